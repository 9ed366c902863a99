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
    /// `D[64, 8 T] = A[64, 16] B[16, 8 T]` by a warpgroup, both along k in shared memory.
    ///
    /// # Safety
    /// See [`isa::wgmma_first`].
    #[track_caller]
    unsafe fn wgmma_first<const T: usize>(a: u64, b: u64) -> [[f32; 4]; T];
    /// `D += A B`, as [`Half::wgmma_first`].
    ///
    /// # Safety
    /// See [`isa::wgmma`].
    #[track_caller]
    unsafe fn wgmma<const T: usize>(d: &mut [[f32; 4]; T], a: u64, b: u64);
    /// `D += A B` with A along k and B along n in shared memory.
    ///
    /// # Safety
    /// See [`isa::wgmma`].
    #[track_caller]
    unsafe fn wgmma_along_n<const T: usize>(d: &mut [[f32; 4]; T], a: u64, b: u64);
    /// `D += A B` with A in registers and B along n in shared memory.
    ///
    /// # Safety
    /// See [`isa::wgmma_registers`].
    #[track_caller]
    unsafe fn wgmma_registers<const T: usize>(d: &mut [[f32; 4]; T], a: [u32; 4], b: u64);
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
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma_first<const T: usize>(a: u64, b: u64) -> [[f32; 4]; T] {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma_first::<T, false, 0, 0>(a, b) }
    }
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma<const T: usize>(d: &mut [[f32; 4]; T], a: u64, b: u64) {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma::<T, false, 0, 0>(d, a, b) }
    }
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma_along_n<const T: usize>(d: &mut [[f32; 4]; T], a: u64, b: u64) {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma::<T, false, 0, 1>(d, a, b) }
    }
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma_registers<const T: usize>(d: &mut [[f32; 4]; T], a: [u32; 4], b: u64) {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma_registers::<T, false, 1>(d, a, b) }
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
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma_first<const T: usize>(a: u64, b: u64) -> [[f32; 4]; T] {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma_first::<T, true, 0, 0>(a, b) }
    }
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma<const T: usize>(d: &mut [[f32; 4]; T], a: u64, b: u64) {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma::<T, true, 0, 0>(d, a, b) }
    }
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma_along_n<const T: usize>(d: &mut [[f32; 4]; T], a: u64, b: u64) {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma::<T, true, 0, 1>(d, a, b) }
    }
    #[inline(always)]
    #[track_caller]
    unsafe fn wgmma_registers<const T: usize>(d: &mut [[f32; 4]; T], a: [u32; 4], b: u64) {
        // SAFETY: the caller's promise.
        unsafe { isa::wgmma_registers::<T, true, 1>(d, a, b) }
    }
}
