//! Finished states of the same rows over disjoint KV, merged: cascades and sequence parallelism. A warp takes a
//! row, a lane every 32nd channel.

use core::f32::consts::{LN_2, LOG2_E};

use crate::abi::{MERGE_STATES, MergeStatesParams, element};
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::elements::{load, store};

#[inline(always)]
pub(super) unsafe fn body(p: &MergeStatesParams) {
    let row = isa::block_x() * WARPS + isa::thread_x() / 32;
    if row >= p.num_rows {
        return;
    }
    let lse = |state: usize| match (state as u32) < p.num_states {
        // SAFETY: the host has checked that every state has the row.
        true => unsafe { load(p.lse[state].flat(row), element::F32, 0) },
        false => f32::NEG_INFINITY,
    };
    let mut max = f32::NEG_INFINITY;
    // Loops over constants, so that parameters stay where they are.
    for state in 0..MERGE_STATES {
        let x = lse(state);
        max = if x > max { x } else { max };
    }
    // An empty state is left out: its O counts for nothing, whatever it holds.
    let weight = |state: usize| {
        if max == f32::NEG_INFINITY { 0.0 } else { isa::ex2((lse(state) - max) * LOG2_E) }
    };
    let mut total = 0.0;
    for state in 0..MERGE_STATES {
        total += weight(state);
    }
    let factor = if total == 0.0 { 0.0 } else { isa::rcp(total) };
    let mut i = isa::thread_x() % 32;
    while i < p.dim {
        let mut sum = 0.0;
        for state in 0..MERGE_STATES {
            let weight = weight(state);
            if weight != 0.0 {
                // SAFETY: as above.
                sum = isa::fma(weight, unsafe { load(p.o[state].flat(row), p.o[state].dtype, i) }, sum);
            }
        }
        // SAFETY: as above; a row is one warp's.
        unsafe { store(p.out.flat(row), p.out.dtype, i, sum * factor) };
        i += 32;
    }
    if isa::thread_x().is_multiple_of(32) {
        let merged = if total == 0.0 { f32::NEG_INFINITY } else { max + isa::lg2(total) * LN_2 };
        // SAFETY: as above.
        unsafe { store(p.out_lse.flat(row), element::F32, 0, merged) };
    }
}
