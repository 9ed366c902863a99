//! int4 KV.

use super::append::RopeParams;
use super::attention::{AttentionParams, RangeParams};
use super::plain;
use super::rows::{Divisor, PageRows, Rows};

/// Tokens that share one K scale in an int4 page, and the length of a sequence's 16-bit tail.
pub const INT4_GROUP: usize = 32;

/// Where int4 pages are; see the host's `Int4Pages` for the layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int4Rows {
    /// Codes, a byte for channels `i` and `i + head_dim / 2`.
    pub k_codes: PageRows,
    /// f16 minima, then scales, per group of tokens.
    pub k_params: PageRows,
    /// As `k_codes`.
    pub v_codes: PageRows,
    /// f16 minima, then scales, per token.
    pub v_params: PageRows,
    /// f16 `[tail, head, token in group, channel]`.
    pub k_tail: PageRows,
    /// As `k_tail`.
    pub v_tail: PageRows,
}

/// What attention over int4 pages is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionInt4Params {
    /// As ever; its K and V rows are not looked at.
    pub attention: AttentionParams,
    /// Pages.
    pub pages: Int4Rows,
    /// Channels that share a V scale.
    pub v_group: Divisor,
    /// Groups of channels, `head_dim / v_group`.
    pub v_groups: u32,
}

/// What decoding over int4 pages is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeInt4Params {
    /// As ever.
    pub int4: AttentionInt4Params,
    /// Who takes which items.
    pub ranges: RangeParams,
}

/// A group of tokens that an append completes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int4Group {
    /// Slot of the group's first token.
    pub slot: u64,
    /// The group's last token in the batch.
    pub last_token: u32,
    /// Tokens of the group that are in the batch; those before them are in the tail.
    pub new_tokens: u32,
    /// The sequence's tail.
    pub tail: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// A token that goes into a tail.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int4TailToken {
    /// Token in the batch.
    pub token: u32,
    /// Tail.
    pub tail: u32,
    /// Token in the group.
    pub in_group: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// `quantize_int4`: a CTA per completed group (x) and KV head (y). `append_tail_int4`: a warp per tail token
/// and head.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Int4AppendParams {
    /// New keys.
    pub k: Rows,
    /// New values.
    pub v: Rows,
    /// Pages.
    pub pages: Int4Rows,
    /// Angles of the keys.
    pub rope: RopeParams,
    /// [`Int4Group`]s.
    pub groups: u64,
    /// [`Int4TailToken`]s.
    pub tail_tokens: u64,
    /// Entries of `tail_tokens`.
    pub num_tail_tokens: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Key heads.
    pub num_kv_heads: u32,
    /// Channels.
    pub head_dim: u32,
    /// Channels that share a V scale.
    pub v_group: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// `dequantize_int4`: a warp per token, over x; KV head in y.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Int4DequantParams {
    /// Pages.
    pub pages: Int4Rows,
    /// f32 `[page, head, token, channel]`.
    pub k: PageRows,
    /// As `k`.
    pub v: PageRows,
    /// Pages in all.
    pub num_pages: u32,
    /// Tokens per page.
    pub page_size: u32,
    /// Channels.
    pub head_dim: u32,
    /// Channels that share a V scale.
    pub v_group: u32,
}

plain! {
    AttentionInt4Params: 464,
    DecodeInt4Params: 496,
    Int4Group: 24,
    Int4TailToken: 16,
    Int4AppendParams: 320,
    Int4DequantParams: 272,
}
