//! Partial states of rows, in the order of their KV, to finished rows. A warp takes a row, a lane every 32nd
//! channel.

use crate::abi::{MergeItem, MergePartialsParams, Sequence, partial_stride};
use crate::attn::output::sink_logit;
use crate::attn::rows::{read_struct, token_head};
use crate::attn::softmax;
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::Half;

/// The kernel. `ctaid.x`: item; `ctaid.y`: four of its rows.
#[inline(always)]
pub(super) unsafe fn body<T: Half>(p: &MergePartialsParams) {
    // SAFETY: one item per CTA in x, and its sequence.
    let item: MergeItem =
        unsafe { read_struct(p.items + isa::block_x() as u64 * size_of::<MergeItem>() as u64) };
    // SAFETY: as above.
    let seq: Sequence = unsafe { read_struct(p.sequences + item.seq as u64 * size_of::<Sequence>() as u64) };
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let row = item.row_start + isa::block_y() * WARPS + warp;
    if row >= item.row_end {
        return;
    }
    let stride = 4 * partial_stride(p.v_head_dim as usize) as u64;
    let first = p.partials + (item.partial as u64 + (row - item.row_start) as u64) * stride;
    let num_rows = (item.row_end - item.row_start) as u64;
    // Lane `i` holds channels `64 c + 2 i` and `+ 1`.
    let mut o = [[0.0f32; 2]; 4];
    let (mut m, mut l) = (f32::NEG_INFINITY, 0.0);
    for split in 0..item.num_splits {
        let at = first + split as u64 * num_rows * stride;
        let m_l_at = at + stride - 64;
        // SAFETY: the plan's states, all written by the attention kernel.
        let [split_m, split_l] = unsafe { isa::ld_global_2(m_l_at) }.map(f32::from_bits);
        let (new, sum, factors) = softmax::merge([m, split_m], [l, split_l]);
        (m, l) = (new, sum);
        for (c, o) in o.iter_mut().enumerate() {
            let channel = 64 * c as u32 + 2 * lane;
            if channel < p.v_head_dim {
                // SAFETY: as above.
                let x = unsafe { isa::ld_global_2(at + 4 * channel as u64) }.map(f32::from_bits);
                for i in 0..2 {
                    o[i] = isa::fma(o[i], factors[0], x[i] * factors[1]);
                }
            }
        }
    }
    let (token, head) = token_head(p.group, item.kv_head, row);
    let token = seq.q_start + token as u64;
    let (factor, lse) = softmax::finish(m, l, sink_logit(p.sink_logits, head));
    for (c, o) in o.iter().enumerate() {
        let channel = 64 * c as u32 + 2 * lane;
        if channel < p.v_head_dim {
            let x = o.map(|x| if factor == 0.0 { 0.0 } else { x * factor });
            // SAFETY: each merge item has rows of its own, checked by the host to be inside `out`.
            unsafe { isa::st_global_1(p.out.at(token, head) + 2 * channel as u64, [T::pack(x[0], x[1])]) };
        }
    }
    if p.lse.base != 0 && lane == 0 {
        // SAFETY: as above.
        unsafe { isa::st_global_1(p.lse.at(token, head), [lse.to_bits()]) };
    }
}
