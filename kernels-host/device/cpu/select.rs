//! Top-k page selection on the CPU (after Quest, arXiv:2406.10774).
#![allow(unsafe_op_in_unsafe_fn)]

use super::convert::load_row_as;
use super::kv_rows::Rows;
use super::simd::{Simd, Task};
use super::{Cpu, Shared, split_workspace};
use crate::device::SelectCall;
use crate::spec::AttentionSpec;
use crate::tensor::View;

pub(super) fn select_pages(cpu: &Cpu, call: SelectCall<'_>) {
    let SelectCall { select, attention, plan, budget, q, summaries, .. } = call;
    let heads = select.spec.num_kv_heads;
    let lists = Shared(split_workspace(plan, attention).1.as_mut_ptr());
    cpu.for_each(select.sequences.len() * heads, |i| {
        let (index, head) = (i / heads, i % heads);
        let (seq, chosen) = (&select.sequences[index], &select.chosen[index]);
        let count = chosen.pages_per_head as usize;
        let num_pages = (seq.kv_len as usize).div_ceil(select.page_size);
        let pages = &select.pages[seq.page_start as usize..][..num_pages];
        let mut kept: Vec<usize> = if count == num_pages {
            (0..num_pages).collect()
        } else {
            let q_token = seq.q_start as usize;
            let score = Score { spec: select.spec, q: &q, summaries: &summaries, q_token, head, pages };
            top_k(&cpu.level.run(score), count, budget.sinks, budget.recent)
        };
        kept.sort_unstable();
        for (j, page) in kept.into_iter().enumerate() {
            let at = chosen.page_start as usize + head * count + j;
            // SAFETY: `at` is inside this sequence's and head's own list, which has `count` entries.
            unsafe { *lists.get().add(at) = pages[page] };
        }
    });
}

/// The `count` pages with the largest scores, the first `sinks` and the last `recent` always among
/// them; of equal scores the earlier page.
fn top_k(scores: &[f32], count: usize, sinks: usize, recent: usize) -> Vec<usize> {
    let n = scores.len();
    let recent = recent.min(count);
    let sinks = sinks.min(count - recent);
    let mut kept: Vec<usize> = (0..sinks).chain(n - recent..n).collect();
    let mut others: Vec<usize> = (sinks..n - recent).collect();
    others.sort_unstable_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    kept.extend(others.into_iter().take(count - sinks - recent));
    kept
}

/// An upper bound of the scores in each page: `max over the group of sum_d max(q_d min_d, q_d max_d)`.
struct Score<'a> {
    spec: &'a AttentionSpec,
    q: &'a View<'a>,
    summaries: &'a View<'a>,
    q_token: usize,
    head: usize,
    pages: &'a [u32],
}

impl Task for Score<'_> {
    type Out = Vec<f32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let Score { spec, q: queries, summaries, q_token, head, pages } = self;
        let (dim, group) = (spec.head_dim, spec.group());
        let padded = dim.next_multiple_of(16);
        let size = queries.dtype().size();
        let strides = queries.strides();
        let mut q = vec![0f32; group * padded];
        for g in 0..group {
            let at = (q_token * strides[0] + (head * group + g) * strides[1]) * size;
            let row = &mut q[g * padded..][..dim];
            load_row_as::<S>(queries.dtype(), queries.ptr().add(at), row.as_mut_ptr(), dim);
            // A negative scale turns the order of the scores.
            row.iter_mut().for_each(|x| *x *= spec.softmax_scale.signum());
        }
        let (summary_dtype, summaries) = (summaries.dtype(), Rows::paged(summaries));
        let (mut min, mut max) = ([0f32; 256], [0f32; 256]);
        let score = |&page: &u32| {
            let at = |side| summaries.at(page as usize, head, side);
            load_row_as::<S>(summary_dtype, at(0), min.as_mut_ptr(), dim);
            load_row_as::<S>(summary_dtype, at(1), max.as_mut_ptr(), dim);
            let mut best = f32::NEG_INFINITY;
            for q in q.chunks_exact(padded) {
                let mut sum = S::splat(0.0);
                for d in (0..padded).step_by(S::LANES) {
                    let q = S::load(q.as_ptr().add(d));
                    let low = S::mul(q, S::load(min.as_ptr().add(d)));
                    sum = S::add(sum, S::max(low, S::mul(q, S::load(max.as_ptr().add(d)))));
                }
                best = best.max(S::reduce_add(sum));
            }
            best
        };
        pages.iter().map(score).collect()
    }
}
