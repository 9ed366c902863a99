//! Attention: what a plan is made of, and the parameters of its kernels.

use super::plain;
use super::rows::{Divisor, PageRows, TokenRows};

/// KV tokens handled together. Blocks start at multiples of this number in a sequence, whatever the
/// query tile, the page size or the chunk, so that a row's arithmetic does not depend on any of them.
pub const KV_BLOCK: usize = 64;

/// [`WorkItem::partial`] of an item that writes finished rows.
pub const NO_PARTIAL: u32 = u32::MAX;

/// [`WorkItem::merge`] of an item whose CTA merges nothing.
pub const NO_MERGE: u32 = u32::MAX;

/// A tile of query rows of one sequence and KV head, against a range of its KV tokens.
///
/// The rows of a KV head's query group are packed: row `r` is query token `r / group`, query head
/// `kv_head * group + r % group`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkItem {
    /// Index of the sequence in the batch.
    pub seq: u32,
    /// KV head.
    pub kv_head: u32,
    /// First packed query row.
    pub row_start: u32,
    /// One past the last packed query row.
    pub row_end: u32,
    /// First KV token, a multiple of [`KV_BLOCK`].
    pub kv_start: u32,
    /// One past the last KV token.
    pub kv_end: u32,
    /// First row of partial states that the item writes, or [`NO_PARTIAL`].
    pub partial: u32,
    /// First row of partial states that the item may use as it likes, where it finishes its rows after
    /// several sections; else [`NO_PARTIAL`].
    pub scratch: u32,
    /// First entry of the item's page list. KV tokens of the item count along its list, page by page.
    pub pages: u64,
    /// The [`MergeItem`] that the item's CTA comes to, or [`NO_MERGE`]: nothing to merge, or a launch of its own does it.
    pub merge: u32,
    /// Keeps the size a multiple of 8 on every target.
    pub reserved: u32,
}

/// Rows whose partial states are merged, in order, into finished rows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MergeItem {
    /// Index of the sequence in the batch.
    pub seq: u32,
    /// KV head.
    pub kv_head: u32,
    /// First packed query row.
    pub row_start: u32,
    /// One past the last packed query row.
    pub row_end: u32,
    /// Its first entry in the list of splits: split `s` of row `r` is the partial state `list[splits + s] + r - row_start`.
    pub splits: u32,
    /// Number of splits.
    pub num_splits: u32,
    /// Work items that write them and come to the merge.
    pub num_items: u32,
    /// Keeps the size a multiple of 8 on every target.
    pub reserved: u32,
}

/// One sequence of the batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// First query token in the ragged batch.
    pub q_start: u64,
    /// First KV token in the ragged KV (0 where KV is paged).
    pub kv_start: u64,
    /// First entry of the sequence's page list, where its items share one.
    pub page_start: u64,
    /// First word of the sequence's tree mask.
    pub tree_start: u64,
    /// Query tokens.
    pub q_len: u32,
    /// KV tokens. With per-head page lists: the tokens of the chosen pages of the longest head.
    pub kv_len: u32,
    /// Distance between the page lists of two KV heads, 0 where the heads share one list.
    pub pages_per_head: u32,
    /// KV columns at the end under the tree mask, 0 without one.
    pub n_tree: u32,
    /// Row of the sequence's 16-bit tail of int4 keys.
    pub tail_slot: u32,
    /// Position of the first query token among the KV tokens: `kv_len - q_len`, below 0 where there are more queries; of a
    /// prefix that sequences share, `kv_len`: all of it is seen.
    pub position: i32,
}

/// What turns a dot product into a weight.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreParams {
    /// Softmax scale.
    pub scale: f32,
    /// `cap * tanh(score / cap)` where positive, off at 0.
    pub soft_cap: f32,
    /// A key is visible while `q_pos - k_pos < window`; 0: no window.
    pub window: u32,
    /// The first `num_sinks` keys stay visible outside the window.
    pub num_sinks: u32,
    /// 1: a key is visible only up to the query's own position.
    pub causal: u32,
}

