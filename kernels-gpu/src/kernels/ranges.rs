//! What decode kernels have in common: CTAs that stay and walk a range of items, and merge what was cut.

use crate::abi::{AttentionParams, DECODE_WARPS, MergeItem, NO_MERGE, RangeParams, Sequence, WorkItem};
use crate::attn::merge::Merging;
use crate::attn::rows::read_struct;
use crate::isa;
use crate::tile::Half;

/// The CTA's first item (0), or one past its last (1): loaded where it is needed, and not kept in registers.
#[inline(always)]
#[track_caller]
pub(super) fn range(ranges: &RangeParams, i: u32) -> u32 {
    let at = ranges.ranges + 4 * (isa::opaque(isa::block_x()) + i) as u64;
    // SAFETY: the host gives one more than CTAs.
    let [item] = unsafe { isa::ld_global_1(at) };
    item
}

/// Where the item is a part of its rows' KV: the CTA that has come last merges all parts.
#[inline(always)]
#[track_caller]
pub(super) fn merge_if_last<T: Half, const WIDE: bool>(
    p: &AttentionParams,
    ranges: &RangeParams,
    item: &WorkItem,
    seq: &Sequence,
    flag: u32,
) {
    if isa::agreed(item.merge == NO_MERGE) {
        return;
    }
    // SAFETY: the plan has the item's merge.
    let merge: MergeItem =
        unsafe { read_struct(ranges.merges + item.merge as u64 * size_of::<MergeItem>() as u64) };
    if isa::thread_x() == 0 {
        // SAFETY: a counter per merge; the flag's word is free since the barrier before the item.
        unsafe {
            let most = merge.num_items - 1;
            let before = isa::atom_inc_global_acq_rel(ranges.arrivals + 4 * item.merge as u64, most);
            isa::st_shared_1(flag, [(before == most) as u32]);
        }
    }
    isa::bar_sync();
    // SAFETY: written before the barrier.
    if isa::agreed(unsafe { isa::ld_shared_1(flag) }[0] == 0) {
        return;
    }
    let merging = Merging {
        out: &p.out,
        lse: &p.lse,
        sink_logits: p.sink_logits,
        partials: p.partials,
        splits: ranges.splits,
        group: p.group,
        v_head_dim: p.v_head_dim,
    };
    let mut row = merge.row_start + isa::thread_x() / 32;
    while isa::agreed(row < merge.row_end) {
        // SAFETY: all parts are written: their CTAs have come to the counter before; a row is one warp's.
        unsafe { merging.row::<T, WIDE>(&merge, seq, row) };
        row += DECODE_WARPS as u32;
    }
}
