//! What the host's plan hands to a kernel: plain `#[repr(C)]` data, the same bytes on every device.

/// KV tokens handled together. Blocks start at multiples of this number in a sequence, whatever the
/// query tile, the page size or the chunk, so that a row's arithmetic does not depend on any of them.
pub const KV_BLOCK: usize = 64;

/// Tokens that share one K scale in an int4 page, and the length of a sequence's 16-bit tail.
pub const INT4_GROUP: usize = 32;

/// [`WorkItem::partial`] of an item that writes finished rows.
pub const NO_PARTIAL: u32 = u32::MAX;

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
    /// First row of partial states; split `s` of row `r` is at `partial + s * rows + r - row_start`.
    pub partial: u32,
    /// Number of splits.
    pub num_splits: u32,
}

/// One sequence of the batch.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// First query token in the ragged batch.
    pub q_start: u64,
    /// First KV token in the ragged KV (0 where KV is paged).
    pub kv_start: u64,
    /// First entry of the sequence in the plan's page list; per KV head, heads follow each other
    /// `pages_per_head` apart.
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
    /// Row of the sequence's 16-bit tail in an int4 cache.
    pub tail_slot: u32,
    /// Keeps the size a multiple of 8 on every target.
    pub reserved: u32,
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

const _: () = {
    assert!(size_of::<WorkItem>() == 28);
    assert!(size_of::<MergeItem>() == 24);
    assert!(size_of::<Sequence>() == 56);
    assert!(size_of::<ScoreParams>() == 20);
};
