//! Page selection.

use super::plain;
use super::rows::{PageRows, Rows};

/// One KV head of one sequence, to score or to choose pages of.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectItem {
    /// Its pages in the list of all.
    pub pages: u64,
    /// Its scores.
    pub scores: u64,
    /// Its list of chosen pages.
    pub chosen: u64,
    /// Query token.
    pub q_token: u32,
    /// KV head.
    pub kv_head: u32,
    /// Pages.
    pub num_pages: u32,
    /// Pages to choose, at most `num_pages`.
    pub count: u32,
}

/// Pages that a warp scores.
pub const SCORE_PAGES: usize = 16;

/// `score_pages`: `page_ctas` CTAs per item, a warp for [`SCORE_PAGES`] pages. `top_k_pages`: a CTA per item.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelectParams {
    /// Queries.
    pub q: Rows,
    /// `[page, head, minimum or maximum, channel]`, of type `summary_dtype`.
    pub summaries: PageRows,
    /// [`SelectItem`]s.
    pub items: u64,
    /// All pages of all sequences, u32.
    pub pages: u64,
    /// f32 per page and head.
    pub scores: u64,
    /// The lists that are written, u32.
    pub chosen: u64,
    /// Query heads per KV head.
    pub group: u32,
    /// Channels.
    pub head_dim: u32,
    /// First pages that are always chosen.
    pub sinks: u32,
    /// Last pages that are always chosen.
    pub recent: u32,
    /// 1: a negative softmax scale turns the order of scores.
    pub negate: u32,
    /// CTAs that score one item's pages.
    pub page_ctas: u32,
    /// An [`element`](super::element).
    pub summary_dtype: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    SelectItem: 40,
    SelectParams: 128,
}
