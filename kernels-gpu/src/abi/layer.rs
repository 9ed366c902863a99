//! What stands around attention: norms, gates, embeddings, merges, sampling.

use super::plain;
use super::rows::Rows;

/// `rms_norm`: a CTA per row.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNormParams {
    /// Input.
    pub x: Rows,
    /// Added to the input, and given the sum; or none.
    pub residual: Rows,
    /// One row.
    pub weight: Rows,
    /// Output.
    pub out: Rows,
    /// Elements of a row.
    pub dim: u32,
    /// Added to the mean square.
    pub eps: f32,
}

/// `silu_mul`: a CTA per row.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SiluMulParams {
    /// Rows of `2 * dim`: gate, then up.
    pub gate_up: Rows,
    /// Output.
    pub out: Rows,
    /// Elements of an output row.
    pub dim: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// `embedding`: a CTA per id.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingParams {
    /// Table.
    pub table: Rows,
    /// Output.
    pub out: Rows,
    /// u32 row numbers.
    pub ids: u64,
    /// Bytes from id to id.
    pub id_stride: u64,
    /// Elements of a row.
    pub dim: u32,
    /// Rows of the table; an id past them gives a row of NaN.
    pub vocab: u32,
}

/// Most states that one merge takes.
pub const MERGE_STATES: usize = 16;

/// `merge_states`: a warp per row `[token, head]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeStatesParams {
    /// O of each state.
    pub o: [Rows; MERGE_STATES],
    /// Natural-log LSE of each state, f32 elements as rows of one.
    pub lse: [Rows; MERGE_STATES],
    /// Merged O.
    pub out: Rows,
    /// Merged LSE.
    pub out_lse: Rows,
    /// States in use.
    pub num_states: u32,
    /// Rows, `tokens * heads`.
    pub num_rows: u32,
    /// Elements of a row.
    pub dim: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// How one row's next token is drawn.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleRow {
    /// Uniform random bits for the draw.
    pub random: u64,
    /// 0: the largest logit.
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// 1: all.
    pub top_p: f32,
    /// 0: all.
    pub min_p: f32,
}

/// `sample`: a CTA per row.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleParams {
    /// Logits.
    pub logits: Rows,
    /// [`SampleRow`]s.
    pub rows: u64,
    /// u32 per row: the result.
    pub ids: u64,
    /// Bytes from id to id.
    pub id_stride: u64,
    /// Logits of a row.
    pub vocab: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    RmsNormParams: 136,
    SiluMulParams: 72,
    EmbeddingParams: 88,
    MergeStatesParams: 1104,
    SampleRow: 24,
    SampleParams: 64,
}
