//! The one matrix product: small tiles held in registers.
#![allow(unsafe_op_in_unsafe_fn)]

use super::simd::Simd;

/// `c[m, n] = a[m, k] * b[k, n]`, added to `c` where `ADD`; `n` is `vecs` vectors of `S`.
///
/// Every element of `c` is one chain of FMAs over `k` in order, so a row's bits do not depend on how
/// many rows there are.
///
/// # Safety
/// The machine has `S`; `a` is valid for `m` rows of `k` at distance `lda`, `b` for `k` rows and `c`
/// for `m` rows of `vecs * S::LANES`.
#[inline(always)]
#[allow(clippy::too_many_arguments)] // three matrices and their sizes
pub unsafe fn matmul<S: Simd, const ADD: bool>(
    m: usize,
    k: usize,
    vecs: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
) {
    let mut v = 0;
    while v < vecs {
        let (b, c) = (b.add(v * S::LANES), c.add(v * S::LANES));
        let nv = (vecs - v).min(S::TILE_VECS);
        match nv {
            1 => column::<S, ADD, 1>(m, k, a, lda, b, ldb, c, ldc),
            2 => column::<S, ADD, 2>(m, k, a, lda, b, ldb, c, ldc),
            3 => column::<S, ADD, 3>(m, k, a, lda, b, ldb, c, ldc),
            _ => column::<S, ADD, 4>(m, k, a, lda, b, ldb, c, ldc),
        }
        v += nv;
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn column<S: Simd, const ADD: bool, const NV: usize>(
    m: usize,
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
) {
    let mut i = 0;
    while i < m {
        let (a, c) = (a.add(i * lda), c.add(i * ldc));
        let rows = (m - i).min(S::TILE_ROWS);
        match rows {
            1 => tile::<S, ADD, 1, NV>(k, a, lda, b, ldb, c, ldc),
            2 => tile::<S, ADD, 2, NV>(k, a, lda, b, ldb, c, ldc),
            3 => tile::<S, ADD, 3, NV>(k, a, lda, b, ldb, c, ldc),
            4 => tile::<S, ADD, 4, NV>(k, a, lda, b, ldb, c, ldc),
            5 => tile::<S, ADD, 5, NV>(k, a, lda, b, ldb, c, ldc),
            _ => tile::<S, ADD, 6, NV>(k, a, lda, b, ldb, c, ldc),
        }
        i += rows;
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const ADD: bool, const MR: usize, const NV: usize>(
    k: usize,
    a: *const f32,
    lda: usize,
    mut b: *const f32,
    ldb: usize,
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
        let mut row = [S::splat(0.0); NV];
        for j in 0..NV {
            row[j] = S::load(b.add(j * S::LANES));
        }
        for i in 0..MR {
            let x = S::splat(*a.add(i * lda + p));
            for j in 0..NV {
                acc[i][j] = S::fma(x, row[j], acc[i][j]);
            }
        }
        b = b.add(ldb);
    }
    for i in 0..MR {
        for j in 0..NV {
            S::store(c.add(i * ldc + j * S::LANES), acc[i][j]);
        }
    }
}
