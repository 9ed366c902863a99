//! One generic body, several instruction sets: [`Simd`] is a vector of f32 lanes, a [`Task`] is written
//! once over it, and [`SimdLevel::run`] compiles the task for each set and picks one at run time.
//!
//! Per-lane arithmetic is the same on every set that has FMA, so results differ between sets only
//! where lanes are reduced.
#![allow(unsafe_op_in_unsafe_fn)] // every function here is an intrinsic behind the contract of `Simd`

use std::sync::OnceLock;

/// An instruction set that this build can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimdLevel {
    /// Portable Rust, whatever the compiler makes of it.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// NEON.
    Neon,
}

impl SimdLevel {
    /// The best set of this machine.
    pub fn detect() -> Self {
        static LEVEL: OnceLock<SimdLevel> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            [SimdLevel::Avx512, SimdLevel::Avx2, SimdLevel::Neon]
                .into_iter()
                .find(|level| level.is_available())
                .unwrap_or(SimdLevel::Portable)
        })
    }

    /// Whether this machine has the set.
    pub fn is_available(self) -> bool {
        match self {
            SimdLevel::Portable => true,
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512 => {
                SimdLevel::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            SimdLevel::Neon => true,
            #[allow(unreachable_patterns)] // the sets of the other architectures
            _ => false,
        }
    }

    /// Runs a task compiled for this set; the portable one where the machine lacks it.
    #[inline]
    pub fn run<T: Task>(self, task: T) -> T::Out {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine has the features that the function is compiled for.
            SimdLevel::Avx512 if self.is_available() => unsafe { x86::run_avx512(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            SimdLevel::Avx2 if self.is_available() => unsafe { x86::run_avx2(task) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is part of every aarch64 target.
            SimdLevel::Neon => unsafe { task.run::<neon::Neon>() },
            // SAFETY: the portable set needs nothing.
            _ => unsafe { task.run::<Portable>() },
        }
    }
}

/// Work written once over [`Simd`].
pub trait Task {
    /// What it gives.
    type Out;

    /// Does the work. Implementations are `#[inline(always)]`, and so is all that they call, so that
    /// the intrinsics are compiled into a function that has their features.
    ///
    /// # Safety
    /// The machine has the instruction set of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// A vector of f32 lanes and what the kernels do with it.
///
/// # Safety
/// Every method needs the machine to have the set; loads and stores need `LANES` valid elements at the
/// pointer (any alignment).
pub unsafe trait Simd: Copy + 'static {
    /// The vector.
    type V: Copy;
    /// As many vectors as lanes.
    type Square: Copy + AsRef<[Self::V]>;
    /// f32 lanes.
    const LANES: usize;
    /// Vectors in a row of a matrix tile: with [`Simd::TILE_ROWS`] rows they fit in the registers.
    const TILE_VECS: usize;
    /// Rows of a matrix tile.
    const TILE_ROWS: usize = 6;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// Rounds to nearest even.
    unsafe fn store_f16(p: *mut u16, v: Self::V);
    /// Rounds to nearest even, NaN stays NaN.
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    /// Bytes as numbers from -128 to 127.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// `2 * LANES` nibbles of `LANES` bytes as numbers 0 to 15: the low ones, then the high ones.
    unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the set has FMA.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where one is NaN on x86.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` of integers from -127 (gives 0) to 127.
    unsafe fn pow2i(n: Self::V) -> Self::V;
    unsafe fn reduce_add(a: Self::V) -> f32;
    unsafe fn reduce_max(a: Self::V) -> f32;
    /// Lanes of two f16 each: the low halves and the high halves as f32.
    unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V);
    /// Lanes of two bf16 each: the low halves and the high halves as f32.
    unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V);
    /// Rows to columns; only moves bits.
    unsafe fn transpose(square: Self::Square) -> Self::Square;
    /// A square of vectors.
    unsafe fn square(row: impl FnMut(usize) -> Self::V) -> Self::Square;

    /// Asks for the cache line of `p`, which need not be valid.
    #[inline(always)]
    fn prefetch(p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch of any address is harmless, and SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast())
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }

    /// `2^x` with a relative error below 2^-23; 0 below -126.5, also for `-inf`; NaN stays NaN.
    #[inline(always)]
    unsafe fn exp2(x: Self::V) -> Self::V {
        let x = Self::min(Self::splat(127.0), Self::max(Self::splat(-127.0), x));
        let n = Self::round(x);
        let f = Self::sub(x, n);
        // Minimax for 2^f on [-0.5, 0.5], relative error 2e-9 before rounding; 2^0 is exactly 1.
        let mut p = Self::splat(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
            p = Self::fma(p, f, Self::splat(c));
        }
        Self::mul(p, Self::pow2i(n))
    }

    /// `tanh(x)`.
    #[inline(always)]
    unsafe fn tanh(x: Self::V) -> Self::V {
        // 1 - 2 / (e^2x + 1), whose absolute error near 0 is 6e-8; scores are compared absolutely.
        let e = Self::exp2(Self::mul(x, Self::splat(2.0 * std::f32::consts::LOG2_E)));
        let two = Self::splat(2.0);
        Self::sub(Self::splat(1.0), Self::div(two, Self::add(e, Self::splat(1.0))))
    }
}

/// Eight lanes of plain Rust.
#[derive(Clone, Copy)]
pub struct Portable;

// SAFETY: no instruction set is needed; pointers are read and written for `LANES` elements only.
unsafe impl Simd for Portable {
    type V = [f32; 8];
    type Square = [[f32; 8]; 8];
    const LANES: usize = 8;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        p.cast::<[f32; 8]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        p.cast::<[f32; 8]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        p.cast::<[u16; 8]>().read_unaligned().map(|x| half::f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        p.cast::<[u16; 8]>().read_unaligned().map(|x| f32::from_bits((x as u32) << 16))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: Self::V) {
        p.cast::<[u16; 8]>().write_unaligned(v.map(|x| half::f16::from_f32(x).to_bits()))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        p.cast::<[u16; 8]>().write_unaligned(v.map(|x| half::bf16::from_f32(x).to_bits()))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        p.cast::<[i8; 8]>().read_unaligned().map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V) {
        let bytes = p.cast::<[u8; 8]>().read_unaligned();
        (bytes.map(|x| (x & 15) as f32), bytes.map(|x| (x >> 4) as f32))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn pow2i(n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V) {
        let half = |shift: u32| pairs.map(|x| half::f16::from_bits((x.to_bits() >> shift) as u16).to_f32());
        (half(0), half(16))
    }
    #[inline(always)]
    unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V) {
        let low = pairs.map(|x| f32::from_bits(x.to_bits() << 16));
        (low, pairs.map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn transpose(square: Self::Square) -> Self::Square {
        std::array::from_fn(|i| std::array::from_fn(|j| square[j][i]))
    }
    #[inline(always)]
    unsafe fn square(row: impl FnMut(usize) -> Self::V) -> Self::Square {
        std::array::from_fn(row)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Simd, Task};

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub(super) unsafe fn run_avx512<T: Task>(task: T) -> T::Out {
        task.run::<Avx512>()
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run_avx2<T: Task>(task: T) -> T::Out {
        task.run::<Avx2>()
    }

    const ROUND: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

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
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;

    use super::Simd;

    #[derive(Clone, Copy)]
    pub(super) struct Neon;

    // SAFETY: NEON is part of every aarch64 target.
    unsafe impl Simd for Neon {
        type V = float32x4_t;
        type Square = [float32x4_t; 4];
        const LANES: usize = 4;
        const TILE_VECS: usize = 4;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            vdupq_n_f32(x)
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            vld1q_f32(p)
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            vst1q_f32(p, v)
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> Self::V {
            // Exponent and mantissa moved into place and rescaled by 2^112: exact, subnormals included;
            // infinity and NaN keep a full exponent.
            let x = vmovl_u16(vld1_u16(p));
            let magnitude = vshlq_n_u32::<13>(vandq_u32(x, vdupq_n_u32(0x7fff)));
            let scaled =
                vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits(0x7780_0000)));
            let special = vcgeq_u32(magnitude, vdupq_n_u32(0x0f80_0000));
            let full = vandq_u32(special, vdupq_n_u32(0x7f80_0000));
            let sign = vshlq_n_u32::<16>(vandq_u32(x, vdupq_n_u32(0x8000)));
            let bits = vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), full), sign);
            vreinterpretq_f32_u32(bits)
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> Self::V {
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p)))
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut u16, v: Self::V) {
            let mut x = [0f32; 4];
            vst1q_f32(x.as_mut_ptr(), v);
            p.cast::<[u16; 4]>().write_unaligned(x.map(|x| half::f16::from_f32(x).to_bits()))
        }
        #[inline(always)]
        unsafe fn store_bf16(p: *mut u16, v: Self::V) {
            let mut x = [0f32; 4];
            vst1q_f32(x.as_mut_ptr(), v);
            p.cast::<[u16; 4]>().write_unaligned(x.map(|x| half::bf16::from_f32(x).to_bits()))
        }
        #[inline(always)]
        unsafe fn load_i8(p: *const i8) -> Self::V {
            let x = p.cast::<[i8; 4]>().read_unaligned().map(|x| x as i32);
            vcvtq_f32_s32(vld1q_s32(x.as_ptr()))
        }
        #[inline(always)]
        unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V) {
            let x = p.cast::<[u8; 4]>().read_unaligned().map(|x| x as u32);
            let x = vld1q_u32(x.as_ptr());
            (vcvtq_f32_u32(vandq_u32(x, vdupq_n_u32(15))), vcvtq_f32_u32(vshrq_n_u32::<4>(x)))
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            vaddq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            vsubq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            vmulq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            vdivq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            vfmaq_f32(c, a, b)
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            vmaxq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            vminq_f32(a, b)
        }
        #[inline(always)]
        unsafe fn round(a: Self::V) -> Self::V {
            vrndnq_f32(a)
        }
        #[inline(always)]
        unsafe fn pow2i(n: Self::V) -> Self::V {
            let n = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(n))
        }
        #[inline(always)]
        unsafe fn reduce_add(a: Self::V) -> f32 {
            vaddvq_f32(a)
        }
        #[inline(always)]
        unsafe fn reduce_max(a: Self::V) -> f32 {
            vmaxvq_f32(a)
        }
        #[inline(always)]
        unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V) {
            let bits = vreinterpretq_u32_f32(pairs);
            let (mut low, mut high) = ([0u16; 4], [0u16; 4]);
            vst1_u16(low.as_mut_ptr(), vmovn_u32(bits));
            vst1_u16(high.as_mut_ptr(), vshrn_n_u32::<16>(bits));
            (Self::load_f16(low.as_ptr()), Self::load_f16(high.as_ptr()))
        }
        #[inline(always)]
        unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V) {
            let bits = vreinterpretq_u32_f32(pairs);
            let high = vandq_u32(bits, vdupq_n_u32(0xffff_0000));
            (vreinterpretq_f32_u32(vshlq_n_u32::<16>(bits)), vreinterpretq_f32_u32(high))
        }
        #[inline(always)]
        unsafe fn transpose(r: Self::Square) -> Self::Square {
            let (a, b) = (vtrnq_f32(r[0], r[1]), vtrnq_f32(r[2], r[3]));
            [
                vcombine_f32(vget_low_f32(a.0), vget_low_f32(b.0)),
                vcombine_f32(vget_low_f32(a.1), vget_low_f32(b.1)),
                vcombine_f32(vget_high_f32(a.0), vget_high_f32(b.0)),
                vcombine_f32(vget_high_f32(a.1), vget_high_f32(b.1)),
            ]
        }
        #[inline(always)]
        unsafe fn square(mut row: impl FnMut(usize) -> Self::V) -> Self::Square {
            [row(0), row(1), row(2), row(3)]
        }
    }
}
