//! Linear layers: weights packed once in the form that the CPU reads fastest.
//!
//! A matrix `[n, k]` is cut into panels of 64 outputs; in a panel, the 64 weights of one `k` stand side
//! by side. Quantised weights stay quantised (`w = min + scale * code`, 4 or 8 bits, exactly the file's
//! values), since decoding one token is bound by reading them: a block of 128 `k` is widened to f32 in
//! the L1 cache, and multiplied by all rows. Each output is one chain of FMAs over `k`, so a row's bits
//! do not depend on how many rows there are: batch size and prompt chunks cannot change a result.
#![allow(unsafe_op_in_unsafe_fn)]

use std::cell::RefCell;

use ferroflash::SimdLevel;
use ferroflash::device::matmul::matmul;
use ferroflash::device::simd::{Simd, Task};
use half::{bf16, f16};
use rayon::prelude::*;

use super::quant::{Quant, RowReader};

/// Outputs side by side.
const PANEL: usize = 64;
/// Widened at a time: 128 x 64 f32 are the L1 cache.
const K_BLOCK: usize = 128;

/// A packed weight matrix.
#[derive(Debug)]
pub struct Matrix {
    n: usize,
    k: usize,
    weights: Weights,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Weights {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    /// Codes `[panel][k][64]`.
    Int8(Vec<i8>, Groups),
    /// Codes `[panel][k / 2][64]`, even `k` in the low nibble.
    Int4(Vec<u8>, Groups),
}

/// `[panel][k / size][64]` scales and minima.
#[derive(Debug)]
struct Groups {
    size: usize,
    scales: Vec<f32>,
    mins: Vec<f32>,
}

impl Matrix {
    /// Packs `n` rows of `k` weights.
    pub fn pack(rows: &RowReader<'_>, bias: Option<Vec<f32>>) -> Self {
        let (n, k) = (rows.num_rows(), rows.row_len());
        let padded = n.next_multiple_of(PANEL);
        // Where weight (row, i) goes: panel, then k, then row in panel.
        let at = |row: usize, i: usize| (row / PANEL * k + i) * PANEL + row % PANEL;
        let weights = match rows.quant() {
            Quant::F32 => Weights::F32(spread(rows, padded * k, at, |x| x)),
            Quant::F16 => Weights::F16(spread(rows, padded * k, at, f16::from_f32)),
            Quant::BF16 => Weights::BF16(spread(rows, padded * k, at, bf16::from_f32)),
            quant => {
                let size = quant.group();
                let groups = k / size;
                let mut scales = vec![0f32; padded * groups];
                let mut mins = scales.clone();
                let four = quant.is_four_bit();
                let mut bytes = vec![0u8; if four { padded * k / 2 } else { padded * k }];
                for row in 0..n {
                    rows.groups(row, |group, scale, min, codes| {
                        let to = (row / PANEL * groups + group) * PANEL + row % PANEL;
                        (scales[to], mins[to]) = (scale, min);
                        for (i, &code) in codes.iter().enumerate() {
                            let i = group * size + i;
                            if four {
                                let to = (row / PANEL * (k / 2) + i / 2) * PANEL + row % PANEL;
                                bytes[to] |= (code as u8) << (i % 2 * 4);
                            } else {
                                bytes[at(row, i)] = code as u8;
                            }
                        }
                    });
                }
                let groups = Groups { size, scales, mins };
                if four {
                    Weights::Int4(bytes, groups)
                } else {
                    Weights::Int8(bytemuck::allocation::cast_vec(bytes), groups)
                }
            }
        };
        Matrix { n, k, weights, bias }
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.k
    }

    /// Bytes that the packed weights take.
    pub fn bytes(&self) -> usize {
        let groups = |g: &Groups| 4 * (g.scales.len() + g.mins.len());
        match &self.weights {
            Weights::F32(w) => 4 * w.len(),
            Weights::F16(w) => 2 * w.len(),
            Weights::BF16(w) => 2 * w.len(),
            Weights::Int8(w, g) => w.len() + groups(g),
            Weights::Int4(w, g) => w.len() + groups(g),
        }
    }

