//! How much of the attention falls on each page: what evicting policies go by (H2O, arXiv:2306.14048; SnapKV,
//! arXiv:2404.14469). A warp takes a page, a half-warp a token, a lane 16 bytes of its row at a time.

use core::f32::consts::LOG2_E;

use crate::abi::{PageMassParams, Sequence, element};
use crate::attn::mask;
use crate::attn::rows::{read_struct, token_head};
use crate::attn::softmax::tanh;
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::Half;
use crate::tile::elements::{half_warp_sum, load, load_8};

/// The kernel. `ctaid.x`: sequence and part of its pages; `ctaid.y`: KV head.
#[inline(always)]
pub(super) unsafe fn body<T: Half>(params: &PageMassParams) {
    let (p, head) = (&params.attention, isa::block_y());
    let dtype = if T::IS_BF16 { element::BF16 } else { element::F16 };
    let (index, part) = isa::div_rem(isa::block_x(), params.page_ctas);
    // SAFETY: `page_ctas` CTAs per sequence.
    let seq: Sequence = unsafe { read_struct(p.sequences + size_of::<Sequence>() as u64 * index as u64) };
    let index = part * WARPS + isa::thread_x() / 32;
    let first = index * p.page_size.value;
    if first >= seq.kv_len {
        return;
    }
    let left = seq.kv_len - first;
    let tokens = if left < p.page_size.value { left } else { p.page_size.value };
    let entry = seq.page_start + index as u64;
    // SAFETY: the sequence's list has the page.
    let [page] = unsafe { isa::ld_global_1(p.pages + 4 * entry) };
    let (half, lane) = (isa::thread_x() % 32 / 16, isa::thread_x() % 16);
    let channel = |step: usize| 8 * (lane + 16 * step as u32);

    let mut sum = 0.0;
    let mut pair = 0;
    while pair < tokens {
        let offset = pair + half;
        let token = first + offset;
        let mut k = [[0.0; 8]; 2];
        for (step, k) in k.iter_mut().enumerate() {
            if offset < tokens && channel(step) < p.head_dim {
                // SAFETY: the host has checked the pages, and their alignment; the token is below the sequence's end.
                *k = unsafe { load_8(p.k.at(page, head, offset), dtype, channel(step)) };
            }
        }
        let mut row = 0;
        while row < seq.q_len * p.group.value {
            let (q_token, q_head) = token_head(p.group, head, row);
            let q_row = p.q.at(seq.q_start + q_token as u64, q_head);
            let mut dot = 0.0;
            for (step, k) in k.iter().enumerate() {
                if channel(step) < p.head_dim {
                    // SAFETY: the host has checked queries, and their alignment.
                    let q = unsafe { load_8(q_row, dtype, channel(step)) };
                    for d in 0..8 {
                        dot = isa::fma(q[d], k[d], dot);
                    }
                }
            }
            let dot = half_warp_sum(dot);
            let position = seq.position + q_token as i32;
            let end = if offset < tokens { seq.kv_len as i32 } else { 0 };
            let mut seen = mask::visible(&p.score, position, token as i32, end) & 1;
            if seq.n_tree != 0 && offset < tokens {
                let words = seq.n_tree.div_ceil(32);
                let at = p.tree_mask + 4 * (seq.tree_start + q_token as u64 * words as u64);
                // SAFETY: the host gives `words` words for each query token.
                seen &= mask::tree(&seq, token as i32, |i| unsafe { isa::ld_global_1(at + 4 * i as u64) }[0]);
            }
            if seen == 1 {
                let mut x = dot * p.score.scale;
                if p.score.soft_cap > 0.0 {
                    x = p.score.soft_cap * tanh(x * isa::rcp(p.score.soft_cap));
                }
                // SAFETY: the host gives a slope per query head, and an LSE per row.
                unsafe {
                    if p.alibi_slopes != 0 {
                        let slope = load(p.alibi_slopes, element::F32, q_head);
                        x = isa::fma(slope, (token as i32 - position) as f32, x);
                    }
                    let lse = load(p.lse.at(seq.q_start + q_token as u64, q_head), element::F32, 0);
                    sum += isa::ex2((x - lse) * LOG2_E);
                }
            }
            row += 1;
        }
        pair += 2;
    }
    // Both halves' tokens.
    sum += f32::from_bits(isa::shfl_bfly(sum.to_bits(), 16));
    if isa::thread_x().is_multiple_of(32) {
        let row = params.mass + head as u64 * params.mass_head;
        // SAFETY: the host has checked the tensor; an entry is one warp's.
        unsafe {
            let at = row + 4 * entry;
            let [before] = isa::ld_global_1(at);
            isa::st_global_1(at, [(f32::from_bits(before) + sum).to_bits()]);
        }
    }
}
