//! NEON.
#![allow(unsafe_op_in_unsafe_fn)]

use std::arch::aarch64::*;

use ferroflash_kernels::abi::codec::fp8_value;

use super::{INT4_SHIFTS, Simd};

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
        let scaled = vmulq_f32(vreinterpretq_f32_u32(magnitude), vdupq_n_f32(f32::from_bits(0x7780_0000)));
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
    unsafe fn load_int4(words: *const u32, at: usize) -> Self::V {
        let word = vdupq_n_u32(words.add(at / 8).read_unaligned());
        // To the right: shifts by less than nothing.
        let shifts = vnegq_s32(vreinterpretq_s32_u32(vld1q_u32(INT4_SHIFTS.as_ptr().add(at % 8))));
        vcvtq_f32_u32(vandq_u32(vshlq_u32(word, shifts), vdupq_n_u32(15)))
    }
    #[inline(always)]
    unsafe fn load_fp8(p: *const u8) -> Self::V {
        let x = p.cast::<[u8; 4]>().read_unaligned().map(|code| fp8_value(code as u32));
        vld1q_f32(x.as_ptr())
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
