//! What a layer needs around attention: `rms_norm`, `silu_mul`, `embedding`. A CTA takes a row; bound by memory.

use core::f32::consts::LOG2_E;

use crate::abi::{EmbeddingParams, RmsNormParams, SiluMulParams};
use crate::isa;
use crate::tile::elements::{cta_reduce, load, store};

const THREADS: u32 = 256;

/// 256 lanes read 512 to 1024 bytes at once; a word a warp for sums.
pub(super) struct Config;

impl super::Config for Config {
    const THREADS: u32 = THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = 4 * THREADS / 32;
}

#[inline(always)]
pub(super) unsafe fn rms_norm(p: &RmsNormParams) {
    let row = isa::block_x();
    let (x, residual, out) = (p.x.flat(row), p.residual.flat(row), p.out.flat(row));
    let sum_at = |i: u32| {
        // SAFETY: the host has checked the rows.
        let x = unsafe { load(x, p.x.dtype, i) };
        // SAFETY: as above.
        if p.residual.base != 0 { x + unsafe { load(residual, p.residual.dtype, i) } } else { x }
    };
    let mut squares = 0.0;
    let mut i = isa::thread_x();
    while i < p.dim {
        let x = sum_at(i);
        squares = isa::fma(x, x, squares);
        i += THREADS;
    }
    let add = |a: u32, b: u32| (f32::from_bits(a) + f32::from_bits(b)).to_bits();
    // SAFETY: the kernel's only shared memory.
    let squares = f32::from_bits(unsafe { cta_reduce(squares.to_bits(), THREADS, isa::shared_base(), add) });
    let factor = isa::rsqrt(squares / p.dim as f32 + p.eps);
    let mut i = isa::thread_x();
    while i < p.dim {
        // Input, residual and output may be the same memory: each element is read and written by one lane.
        let x = sum_at(i);
        // SAFETY: the host has checked the rows.
        unsafe {
            if p.residual.base != 0 {
                store(residual, p.residual.dtype, i, x);
            }
            let weight = load(p.weight.base, p.weight.dtype, i);
            store(out, p.out.dtype, i, x * factor * weight);
        }
        i += THREADS;
    }
}

#[inline(always)]
pub(super) unsafe fn silu_mul(p: &SiluMulParams) {
    let (gate_up, out) = (p.gate_up.flat(isa::block_x()), p.out.flat(isa::block_x()));
    let mut i = isa::thread_x();
    while i < p.dim {
        // SAFETY: the host has checked the rows.
        unsafe {
            let (gate, up) = (load(gate_up, p.gate_up.dtype, i), load(gate_up, p.gate_up.dtype, p.dim + i));
            let silu = gate * isa::rcp(1.0 + isa::ex2(-LOG2_E * gate));
            store(out, p.out.dtype, i, silu * up);
        }
        i += THREADS;
    }
}

#[inline(always)]
pub(super) unsafe fn embedding(p: &EmbeddingParams) {
    // SAFETY: one id per CTA.
    let [id] = unsafe { isa::ld_global_1(p.ids + p.id_stride * isa::block_x() as u64) };
    let (from, to) = (p.table.at(id, 0), p.out.at(isa::block_x(), 0));
    let mut i = isa::thread_x();
    while i < p.dim {
        // SAFETY: the host has checked table and output, and an id past the table is not followed.
        unsafe {
            let x = if id < p.vocab { load(from, p.table.dtype, i) } else { f32::NAN };
            store(to, p.out.dtype, i, x);
        }
        i += THREADS;
    }
}
