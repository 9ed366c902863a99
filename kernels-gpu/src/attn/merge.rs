//! Partial states of a row, in the order of their KV, to a finished row.

use crate::abi::{
    AttentionParams, DECODE_WARPS, Divisor, MergeItem, NO_MERGE, RangeParams, Sequence, TokenRows, WorkItem,
    partial_stride,
};
use crate::attn::output::sink_logit;
use crate::attn::rows::{read_struct, token_head};
use crate::attn::softmax;
use crate::isa;
use crate::tile::Half;

/// States whose loads are under way together.
const AHEAD: u32 = 4;

/// Where partial states are, and finished rows go.
pub(crate) struct Merging<'a> {
    pub(crate) out: &'a TokenRows,
    pub(crate) lse: &'a TokenRows,
    pub(crate) sink_logits: u64,
    pub(crate) partials: u64,
    /// Address of the list of splits.
    pub(crate) splits: u64,
    pub(crate) group: Divisor,
    pub(crate) v_head_dim: u32,
}

impl Merging<'_> {
    /// Merges packed row `row` of the item, by a warp. `WIDE`: whether there may be more than 256 channels.
    ///
    /// # Safety
    /// The states are written and visible, the row is in the item and this warp's alone.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn row<T: Half, const WIDE: bool>(&self, item: &MergeItem, seq: &Sequence, row: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            self.channels::<T>(item, seq, row, 0);
            if WIDE && self.v_head_dim > 256 {
                self.channels::<T>(item, seq, row, 256);
            }
        }
    }

    /// As [`Merging::row`], 256 channels from `from`.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    #[track_caller]
    unsafe fn channels<T: Half>(&self, item: &MergeItem, seq: &Sequence, row: u32, from: u32) {
        // Opaque: what follows from it is not computed ahead of the kernel's loops.
        let lane = isa::opaque(isa::thread_x()) % 32;
        let stride = 4 * partial_stride(self.v_head_dim as usize) as u64;
        let first = self.partials + (row - item.row_start) as u64 * stride;
        let splits = self.splits + 4 * item.splits as u64;
        // Lane `i` holds channels `64 c + 2 i` and `+ 1`.
        let channel = |c: usize| from + 64 * c as u32 + 2 * lane;
        let mut o = [[0.0f32; 2]; 4];
        let (mut m, mut l) = (f32::NEG_INFINITY, 0.0);
        let mut split = 0;
        while split < item.num_splits {
            let (mut states, mut x) = ([[0.0f32; 2]; AHEAD as usize], [[[0.0f32; 2]; 4]; AHEAD as usize]);
            for i in 0..AHEAD {
                if split + i < item.num_splits {
                    // SAFETY: the list has the merge's splits.
                    let [state] = unsafe { isa::ld_global_1(splits + 4 * (split + i) as u64) };
                    let at = first + state as u64 * stride;
                    // SAFETY: the plan's states; rows end with room for maximum and sum.
                    states[i as usize] = unsafe { isa::ld_global_2(at + stride - 64) }.map(f32::from_bits);
                    for c in 0..4 {
                        if channel(c) < self.v_head_dim {
                            // SAFETY: as above.
                            x[i as usize][c] =
                                unsafe { isa::ld_global_2(at + 4 * channel(c) as u64) }.map(f32::from_bits);
                        }
                    }
                }
            }
            for i in 0..AHEAD {
                if split + i < item.num_splits {
                    let [split_m, split_l] = states[i as usize];
                    let (new, sum, factors) = softmax::merge([m, split_m], [l, split_l]);
                    (m, l) = (new, sum);
                    for c in 0..4 {
                        for j in 0..2 {
                            o[c][j] = isa::fma(o[c][j], factors[0], x[i as usize][c][j] * factors[1]);
                        }
                    }
                }
            }
            split += AHEAD;
        }
        let (token, head) = token_head(self.group, item.kv_head, row);
        let token = seq.q_start + token as u64;
        let (factor, lse) = softmax::finish(m, l, sink_logit(self.sink_logits, head));
        for c in 0..4 {
            if channel(c) < self.v_head_dim {
                let x = o[c].map(|x| if factor == 0.0 { 0.0 } else { x * factor });
                // SAFETY: each merge item has rows of its own, checked by the host to be inside `out`.
                unsafe {
                    isa::st_global_1(self.out.at(token, head) + 2 * channel(c) as u64, [T::pack(x[0], x[1])])
                };
            }
        }
        if self.lse.base != 0 && lane == 0 && from == 0 {
            // SAFETY: as above.
            unsafe { isa::st_global_1(self.lse.at(token, head), [lse.to_bits()]) };
        }
    }
}

/// The warps of a CTA that merge.
pub(crate) trait Crew {
    const WARPS: u32;
    /// The lane's number among theirs.
    fn thread() -> u32;
    /// A barrier of theirs.
    #[track_caller]
    fn sync();
}

/// All warps of a decoding CTA.
pub(crate) struct WholeCta;

impl Crew for WholeCta {
    const WARPS: u32 = DECODE_WARPS as u32;

    #[inline(always)]
    fn thread() -> u32 {
        isa::thread_x()
    }

    #[inline(always)]
    #[track_caller]
    fn sync() {
        isa::bar_sync();
    }
}

/// Where the item is a part of its rows' KV: the CTA that has come last merges all parts. The crew has met since it wrote
/// the item's part.
#[inline(always)]
#[track_caller]
pub(crate) fn merge_if_last<C: Crew, T: Half, const WIDE: bool>(
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
    if C::thread() == 0 {
        // SAFETY: a counter per merge; the flag's word is free since the barrier before the item.
        unsafe {
            let most = merge.num_items - 1;
            let before = isa::atom_inc_global_acq_rel(ranges.arrivals + 4 * item.merge as u64, most);
            isa::st_shared_1(flag, [(before == most) as u32]);
        }
    }
    C::sync();
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
    let mut row = merge.row_start + C::thread() / 32;
    while isa::agreed(row < merge.row_end) {
        // SAFETY: all parts are written: their CTAs have come to the counter before; a row is one warp's.
        unsafe { merging.row::<T, WIDE>(&merge, seq, row) };
        row += C::WARPS;
    }
}
