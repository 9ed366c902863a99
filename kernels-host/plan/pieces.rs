//! Into how many pieces a GPU's tiles of many rows are cut.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ferroflash_kernels::abi::WorkItem;

use super::schedule::cost;

/// Blocks in whose time a worker begins a piece of a tile, writes its states, and another reads them: an estimate from
/// latencies and bandwidths (1 us to begin; 64 KiB of states against 16 KiB of K and V of a block).
const PIECE_BLOCKS: u64 = 6;

/// Pieces for each worker, at most.
const MOST: usize = 4;

/// The most that a piece should cost, for all to be done soonest: `workers` take pieces one by one, longest first. `tiles` come
/// in that order. `None` where they are so many for each worker that they even out.
pub(super) fn best_piece(tiles: &[WorkItem], workers: usize) -> Option<u64> {
    let first = tiles.first().filter(|_| tiles.len() < MOST * workers)?;
    let longest = cost(first).max(1);
    let rows = tiles.iter().map(|t| t.row_end - t.row_start).max().unwrap_or(0) as u64;
    let extra = PIECE_BLOCKS * (rows + 8);
    let candidates = (MOST * workers).div_ceil(tiles.len()) as u64;
    let time = |most: u64| {
        if tiles.len() < workers {
            bound(tiles, workers, most, extra)
        } else {
            makespan(tiles, workers, most, extra)
        }
    };
    (1..=candidates).map(|n| longest.div_ceil(n)).min_by_key(|&most| time(most))
}

/// Pieces of a tile, and what each costs.
fn cut(tile: &WorkItem, most: u64, extra: u64) -> (u64, u64) {
    match cost(tile).div_ceil(most).max(1) {
        1 => (1, cost(tile)),
        pieces => (pieces, cost(tile) / pieces + extra),
    }
}

/// The better of two bounds of the time, quick where candidates are many. Workers take pieces in rounds, none of which takes
/// longer than the longest; and all but the last piece are dealt evenly.
fn bound(tiles: &[WorkItem], workers: usize, most: u64, extra: u64) -> u64 {
    let workers = workers as u64;
    let (mut pieces, mut total, mut longest) = (0, 0, 0);
    for (n, each) in tiles.iter().map(|t| cut(t, most, extra)) {
        (pieces, total, longest) = (pieces + n, total + n * each, longest.max(each));
    }
    (pieces.div_ceil(workers) * longest).min(total / workers + longest)
}

/// The time itself.
fn makespan(tiles: &[WorkItem], workers: usize, most: u64, extra: u64) -> u64 {
    let mut pieces: Vec<u64> = Vec::new();
    for (n, each) in tiles.iter().map(|t| cut(t, most, extra)) {
        pieces.extend((0..n).map(|_| each));
    }
    pieces.sort_unstable_by_key(|&each| Reverse(each));
    let mut free: BinaryHeap<Reverse<u64>> = (0..workers).map(|_| Reverse(0)).collect();
    for each in pieces {
        if let Some(mut first) = free.peek_mut() {
            first.0 += each;
        }
    }
    free.into_iter().map(|f| f.0).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::plan::{Batch, KvTable, Plan, Schedule, Splits};
    use crate::spec::AttentionSpec;

    /// Pieces of each tile of sequences of so many queries and KV tokens, on 132 processors; Llama's heads.
    fn pieces(lengths: &[(u32, u32)], causal: bool) -> Vec<usize> {
        let spec = AttentionSpec { causal, ..AttentionSpec::new(32, 8, 128) };
        let sums = |f: fn(&(u32, u32)) -> u32| {
            let sums = lengths.iter().scan(0, |sum, l| {
                *sum += f(l);
                Some(*sum)
            });
            std::iter::once(0).chain(sums).collect::<Vec<u32>>()
        };
        let (qo_indptr, kv_indptr) = (sums(|l| l.0), sums(|l| l.1));
        let batch = Batch::new(&qo_indptr, KvTable::Ragged { kv_indptr: &kv_indptr });
        let schedule = Schedule {
            row_tile: 128,
            workers: 132,
            ranges: 264,
            range_rows: 16,
            hopper: true,
            ..Schedule::default()
        };
        let plan = Plan::new("test", &spec, &batch, Splits::Auto, schedule).unwrap();
        let mut counts = BTreeMap::new();
        plan.items.iter().for_each(|i| *counts.entry((i.seq, i.kv_head, i.row_start)).or_default() += 1);
        counts.into_values().collect()
    }

    #[test]
    fn few_tiles_fill_the_processors_once() {
        // 64 drafted tokens: 16 tiles, of which 132 processors take 8 pieces each at once.
        assert_eq!(pieces(&[(64, 32768)], false), [8; 16]);
        assert_eq!(pieces(&[(32, 32768)], false), [16; 8]);
        // As many as there are tokens for.
        assert_eq!(pieces(&[(32, 8192)], false), [16; 8]);
        assert_eq!(pieces(&[(32, 512)], false), [1; 8]);
        // Nearly a tile for each.
        assert_eq!(pieces(&[(512, 32768)], false), [1; 128]);
    }

    #[test]
    fn many_tiles_are_cut_where_the_last_round_would_be_all_but_empty() {
        // 136 tiles of one length would take as long as 264.
        assert_eq!(pieces(&[(32, 16384); 17], false), [4; 136]);
        // The lengths of a causal prompt even out by themselves.
        assert_eq!(pieces(&[(4096, 4096)], true), [1; 8 * 128]);
        // One sequence that all would wait for.
        let mut lengths = vec![(32, 512); 70];
        lengths.push((32, 131_072));
        let counts = pieces(&lengths, false);
        assert!(counts[..560].iter().all(|&n| n == 1) && counts[560..].iter().all(|&n| n > 4), "{counts:?}");
    }
}
