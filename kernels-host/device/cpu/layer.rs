//! What stands around attention in a layer: norms, gates, embeddings; and the merge of finished states.
#![allow(unsafe_op_in_unsafe_fn)]

use super::convert::{load_row_as, store_row_as};
use super::simd::{Simd, Task};
use super::{Cpu, Shared};
use crate::device::{EmbeddingCall, Ids, MergeCall, RmsNormCall, SiluMulCall};
use crate::layout::Layout;
use crate::tensor::View;

/// Rows of a tensor: all dimensions but the last, of two or three.
#[derive(Clone, Copy)]
struct Rows {
    ptr: Shared<u8>,
    layout: Layout,
}

impl Rows {
    fn new(view: View<'_>) -> Self {
        Rows { ptr: Shared(view.ptr().cast_mut()), layout: view.layout }
    }

    fn row(&self, i: usize) -> *mut u8 {
        let strides = &self.layout.strides;
        let at = match self.layout.shape.len() {
            3 => {
                let inner = self.layout.shape[1];
                i / inner * strides[0] + i % inner * strides[1]
            }
            _ => i * strides[0],
        };
        self.ptr.get().wrapping_add(at * self.layout.dtype.size())
    }

    /// # Safety
    /// The machine has `S`; `i` is a row of a view of which `self` was made; nobody writes it.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, i: usize, from: usize, to: &mut [f32]) {
        let at = self.row(i).wrapping_add(from * self.layout.dtype.size());
        load_row_as::<S>(self.layout.dtype, at, to.as_mut_ptr(), to.len());
    }

    /// # Safety
    /// As [`Rows::load`], of a view for writing; nobody else touches the row.
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, i: usize, from: &[f32]) {
        store_row_as::<S>(self.layout.dtype, from.as_ptr(), self.row(i), from.len());
    }
}

/// A run of rows under one of the operations below.
struct OnRows<'a, F> {
    rows: std::ops::Range<usize>,
    op: &'a F,
}

trait RowOp: Sync {
    /// # Safety
    /// The machine has `S`; `i` is a row that no other thread works on.
    unsafe fn row<S: Simd>(&self, i: usize, scratch: &mut Vec<f32>);
}

impl<F: RowOp> Task for OnRows<'_, F> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut scratch = Vec::new();
        for i in self.rows {
            self.op.row::<S>(i, &mut scratch);
        }
    }
}

fn on_rows(cpu: &Cpu, rows: usize, elements: usize, op: impl RowOp) {
    cpu.for_rows(rows, elements, |rows| cpu.level.run(OnRows { rows, op: &op }));
}

struct RmsNorm {
    x: Rows,
    residual: Option<Rows>,
    weight: Vec<f32>,
    eps: f32,
    out: Rows,
}

impl RowOp for RmsNorm {
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, i: usize, scratch: &mut Vec<f32>) {
        let n = self.weight.len();
        scratch.resize(2 * n, 0.0);
        let (x, added) = scratch.split_at_mut(n);
        self.x.load::<S>(i, 0, x);
        if let Some(residual) = &self.residual {
            residual.load::<S>(i, 0, added);
            x.iter_mut().zip(&*added).for_each(|(x, r)| *x += r);
            residual.store::<S>(i, x);
        }
        let mut sum = S::splat(0.0);
        let whole = n - n % S::LANES;
        for d in (0..whole).step_by(S::LANES) {
            let v = S::load(x.as_ptr().add(d));
            sum = S::fma(v, v, sum);
        }
        let rest: f32 = x[whole..].iter().map(|x| x * x).sum();
        let factor = 1.0 / ((S::reduce_add(sum) + rest) / n as f32 + self.eps).sqrt();
        x.iter_mut().zip(&self.weight).for_each(|(x, w)| *x = *x * factor * w);
        self.out.store::<S>(i, x);
    }
}

pub(super) fn rms_norm(cpu: &Cpu, call: RmsNormCall<'_>) {
    let dim = call.weight.shape()[0];
    let rows = call.out.shape().iter().rev().skip(1).product();
    let mut weight = vec![0.0; dim];
    // SAFETY: the portable set needs nothing; the weight holds `dim` elements.
    unsafe {
        let dtype = call.weight.dtype();
        load_row_as::<super::simd::Portable>(dtype, call.weight.ptr(), weight.as_mut_ptr(), dim)
    };
    let op = RmsNorm {
        // A row is read whole before it is written, by one thread.
        x: Rows::new(call.x.unwrap_or(call.out.as_view())),
        residual: call.residual.map(|r| Rows::new(r.as_view())),
        weight,
        eps: call.eps,
        out: Rows::new(call.out.as_view()),
    };
    on_rows(cpu, rows, rows * dim, op);
}

