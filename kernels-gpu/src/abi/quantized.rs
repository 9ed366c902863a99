//! Quantised KV. The formats are the host's `QuantPages`.

use super::append::RopeParams;
use super::attention::{AttentionParams, RangeParams};
use super::plain;
use super::rows::{PageRows, Rows};

/// What shares a scale in int4 pages: tokens of a channel of K, channels of a token of V. Also the length of a sequence's
/// 16-bit tail of K.
pub const INT4_GROUP: usize = 32;

/// By how many bits each of eight channels stands above bit 0 of its word of int4 codes. In the two halves of a word, masked,
/// then stand two channels side by side, which is what a tensor-core fragment holds in a register.
pub const INT4_SHIFTS: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

/// How one side, K or V, is kept: [`QuantRows::format`].
pub mod format {
    /// f16.
    pub const F16: u32 = 0;
    /// fp8 e4m3, a scale per KV head.
    pub const FP8: u32 = 1;
    /// Signed bytes, a scale per token and head.
    pub const INT8: u32 = 2;
    /// Four bits, minima and scales per group of tokens (K) or channels (V).
    pub const INT4: u32 = 3;
}

/// Where one side of quantised KV is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuantRows {
    /// Rows of codes, or of f16.
    pub codes: PageRows,
    /// fp8: f32 per KV head. int8: f16 `[page, head, token]`. int4, K: f16 rows `[page, head, group of tokens]`, minima then
    /// scales; V: rows `[page, head, group of channels]` of two bytes per token, span and minimum.
    pub params: PageRows,
    /// int4 K: f16 `[tail, head, token in group, channel]`.
    pub tail: PageRows,
    /// One of [`format`](super::format).
    pub format: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// What attention over quantised pages is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionQuantParams {
    /// As ever; its K and V rows are not looked at.
    pub attention: AttentionParams,
    /// Keys.
    pub k: QuantRows,
    /// Values.
    pub v: QuantRows,
}

/// What decoding over quantised pages is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeQuantParams {
    /// As ever.
    pub quant: AttentionQuantParams,
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

/// `append_quantized`: a warp per head of a token: key heads, value heads; int4 keys are left to `quantize_keys_int4`, a CTA
/// per completed group (x) and KV head (y), and `append_tail_int4`, a warp per tail token and head.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppendQuantParams {
    /// New keys.
    pub k: Rows,
    /// New values.
    pub v: Rows,
    /// Pages of keys.
    pub k_pages: QuantRows,
    /// Pages of values.
    pub v_pages: QuantRows,
    /// u64 per token: `page * page_size + offset`, or [`SKIP_SLOT`](super::SKIP_SLOT).
    pub slots: u64,
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
}

/// `dequantize`: a warp per token, over x; KV head in y.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DequantParams {
    /// Pages of keys.
    pub k_pages: QuantRows,
    /// Pages of values.
    pub v_pages: QuantRows,
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
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    QuantRows: 104,
    AttentionQuantParams: 464,
    DecodeQuantParams: 496,
    Int4Group: 24,
    Int4TailToken: 16,
    AppendQuantParams: 336,
    DequantParams: 288,
}
