//! From lengths and page tables to work items: pure, printable, no device needed.

use ferroflash_kernels::abi::{KV_BLOCK, MergeItem, NO_MERGE, NO_PARTIAL, Sequence, WorkItem};

mod batch;
mod cascade;
mod limits;
mod lists;
mod pieces;
mod ranges;
mod schedule;

pub use batch::{Batch, KvTable, PageLists, Splits, TreeMask};
pub use cascade::SharedPrefix;
pub use limits::PlanLimits;
pub(crate) use limits::PlanSizes;
pub(crate) use schedule::Schedule;

use cascade::Cascade;

use crate::error::{Error, Result};
use crate::spec::AttentionSpec;

/// Work for one step. Made once, used by every layer.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(crate) sequences: Vec<Sequence>,
    /// Page lists, at each sequence's `page_start`.
    pub(crate) pages: Vec<u32>,
    /// For each entry of `pages` its place in the sequence; empty where items have all pages.
    pub(crate) logical_pages: Vec<u32>,
    /// Tokens per page; 0: ragged.
    pub(crate) page_size: usize,
    pub(crate) tree_mask: Vec<u32>,
    /// Those of ranges first, then others.
    pub(crate) items: Vec<WorkItem>,
    /// In the order of the items' tiles: those of ranges first.
    pub(crate) merges: Vec<MergeItem>,
    /// First rows of the states that merges take, at each one's `splits`.
    pub(crate) splits: Vec<u32>,
    pub(crate) cascade: Cascade,
    /// Items of range `r` are `items[ranges[r]..ranges[r + 1]]`.
    pub(crate) ranges: Vec<u32>,
    /// Merges of ranges' items.
    pub(crate) range_merges: usize,
    /// Tokens after which an item starts a new state; 0: never.
    pub(crate) section: usize,
    pub(crate) partial_rows: usize,
    /// As [`Schedule::hopper`].
    pub(crate) hopper: bool,
    /// The room that is kept, in a plan with limits.
    pub(crate) reserved: Option<PlanSizes>,
    /// Rows of queries and outputs.
    pub(crate) total_q: usize,
    /// Rows that ragged KV must have.
    pub(crate) total_kv: usize,
    /// One past the largest page number.
    pub(crate) num_pages: usize,
    /// One past the largest tail slot; `None` where the batch has no tails.
    pub(crate) num_tails: Option<usize>,
}

impl Plan {
    /// Plans `batch`.
    pub(crate) fn new(
        op: &'static str,
        spec: &AttentionSpec,
        batch: &Batch<'_>,
        splits: Splits,
        schedule: Schedule,
    ) -> Result<Self> {
        let mut plan = Plan::lengths(op, spec, batch)?;
        if splits == Splits::Fixed(0) {
            return Err(Error::value(op, "Splits::Fixed", "at least 1 token", 0));
        }
        plan.section = splits.section();
        plan.add_tree(op, spec, batch)?;
        plan.find_prefixes(spec, batch, splits, schedule);
        let tiles = match &batch.page_lists {
            None => plan.tiles(op, spec, schedule)?,
            Some(lists) => plan.listed_tiles(op, spec, lists, batch, schedule)?,
        };
        plan.hopper = schedule.hopper;
        plan.schedule(op, spec, tiles, splits, schedule)?;
        Ok(plan)
    }

    /// Sequences and page tables, checked, without work items.
    pub(crate) fn lengths(op: &'static str, spec: &AttentionSpec, batch: &Batch<'_>) -> Result<Self> {
        spec.check(op)?;
        let mut plan = Plan {
            sequences: Vec::new(),
            pages: Vec::new(),
            logical_pages: Vec::new(),
            page_size: 0,
            tree_mask: Vec::new(),
            items: Vec::new(),
            merges: Vec::new(),
            splits: Vec::new(),
            cascade: Cascade::default(),
            ranges: Vec::new(),
            range_merges: 0,
            section: 0,
            partial_rows: 0,
            hopper: false,
            reserved: None,
            total_q: 0,
            total_kv: 0,
            num_pages: 0,
            num_tails: None,
        };
        plan.add_sequences(op, batch)?;
        Ok(plan)
    }

    /// Work items, in the order in which workers take them.
    pub fn work_items(&self) -> &[WorkItem] {
        &self.items
    }

    /// Where decoding's workers stay and walk items: worker `r` takes items `ranges[r]..ranges[r + 1]`, and no others
    /// do. Empty where a device has no such workers.
    pub fn ranges(&self) -> &[u32] {
        &self.ranges
    }

    /// Rows that are merged from partial states.
    pub fn merge_items(&self) -> &[MergeItem] {
        &self.merges
    }

    /// Sequences of the batch, then those that stand for shared prefixes.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// The batch's own sequences.
    pub(crate) fn own_sequences(&self) -> &[Sequence] {
        &self.sequences[..self.sequences.len() - self.cascade.prefixes.len()]
    }

