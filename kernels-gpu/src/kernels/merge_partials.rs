//! Partial states of rows to finished rows, for kernels whose CTAs do not merge themselves. A warp takes a row.

use crate::abi::{MergeItem, MergePartialsParams, Sequence};
use crate::attn::merge::Merging;
use crate::attn::rows::read_struct;
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::Half;

/// The kernel. `ctaid.x`: item; `ctaid.y`: four of its rows.
#[inline(always)]
pub(super) unsafe fn body<T: Half>(p: &MergePartialsParams) {
    // SAFETY: one item per CTA in x.
    let item: MergeItem =
        unsafe { read_struct(p.items + isa::block_x() as u64 * size_of::<MergeItem>() as u64) };
    // SAFETY: the item's sequence.
    let seq: Sequence = unsafe { read_struct(p.sequences + item.seq as u64 * size_of::<Sequence>() as u64) };
    let row = item.row_start + isa::block_y() * WARPS + isa::thread_x() / 32;
    let merging = Merging {
        out: &p.out,
        lse: &p.lse,
        sink_logits: p.sink_logits,
        partials: p.partials,
        splits: p.splits,
        group: p.group,
        v_head_dim: p.v_head_dim,
    };
    if row < item.row_end {
        // SAFETY: the attention kernel has written the states.
        unsafe { merging.row::<T, true>(&item, &seq, row) };
    }
}
