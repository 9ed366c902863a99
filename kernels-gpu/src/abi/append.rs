//! Append: rotation, writing into pages, page summaries.

use super::plain;
use super::rows::{PageRows, Rows};

/// Slot of a token that is not written.
pub const SKIP_SLOT: u64 = u64::MAX;

/// What rotates a token's heads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeParams {
    /// f32 `[tokens, rotary_dim / 2]`.
    pub cos: u64,
    /// f32, as `cos`.
    pub sin: u64,
    /// Channels that are rotated; 0: none.
    pub rotary_dim: u32,
    /// 1: channel `2 i` with `2 i + 1`; 0: channel `i` with `i + rotary_dim / 2`.
    pub interleaved: u32,
}

/// `append_kv`: a warp per head of a token: query heads, key heads, value heads.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppendParams {
    /// Queries, rotated in place; or none.
    pub q: Rows,
    /// New keys and values.
    pub k: Rows,
    /// As `k`.
    pub v: Rows,
    /// Pages; their type is `kv_dtype`. With no address K and V are not written.
    pub k_pages: PageRows,
    /// As `k_pages`.
    pub v_pages: PageRows,
    /// u64 per token: `page * page_size + offset`, or [`SKIP_SLOT`].
    pub slots: u64,
    /// Angles.
    pub rope: RopeParams,
    /// Tokens per page.
    pub page_size: u32,
    /// An [`element`](super::element).
    pub kv_dtype: u32,
    /// Query heads, 0 without queries.
    pub num_q_heads: u32,
    /// Key heads.
    pub num_kv_heads: u32,
    /// Channels.
    pub head_dim: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// A page whose summary is to be made anew.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TouchedPage {
    /// Page number.
    pub page: u32,
    /// Tokens in it.
    pub tokens: u32,
}

/// `page_summaries`: a CTA per touched page (x) and KV head (y).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SummaryParams {
    /// Key pages.
    pub k_pages: PageRows,
    /// `[page, head, minimum or maximum, channel]`, of type `summary_dtype`.
    pub summaries: PageRows,
    /// [`TouchedPage`]s.
    pub touched: u64,
    /// An [`element`](super::element), of the keys.
    pub kv_dtype: u32,
    /// Channels.
    pub head_dim: u32,
    /// An [`element`](super::element) that holds every key exactly.
    pub summary_dtype: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    AppendParams: 216,
    TouchedPage: 8,
    SummaryParams: 88,
}
