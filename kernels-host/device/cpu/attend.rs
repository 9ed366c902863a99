//! Attention on the CPU: one kernel for prefill, decode, tree, quantised and selected pages.
//!
//! A work item is a tile of packed query rows against a range of KV. For each block of 64 KV tokens:
//! load K transposed to f32, `S = Q K^T`, mask and online softmax (FlashAttention-2, arXiv:2307.08691),
//! load V, `O += P V`. Both products are chains of FMAs in a fixed order and blocks start at multiples
//! of 64, so a row's bits depend on nothing but its own query and KV.
#![allow(unsafe_op_in_unsafe_fn)]

use std::f32::consts::{LN_2, LOG2_E};

use ferroflash_kernels::abi::{
    KV_BLOCK, MergeItem, NO_PARTIAL, ScoreParams, Sequence, WorkItem, partial_stride,
};

use super::convert::{load_row_as, store_row_as};
use super::kv_rows::{KvRows, Place};
use super::matmul::matmul;
use super::simd::{Simd, Task};
use super::softmax::{Scratch, State, exp2, max_nan, with_scratch};
use super::{Cpu, Shared, split_workspace};
use crate::device::AttentionCall;
use crate::layout::Layout;
use crate::plan::Plan;

pub(super) fn attention(cpu: &Cpu, call: AttentionCall<'_>) {
    let AttentionCall { op: _, spec, plan, workspace, q, kv, mut out, mut lse } = call;
    let (partials, pages) = split_workspace(plan, workspace);
    let (head_dim, v_head_dim) = (spec.head_dim, spec.v_head_dim);
    let kernel = Kernel {
        plan,
        score: spec.score_params(),
        group: spec.group(),
        head_dim,
        padded_dim: pad(head_dim),
        v_head_dim,
        padded_v_dim: pad(v_head_dim),
        alibi_slopes: spec.alibi_slopes.as_deref(),
        sink_logits: spec.sink_logits.as_deref(),
        q: (q.ptr(), q.layout),
        kv: KvRows::new(&kv, plan.page_size, pages, (head_dim, v_head_dim)),
        out: (Shared(out.reborrow().ptr()), out.layout),
        lse: lse.as_mut().map(|lse| (Shared(lse.0.ptr()), lse.0.layout)),
        partials: Shared(partials.as_mut_ptr()),
    };
    cpu.for_each(plan.items.len(), |i| {
        with_scratch(kernel.padded_dim, |scratch| {
            cpu.level.run(Attend { kernel: &kernel, item: &plan.items[i], scratch });
        });
    });
    cpu.for_each(plan.merges.len(), |i| {
        with_scratch(kernel.padded_dim, |scratch| {
            cpu.level.run(Merge { kernel: &kernel, item: &plan.merges[i], scratch });
        });
    });
}

/// Rows of scratch are padded to whole vectors of the widest set.
fn pad(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

struct Kernel<'a> {
    plan: &'a Plan,
    score: ScoreParams,
    group: usize,
    head_dim: usize,
    padded_dim: usize,
    v_head_dim: usize,
    padded_v_dim: usize,
    alibi_slopes: Option<&'a [f32]>,
    sink_logits: Option<&'a [f32]>,
    q: (*const u8, Layout),
    kv: KvRows<'a>,
    /// Rows are written by the one item (or merge) that owns them.
    out: (Shared<u8>, Layout),
    lse: Option<(Shared<u8>, Layout)>,
    partials: Shared<f32>,
}

// SAFETY: `q` and `kv` are only read; what is written is `Shared`, by disjoint rows.
unsafe impl Sync for Kernel<'_> {}

