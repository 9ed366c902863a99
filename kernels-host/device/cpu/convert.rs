//! Rows of f32, f16 and bf16 to and from f32 scratch.
#![allow(unsafe_op_in_unsafe_fn)]

use half::{bf16, f16};

use super::simd::Simd;
use crate::tensor::DType;

/// An element type that kernels read and write.
pub trait Float: Copy + 'static {
    /// `S::LANES` elements.
    ///
    /// # Safety
    /// The machine has `S`; `p` is valid for `S::LANES` elements.
    unsafe fn load<S: Simd>(p: *const Self) -> S::V;
    /// Writes `S::LANES` elements.
    ///
    /// # Safety
    /// As [`Float::load`].
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V);
    /// Widens.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
    /// Whether two elements are one f32 lane wide, and can be moved as one.
    const PAIRS: bool;
    /// Lanes that hold pairs to the first and the second elements.
    ///
    /// # Safety
    /// The machine has `S`.
    unsafe fn split<S: Simd>(pairs: S::V) -> (S::V, S::V);
}

impl Float for f32 {
    const PAIRS: bool = false;
    #[inline(always)]
    unsafe fn split<S: Simd>(pairs: S::V) -> (S::V, S::V) {
        (pairs, pairs)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        S::load(p)
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        S::store(p, v)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}

impl Float for f16 {
    const PAIRS: bool = true;
    #[inline(always)]
    unsafe fn split<S: Simd>(pairs: S::V) -> (S::V, S::V) {
        S::split_f16(pairs)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        S::load_f16(p.cast())
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        S::store_f16(p.cast(), v)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
}

impl Float for bf16 {
    const PAIRS: bool = true;
    #[inline(always)]
    unsafe fn split<S: Simd>(pairs: S::V) -> (S::V, S::V) {
        S::split_bf16(pairs)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> S::V {
        S::load_bf16(p.cast())
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: S::V) {
        S::store_bf16(p.cast(), v)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
}

/// Reads `n` elements into `n` f32.
///
/// # Safety
/// The machine has `S`; `from` is valid for `n` elements and `to` for `n` f32.
#[inline(always)]
pub(super) unsafe fn load_row<S: Simd, T: Float>(from: *const T, to: *mut f32, n: usize) {
    let mut i = 0;
    while i + S::LANES <= n {
        S::store(to.add(i), T::load::<S>(from.add(i)));
        i += S::LANES;
    }
    while i < n {
        *to.add(i) = (*from.add(i)).to_f32();
        i += 1;
    }
}

/// Writes `n` f32 as `n` elements.
///
/// # Safety
/// The machine has `S`; `from` is valid for `n` f32 and `to` for `n` elements.
#[inline(always)]
pub(super) unsafe fn store_row<S: Simd, T: Float>(from: *const f32, to: *mut T, n: usize) {
    let mut i = 0;
    while i + S::LANES <= n {
        T::store::<S>(to.add(i), S::load(from.add(i)));
        i += S::LANES;
    }
    while i < n {
        *to.add(i) = T::from_f32(*from.add(i));
        i += 1;
    }
}

/// [`load_row`] for a type known at run time.
///
/// # Safety
/// As [`load_row`]; `dtype` is a float type.
#[inline(always)]
pub(super) unsafe fn load_row_as<S: Simd>(dtype: DType, from: *const u8, to: *mut f32, n: usize) {
    match dtype {
        DType::F16 => load_row::<S, f16>(from.cast(), to, n),
        DType::BF16 => load_row::<S, bf16>(from.cast(), to, n),
        _ => load_row::<S, f32>(from.cast(), to, n),
    }
}

/// [`store_row`] for a type known at run time.
///
/// # Safety
/// As [`store_row`]; `dtype` is a float type.
#[inline(always)]
pub(super) unsafe fn store_row_as<S: Simd>(dtype: DType, from: *const f32, to: *mut u8, n: usize) {
    match dtype {
        DType::F16 => store_row::<S, f16>(from, to.cast(), n),
        DType::BF16 => store_row::<S, bf16>(from, to.cast(), n),
        _ => store_row::<S, f32>(from, to.cast(), n),
    }
}