struct SiluMul {
    gate_up: Rows,
    out: Rows,
    dim: usize,
}

impl RowOp for SiluMul {
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, i: usize, scratch: &mut Vec<f32>) {
        let n = self.dim.next_multiple_of(16);
        scratch.resize(2 * n, 0.0);
        let (gate, up) = scratch.split_at_mut(n);
        self.gate_up.load::<S>(i, 0, &mut gate[..self.dim]);
        self.gate_up.load::<S>(i, self.dim, &mut up[..self.dim]);
        for d in (0..n).step_by(S::LANES) {
            let x = S::load(gate.as_ptr().add(d));
            let e = S::exp2(S::mul(x, S::splat(-std::f32::consts::LOG2_E)));
            let silu = S::div(x, S::add(S::splat(1.0), e));
            S::store(gate.as_mut_ptr().add(d), S::mul(silu, S::load(up.as_ptr().add(d))));
        }
        self.out.store::<S>(i, &gate[..self.dim]);
    }
}

pub(super) fn silu_mul(cpu: &Cpu, call: SiluMulCall<'_>) {
    let (rows, dim) = (call.out.shape()[0], call.out.shape()[1]);
    let op = SiluMul { gate_up: Rows::new(call.gate_up), out: Rows::new(call.out.as_view()), dim };
    // An exponential and a division are some ten elements' worth of copying.
    on_rows(cpu, rows, 10 * rows * dim, op);
}

struct Embedding<'a> {
    table: Rows,
    vocab: usize,
    ids: Ids<'a>,
    out: Rows,
    dim: usize,
}

impl RowOp for Embedding<'_> {
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, i: usize, scratch: &mut Vec<f32>) {
        scratch.resize(self.dim, 0.0);
        let id = match &self.ids {
            Ids::Host(ids) => ids[i],
            Ids::Device(ids) => *ids.ptr().cast::<u32>().add(i * ids.strides()[0]),
        };
        if (id as usize) < self.vocab {
            self.table.load::<S>(id as usize, 0, scratch);
        } else {
            scratch.fill(f32::NAN);
        }
        self.out.store::<S>(i, scratch);
    }
}

pub(super) fn embedding(cpu: &Cpu, call: EmbeddingCall<'_>) {
    let (rows, dim) = (call.out.shape()[0], call.out.shape()[1]);
    let op = Embedding {
        table: Rows::new(call.table),
        vocab: call.table.shape()[0],
        ids: call.ids,
        out: Rows::new(call.out.as_view()),
        dim,
    };
    on_rows(cpu, rows, rows * dim, op);
}

struct MergeStates {
    states: Vec<(Rows, Rows)>,
    out: Rows,
    lse: Rows,
    heads: usize,
    dim: usize,
}

impl RowOp for MergeStates {
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, token: usize, scratch: &mut Vec<f32>) {
        let n = self.dim;
        scratch.resize(2 * n, 0.0);
        let (sum, o) = scratch.split_at_mut(n);
        for head in 0..self.heads {
            let i = token * self.heads + head;
            let lse = |rows: &Rows| *rows.row(token).cast::<f32>().add(head * rows.layout.strides[1]);
            let max = self.states.iter().map(|(_, l)| lse(l)).fold(f32::NEG_INFINITY, f32::max);
            sum.fill(0.0);
            let mut total = 0.0;
            for (states_o, states_lse) in &self.states {
                let weight = (lse(states_lse) - max).exp();
                // An empty state is left out: its O counts for nothing, whatever it holds.
                if max == f32::NEG_INFINITY || weight == 0.0 {
                    continue;
                }
                total += weight;
                states_o.load::<S>(i, 0, o);
                sum.iter_mut().zip(&*o).for_each(|(s, o)| *s += weight * o);
            }
            let divisor = if total == 0.0 { 1.0 } else { total };
            sum.iter_mut().for_each(|s| *s /= divisor);
            let merged = if total == 0.0 { f32::NEG_INFINITY } else { max + total.ln() };
            *self.lse.row(token).cast::<f32>().add(head * self.lse.layout.strides[1]) = merged;
            self.out.store::<S>(i, sum);
        }
    }
}

pub(super) fn merge(cpu: &Cpu, call: MergeCall<'_>) {
    let &[tokens, heads, dim] = call.out.shape() else { return };
    let op = MergeStates {
        states: call.states.iter().map(|(o, lse)| (Rows::new(*o), Rows::new(lse.0))).collect(),
        out: Rows::new(call.out.as_view()),
        lse: Rows::new(call.lse.0.as_view()),
        heads,
        dim,
    };
    on_rows(cpu, tokens, call.states.len() * tokens * heads * dim, op);
}
