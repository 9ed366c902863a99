//! What a plan is made from: lengths, page tables, trees, page lists.

use ferroflash_kernels::abi::KV_BLOCK;

/// How a sequence's KV is divided over workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Splits {
    /// Divided where that keeps all workers busy. Deterministic for the same batch.
    #[default]
    Auto,
    /// One worker walks all of a row's KV.
    None,
    /// Every row's KV is divided at multiples of this many tokens (rounded up to a multiple of 64) and
    /// merged in order, whatever else is in the batch and however the queries are chunked: a row's bits
    /// depend on its own query, keys and values alone.
    Fixed(usize),
}

/// A section that no sequence is longer than: KV lengths are below 2^31.
const LONGEST: usize = 1 << 31;

impl Splits {
    /// Tokens of a fixed split's sections, whole blocks; 0: not fixed.
    pub(crate) fn section(self) -> usize {
        match self {
            Splits::Fixed(tokens) => tokens.min(LONGEST).next_multiple_of(KV_BLOCK),
            Splits::Auto | Splits::None => 0,
        }
    }
}

/// The lengths of one step: which queries and which KV belong to which sequence.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// Query tokens of sequence `i` are rows `qo_indptr[i]..qo_indptr[i + 1]`; starts at 0.
    pub qo_indptr: &'a [u32],
    /// Where each sequence's KV lives.
    pub kv: KvTable<'a>,
    /// Ancestor masks, for tree attention only.
    pub tree: Option<TreeMask<'a>>,
    /// Row of each sequence's tail in a cache of int4 keys; empty for other formats.
    pub tail_slots: &'a [u32],
    /// Which pages each tile of queries attends to; `None`: all of its sequence's.
    pub page_lists: Option<PageLists<'a>>,
}

impl<'a> Batch<'a> {
    /// A batch without trees, int4 tails or page lists.
    pub fn new(qo_indptr: &'a [u32], kv: KvTable<'a>) -> Self {
        Batch { qo_indptr, kv, tree: None, tail_slots: &[], page_lists: None }
    }
}

/// Where each sequence's KV lives.
#[derive(Clone, Copy, Debug)]
pub enum KvTable<'a> {
    /// Rows `kv_indptr[i]..kv_indptr[i + 1]` of ragged KV; starts at 0.
    Ragged {
        /// Prefix sums of the KV lengths, one more than sequences.
        kv_indptr: &'a [u32],
    },
    /// Compressed page lists (FlashInfer's form).
    Csr {
        /// Tokens per page.
        page_size: usize,
        /// Pages of sequence `i` are `kv_indices[kv_indptr[i]..kv_indptr[i + 1]]`; starts at 0.
        kv_indptr: &'a [u32],
        /// Page numbers.
        kv_indices: &'a [u32],
        /// Tokens in each sequence's last page, 1 to `page_size`; ignored for a sequence with no page.
        last_page_len: &'a [u32],
    },
    /// A rectangular table (vLLM's form).
    Block {
        /// Tokens per page.
        page_size: usize,
        /// `[batch, max_blocks]` page numbers; entries past a sequence's length are not looked at.
        block_table: &'a [u32],
        /// Columns of the table.
        max_blocks: usize,
        /// KV tokens of each sequence.
        seq_lens: &'a [u32],
    },
}

/// Block-sparse attention: lists of pages per KV head and tile of queries (local and global windows, dilated or
/// random blocks, the choice of any policy). Masks are on top, by the tokens' own positions.
#[derive(Clone, Copy, Debug)]
pub struct PageLists<'a> {
    /// Query tokens of a tile; a sequence's last tile may be shorter.
    pub q_tile: usize,
    /// `true`: a list for each KV head; `false`: one for all of them.
    pub per_head: bool,
    /// Where the lists begin and end in `pages`; starts at 0. Sequences one after another, in each of them KV heads
    /// (with `per_head`), in each of these tiles.
    pub indptr: &'a [u32],
    /// Numbers of pages within their sequence, 0 its first, ascending in each list.
    pub pages: &'a [u32],
}

/// Which of the last KV columns each query of a tree sees: itself and its ancestors.
#[derive(Clone, Copy, Debug)]
pub struct TreeMask<'a> {
    /// KV columns under the mask, for each sequence; the columns before them are seen by every query.
    pub n_tree: &'a [u32],
    /// Rows of `ceil(n_tree / 32)` words, a row per query token, sequences one after another. Bit
    /// `j % 32` of word `j / 32`: whether the query sees KV column `kv_len - n_tree + j`.
    pub mask: &'a [u32],
}
