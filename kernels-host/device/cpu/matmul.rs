//! The one matrix product: small tiles held in registers.
#![allow(unsafe_op_in_unsafe_fn)]

use super::convert::Float;
use super::simd::Simd;

/// `c[m, n] = a[m, k] * b[k, n]`, added to `c` where `ADD`; `n` is `vecs` vectors of `S`, `b(p, j)`
/// is where row `p` of `b` has its element `j`.
///
/// Every element of `c` is one chain of FMAs over `k` in order, so a row's bits do not depend on how
/// many rows there are.
///
/// # Safety
/// The machine has `S`; `a` is valid for `m` rows of `k` at distance `lda`, `b` for `k` rows and `c`
/// for `m` rows of `vecs * S::LANES`.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices and their sizes
pub unsafe fn matmul<S: Simd, T: Float, const ADD: bool>(
    m: usize,
    k: usize,
    vecs: usize,
    a: *const f32,
    lda: usize,
    b: impl Fn(usize, usize) -> *const T + Copy,
    c: *mut f32,
    ldc: usize,
) {
    let mut v = 0;
    while v < vecs {
        let at = v * S::LANES;
        let b = |p, j| b(p, at + j);
        let c = c.add(at);
        let nv = (vecs - v).min(S::TILE_VECS);
        match nv {
            1 => column::<S, T, ADD, 1>(m, k, a, lda, b, c, ldc),
            2 => column::<S, T, ADD, 2>(m, k, a, lda, b, c, ldc),
            3 => column::<S, T, ADD, 3>(m, k, a, lda, b, c, ldc),
            _ => column::<S, T, ADD, 4>(m, k, a, lda, b, c, ldc),
        }
        v += nv;
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn column<S: Simd, T: Float, const ADD: bool, const NV: usize>(
    m: usize,
    k: usize,
    a: *const f32,
    lda: usize,
    b: impl Fn(usize, usize) -> *const T + Copy,
    c: *mut f32,
    ldc: usize,
) {
    let mut i = 0;
    while i < m {
        let (a, c) = (a.add(i * lda), c.add(i * ldc));
        let rows = (m - i).min(S::TILE_ROWS);
        match rows {
            1 => tile::<S, T, ADD, 1, NV>(k, a, lda, b, c, ldc),
            2 => tile::<S, T, ADD, 2, NV>(k, a, lda, b, c, ldc),
            3 => tile::<S, T, ADD, 3, NV>(k, a, lda, b, c, ldc),
            4 => tile::<S, T, ADD, 4, NV>(k, a, lda, b, c, ldc),
            5 => tile::<S, T, ADD, 5, NV>(k, a, lda, b, c, ldc),
            _ => tile::<S, T, ADD, 6, NV>(k, a, lda, b, c, ldc),
        }
        i += rows;
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, T: Float, const ADD: bool, const MR: usize, const NV: usize>(
    k: usize,
    a: *const f32,
    lda: usize,
    b: impl Fn(usize, usize) -> *const T,
    c: *mut f32,
    ldc: usize,
) {
    let mut acc = [[S::splat(0.0); NV]; MR];
    if ADD {
        for i in 0..MR {
            for j in 0..NV {
                acc[i][j] = S::load(c.add(i * ldc + j * S::LANES));
            }
        }
    }
    for p in 0..k {
        let from = b(p, 0);
        let mut row = [S::splat(0.0); NV];
        for j in 0..NV {
            row[j] = T::load::<S>(from.add(j * S::LANES));
        }
        for i in 0..MR {
            let x = S::splat(*a.add(i * lda + p));
            for j in 0..NV {
                acc[i][j] = S::fma(x, row[j], acc[i][j]);
            }
        }
    }
    for i in 0..MR {
        for j in 0..NV {
            S::store(c.add(i * ldc + j * S::LANES), acc[i][j]);
        }
    }
}