    /// `out[r, column..column + n] = x[r] W^T + bias`, for rows of `x` of `k` and of `out` of `out_row`.
    ///
    /// # Panics
    /// Where the slices do not hold whole rows.
    pub fn forward(&self, x: &[f32], out: &mut [f32], out_row: usize, column: usize) {
        let rows = x.len() / self.k;
        assert!(x.len() == rows * self.k && out.len() >= rows * out_row && column + self.n <= out_row);
        let to = Shared(out.as_mut_ptr());
        let level = SimdLevel::detect();
        (0..self.n.div_ceil(PANEL)).into_par_iter().with_max_len(1).for_each(|panel| {
            with_scratch(rows, |block, sums| {
                level.run(Panel { matrix: self, panel, x, rows, block, sums });
                let first = panel * PANEL;
                let width = PANEL.min(self.n - first);
                if let Some(bias) = &self.bias {
                    for sums in sums.chunks_exact_mut(PANEL) {
                        sums.iter_mut().zip(&bias[first..first + width]).for_each(|(s, b)| *s += b);
                    }
                }
                for (r, sums) in sums.chunks_exact(PANEL).enumerate() {
                    // SAFETY: inside `out` by the assertion; each panel writes columns of its own.
                    unsafe {
                        let to = to.get().add(r * out_row + column + first);
                        to.copy_from_nonoverlapping(sums.as_ptr(), width);
                    }
                }
            });
        });
    }
}

/// A pointer whose users write disjoint columns.
struct Shared(*mut f32);

// SAFETY: `Matrix::forward` writes disjoint columns of it.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

fn spread<T: Copy + bytemuck::Zeroable>(
    rows: &RowReader<'_>,
    len: usize,
    at: impl Fn(usize, usize) -> usize,
    narrow: impl Fn(f32) -> T,
) -> Vec<T> {
    let mut to = vec![T::zeroed(); len];
    let mut row_f32 = vec![0f32; rows.row_len()];
    for row in 0..rows.num_rows() {
        rows.read(row, &mut row_f32);
        row_f32.iter().enumerate().for_each(|(i, &x)| to[at(row, i)] = narrow(x));
    }
    to
}

fn with_scratch(rows: usize, f: impl FnOnce(&mut [f32], &mut [f32])) {
    thread_local! {
        static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let needed = PANEL * (K_BLOCK + rows);
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (block, sums) = scratch.split_at_mut(PANEL * K_BLOCK);
        f(block, &mut sums[..PANEL * rows]);
    });
}

struct Panel<'a> {
    matrix: &'a Matrix,
    panel: usize,
    x: &'a [f32],
    rows: usize,
    block: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Task for Panel<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        match self.rows {
            1 => self.run_few::<S, 1>(),
            2 => self.run_few::<S, 2>(),
            _ => self.run_many::<S>(),
        }
    }
}

impl Panel<'_> {
    /// One or two rows: weights go from memory through registers into the sums.
    #[inline(always)]
    unsafe fn run_few<S: Simd, const ROWS: usize>(self) {
        let Panel { matrix, panel, x, sums, .. } = self;
        let k = matrix.k;
        for column in (0..PANEL).step_by(S::TILE_VECS * S::LANES) {
            let mut acc = [[S::splat(0.0); MAX_VECS]; ROWS];
            matrix.visit::<S>(
                panel,
                column,
                0..k,
                #[inline(always)]
                |i, weights| {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = S::splat(*x.as_ptr().add(r * k + i));
                        for j in 0..S::TILE_VECS {
                            acc[j] = S::fma(x, weights[j], acc[j]);
                        }
                    }
                },
            );
            for (r, acc) in acc.iter().enumerate() {
                for j in 0..S::TILE_VECS {
                    S::store(sums.as_mut_ptr().add(r * PANEL + column + j * S::LANES), acc[j]);
                }
            }
        }
    }

    /// More rows: a block of weights is widened into the cache and used by all of them.
    #[inline(always)]
    unsafe fn run_many<S: Simd>(self) {
        let Panel { matrix, panel, x, rows, block, sums } = self;
        let (k, vecs) = (matrix.k, PANEL / S::LANES);
        let sums = sums.as_mut_ptr();
        for start in (0..k).step_by(K_BLOCK) {
            let len = K_BLOCK.min(k - start);
            let widened = block.as_mut_ptr();
            for column in (0..PANEL).step_by(S::TILE_VECS * S::LANES) {
                matrix.visit::<S>(
                    panel,
                    column,
                    start..start + len,
                    #[inline(always)]
                    |i, weights| {
                        let to = widened.add((i - start) * PANEL + column);
                        for j in 0..S::TILE_VECS {
                            S::store(to.add(j * S::LANES), weights[j]);
                        }
                    },
                );
            }
            let x = x.as_ptr().add(start);
            let b = |p, j| widened.add(p * PANEL + j).cast_const();
            if start == 0 {
                matmul::<S, f32, false>(rows, len, vecs, x, k, b, sums, PANEL);
            } else {
                matmul::<S, f32, true>(rows, len, vecs, x, k, b, sums, PANEL);
            }
        }
    }
}

/// Vectors side by side that any set has registers for; a set uses the first `TILE_VECS`.
const MAX_VECS: usize = 4;

