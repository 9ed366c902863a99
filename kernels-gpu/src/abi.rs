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
    /// First row of partial states that the item may use as it likes, where it finishes its rows after
    /// several sections; else [`NO_PARTIAL`].
    pub scratch: u32,
    /// First entry of the item's page list. KV tokens of the item count along its list, page by page.
    pub pages: u64,
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

/// Division by a number known to the host, as a multiplication (Granlund and Montgomery, PLDI 1994).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    /// The divisor; 0: none, and the other fields mean nothing.
    pub value: u32,
    multiplier: u32,
    shift: u32,
}

impl Divisor {
    /// For dividends below 2^31 and divisors up to 2^31.
    pub const fn new(value: u32) -> Self {
        if value == 0 {
            return Divisor { value, multiplier: 0, shift: 0 };
        }
        let shift = if value == 1 { 0 } else { 32 - (value - 1).leading_zeros() };
        let multiplier = ((((1u64 << shift) - value as u64) << 32) / value as u64 + 1) as u32;
        Divisor { value, multiplier, shift }
    }

    /// Quotient and remainder.
    #[inline(always)]
    pub const fn div_rem(self, x: u32) -> (u32, u32) {
        let high = ((x as u64 * self.multiplier as u64) >> 32) as u32;
        let quotient = (high + x) >> self.shift;
        (quotient, x - quotient * self.value)
    }
}

/// Rows `[token, head]` of a ragged tensor; strides in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRows {
    /// Device address; 0: none.
    pub base: u64,
    /// Bytes from token to token.
    pub token: u64,
    /// Bytes from head to head.
    pub head: u64,
}

/// Rows `[page, head, token]` of a paged tensor; strides in bytes. Ragged KV is one page.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRows {
    /// Device address.
    pub base: u64,
    /// Bytes from page to page.
    pub page: u64,
    /// Bytes from head to head.
    pub head: u64,
    /// Bytes from token to token.
    pub token: u64,
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
    /// Channels, at most the kernel's.
    pub head_dim: u32,
    /// Tokens after which a new state begins; 0: never.
    pub section: u32,
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
    /// Query heads per KV head.
    pub group: Divisor,
    /// Channels.
    pub head_dim: u32,
}

/// f32 of one row of partial states: unnormalised O, padded; then 16 of which the first two are the row
/// maximum (base 2) and the row sum.
pub const fn partial_stride(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16) + 16
}

/// Packed query rows of one decode tile.
pub const DECODE_ROWS: usize = 16;

/// Packed query rows of one prefill tile. With 256 channels, Q of 128 rows, K and V would be 128 KiB of shared
/// memory, and GPUs of compute capability 8.6, 8.9 and 12.0 have 99.
pub const fn prefill_rows(head_dim: usize) -> usize {
    if head_dim > 192 { 64 } else { 128 }
}

/// Element types of [`Rows`].
pub mod element {
    /// 32-bit float.
    pub const F32: u32 = 0;
    /// IEEE half.
    pub const F16: u32 = 1;
    /// bfloat16.
    pub const BF16: u32 = 2;
}

/// Rows `[outer, inner]` of contiguous elements of any float type; strides in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Device address; 0: none.
    pub base: u64,
    /// Bytes from outer index to outer index.
    pub outer: u64,
    /// Bytes from inner index to inner index.
    pub inner: u64,
    /// An [`element`].
    pub dtype: u32,
    /// Inner indices.
    pub num_inner: u32,
}

impl Rows {
    /// No rows.
    pub const NONE: Rows = Rows { base: 0, outer: 0, inner: 0, dtype: 0, num_inner: 1 };
}

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
    /// An [`element`].
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
    /// f32 `[page, head, minimum or maximum, channel]`.
    pub summaries: PageRows,
    /// [`TouchedPage`]s.
    pub touched: u64,
    /// An [`element`], of the keys.
    pub kv_dtype: u32,
    /// Channels.
    pub head_dim: u32,
}

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

/// `score_pages`: `page_ctas` CTAs per item, a warp per page. `top_k_pages`: a CTA per item.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SelectParams {
    /// Queries.
    pub q: Rows,
    /// f32 `[page, head, minimum or maximum, channel]`.
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

/// Data that the device is given as bytes.
///
/// # Safety
/// `#[repr(C)]`, without padding: the sizes below are the sums of the fields'.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($t:ty: $size:literal),* $(,)?) => { $(
        // SAFETY: as the trait says.
        unsafe impl Plain for $t {}
        const _: () = assert!(size_of::<$t>() == $size);
    )* };
}

plain! {
    AttentionParams: 256,
    MergePartialsParams: 96,
    AttentionInt4Params: 464,
    WorkItem: 40,
    MergeItem: 24,
    Sequence: 56,
    ScoreParams: 20,
    RmsNormParams: 136,
    SiluMulParams: 72,
    EmbeddingParams: 88,
    MergeStatesParams: 1104,
    AppendParams: 216,
    TouchedPage: 8,
    SummaryParams: 80,
    Int4Group: 24,
    Int4TailToken: 16,
    Int4AppendParams: 320,
    Int4DequantParams: 272,
    SelectItem: 40,
    SelectParams: 120,
    SampleRow: 24,
    SampleParams: 64,
    ConformanceParams: 32,
}