impl Kernel<'_> {
    fn query_head(&self, kv_head: u32, row: usize) -> usize {
        kv_head as usize * self.group + row % self.group
    }

    unsafe fn load_q<S: Simd>(&self, seq: &Sequence, item: &WorkItem, to: *mut f32) {
        let (q, layout) = self.q;
        let strides = &layout.strides;
        for (i, row) in (item.row_start as usize..item.row_end as usize).enumerate() {
            let token = seq.q_start as usize + row / self.group;
            let at = token * strides[0] + self.query_head(item.kv_head, row) * strides[1];
            let to = to.add(i * self.padded_dim);
            load_row_as::<S>(layout.dtype, q.add(at * layout.dtype.size()), to, self.head_dim);
            for d in self.head_dim..self.padded_dim {
                *to.add(d) = 0.0;
            }
        }
    }

    /// Normalises a row and writes it.
    #[inline(always)]
    unsafe fn finish_row<S: Simd>(
        &self,
        seq: &Sequence,
        kv_head: u32,
        row: usize,
        m: f32,
        l: f32,
        o: *mut f32,
    ) {
        let head = self.query_head(kv_head, row);
        let (mut m, mut l, mut factor) = (m, l, 1.0);
        if let Some(sinks) = self.sink_logits {
            let sink = sinks[head] * LOG2_E;
            let with_sink = max_nan(m, sink);
            factor = exp2::<S>(m - with_sink);
            l = l * factor + exp2::<S>(sink - with_sink);
            m = with_sink;
        }
        let token = seq.q_start as usize + row / self.group;
        let empty = l == 0.0;
        let (factor, divisor) = (S::splat(factor), S::splat(if empty { 1.0 } else { l }));
        for d in (0..self.padded_v_dim).step_by(S::LANES) {
            let x = S::mul(S::load(o.add(d)), factor);
            S::store(o.add(d), S::div(x, divisor));
        }
        let (out, layout) = &self.out;
        let at = token * layout.strides[0] + head * layout.strides[1];
        store_row_as::<S>(layout.dtype, o, out.get().add(at * layout.dtype.size()), self.v_head_dim);
        if let Some((lse, layout)) = &self.lse {
            let at = token * layout.strides[0] + head * layout.strides[1];
            let value = if empty { f32::NEG_INFINITY } else { (m + l.log2()) * LN_2 };
            *lse.get().cast::<f32>().add(at) = value;
        }
    }
}

/// One work item.
struct Attend<'a> {
    kernel: &'a Kernel<'a>,
    item: &'a WorkItem,
    scratch: &'a Scratch,
}

impl Task for Attend<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Attend { kernel, item, scratch } = self;
        let seq = &kernel.plan.sequences[item.seq as usize];
        let rows = (item.row_end - item.row_start) as usize;
        kernel.load_q::<S>(seq, item, scratch.q);
        let (start, end) = (item.kv_start as usize, item.kv_end as usize);
        let section = match kernel.plan.section {
            0 => usize::MAX,
            tokens => tokens,
        };
        let mut states = 0;
        let mut at = start;
        loop {
            let stop = (at / section).saturating_add(1).saturating_mul(section).min(end);
            scratch.state.init(rows, kernel.padded_v_dim);
            while at < stop {
                let n = (stop - at).min(KV_BLOCK);
                self.block::<S>(seq, at, n);
                at += n;
            }
            if item.partial != NO_PARTIAL {
                self.write_partial(item.partial as usize + states * rows, rows);
            } else if states == 0 && at >= end {
                return self.finish::<S>(seq, &scratch.state);
            } else {
                self.fold::<S>(states == 0, rows);
            }
            states += 1;
            if at >= end {
                break;
            }
        }
        if item.partial == NO_PARTIAL {
            self.finish::<S>(seq, &scratch.merged);
        }
    }
}

