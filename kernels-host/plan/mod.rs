//! From lengths and page tables to work items: pure, printable, no device needed.

use ferroflash_kernels::abi::{KV_BLOCK, MergeItem, NO_PARTIAL, Sequence, WorkItem};

mod batch;
mod lists;

pub use batch::{Batch, KvTable, PageLists, Splits, TreeMask};

use crate::error::{Error, Result};
use crate::spec::AttentionSpec;

/// Tiles of so few rows are bound by reading KV, not by arithmetic.
const FEW_ROWS: u32 = 32;

/// Such tiles are cut into pieces of this many tokens, and all heads of a piece follow each other: where
/// the heads of a token stand side by side in memory, one head's reading brings in the next one's lines,
/// and a piece of all heads fits in the last-level cache.
const MEMORY_PIECE: u32 = 2048;

/// What a device wants of a plan.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Schedule {
    /// Packed query rows of one work item.
    pub(crate) row_tile: usize,
    /// Parallel workers that items should fill.
    pub(crate) workers: usize,
    /// Whether an item that finishes rows after several sections gets room to keep them in between.
    pub(crate) scratch: bool,
    /// Whether items of many rows are for Hopper's kernels.
    pub(crate) hopper: bool,
    /// Bytes of a cache that all workers share: items of many rows are ordered so that those under way together use no
    /// more K and V than half of it. 0: ordered by length alone.
    pub(crate) cache_bytes: usize,
}

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
    pub(crate) items: Vec<WorkItem>,
    pub(crate) merges: Vec<MergeItem>,
    /// Tokens after which an item starts a new state; 0: never.
    pub(crate) section: usize,
    pub(crate) partial_rows: usize,
    /// As [`Schedule::hopper`].
    pub(crate) hopper: bool,
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
        plan.section = match splits {
            Splits::Fixed(0) => {
                return Err(Error::value(op, "Splits::Fixed", "at least 1 token", 0));
            }
            Splits::Fixed(tokens) => tokens.checked_next_multiple_of(KV_BLOCK).unwrap_or(0),
            Splits::Auto | Splits::None => 0,
        };
        plan.add_tree(op, spec, batch)?;
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
            section: 0,
            partial_rows: 0,
            hopper: false,
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

    /// Rows that are merged from partial states.
    pub fn merge_items(&self) -> &[MergeItem] {
        &self.merges
    }

    /// Sequences of the batch.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
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
                    let (kv_start, kv_end) = kv_range(spec, s, row_start, row_end);
                    let mut tile = work_item(index, kv_head, row_start, row_end, s.page_start);
                    (tile.kv_start, tile.kv_end) = (kv_start, kv_end);
                    tiles.push(tile);
                }
            }
        }
        Ok(tiles)
    }

    fn schedule(
        &mut self,
        op: &'static str,
        spec: &AttentionSpec,
        mut tiles: Vec<WorkItem>,
        splits: Splits,
        schedule: Schedule,
    ) -> Result<()> {
        let workers = schedule.workers.max(1);
        // Longest first, so that no worker starts a long item when the others are done.
        tiles.sort_by_key(|t| std::cmp::Reverse(cost(t)));
        let total: u64 = tiles.iter().map(cost).sum();
        // An item a quarter of a worker's share leaves at most that much of an imbalance; below eight
        // blocks the merge costs as much as it saves.
        let share = total / (4 * workers as u64);
        let may_split = splits != Splits::None && workers > 1;
        // Workers that stay and take items, longest first, are busy without splitting the long ones.
        let enough = schedule.hopper && tiles.len() >= workers - workers / 5;
        for tile in tiles {
            let tokens = tile.kv_end - tile.kv_start;
            let pieces = if !may_split {
                1
            } else if tile.row_end - tile.row_start <= FEW_ROWS {
                cost(&tile).div_ceil(share.max(1)).max(tokens.div_ceil(MEMORY_PIECE) as u64)
            } else if cost(&tile) > 2 * share && !enough {
                cost(&tile).div_ceil(share.max(1))
            } else {
                1
            };
            let blocks = tokens.div_ceil(KV_BLOCK as u32);
            let pieces = pieces.min(blocks as u64 / 8) as u32;
            if pieces <= 1 {
                self.items.push(tile);
                continue;
            }
            self.split(tile, blocks.div_ceil(pieces) * KV_BLOCK as u32);
        }
        if schedule.scratch && self.section > 0 {
            let section = self.section as u32;
            for item in &mut self.items {
                let sections = item.kv_end.div_ceil(section) - item.kv_start / section;
                if item.partial == NO_PARTIAL && sections > 1 {
                    item.scratch = self.partial_rows as u32;
                    self.partial_rows += (item.row_end - item.row_start) as usize;
                }
            }
        }
        if self.partial_rows > NO_PARTIAL as usize {
            return Err(Error::value(
                op,
                "partial states",
                "fewer than 2^32 rows: use a larger split",
                self.partial_rows,
            ));
        }
        let sections = self.sections(spec, schedule.cache_bytes / 2);
        let section = |t: &WorkItem| match sections.as_slice() {
            [] => 0,
            sections => sections[t.seq as usize * spec.num_kv_heads + t.kv_head as usize],
        };
        self.items.sort_by_key(|t| {
            let few = t.row_end - t.row_start <= FEW_ROWS;
            let section = if few { 0 } else { section(t) };
            (section, std::cmp::Reverse(cost(t)), t.seq, t.kv_start, t.kv_head)
        });
        Ok(())
    }

    /// For each sequence and KV head, the section of the work it belongs to: heads of sequences, longest first, whose K
    /// and V are `bytes` together. Empty where all of them are no more.
    fn sections(&self, spec: &AttentionSpec, bytes: usize) -> Vec<u32> {
        // Kernels that order by sections take 16-bit elements.
        let head_bytes = |s: &Sequence| 2 * 2 * s.kv_len as usize * spec.head_dim;
        let all: usize = self.sequences.iter().map(|s| head_bytes(s) * spec.num_kv_heads).sum();
        if bytes == 0 || all <= bytes {
            return Vec::new();
        }
        let mut order: Vec<usize> = (0..self.sequences.len()).collect();
        order.sort_by_key(|&i| std::cmp::Reverse(self.sequences[i].kv_len));
        let mut sections = vec![0; self.sequences.len() * spec.num_kv_heads];
        let (mut section, mut used) = (0, 0);
        for i in order {
            for head in 0..spec.num_kv_heads {
                let more = head_bytes(&self.sequences[i]);
                if used > 0 && used + more > bytes {
                    (section, used) = (section + 1, 0);
                }
                used += more;
                sections[i * spec.num_kv_heads + head] = section;
            }
        }
        sections
    }

    /// Splits a tile into pieces of `piece` tokens, each with its own partial states; under
    /// [`Splits::Fixed`] a piece is a run of whole sections with a state for each.
    fn split(&mut self, tile: WorkItem, piece: u32) {
        let rows = (tile.row_end - tile.row_start) as usize;
        let (state, piece) = match self.section {
            0 => (piece, piece),
            section => (section as u32, piece.next_multiple_of(section as u32)),
        };
        let first = tile.kv_start / state * state;
        let num_splits = (tile.kv_end - first).div_ceil(state);
        if num_splits <= 1 {
            self.items.push(tile);
            return;
        }
        let partial = self.partial_rows;
        for start in (first..tile.kv_end).step_by(piece as usize) {
            self.items.push(WorkItem {
                kv_start: start.max(tile.kv_start),
                kv_end: start.saturating_add(piece).min(tile.kv_end),
                partial: (partial + ((start - first) / state) as usize * rows) as u32,
                ..tile
            });
        }
        let WorkItem { seq, kv_head, row_start, row_end, .. } = tile;
        self.merges.push(MergeItem { seq, kv_head, row_start, row_end, partial: partial as u32, num_splits });
        self.partial_rows += num_splits as usize * rows;
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
    }
}

fn cost(item: &WorkItem) -> u64 {
    // Loading a block costs about as much as computing eight rows on it.
    (item.row_end - item.row_start + 8) as u64
        * (item.kv_end - item.kv_start).div_ceil(KV_BLOCK as u32) as u64
}

/// KV tokens that some row of the tile may see: starts at a block.
fn kv_range(spec: &AttentionSpec, s: &Sequence, row_start: usize, row_end: usize) -> (u32, u32) {
    let group = spec.group();
    let position = |row: usize| s.kv_len as i64 - s.q_len as i64 + (row / group) as i64;
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