impl Matrix {
    /// Calls `f(k, weights)` for each `k` of a range, with a panel's weights from `column` on as f32. The
    /// range is one of whole groups.
    #[inline(always)]
    unsafe fn visit<S: Simd>(
        &self,
        panel: usize,
        column: usize,
        range: std::ops::Range<usize>,
        mut f: impl FnMut(usize, [S::V; MAX_VECS]),
    ) {
        let at = panel * self.k * PANEL;
        match &self.weights {
            Weights::F32(w) => {
                let load = |p: *const f32| S::load(p);
                plain::<S, f32>(w.as_ptr().add(at), column, range, load, f);
            }
            Weights::F16(w) => {
                let load = |p: *const f16| S::load_f16(p.cast());
                plain::<S, f16>(w.as_ptr().add(at), column, range, load, f);
            }
            Weights::BF16(w) => {
                let load = |p: *const bf16| S::load_bf16(p.cast());
                plain::<S, bf16>(w.as_ptr().add(at), column, range, load, f);
            }
            Weights::Int8(codes, groups) => {
                let codes = codes.as_ptr().add(at);
                for group in range.step_by(groups.size) {
                    let (scales, mins) = groups.load::<S>(self.k, panel, group, column);
                    for i in group..group + groups.size {
                        let mut weights = [S::splat(0.0); MAX_VECS];
                        for j in 0..S::TILE_VECS {
                            let code = S::load_i8(codes.add(i * PANEL + column + j * S::LANES));
                            weights[j] = S::fma(code, scales[j], mins[j]);
                        }
                        f(i, weights);
                    }
                }
            }
            Weights::Int4(codes, groups) => {
                let codes = codes.as_ptr().add(at / 2);
                for group in range.step_by(groups.size) {
                    let (scales, mins) = groups.load::<S>(self.k, panel, group, column);
                    for i in (group..group + groups.size).step_by(2) {
                        let (mut even, mut odd) = ([S::splat(0.0); MAX_VECS], [S::splat(0.0); MAX_VECS]);
                        for j in 0..S::TILE_VECS {
                            let pair = S::load_nibbles(codes.add(i / 2 * PANEL + column + j * S::LANES));
                            even[j] = S::fma(pair.0, scales[j], mins[j]);
                            odd[j] = S::fma(pair.1, scales[j], mins[j]);
                        }
                        f(i, even);
                        f(i + 1, odd);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn plain<S: Simd, T>(
    panel: *const T,
    column: usize,
    range: std::ops::Range<usize>,
    load: impl Fn(*const T) -> S::V,
    mut f: impl FnMut(usize, [S::V; MAX_VECS]),
) {
    for i in range {
        let mut weights = [S::splat(0.0); MAX_VECS];
        for j in 0..S::TILE_VECS {
            weights[j] = load(panel.add(i * PANEL + column + j * S::LANES));
        }
        f(i, weights);
    }
}

impl Groups {
    #[inline(always)]
    unsafe fn load<S: Simd>(
        &self,
        k: usize,
        panel: usize,
        start: usize,
        column: usize,
    ) -> ([S::V; MAX_VECS], [S::V; MAX_VECS]) {
        let at = (panel * (k / self.size) + start / self.size) * PANEL + column;
        let (mut scales, mut mins) = ([S::splat(0.0); MAX_VECS], [S::splat(0.0); MAX_VECS]);
        for j in 0..S::TILE_VECS {
            scales[j] = S::load(self.scales.as_ptr().add(at + j * S::LANES));
            mins[j] = S::load(self.mins.as_ptr().add(at + j * S::LANES));
        }
        (scales, mins)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, so that every sum is exact.
    fn numbers(n: usize, step: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * step) % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn forward_is_the_naive_product_for_any_rows() {
        for (n, k) in [(1, 32), (64, 256), (100, 288), (130, 160)] {
            let w = numbers(n * k, 7);
            let bias = numbers(n, 3);
            let reader = RowReader::new(Quant::F32, bytemuck::cast_slice(&w), n, k).unwrap();
            let matrix = Matrix::pack(&reader, Some(bias.clone()));
            for rows in [1, 2, 7, 40] {
                let x = numbers(rows * k, 5);
                let mut out = vec![f32::NAN; rows * (n + 3)];
                matrix.forward(&x, &mut out, n + 3, 2);
                for r in 0..rows {
                    for o in 0..n {
                        let dot: f32 = (0..k).map(|i| x[r * k + i] * w[o * k + i]).sum();
                        assert_eq!(out[r * (n + 3) + 2 + o], dot + bias[o]);
                    }
                    assert!(out[r * (n + 3)].is_nan() && out[r * (n + 3) + n + 2].is_nan());
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        let (n, k) = (96, 320);
        let w: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
        let x: Vec<f32> = (0..9 * k).map(|i| (i as f32 * 0.11).cos()).collect();
        let reader = RowReader::new(Quant::F32, bytemuck::cast_slice(&w), n, k).unwrap();
        let matrix = Matrix::pack(&reader, None);
        let (mut all, mut one) = (vec![0.0; 9 * n], vec![0.0; n]);
        matrix.forward(&x, &mut all, n, 0);
        for r in 0..9 {
            matrix.forward(&x[r * k..][..k], &mut one, n, 0);
            assert_eq!(one, &all[r * n..][..n]);
        }
    }
}