    /// Tokens of each split under [`Splits::Fixed`], 0 otherwise.
    pub fn fixed_split(&self) -> usize {
        self.section
    }

    /// Rows of partial states that a run writes.
    pub fn partial_rows(&self) -> usize {
        self.partial_rows
    }

    fn add_sequences(&mut self, op: &'static str, batch: &Batch<'_>) -> Result<()> {
        let qo = batch.qo_indptr;
        check_indptr(op, "qo_indptr", qo)?;
        let n = qo.len() - 1;
        self.total_q = qo[n] as usize;
        self.sequences = (0..n)
            .map(|i| Sequence { q_start: qo[i] as u64, q_len: qo[i + 1] - qo[i], ..Default::default() })
            .collect();
        let expect_len = |what: &'static str, len: usize, expected: usize| {
            if len == expected {
                Ok(())
            } else {
                let expected = format_args!("{expected} entries for {n} sequences").to_string();
                Err(Error::value(op, what, expected, len))
            }
        };
        match batch.kv {
            KvTable::Ragged { kv_indptr } => {
                check_indptr(op, "kv_indptr", kv_indptr)?;
                expect_len("kv_indptr", kv_indptr.len(), n + 1)?;
                self.total_kv = kv_indptr[n] as usize;
                for (i, s) in self.sequences.iter_mut().enumerate() {
                    s.kv_start = kv_indptr[i] as u64;
                    s.kv_len = kv_indptr[i + 1] - kv_indptr[i];
                }
            }
            KvTable::Csr { page_size, kv_indptr, kv_indices, last_page_len } => {
                check_page_size(op, page_size)?;
                check_indptr(op, "kv_indptr", kv_indptr)?;
                expect_len("kv_indptr", kv_indptr.len(), n + 1)?;
                expect_len("last_page_len", last_page_len.len(), n)?;
                if kv_indptr[n] as usize > kv_indices.len() {
                    let expected = format_args!("at least {} entries", kv_indptr[n]).to_string();
                    return Err(Error::value(op, "kv_indices", expected, kv_indices.len()));
                }
                self.page_size = page_size;
                self.pages = kv_indices[..kv_indptr[n] as usize].to_vec();
                for (i, s) in self.sequences.iter_mut().enumerate() {
                    s.page_start = kv_indptr[i] as u64;
                    let num_pages = (kv_indptr[i + 1] - kv_indptr[i]) as usize;
                    if num_pages > 0 {
                        let last = last_page_len[i] as usize;
                        if last == 0 || last > page_size {
                            let expected = format_args!("1 to page_size, {page_size}").to_string();
                            return Err(Error::value(op, "last_page_len", expected, last));
                        }
                        s.kv_len = token_count(op, (num_pages - 1) * page_size + last)?;
                    }
                }
            }
            KvTable::Block { page_size, block_table, max_blocks, seq_lens } => {
                check_page_size(op, page_size)?;
                expect_len("seq_lens", seq_lens.len(), n)?;
                expect_len("block_table", block_table.len(), n.saturating_mul(max_blocks))?;
                self.page_size = page_size;
                for (i, s) in self.sequences.iter_mut().enumerate() {
                    let num_pages = (seq_lens[i] as usize).div_ceil(page_size);
                    if num_pages > max_blocks {
                        let expected =
                            format_args!("at most max_blocks * page_size, {max_blocks} * {page_size}");
                        return Err(Error::value(op, "seq_lens", expected, seq_lens[i]));
                    }
                    s.page_start = self.pages.len() as u64;
                    s.kv_len = token_count(op, seq_lens[i] as usize)?;
                    self.pages.extend_from_slice(&block_table[i * max_blocks..][..num_pages]);
                }
            }
        }
        self.num_pages = self.pages.iter().max().map_or(0, |&p| p as usize + 1);
        if !batch.tail_slots.is_empty() {
            expect_len("tail_slots", batch.tail_slots.len(), n)?;
            self.num_tails = Some(batch.tail_slots.iter().max().map_or(0, |&t| t as usize + 1));
        }
        for (i, s) in self.sequences.iter_mut().enumerate() {
            s.tail_slot = batch.tail_slots.get(i).copied().unwrap_or(0);
            s.position = (s.kv_len as i32).wrapping_sub(s.q_len as i32);
        }
        Ok(())
    }

    fn add_tree(&mut self, op: &'static str, spec: &AttentionSpec, batch: &Batch<'_>) -> Result<()> {
        let Some(tree) = batch.tree else { return Ok(()) };
        if spec.causal || spec.window.is_some() || spec.alibi_slopes.is_some() {
            let expected = "no causal mask, window or ALiBi: the tree's mask says what is visible";
            return Err(Error::value(op, "spec", expected, "one of them set"));
        }
        if tree.n_tree.len() != self.sequences.len() {
            let expected = format_args!("one per sequence, {}", self.sequences.len()).to_string();
            return Err(Error::value(op, "n_tree", expected, tree.n_tree.len()));
        }
        let mut words = 0usize;
        for (s, &n_tree) in self.sequences.iter_mut().zip(tree.n_tree) {
            if n_tree > s.kv_len {
                let expected = format_args!("at most the sequence's KV length, {}", s.kv_len).to_string();
                return Err(Error::value(op, "n_tree", expected, n_tree));
            }
            s.n_tree = n_tree;
            s.tree_start = words as u64;
            words += s.q_len as usize * n_tree.div_ceil(32) as usize;
        }
        if tree.mask.len() != words {
            let expected = format_args!("{words} words, ceil(n_tree / 32) per query token").to_string();
            return Err(Error::value(op, "tree mask", expected, tree.mask.len()));
        }
        self.tree_mask = tree.mask.to_vec();
        Ok(())
    }

    /// Tiles of rows of every sequence and KV head against all KV that they may see.
    fn tiles(&self, op: &'static str, spec: &AttentionSpec, schedule: Schedule) -> Result<Vec<WorkItem>> {
        let row_tile = schedule.row_tile;
        let mut tiles = Vec::new();
        for (index, s) in self.sequences.iter().enumerate() {
            let rows = check_rows(op, spec, s)?;
            for kv_head in 0..spec.num_kv_heads {
                for row_start in (0..rows).step_by(row_tile) {
                    let row_end = (row_start + row_tile).min(rows);
                    let (kv_start, kv_end) = match self.cascade.kv_start(index) {
                        Some(start) => (start, s.kv_len.max(start)),
                        None => kv_range(spec, s, row_start, row_end),
                    };
                    let mut tile = work_item(index, kv_head, row_start, row_end, s.page_start);
                    (tile.kv_start, tile.kv_end) = (kv_start, kv_end);
                    tiles.push(tile);
                }
            }
        }
        Ok(tiles)
    }
}

