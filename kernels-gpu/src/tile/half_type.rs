//! The two 16-bit element types that tensor cores multiply.

use crate::isa;

/// f16 or bf16.
pub trait Half: Copy + 'static {
    /// Which of the two.
    const IS_BF16: bool;
    /// Two values in one register, the first in the low half, rounded to nearest even.
    fn pack(low: f32, high: f32) -> u32;
    /// Both values of a register.
    fn unpack(x: u32) -> (f32, f32);
    /// `D[16, 8] += A[16, 16] B[16, 8]`.
    #[track_caller]
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]);
}

/// IEEE half.
#[derive(Clone, Copy)]
pub struct F16;

/// bfloat16.
#[derive(Clone, Copy)]
pub struct BF16;

impl Half for F16 {
    const IS_BF16: bool = false;

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        isa::pack_f16x2(low, high)
    }
    #[inline(always)]
    fn unpack(x: u32) -> (f32, f32) {
        isa::f16x2_to_f32(x)
    }
    #[inline(always)]
    #[track_caller]
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        isa::mma_f16(d, a, b);
    }
}

impl Half for BF16 {
    const IS_BF16: bool = true;

    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        isa::pack_bf16x2(low, high)
    }
    #[inline(always)]
    fn unpack(x: u32) -> (f32, f32) {
        isa::bf16x2_to_f32(x)
    }
    #[inline(always)]
    #[track_caller]
    fn mma(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
        isa::mma_bf16(d, a, b);
    }
}
