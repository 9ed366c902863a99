//! One instruction at a time, for tests.

use super::plain;

/// What [`ConformanceParams`] asks for.
pub mod conformance {
    /// Shuffles and votes.
    pub const SHUFFLES: u32 = 0;
    /// `mma.sync`, f16.
    pub const MMA_F16: u32 = 1;
    /// `mma.sync`, bf16.
    pub const MMA_BF16: u32 = 2;
    /// `ldmatrix`, both ways.
    pub const LDMATRIX: u32 = 3;
    /// 16-bit conversions and arithmetic.
    pub const CONVERT: u32 = 4;
    /// Exact arithmetic.
    pub const ARITHMETIC: u32 = 5;
    /// Approximate functions.
    pub const APPROXIMATE: u32 = 6;
    /// `cp.async`.
    pub const COPIES: u32 = 7;
    /// Atomics, and loads and stores of all widths.
    pub const MEMORY: u32 = 8;
}

/// `conformance`: one warp.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConformanceParams {
    /// 16 words a lane.
    pub input: u64,
    /// 16 words a lane.
    pub output: u64,
    /// One word, to which all lanes add.
    pub sum: u64,
    /// One of [`conformance`].
    pub op: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    ConformanceParams: 32,
}
