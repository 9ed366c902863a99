//! Decoding's workers: each walks one contiguous range of all tiles' blocks of KV.

use ferroflash_kernels::abi::{DECODE_WARPS, KV_BLOCK, MergeItem, WorkItem};

use super::{Plan, Splits};

const BLOCK: u32 = KV_BLOCK as u32;

/// Blocks of a tile; one that has none takes as long as one block.
fn blocks(tile: &WorkItem) -> u32 {
    (tile.kv_end - tile.kv_start).div_ceil(BLOCK).max(1)
}

impl Plan {
    /// Deals the tiles' blocks to at most `workers` workers, side by side and evenly to one block; fixed splits are cut
    /// between sections only, and [`Splits::None`] between tiles.
    ///
    /// A worker's range may begin and end inside a tile, so all of them cut at most `workers - 1` times, and leave at most
    /// `2 (workers - 1)` states of tiles in parts (with fixed splits, a state for each section).
    pub(super) fn walk_ranges(&mut self, tiles: Vec<WorkItem>, splits: Splits, workers: usize) {
        let total: u64 = tiles.iter().map(|t| blocks(t) as u64).sum();
        // A block for each of a worker's warps, before there are more workers.
        let workers = total.div_ceil(DECODE_WARPS as u64).min(workers as u64);
        let begin = |worker: u64| worker * total / workers.max(1);
        self.ranges = vec![0];
        let (mut worker, mut before) = (0, 0);
        for tile in tiles {
            let end = before + blocks(&tile) as u64;
            let mut pieces = Vec::new();
            let mut start = tile.kv_start;
            // Workers that end inside the tile or with it.
            while worker < workers && begin(worker + 1) <= end {
                let cut = match splits {
                    // To the nearer end of the tile.
                    Splits::None if 2 * (begin(worker + 1) - before) < end - before => start,
                    Splits::None => tile.kv_end,
                    _ => self.cut(&tile, (begin(worker + 1) - before) as u32),
                };
                if cut > start || (cut == tile.kv_end && pieces.is_empty()) {
                    pieces.push((start, cut));
                    start = cut;
                }
                let done = self.items.len() + pieces.len();
                self.ranges.push(done as u32);
                worker += 1;
            }
            if start < tile.kv_end || pieces.is_empty() {
                pieces.push((start, tile.kv_end));
            }
            self.push_pieces(tile, &pieces);
            before = end;
        }
        self.range_merges = self.merges.len();
    }

    /// Token at which a tile is cut after some of its blocks.
    fn cut(&self, tile: &WorkItem, blocks: u32) -> u32 {
        let at = tile.kv_start.saturating_add(blocks * BLOCK);
        if at >= tile.kv_end {
            return tile.kv_end;
        }
        match self.section as u32 {
            0 => at,
            section => (at / section * section).max(tile.kv_start),
        }
    }

    fn push_pieces(&mut self, tile: WorkItem, pieces: &[(u32, u32)]) {
        let rows = tile.row_end - tile.row_start;
        // States before a token of the tile.
        let states = |token: u32| match self.section as u32 {
            0 => pieces.iter().filter(|p| p.1 <= token).count() as u32,
            section => token.div_ceil(section).saturating_sub(tile.kv_start / section),
        };
        let num_splits = states(tile.kv_end).max(1);
        if num_splits == 1 {
            let (kv_start, kv_end) = pieces[0];
            self.items.push(WorkItem { kv_start, kv_end, ..tile });
            return;
        }
        let first = self.partial_rows as u32;
        let merge = self.merges.len() as u32;
        for &(kv_start, kv_end) in pieces {
            let before = if kv_start == tile.kv_start { 0 } else { states(kv_start) };
            self.items.push(WorkItem { kv_start, kv_end, partial: first + before * rows, merge, ..tile });
        }
        self.partial_rows += (num_splits * rows) as usize;
        let WorkItem { seq, kv_head, row_start, row_end, .. } = tile;
        let num_items = pieces.len() as u32;
        self.merges.push(MergeItem {
            seq,
            kv_head,
            row_start,
            row_end,
            partial: first,
            num_splits,
            num_items,
            reserved: 0,
        });
    }
}