/// Rows of a sequence, for one KV head.
fn check_rows(op: &'static str, spec: &AttentionSpec, s: &Sequence) -> Result<usize> {
    let rows = s.q_len as usize * spec.group();
    if rows > u32::MAX as usize || s.kv_len > i32::MAX as u32 || s.q_len > i32::MAX as u32 {
        return Err(Error::value(op, "q_len, kv_len", "below 2^31 tokens and 2^32 packed rows", rows));
    }
    Ok(rows)
}

/// An item without KV yet.
fn work_item(seq: usize, kv_head: usize, row_start: usize, row_end: usize, pages: u64) -> WorkItem {
    WorkItem {
        seq: seq as u32,
        kv_head: kv_head as u32,
        row_start: row_start as u32,
        row_end: row_end as u32,
        kv_start: 0,
        kv_end: 0,
        partial: NO_PARTIAL,
        scratch: NO_PARTIAL,
        pages,
        merge: NO_MERGE,
        reserved: 0,
    }
}

/// KV tokens that some row of the tile may see: starts at a block.
fn kv_range(spec: &AttentionSpec, s: &Sequence, row_start: usize, row_end: usize) -> (u32, u32) {
    let group = spec.group();
    let position = |row: usize| s.position as i64 + (row / group) as i64;
    let end =
        if spec.causal { (position(row_end - 1) + 1).clamp(0, s.kv_len as i64) } else { s.kv_len as i64 };
    let start = match spec.window {
        Some(w) if spec.num_sinks == 0 => (position(row_start) - w as i64 + 1).clamp(0, end),
        _ => 0,
    };
    ((start as usize / KV_BLOCK * KV_BLOCK) as u32, end as u32)
}

fn check_page_size(op: &'static str, page_size: usize) -> Result<()> {
    if page_size == 0 || page_size > 1 << 30 {
        return Err(Error::value(op, "page_size", "1 to 2^30 tokens", page_size));
    }
    Ok(())
}

fn token_count(op: &'static str, tokens: usize) -> Result<u32> {
    u32::try_from(tokens)
        .ok()
        .filter(|&t| t <= i32::MAX as u32)
        .ok_or_else(|| Error::value(op, "KV length", "below 2^31 tokens", tokens))
}

pub(crate) fn check_indptr(op: &'static str, what: &'static str, indptr: &[u32]) -> Result<()> {
    if indptr.first() != Some(&0) {
        let got = format!("{:?}", indptr.first());
        return Err(Error::value(op, what, "at least one entry, the first 0", got));
    }
    if let Some(at) = indptr.windows(2).position(|w| w[0] > w[1]) {
        let got = format!("{} then {} at entry {at}", indptr[at], indptr[at + 1]);
        return Err(Error::value(op, what, "entries that never decrease", got));
    }
    Ok(())
}
