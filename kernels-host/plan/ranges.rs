//! Decoding's workers: each walks one contiguous range of all tiles' blocks of KV.

use ferroflash_kernels::abi::{DECODE_WARPS, KV_BLOCK, NO_PARTIAL, WorkItem};

use super::{Plan, Splits};

const BLOCK: u32 = KV_BLOCK as u32;

/// Blocks of a tile; one that has none takes as long as one block.
fn blocks(tile: &WorkItem) -> u32 {
    (tile.kv_end - tile.kv_start).div_ceil(BLOCK).max(1)
}

/// Tiles of every KV head of every sequence, where all have as many; else 1.
fn tiles_of_each(tiles: &[WorkItem]) -> usize {
    let head = |t: &WorkItem| (t.seq, t.kv_head);
    let mut counts = tiles.chunk_by(|a, b| head(a) == head(b)).map(<[WorkItem]>::len);
    let first = counts.next().unwrap_or(1);
    if counts.all(|n| n == first) { first } else { 1 }
}

impl Plan {
    /// Deals the tiles' blocks to at most `workers` workers, side by side and evenly to one block; fixed splits are cut
    /// between sections only, and [`Splits::None`] between tiles.
    ///
    /// Where heads have several tiles, which read the same KV, a team of workers takes the first tile of each, another the
    /// second: so they are cut alike, and come to the same KV at the same time, once from memory and then from a cache.
    ///
    /// A worker's range may begin and end inside a tile, so all of them cut at most `workers - 1` times, and leave at most
    /// `2 (workers - 1)` states of tiles in parts (with fixed splits, a state for each section).
    pub(super) fn walk_ranges(&mut self, tiles: Vec<WorkItem>, splits: Splits, workers: usize) {
        let teams = Some(tiles_of_each(&tiles)).filter(|&n| n <= workers).unwrap_or(1);
        self.ranges = vec![0];
        for team in 0..teams {
            let own = tiles.iter().skip(team).step_by(teams).copied().collect();
            self.walk_team(own, splits, workers / teams);
        }
        self.range_merges = self.merges.len();
    }

