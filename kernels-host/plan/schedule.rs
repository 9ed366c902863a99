//! From tiles of rows to items in the order in which workers take them.

use ferroflash_kernels::abi::{KV_BLOCK, MergeItem, NO_MERGE, NO_PARTIAL, Sequence, WorkItem};

use super::pieces::best_piece;
use super::{Plan, Splits};
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
    /// Workers that stay and walk ranges of items of at most `range_rows` rows; 0: none do.
    pub(crate) ranges: usize,
    pub(crate) range_rows: usize,
    /// Whether an item that finishes rows after several sections gets room to keep them in between.
    pub(crate) scratch: bool,
    /// Whether items of many rows, or all of latent attention, are for Hopper's kernels.
    pub(crate) hopper: bool,
    /// Bytes that sharing a prefix has to save to be worth its launches; `None`: prefixes are not shared.
    pub(crate) cascade: Option<u64>,
    /// Bytes of a cache that all workers share: items of many rows are ordered so that those under way together use no
    /// more K and V than half of it. 0: ordered by length alone.
    pub(crate) cache_bytes: usize,
}

impl Schedule {
    /// Whether workers that walk ranges take whatever there is.
    pub(super) fn all_walk(&self) -> bool {
        self.row_tile <= self.range_rows
    }
}

impl Plan {
    pub(super) fn schedule(
        &mut self,
        op: &'static str,
        spec: &AttentionSpec,
        mut tiles: Vec<WorkItem>,
        splits: Splits,
        schedule: Schedule,
    ) -> Result<()> {
        if schedule.ranges > 0 {
            let is_few = |t: &WorkItem| (t.row_end - t.row_start) as usize <= schedule.range_rows;
            let (few, many) = tiles.into_iter().partition(is_few);
            self.walk_ranges(few, splits, schedule.ranges);
            tiles = many;
        }
        let (range_items, workers) = (self.items.len(), schedule.workers.max(1));
        // Longest first, so that no worker starts a long item when the others are done.
        tiles.sort_by_key(|t| std::cmp::Reverse(cost(t)));
        let total: u64 = tiles.iter().map(cost).sum();
        // An item a quarter of a worker's share leaves at most that much of an imbalance.
        let share = (total / (4 * workers as u64)).max(1);
        let may_split = splits != Splits::None && workers > 1;
        // A CPU's workers take small pieces: others use its cores too.
        let best = if schedule.ranges > 0 { best_piece(&tiles, workers) } else { None };
        for tile in tiles {
            let tokens = tile.kv_end - tile.kv_start;
            let pieces = if !may_split {
                1
            } else if let Some(best) = best {
                cost(&tile).div_ceil(best)
            } else if tile.row_end - tile.row_start <= FEW_ROWS {
                cost(&tile).div_ceil(share).max(tokens.div_ceil(MEMORY_PIECE) as u64)
            } else if cost(&tile) > 2 * share {
                cost(&tile).div_ceil(share)
            } else {
                1
            };
            let blocks = tokens.div_ceil(KV_BLOCK as u32);
            // Below eight blocks the merge costs as much as it saves.
            let pieces = pieces.min(blocks as u64 / 8) as u32;
            if pieces > 1 {
                self.split(tile, blocks.div_ceil(pieces) * KV_BLOCK as u32);
            } else if self.cascade.in_parts(tile.seq) {
                self.split(tile, blocks.max(1) * KV_BLOCK as u32);
            } else {
                self.items.push(tile);
            }
        }
        self.merge_cascade(spec);
        if schedule.scratch && self.section > 0 {
            let section = self.section as u32;
            for item in &mut self.items[range_items..] {
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
        self.items[range_items..].sort_by_key(|t| {
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
        let rows = tile.row_end - tile.row_start;
        let (state, piece) = match self.section {
            0 => (piece, piece),
            section => (section as u32, piece.checked_next_multiple_of(section as u32).unwrap_or(u32::MAX)),
        };
        let first = tile.kv_start / state * state;
        let num_states = (tile.kv_end - first).div_ceil(state).max(1);
        let mut starts: Vec<u32> = (first..tile.kv_end).step_by(piece as usize).collect();
        if num_states == 1 || starts.is_empty() {
            starts = vec![first];
        }
        let (partial, merge) = self.place_states(&tile, num_states, starts.len());
        for start in starts {
            self.items.push(WorkItem {
                kv_start: start.max(tile.kv_start),
                kv_end: start.saturating_add(piece).min(tile.kv_end),
                partial: if partial == NO_PARTIAL {
                    partial
                } else {
                    partial.wrapping_add(((start - first) / state).wrapping_mul(rows))
                },
                merge,
                ..tile
            });
        }
    }

    /// Room for a tile's states, which `num_items` items write: the first row, or [`NO_PARTIAL`] where the only item
    /// finishes its rows; and the merge that takes them.
    pub(super) fn place_states(&mut self, tile: &WorkItem, num_states: u32, num_items: usize) -> (u32, u32) {
        let in_parts = self.cascade.in_parts(tile.seq);
        if num_states == 1 && !in_parts {
            return (NO_PARTIAL, NO_MERGE);
        }
        let rows = tile.row_end - tile.row_start;
        // Where this wraps the plan is refused in the end.
        let first = self.partial_rows as u32;
        self.partial_rows += num_states as usize * rows as usize;
        let firsts = (0..num_states).map(|state| first.wrapping_add(state.wrapping_mul(rows)));
        if in_parts {
            self.cascade.add_states(tile, firsts);
            return (first, NO_MERGE);
        }
        let splits = self.splits.len() as u32;
        self.splits.extend(firsts);
        let &WorkItem { seq, kv_head, row_start, row_end, .. } = tile;
        let (num_splits, num_items) = (num_states, num_items as u32);
        let item = MergeItem { seq, kv_head, row_start, row_end, splits, num_splits, num_items, reserved: 0 };
        self.merges.push(item);
        (first, self.merges.len() as u32 - 1)
    }
}

/// What a tile or a piece of one costs.
pub(super) fn cost(item: &WorkItem) -> u64 {
    // Loading a block costs about as much as computing eight rows on it.
    (item.row_end - item.row_start + 8) as u64
        * (item.kv_end - item.kv_start).div_ceil(KV_BLOCK as u32) as u64
}
