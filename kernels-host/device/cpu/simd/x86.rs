//! AVX-512 and AVX2.
#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::x86_64::*;

use super::{INT4_SHIFTS, Simd, Task};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run_avx512<T: Task>(task: T) -> T::Out {
    task.run::<Avx512>()
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run_avx2<T: Task>(task: T) -> T::Out {
    task.run::<Avx2>()
}

const ROUND: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// e4m3's exponent and mantissa in their places of an f32, and what the biases differ by. Codes without an exponent are what
// their mantissa adds to the least number that has one: f32 without an exponent would be slow.
const FP8_SIZE: i32 = 0x7f << 20;
const FP8_BIAS: i32 = (127 - 7) << 23;
const FP8_LEAST: f32 = 1.0 / 64.0;

#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY: the trait's contract is that of the intrinsics.
unsafe impl Simd for Avx512 {
    type V = __m512;
    type Square = [__m512; 16];
    const LANES: usize = 16;
    const TILE_VECS: usize = 4; // 6 x 4 accumulators, 4 operands, 1 broadcast of 32 registers

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        _mm512_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        let x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: Self::V) {
        _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<ROUND>(v))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        let bits = _mm512_castps_si512(v);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
        let bits = _mm512_mask_mov_epi32(rounded, nan, quiet);
        _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits)))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V) {
        let x = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        let low = _mm512_and_si512(x, _mm512_set1_epi32(15));
        (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(x)))
    }
    #[inline(always)]
    unsafe fn load_int4(words: *const u32, at: usize) -> Self::V {
        let words = _mm512_castsi128_si512(_mm_loadl_epi64(words.add(at / 8).cast()));
        let which = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi32(1));
        let shifts = _mm512_broadcast_i64x4(_mm256_loadu_si256(INT4_SHIFTS.as_ptr().cast()));
        let codes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(which, words), shifts);
        _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15)))
    }
    #[inline(always)]
    unsafe fn load_fp8(p: *const u8) -> Self::V {
        let x = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
        let size = _mm512_and_si512(_mm512_slli_epi32::<20>(x), _mm512_set1_epi32(FP8_SIZE));
        let normal = _mm512_castsi512_ps(_mm512_add_epi32(size, _mm512_set1_epi32(FP8_BIAS)));
        let least = _mm512_set1_ps(FP8_LEAST);
        let above = _mm512_or_ps(_mm512_castsi512_ps(size), least);
        let is_small = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(1 << 23));
        let size = _mm512_mask_sub_ps(normal, is_small, above, least);
        _mm512_or_ps(size, _mm512_and_ps(_mm512_castsi512_ps(x), _mm512_set1_ps(-0.0)))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        _mm512_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        _mm512_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        _mm512_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        _mm512_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        _mm512_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        _mm512_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        _mm512_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT }>(a)
    }
    #[inline(always)]
    unsafe fn pow2i(n: Self::V) -> Self::V {
        let n = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        _mm512_reduce_add_ps(a)
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        _mm512_reduce_max_ps(a)
    }
    #[inline(always)]
    unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V) {
        let bits = _mm512_castps_si512(pairs);
        let high = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
        (_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits)), _mm512_cvtph_ps(high))
    }
    #[inline(always)]
    unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V) {
        let bits = _mm512_castps_si512(pairs);
        let high = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(high))
    }
    #[inline(always)]
    unsafe fn transpose(r: Self::Square) -> Self::Square {
        // Pairs, then quads inside 128-bit lanes, then the lanes themselves.
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..4 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            u[4 * i] = _mm512_shuffle_ps::<0x44>(a, c);
            u[4 * i + 1] = _mm512_shuffle_ps::<0xee>(a, c);
            u[4 * i + 2] = _mm512_shuffle_ps::<0x44>(b, d);
            u[4 * i + 3] = _mm512_shuffle_ps::<0xee>(b, d);
        }
        let mut out = u;
        for c in 0..4 {
            let low = _mm512_shuffle_f32x4::<0x88>(u[c], u[4 + c]);
            let high = _mm512_shuffle_f32x4::<0xdd>(u[c], u[4 + c]);
            let low2 = _mm512_shuffle_f32x4::<0x88>(u[8 + c], u[12 + c]);
            let high2 = _mm512_shuffle_f32x4::<0xdd>(u[8 + c], u[12 + c]);
            out[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
            out[4 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
            out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
            out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
        }
        out
    }
    #[inline(always)]
    unsafe fn square(mut row: impl FnMut(usize) -> Self::V) -> Self::Square {
        let mut square = [_mm512_setzero_ps(); 16];
        let mut i = 0;
        while i < 16 {
            square[i] = row(i);
            i += 1;
        }
        square
    }
}

