//! Which of 64 columns a row sees, as bits.

use crate::abi::{AttentionParams, ScoreParams, Sequence, WorkItem};
use crate::attn::kv::PageList;
use crate::attn::rows::LaneRows;
use crate::attn::softmax::Scores;
use crate::isa;

/// The first `n` bits, `n` clamped to 0 to 64.
#[inline(always)]
fn first(n: i32) -> u64 {
    if n >= 64 {
        u64::MAX
    } else if n <= 0 {
        0
    } else {
        (1 << n) - 1
    }
}

/// Columns `at..at + 64` that a query at `position` sees, of those below `end`; tree masks apart.
#[inline(always)]
pub(crate) fn visible(score: &ScoreParams, position: i32, at: i32, end: i32) -> u64 {
    let mut bits = first(end - at);
    if score.causal != 0 {
        bits &= first(position + 1 - at);
    }
    if score.window != 0 {
        let low = position as i64 - score.window as i64 + 1 - at as i64;
        let low = low.clamp(0, 64) as i32;
        // A sink outside the causal range stays hidden.
        bits &= !first(low) | first((score.num_sinks.min(i32::MAX as u32) as i32).saturating_sub(at));
    }
    bits
}

/// As [`visible`], where columns count along a list of pages: run by run of one page.
#[inline(always)]
#[track_caller]
fn visible_in_list(p: &AttentionParams, item: &WorkItem, position: i32, at: u32) -> u64 {
    if at >= item.kv_end {
        return 0;
    }
    let list = PageList::new(p.logical_pages, p.page_size, item);
    let end = if item.kv_end - at < 64 { item.kv_end - at } else { 64 };
    let (mut bits, mut column) = (0, 0);
    while column < end {
        // SAFETY: the column is below the item's end.
        let (page, offset) = unsafe { list.locate(at + column) };
        let first_position = (page * p.page_size.value + offset) as i32;
        let left = p.page_size.value - offset;
        let run = if end - column < left { end - column } else { left };
        bits |= (visible(&p.score, position, first_position, i32::MAX) & first(run as i32)) << column;
        column += run;
    }
    bits
}

/// Bits of the tree mask for columns `at..at + 64`: those before the tree are seen. `word(i)` is word `i` of
/// the query's row.
#[inline(always)]
pub(crate) fn tree(seq: &Sequence, at: i32, word: impl Fn(u32) -> u32) -> u64 {
    let begin = (seq.kv_len - seq.n_tree) as i32;
    let words = seq.n_tree.div_ceil(32) as i32;
    // Bit 0 of the result is bit `shift` of the row.
    let shift = at - begin;
    if shift <= -64 {
        return u64::MAX;
    }
    let get = |i: i32| if i >= 0 && i < words { word(i as u32) as u64 } else { 0 };
    let (index, bit) = (shift >> 5, shift & 31);
    let low = get(index) | get(index + 1) << 32;
    let bits = if bit == 0 { low } else { low >> bit | get(index + 2) << (64 - bit) };
    bits | first(-shift)
}

/// Sets what the lane's rows do not see of the columns from `at` to `-inf`. `LISTS`: whether columns may count along a
/// list of pages.
#[inline(always)]
pub(crate) fn hide<const LISTS: bool, const TILES: usize>(
    rows: &LaneRows<'_>,
    at: u32,
    s: &mut Scores<TILES>,
) {
    for first in (0..TILES).step_by(8) {
        // Lanes of a warp may differ here; none of what follows is a collective.
        let at = at + 8 * first as u32;
        if rows.see_all::<LISTS>(at) {
            continue;
        }
        let p = rows.place.p;
        let (item, seq) = rows.place.item();
        for r in 0..2 {
            // Read again for each row, and not kept.
            let position = rows.positions().0[r];
            let mut bits = if !LISTS || p.logical_pages == 0 {
                visible(&p.score, position, at as i32, item.kv_end as i32)
            } else {
                visible_in_list(p, &item, position, at)
            };
            if seq.n_tree != 0 {
                let token = p.group.div_rem((item.row_start + rows.row(r)).min(item.row_end - 1)).0;
                let words = seq.n_tree.div_ceil(32);
                let row = p.tree_mask + 4 * (seq.tree_start + token as u64 * words as u64);
                // SAFETY: the host gives `words` words for each query token.
                bits &= tree(&seq, at as i32, |i| unsafe { isa::ld_global_1(row + 4 * i as u64) }[0]);
            }
            let bits = bits >> (2 * (isa::thread_x() % 4));
            let halves = [bits as u32, (bits >> 32) as u32];
            for j in 0..8 {
                if first + j >= TILES {
                    break;
                }
                for i in 0..2 {
                    if halves[j / 4] >> (8 * (j % 4) + i) & 1 == 0 {
                        s[first + j][2 * r + i] = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Rng;

    #[test]
    fn bits_are_the_definition() {
        let mut rng = Rng(3);
        for _ in 0..20_000 {
            let mut draw = |n: usize| rng.below(n) as i32;
            let score = ScoreParams {
                scale: 1.0,
                soft_cap: 0.0,
                window: draw(3) as u32 * draw(200) as u32,
                num_sinks: draw(100) as u32,
                causal: draw(2) as u32,
            };
            let (position, at, end) = (draw(400) - 20, 64 * draw(6), draw(400));
            let n_tree = draw(2) * draw(end as usize + 1);
            let seq = Sequence { kv_len: end as u32, n_tree: n_tree as u32, ..Default::default() };
            let words: [u32; 13] =
                core::array::from_fn(|i| (i as u32 + 1).wrapping_mul(0x9E37_79B9) ^ position as u32);
            let bits = visible(&score, position, at, end) & tree(&seq, at, |i| words[i as usize]);
            for c in 0..64 {
                let column = at + c;
                let mut seen = column < end;
                seen &= score.causal == 0 || column <= position;
                seen &= score.window == 0
                    || position - column < score.window as i32
                    || column < score.num_sinks as i32;
                let in_tree = column - (end - n_tree);
                seen &= in_tree < 0
                    || in_tree >= n_tree
                    || words[in_tree as usize / 32] >> (in_tree % 32) & 1 == 1;
                assert_eq!(bits >> c & 1 == 1, seen, "{score:?} {position} {at} {end} {n_tree} {c}");
            }
        }
    }
}
