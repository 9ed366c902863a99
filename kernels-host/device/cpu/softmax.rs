//! The state of online softmax for a tile of rows, and the scratch that it lives in.
#![allow(unsafe_op_in_unsafe_fn)]

use std::cell::RefCell;

use ferroflash_kernels::abi::KV_BLOCK;

use super::ROW_TILE;
use super::simd::Simd;

/// A cache line, for aligned scratch.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// The f32 scratch of one thread, for a tile of rows and a block of KV.
pub(super) struct Scratch {
    pub(super) q: *mut f32,
    pub(super) k: *mut f32,
    pub(super) v: *mut f32,
    pub(super) s: *mut f32,
    pub(super) state: State,
    pub(super) merged: State,
}

/// Online softmax of a tile: per row the maximum `m` (base 2), the sum `l` and the unnormalised `O`.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub(super) m: *mut f32,
    pub(super) l: *mut f32,
    pub(super) o: *mut f32,
}

pub(super) fn with_scratch(padded_dim: usize, f: impl FnOnce(&Scratch)) {
    thread_local! {
        static LINES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
    }
    let sizes = [
        ROW_TILE * padded_dim, // q
        KV_BLOCK * padded_dim, // k
        KV_BLOCK * padded_dim, // v
        ROW_TILE * KV_BLOCK,   // s
        ROW_TILE * padded_dim, // state.o
        ROW_TILE * padded_dim, // merged.o
        4 * ROW_TILE,          // m and l of both
    ];
    LINES.with_borrow_mut(|lines| {
        let needed = sizes.iter().sum::<usize>() / 16;
        if lines.len() < needed {
            lines.resize(needed, Line([0.0; 16]));
        }
        let mut at = lines.as_mut_ptr().cast::<f32>();
        let [q, k, v, s, o, merged_o, ml] = sizes.map(|size| {
            let here = at;
            at = at.wrapping_add(size);
            here
        });
        let part = |i: usize| ml.wrapping_add(i * ROW_TILE);
        f(&Scratch {
            q,
            k,
            v,
            s,
            state: State { m: part(0), l: part(1), o },
            merged: State { m: part(2), l: part(3), o: merged_o },
        })
    });
}

impl State {
    /// The empty state.
    ///
    /// # Safety
    /// The state holds `rows` rows.
    pub(super) unsafe fn init(&self, rows: usize, padded_dim: usize) {
        for r in 0..rows {
            *self.m.add(r) = f32::NEG_INFINITY;
            *self.l.add(r) = 0.0;
        }
        self.o.write_bytes(0, rows * padded_dim);
    }

    /// Adds another state of one row; the empty state changes nothing, to the bit.
    ///
    /// # Safety
    /// The machine has `S`; `r` is a row of the state, `o` a padded row.
    #[inline(always)]
    pub(super) unsafe fn merge_row<S: Simd>(
        &self,
        r: usize,
        padded_dim: usize,
        m: f32,
        l: f32,
        o: *const f32,
    ) {
        let old = *self.m.add(r);
        let new = max_nan(old, m);
        if new == f32::NEG_INFINITY {
            return;
        }
        let (a, b) = (exp2::<S>(old - new), exp2::<S>(m - new));
        *self.m.add(r) = new;
        *self.l.add(r) = *self.l.add(r) * a + l * b;
        let (a, b) = (S::splat(a), S::splat(b));
        let into = self.o.add(r * padded_dim);
        for d in (0..padded_dim).step_by(S::LANES) {
            let sum = S::fma(S::load(o.add(d)), b, S::mul(S::load(into.add(d)), a));
            S::store(into.add(d), sum);
        }
    }
}

/// The larger; NaN where either is.
pub(super) fn max_nan(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

/// The kernel's one exponential, of a scalar.
///
/// # Safety
/// The machine has `S`.
#[inline(always)]
pub(super) unsafe fn exp2<S: Simd>(x: f32) -> f32 {
    // Reducing a splat is exact, and keeps to the one exponential of the kernel.
    S::reduce_max(S::exp2(S::splat(x)))
}