/// What every attention kernel is given. Addresses are the device's; 0: not there.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Queries.
    pub q: TokenRows,
    /// Output, as the queries.
    pub out: TokenRows,
    /// f32 log-sum-exp, natural logarithm; or 0.
    pub lse: TokenRows,
    /// Keys.
    pub k: PageRows,
    /// Values.
    pub v: PageRows,
    /// [`WorkItem`]s, one per CTA.
    pub items: u64,
    /// [`Sequence`]s.
    pub sequences: u64,
    /// Page numbers, u32.
    pub pages: u64,
    /// For each entry of `pages` its place in the sequence, u32: positions are counted by it. 0: lists have all pages.
    pub logical_pages: u64,
    /// Tree mask words, u32.
    pub tree_mask: u64,
    /// f32 per query head; or 0.
    pub alibi_slopes: u64,
    /// f32 per query head; or 0.
    pub sink_logits: u64,
    /// f32 rows of [`partial_stride`].
    pub partials: u64,
    /// Score features.
    pub score: ScoreParams,
    /// Query heads per KV head.
    pub group: Divisor,
    /// Tokens per page; 0: ragged.
    pub page_size: Divisor,
    /// Channels of Q and K, at most the kernel's.
    pub head_dim: u32,
    /// Channels of V and O, at most the kernel's.
    pub v_head_dim: u32,
    /// Tokens after which a new state begins; 0: never.
    pub section: u32,
}

/// Who takes which items: CTA `c` takes `ranges[c]..ranges[c + 1]`, one after the other, and who comes last to a merge
/// does it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeParams {
    /// u32, one more than CTAs.
    pub ranges: u64,
    /// [`MergeItem`]s.
    pub merges: u64,
    /// u32, the splits of merges.
    pub splits: u64,
    /// A u32 per merge, 0 between launches: items that have come to it.
    pub arrivals: u64,
}

/// What decoding is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeParams {
    /// As ever.
    pub attention: AttentionParams,
    /// Who takes which items.
    pub ranges: RangeParams,
}

/// `page_mass`: `page_ctas` CTAs per sequence in x, a warp per page; KV head in y.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PageMassParams {
    /// As ever; its LSE is read, its output and values are not looked at.
    pub attention: AttentionParams,
    /// f32 `[KV head, entry of the page lists]`, added to.
    pub mass: u64,
    /// Bytes from head to head.
    pub mass_head: u64,
    /// CTAs that take one sequence's pages.
    pub page_ctas: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// What the merge kernel is given.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergePartialsParams {
    /// Output.
    pub out: TokenRows,
    /// f32 log-sum-exp; or 0.
    pub lse: TokenRows,
    /// [`MergeItem`]s, one per CTA in x; rows of the item over y and warps.
    pub items: u64,
    /// [`Sequence`]s.
    pub sequences: u64,
    /// f32 per query head; or 0.
    pub sink_logits: u64,
    /// f32 rows of [`partial_stride`].
    pub partials: u64,
    /// u32, the splits of merges.
    pub splits: u64,
    /// Query heads per KV head.
    pub group: Divisor,
    /// Channels of V and O.
    pub v_head_dim: u32,
}

/// f32 of one row of partial states: unnormalised O, padded; then 16 of which the first two are the row
/// maximum (base 2) and the row sum.
pub const fn partial_stride(v_head_dim: usize) -> usize {
    v_head_dim.next_multiple_of(16) + 16
}

/// Packed query rows of one decode tile.
pub const DECODE_ROWS: usize = 16;

/// Stages of 16 tokens in a decode warp's ring, by the kernel's `head_dim`; all but one are on their way.
pub const DECODE_SLOTS: [(usize, usize); 5] = [(64, 8), (96, 6), (128, 4), (192, 3), (256, 2)];

/// Stages in a decode warp's ring of quantised KV, each of at least 32 tokens, by the kernel's `head_dim`.
pub const DECODE_QUANTIZED_SLOTS: [(usize, usize); 3] = [(64, 6), (128, 3), (256, 2)];

/// Warps of a decode CTA, which take turns at the blocks of its items.
pub const DECODE_WARPS: usize = 4;

/// Packed query rows of one prefill tile. With 256 channels, Q of 128 rows, K and V would be 128 KiB of shared
/// memory, and GPUs of compute capability 8.6, 8.9 and 12.0 have 99.
pub const fn prefill_rows(head_dim: usize) -> usize {
    if head_dim > 192 { 64 } else { 128 }
}

plain! {
    WorkItem: 48,
    MergeItem: 32,
    Sequence: 56,
    ScoreParams: 20,
    AttentionParams: 256,
    RangeParams: 32,
    DecodeParams: 288,
    PageMassParams: 280,
    MergePartialsParams: 104,
}
