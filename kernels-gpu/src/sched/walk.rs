//! Which blocks of KV a tile of rows meets, in which order, and which of them have edges of masks in them.

use crate::abi::{Divisor, ScoreParams, Sequence, WorkItem};
use crate::attn::rows::plain_end;

/// An item's blocks of `N` tokens from its first token on. They are taken from the last to the first, so that the ones
/// on the diagonal come first and what remains is plain.
///
/// Under a window the tile sees the first `sinks` blocks, then, `gap` blocks further, all to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walk {
    /// Blocks that are taken, at least one.
    pub(crate) steps: u32,
    sinks: u32,
    gap: u32,
    /// Blocks from this one on have columns that some row does not see: a diagonal, an end, a tree.
    right: u32,
    /// So have blocks before this one: a window's left edge.
    left: u32,
}

impl Walk {
    /// For blocks of `n` tokens that count along a list of pages: any of them may have an edge.
    #[inline(always)]
    pub(crate) fn listed(item: &WorkItem, n: u32) -> Self {
        let blocks = (item.kv_end - item.kv_start).div_ceil(n);
        Walk { steps: if blocks > 0 { blocks } else { 1 }, sinks: 0, gap: 0, right: 0, left: 0 }
    }

    /// For blocks of `n` tokens.
    #[inline(always)]
    pub(crate) fn new(score: &ScoreParams, group: Divisor, item: &WorkItem, seq: &Sequence, n: u32) -> Self {
        let len = item.kv_end - item.kv_start;
        let blocks = len.div_ceil(n);
        // Positions are within 31 bits and a sign: the host allows no more tokens.
        let position = |row: u32| seq.position + group.div_rem(row).0 as i32;
        // Tokens of the item before `token`, 0 to all of them.
        let within = |token: i32| {
            let x = if token > item.kv_start as i32 { token as u32 - item.kv_start } else { 0 };
            if x < len { x } else { len }
        };

        let mut full = within(plain_end(item, seq) as i32);
        if score.causal != 0 {
            let seen = within(position(item.row_start) + 1);
            full = if seen < full { seen } else { full };
        }
        let right = full / n;
        let (mut sinks, mut gap, mut left) = (0, 0, 0);
        if score.window != 0 {
            let window = if score.window < i32::MAX as u32 { score.window as i32 } else { i32::MAX };
            let low = |row: u32| {
                let next = position(row) + 1;
                within(if next > window { next - window } else { 0 })
            };
            left = low(item.row_end - 1).div_ceil(n);
            let visible = low(item.row_start) / n;
            let wanted = if score.num_sinks < item.kv_end { score.num_sinks } else { item.kv_end };
            let wanted = within(wanted as i32).div_ceil(n);
            sinks = if wanted < visible { wanted } else { visible };
            gap = visible - sinks;
        }
        // At least one, of which nothing is seen where there is nothing to see.
        let steps = if blocks > gap { blocks - gap } else { 1 };
        Walk { steps, sinks, gap, right, left }
    }

    /// Block of step `step`; steps count down to 0.
    #[inline(always)]
    pub(crate) fn block(&self, step: u32) -> u32 {
        step + if step < self.sinks { 0 } else { self.gap }
    }

    /// Whether some row does not see some column of a block.
    #[inline(always)]
    pub(crate) fn is_edge(&self, block: u32) -> bool {
        block >= self.right || block < self.left
    }

    /// As words for shared memory.
    #[inline(always)]
    pub(crate) fn to_words(self) -> ([u32; 4], u32) {
        ([self.steps, self.sinks, self.gap, self.right], self.left)
    }

    /// From [`Walk::to_words`].
    #[inline(always)]
    pub(crate) fn from_words([steps, sinks, gap, right]: [u32; 4], left: u32) -> Self {
        Walk { steps, sinks, gap, right, left }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::NO_PARTIAL;
    use crate::sim::Rng;

    #[test]
    fn every_visible_column_is_met_and_plain_blocks_are_plain() {
        let mut rng = Rng(5);
        for _ in 0..4000 {
            let mut draw = |n: usize| rng.below(n) as u32;
            let n = [64, 80, 112, 128, 176][draw(5) as usize];
            let score = ScoreParams {
                scale: 1.0,
                soft_cap: 0.0,
                window: draw(2) * (1 + draw(400)),
                num_sinks: draw(3) * draw(200),
                causal: draw(2),
            };
            let group = Divisor::new(1 + draw(5));
            let (q_len, kv_len) = (1 + draw(300), draw(900));
            let n_tree = draw(2) * draw(kv_len as usize + 1);
            let rows = q_len * group.value;
            let row_start = draw(rows as usize);
            let kv_start = draw(1 + kv_len as usize / 64) * 64;
            let item = WorkItem {
                seq: 0,
                kv_head: 0,
                row_start,
                row_end: rows.min(row_start + 128),
                kv_start,
                kv_end: kv_start + draw(1 + (kv_len - kv_start.min(kv_len)) as usize),
                partial: NO_PARTIAL,
                scratch: NO_PARTIAL,
                pages: 0,
                merge: 0,
                reserved: 0,
            };
            if item.kv_end > kv_len {
                continue;
            }
            let position = kv_len as i32 - q_len as i32;
            let seq = Sequence { q_len, kv_len, n_tree, position, ..Default::default() };
            let walk = Walk::new(&score, group, &item, &seq, n);
            assert_eq!(Walk::from_words(walk.to_words().0, walk.to_words().1), walk);
            let met: std::vec::Vec<u32> = (0..walk.steps).map(|s| walk.block(s)).collect();
            assert!(met.windows(2).all(|w| w[0] < w[1]), "{met:?}");
            let blocks = (item.kv_end - item.kv_start).div_ceil(n);
            // Where there is nothing to see, a block with no visible token stands in.
            assert!(met.iter().all(|&b| b < blocks) || met.len() == 1 && walk.is_edge(met[0]));
            for block in 0..blocks {
                for column in block * n..(block + 1) * n {
                    let column = item.kv_start + column;
                    for row in [item.row_start, item.row_end - 1] {
                        let position = kv_len as i64 - q_len as i64 + (row / group.value) as i64;
                        let distance = position - column as i64;
                        let mut seen = column < item.kv_end;
                        seen &= score.causal == 0 || distance >= 0;
                        seen &=
                            score.window == 0 || distance < score.window as i64 || column < score.num_sinks;
                        assert!(
                            !seen || met.contains(&block),
                            "{walk:?} {score:?} {item:?} {seq:?} {column}"
                        );
                        let plain = seen && column < kv_len - n_tree;
                        assert!(
                            plain || !met.contains(&block) || walk.is_edge(block),
                            "{walk:?} {item:?} {column}"
                        );
                    }
                }
            }
        }
    }
}