#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY: the trait's contract is that of the intrinsics.
unsafe impl Simd for Avx2 {
    type V = __m256;
    type Square = [__m256; 8];
    const LANES: usize = 8;
    const TILE_VECS: usize = 2; // 6 x 2 accumulators, 2 operands, 1 broadcast of 16 registers

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        _mm256_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        _mm256_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        _mm256_storeu_ps(p, v)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: Self::V) {
        _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(v, v);
        let bits = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
        let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(bits));
        let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
        _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())))
    }
    #[inline(always)]
    unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V) {
        let x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        let low = _mm256_and_si256(x, _mm256_set1_epi32(15));
        (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(x)))
    }
    #[inline(always)]
    unsafe fn load_int4(words: *const u32, at: usize) -> Self::V {
        let word = _mm256_set1_epi32(words.add(at / 8).read_unaligned() as i32);
        let codes = _mm256_srlv_epi32(word, _mm256_loadu_si256(INT4_SHIFTS.as_ptr().cast()));
        _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(15)))
    }
    #[inline(always)]
    unsafe fn load_fp8(p: *const u8) -> Self::V {
        let x = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
        let size = _mm256_and_si256(_mm256_slli_epi32::<20>(x), _mm256_set1_epi32(FP8_SIZE));
        let normal = _mm256_castsi256_ps(_mm256_add_epi32(size, _mm256_set1_epi32(FP8_BIAS)));
        let least = _mm256_castps_si256(_mm256_set1_ps(FP8_LEAST));
        let above = _mm256_castsi256_ps(_mm256_or_si256(size, least));
        let small = _mm256_sub_ps(above, _mm256_castsi256_ps(least));
        let is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), size));
        let size = _mm256_blendv_ps(normal, small, is_small);
        _mm256_or_ps(size, _mm256_and_ps(_mm256_castsi256_ps(x), _mm256_set1_ps(-0.0)))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        _mm256_add_ps(a, b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        _mm256_sub_ps(a, b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        _mm256_mul_ps(a, b)
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        _mm256_div_ps(a, b)
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        _mm256_fmadd_ps(a, b, c)
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        _mm256_max_ps(a, b)
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        _mm256_min_ps(a, b)
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        _mm256_round_ps::<ROUND>(a)
    }
    #[inline(always)]
    unsafe fn pow2i(n: Self::V) -> Self::V {
        let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps::<1>(a, a)))
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
        _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps::<1>(a, a)))
    }
    #[inline(always)]
    unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V) {
        let bits = _mm256_castps_si256(pairs);
        let low = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff));
        // Inside 128-bit lanes: four low halves, four high halves.
        let packed = _mm256_packus_epi32(low, _mm256_srli_epi32::<16>(bits));
        let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
        let (low, high) = (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
        (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
    }
    #[inline(always)]
    unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V) {
        let bits = _mm256_castps_si256(pairs);
        let high = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000u32 as i32));
        (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)), _mm256_castsi256_ps(high))
    }
    #[inline(always)]
    unsafe fn transpose(r: Self::Square) -> Self::Square {
        let mut t = r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..2 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            u[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
            u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        let mut out = u;
        for c in 0..4 {
            out[c] = _mm256_permute2f128_ps::<0x20>(u[c], u[4 + c]);
            out[4 + c] = _mm256_permute2f128_ps::<0x31>(u[c], u[4 + c]);
        }
        out
    }
    #[inline(always)]
    unsafe fn square(mut row: impl FnMut(usize) -> Self::V) -> Self::Square {
        let mut square = [_mm256_setzero_ps(); 8];
        let mut i = 0;
        while i < 8 {
            square[i] = row(i);
            i += 1;
        }
        square
    }
}