impl Attend<'_> {
    /// Runs of columns of a block whose tokens have successive positions: first column, its position, columns.
    #[inline(always)]
    fn runs(&self, at: usize, n: usize) -> impl Iterator<Item = (usize, usize, usize)> {
        let Plan { logical_pages, page_size, .. } = self.kernel.plan;
        let list = self.item.pages as usize;
        let mut column = 0;
        std::iter::from_fn(move || {
            if column >= n {
                return None;
            }
            let first = column;
            if logical_pages.is_empty() {
                column = n;
                return Some((0, at, n));
            }
            let (index, offset) = ((at + first) / page_size, (at + first) % page_size);
            column = (first + page_size - offset).min(n);
            let position = logical_pages[list + index] as usize * page_size + offset;
            Some((first, position, column - first))
        })
    }

    /// Rows' visible columns of a run of positions from `at`: `lo..hi`, and the sinks below `sink`.
    #[inline(always)]
    fn columns(&self, seq: &Sequence, row: usize, at: usize, n: usize) -> (usize, usize, usize) {
        let score = &self.kernel.score;
        let q_pos = seq.position as i64 + (row / self.kernel.group) as i64;
        let (at, n) = (at as i64, n as i64);
        let hi = if score.causal != 0 { (q_pos - at + 1).clamp(0, n) } else { n };
        let lo = if score.window > 0 { (q_pos - score.window as i64 + 1 - at).clamp(0, hi) } else { 0 };
        let sink = (score.num_sinks as i64 - at).clamp(0, lo);
        (lo as usize, hi as usize, sink as usize)
    }

    /// Adds KV tokens `at..at + n` to the state.
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, seq: &Sequence, at: usize, n: usize) {
        let Attend { kernel, item, scratch } = self;
        let rows = (item.row_end - item.row_start) as usize;
        let visible = |i: usize| {
            self.runs(at, n).any(|(_, position, n)| {
                let (lo, hi, sink) = self.columns(seq, item.row_start as usize + i, position, n);
                lo < hi || sink > 0
            })
        };
        // Rows from the first visible to the last: of contiguous KV all of them are visible, for positions grow
        // with rows, and so do both edges.
        let Some(first) = (0..rows).find(|&i| visible(i)) else { return };
        let last = (first..rows).rev().find(|&i| visible(i)).unwrap_or(first);
        let (m, dim) = (last + 1 - first, kernel.padded_dim);

        let vecs = KV_BLOCK / S::LANES;
        let place =
            Place { seq, head: item.kv_head as usize, list: item.pages as usize, end: item.kv_end as usize };
        let ahead = kernel.kv.load_k::<S>(place, at, n, scratch.k, scratch.v);
        let (q, s) = (scratch.q.add(first * dim), scratch.s.add(first * KV_BLOCK));
        let columns = |d, j| scratch.k.add(d * KV_BLOCK + j).cast_const();
        if m <= S::TILE_ROWS {
            let columns = |d, j| {
                ahead.prefetch::<S>(d);
                columns(d, j)
            };
            matmul::<S, f32, false>(m, kernel.head_dim, vecs, q, dim, columns, s, KV_BLOCK);
        } else {
            matmul::<S, f32, false>(m, kernel.head_dim, vecs, q, dim, columns, s, KV_BLOCK);
        }

        for i in first..=last {
            self.softmax_row::<S>(seq, i, at, n);
        }

        let o = scratch.state.o.add(first * kernel.padded_v_dim);
        kernel.kv.add_pv::<S>(place, at, n, s, m, o, scratch.v);
    }

    /// Scores to weights, in place; the row's O is scaled to the new maximum.
    #[inline(always)]
    unsafe fn softmax_row<S: Simd>(&self, seq: &Sequence, i: usize, at: usize, n: usize) {
        let Attend { kernel, item, scratch } = self;
        let score = &kernel.score;
        let row = item.row_start as usize + i;
        let s = scratch.s.add(i * KV_BLOCK);
        let head = kernel.query_head(item.kv_head, row);

        // Base-2 logits are these numbers times `factor`, which comes in where the maximum is taken off: rounded before, a
        // large logit would lose what its distance from the maximum is made of. A plain scale is part of it.
        let plain = score.soft_cap == 0.0 && kernel.alibi_slopes.is_none() && score.scale > 0.0;
        let factor = if plain { score.scale * LOG2_E } else { LOG2_E };
        if score.soft_cap > 0.0 {
            let (to_unit, from_unit) = (S::splat(score.scale / score.soft_cap), S::splat(score.soft_cap));
            for c in (0..KV_BLOCK).step_by(S::LANES) {
                let x = S::tanh(S::mul(S::load(s.add(c)), to_unit));
                S::store(s.add(c), S::mul(x, from_unit));
            }
        } else if !plain {
            let scale = S::splat(score.scale);
            for c in (0..KV_BLOCK).step_by(S::LANES) {
                S::store(s.add(c), S::mul(S::load(s.add(c)), scale));
            }
        }
        if let Some(slopes) = kernel.alibi_slopes {
            let q_pos = seq.position as i64 + (row / kernel.group) as i64;
            for c in 0..n {
                *s.add(c) += slopes[head] * (at as i64 + c as i64 - q_pos) as f32;
            }
        }
        self.mask_row(seq, row, at, n, s);

        let mut max = S::load(s);
        for c in (S::LANES..KV_BLOCK).step_by(S::LANES) {
            max = S::max(max, S::load(s.add(c)));
        }
        let old = *scratch.state.m.add(i);
        let new = max_nan(old, S::reduce_max(max) * factor);
        // A row that has seen nothing yet subtracts 0, not -inf: its weights come out 0, not NaN.
        let base = if new == f32::NEG_INFINITY { 0.0 } else { new };
        let mut sum = S::splat(0.0);
        for c in (0..KV_BLOCK).step_by(S::LANES) {
            let p = S::exp2(S::fma(S::load(s.add(c)), S::splat(factor), S::splat(-base)));
            S::store(s.add(c), p);
            sum = S::add(sum, p);
        }
        let sum = S::reduce_add(sum);
        if new == old {
            *scratch.state.l.add(i) += sum;
            return;
        }
        let correction = exp2::<S>(old - base);
        *scratch.state.m.add(i) = new;
        *scratch.state.l.add(i) = *scratch.state.l.add(i) * correction + sum;
        let o = scratch.state.o.add(i * kernel.padded_v_dim);
        for d in (0..kernel.padded_v_dim).step_by(S::LANES) {
            S::store(o.add(d), S::mul(S::load(o.add(d)), S::splat(correction)));
        }
    }

    /// Sets what the row does not see to `-inf`.
    #[inline(always)]
    unsafe fn mask_row(&self, seq: &Sequence, row: usize, at: usize, n: usize, s: *mut f32) {
        for (first, position, n) in self.runs(at, n) {
            let (lo, hi, sink) = self.columns(seq, row, position, n);
            for c in (sink..lo).chain(hi..n) {
                *s.add(first + c) = f32::NEG_INFINITY;
            }
        }
        for c in n..KV_BLOCK {
            *s.add(c) = f32::NEG_INFINITY;
        }
        let tree_at = (seq.kv_len - seq.n_tree) as usize;
        if seq.n_tree == 0 || at + n <= tree_at {
            return;
        }
        let words = seq.n_tree.div_ceil(32) as usize;
        let mask =
            &self.kernel.plan.tree_mask[seq.tree_start as usize + row / self.kernel.group * words..][..words];
        for c in tree_at.saturating_sub(at)..n {
            let column = at + c - tree_at;
            if mask[column / 32] >> (column % 32) & 1 == 0 {
                *s.add(c) = f32::NEG_INFINITY;
            }
        }
    }

    unsafe fn write_partial(&self, at: usize, rows: usize) {
        let Attend { kernel, scratch: Scratch { state, .. }, .. } = self;
        let stride = partial_stride(kernel.v_head_dim);
        for i in 0..rows {
            let to = kernel.partials.get().add((at + i) * stride);
            to.copy_from_nonoverlapping(state.o.add(i * kernel.padded_v_dim), kernel.padded_v_dim);
            *to.add(kernel.padded_v_dim) = *state.m.add(i);
            *to.add(kernel.padded_v_dim + 1) = *state.l.add(i);
        }
    }

    /// Adds the state of a section to those before it.
    #[inline(always)]
    unsafe fn fold<S: Simd>(&self, first: bool, rows: usize) {
        let Attend { kernel, scratch: Scratch { state, merged, .. }, .. } = self;
        if first {
            merged.init(rows, kernel.padded_v_dim);
        }
        for i in 0..rows {
            let o = state.o.add(i * kernel.padded_v_dim);
            merged.merge_row::<S>(i, kernel.padded_v_dim, *state.m.add(i), *state.l.add(i), o);
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, seq: &Sequence, state: &State) {
        let Attend { kernel, item, .. } = self;
        for (i, row) in (item.row_start as usize..item.row_end as usize).enumerate() {
            let o = state.o.add(i * kernel.padded_v_dim);
            kernel.finish_row::<S>(seq, item.kv_head, row, *state.m.add(i), *state.l.add(i), o);
        }
    }
}

/// Partial states of some rows to finished rows.
struct Merge<'a> {
    kernel: &'a Kernel<'a>,
    item: &'a MergeItem,
    scratch: &'a Scratch,
}

impl Task for Merge<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Merge { kernel, item, scratch: Scratch { merged, .. } } = self;
        let seq = &kernel.plan.sequences[item.seq as usize];
        let rows = (item.row_end - item.row_start) as usize;
        let stride = partial_stride(kernel.v_head_dim);
        merged.init(rows, kernel.padded_v_dim);
        for i in 0..rows {
            for split in 0..item.num_splits as usize {
                let first = kernel.plan.splits[item.splits as usize + split] as usize;
                let from = kernel.partials.get().add((first + i) * stride);
                let (m, l) = (*from.add(kernel.padded_v_dim), *from.add(kernel.padded_v_dim + 1));
                merged.merge_row::<S>(i, kernel.padded_v_dim, m, l, from);
            }
            let o = merged.o.add(i * kernel.padded_v_dim);
            let row = item.row_start as usize + i;
            kernel.finish_row::<S>(seq, item.kv_head, row, *merged.m.add(i), *merged.l.add(i), o);
        }
    }
}
