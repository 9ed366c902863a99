//! One instruction at a time, for tests.

use super::plain;
use super::sm90::TensorMap;

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

    // Of [`ConformanceSm90Params`](super::ConformanceSm90Params).
    /// `wgmma`, both operands along k in swizzled shared tiles.
    pub const A_BT: u32 = 0;
    /// `wgmma`, A in registers, B along n.
    pub const PLUS_A_B: u32 = 1;
    /// `wgmma` by descriptors of the test's own.
    pub const DESCRIBED: u32 = 2;
    /// Boxes in and out.
    pub const BOXES: u32 = 3;
    /// Bulk copies of runs of bytes.
    pub const RUNS: u32 = 4;
    /// mbarriers, named barriers, `elect`, `stmatrix`.
    pub const LANES: u32 = 5;
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

/// Conformance on Hopper: a warpgroup or two, or a cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConformanceSm90Params {
    /// Of boxes in, and out.
    pub maps: [TensorMap; 2],
    /// What the test gives.
    pub input: u64,
    /// What the test takes.
    pub output: u64,
    /// Of A and B, with addresses relative to the tile.
    pub descriptors: [u64; 2],
    /// One of [`conformance`].
    pub op: u32,
    /// Columns of a product, ways of its operands, or dimensions of a box.
    pub shape: u32,
    /// Whether elements are bf16.
    pub bf16: u32,
    /// Of a box, or a run.
    pub bytes: u32,
    /// Coordinates of a box.
    pub at: [i32; 5],
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    ConformanceParams: 32,
    ConformanceSm90Params: 328,
}