    fn walk_team(&mut self, tiles: Vec<WorkItem>, splits: Splits, workers: usize) {
        let total: u64 = tiles.iter().map(|t| blocks(t) as u64).sum();
        // A block for each of a worker's warps, before there are more workers.
        let workers = total.div_ceil(DECODE_WARPS as u64).min(workers as u64);
        let begin = |worker: u64| worker * total / workers.max(1);
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
        let before: Vec<u32> =
            pieces.iter().map(|&(start, _)| if start == tile.kv_start { 0 } else { states(start) }).collect();
        let num_states = states(tile.kv_end).max(1);
        let (partial, merge) = self.place_states(&tile, num_states, pieces.len());
        for (&(kv_start, kv_end), before) in pieces.iter().zip(before) {
            let partial = if partial == NO_PARTIAL {
                NO_PARTIAL
            } else {
                partial.wrapping_add(before.wrapping_mul(rows))
            };
            self.items.push(WorkItem { kv_start, kv_end, partial, merge, ..tile });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::plan::{Batch, KvTable, PlanLimits, Schedule};
    use crate::spec::AttentionSpec;

    fn plan(
        spec: &AttentionSpec,
        lengths: &[(u32, u32)],
        splits: Splits,
        ranges: usize,
        row_tile: usize,
    ) -> Plan {
        let sums = |f: fn(&(u32, u32)) -> u32| {
            std::iter::once(0)
                .chain(lengths.iter().scan(0, |sum, l| {
                    *sum += f(l);
                    Some(*sum)
                }))
                .collect::<Vec<u32>>()
        };
        let (qo_indptr, kv_indptr) = (sums(|l| l.0), sums(|l| l.1));
        let batch = Batch::new(&qo_indptr, KvTable::Ragged { kv_indptr: &kv_indptr });
        let schedule = Schedule { row_tile, workers: 4, ranges, range_rows: row_tile, ..Schedule::default() };
        Plan::new("test", spec, &batch, splits, schedule).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_block_once_and_evenly(
            lengths in proptest::collection::vec((1u32..5, prop_oneof![0u32..3, 1u32..400, 1u32..9000]), 0..24),
            kv_heads in 1usize..5, group in prop_oneof![Just(1usize), Just(3)], workers in 1usize..70,
            splits in prop_oneof![Just(Splits::Auto), Just(Splits::None), Just(Splits::Fixed(64)), Just(Splits::Fixed(320))],
            window in prop_oneof![Just(None), Just(Some(100u32))],
            row_tile in prop_oneof![Just(16usize), Just(2)],
        ) {
            let mut spec = AttentionSpec::new(kv_heads * group, kv_heads, 64).causal();
            spec.window = window;
            let plan = plan(&spec, &lengths, splits, workers, row_tile);
            let whole = plan_of_tiles(&spec, &lengths, row_tile);
            let count = plan.ranges.len() - 1;
            prop_assert!(count <= workers);
            prop_assert_eq!(plan.ranges[0], 0);
            prop_assert_eq!(plan.ranges[count] as usize, plan.items.len());
            prop_assert!(plan.ranges.windows(2).all(|r| r[0] <= r[1]));
            prop_assert_eq!(plan.range_merges, plan.merges.len());

            // In order, the pieces of each tile are all of it.
            let mut pieces: BTreeMap<(u32, u32, u32), Vec<WorkItem>> = BTreeMap::new();
            plan.items.iter().for_each(|i| pieces.entry((i.seq, i.kv_head, i.row_start)).or_default().push(*i));
            prop_assert_eq!(pieces.len(), whole.len());
            let (mut cuts, mut rows_in_parts) = (0, 0);
            let mut taken = vec![false; plan.partial_rows];
            let section = plan.section as u32;
            for tile in &whole {
                let own = &pieces[&(tile.seq, tile.kv_head, tile.row_start)];
                prop_assert_eq!((own[0].kv_start, own[own.len() - 1].kv_end), (tile.kv_start, tile.kv_end));
                prop_assert!(own.windows(2).all(|w| w[0].kv_end == w[1].kv_start && w[0].kv_start < w[0].kv_end));
                cuts += own.len() - 1;
                prop_assert!(own[1..].iter().all(|i| i.kv_start % section.max(64) == 0));
                let rows = tile.row_end - tile.row_start;
                let states = match section {
                    0 => own.len() as u32,
                    s => (tile.kv_end.div_ceil(s)).saturating_sub(tile.kv_start / s).max(1),
                };
                if states == 1 {
                    prop_assert!(own.len() == 1 && own[0].partial == ferroflash_kernels::abi::NO_PARTIAL);
                    continue;
                }
                rows_in_parts += (states * rows) as usize;
                let merge = plan.merges[own[0].merge as usize];
                prop_assert_eq!((merge.seq, merge.kv_head, merge.row_start, merge.row_end), (tile.seq, tile.kv_head, tile.row_start, tile.row_end));
                prop_assert_eq!((merge.num_splits, merge.num_items as usize), (states, own.len()));
                for (i, item) in own.iter().enumerate() {
                    prop_assert_eq!(item.merge, own[0].merge);
                    let before = match section {
                        0 => i as u32,
                        s => item.kv_start / s - tile.kv_start / s,
                    };
                    prop_assert_eq!(item.partial, plan.splits[(merge.splits + before) as usize]);
                }
                for &first in &plan.splits[merge.splits as usize..][..states as usize] {
                    for row in first..first + rows {
                        prop_assert!(!std::mem::replace(&mut taken[row as usize], true));
                    }
                }
            }
            prop_assert!(cuts < workers);
            prop_assert_eq!(rows_in_parts, plan.partial_rows);
            // Within the room that limits give; fixed splits of several tiles are refused.
            let refused = section > 0 && lengths.iter().any(|l| l.0 as usize * group > row_tile);
            let limits = PlanLimits {
                sequences: lengths.len(),
                q_tokens: plan.total_q,
                page_size: 1,
                pages: plan.total_kv,
                tree_words: 0,
            };
            let schedule = Schedule { row_tile, ranges: workers, range_rows: row_tile, ..Schedule::default() };
            let (room, needed) = (limits.sizes(&spec, splits, schedule), plan.sizes());
            prop_assert!(refused || needed.items <= room.items && needed.ranges <= room.ranges);
            prop_assert!(refused || needed.merges <= room.merges && needed.range_merges <= room.range_merges);
            prop_assert!(refused || needed.splits <= room.splits);
            prop_assert!(refused || needed.partial_rows <= room.partial_rows, "{:?} {:?}", needed, room);

            // Of each team, which has tiles of its own.
            let teams = super::tiles_of_each(&whole);
            let mut work: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
            for range in plan.ranges.windows(2) {
                let items = &plan.items[range[0] as usize..range[1] as usize];
                let team = |i: &WorkItem| if teams > 1 && teams <= workers { i.row_start } else { 0 };
                prop_assert!(items.windows(2).all(|w| team(&w[0]) == team(&w[1])));
                prop_assert!(!items.is_empty() || splits != Splits::Auto);
                let Some(first) = items.first() else { continue };
                work.entry(team(first)).or_default().push(items.iter().map(blocks).sum());
            }
            match splits {
                Splits::Auto => {
                    for work in work.values() {
                        prop_assert!(work.iter().max().unwrap() - work.iter().min().unwrap() <= 1, "{:?}", work);
                    }
                }
                Splits::None => prop_assert_eq!(cuts, 0),
                _ => {}
            }
        }
    }

    fn plan_of_tiles(spec: &AttentionSpec, lengths: &[(u32, u32)], row_tile: usize) -> Vec<WorkItem> {
        let mut items = plan(spec, lengths, Splits::None, 1, row_tile).items;
        items.sort_by_key(|i| (i.seq, i.kv_head, i.row_start));
        items
    }

    #[test]
    fn tiles_of_a_head_are_cut_alike() {
        let spec = AttentionSpec::new(40, 1, 64).causal();
        let plan = plan(&spec, &[(1, 5000), (1, 130), (1, 9000)], Splits::Auto, 33, 16);
        let pieces = |row_start: u32| {
            let own = plan.items.iter().filter(move |i| i.row_start == row_start);
            own.map(|i| (i.seq, i.kv_start, i.kv_end)).collect::<Vec<_>>()
        };
        assert_eq!(plan.ranges.len(), 34);
        assert!(pieces(0).len() >= 11);
        assert_eq!(pieces(0), pieces(16));
        assert_eq!(pieces(0), pieces(32));
    }
}
