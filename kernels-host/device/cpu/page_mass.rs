//! The probability mass of pages on the CPU.
#![allow(unsafe_op_in_unsafe_fn)]

use ferroflash_kernels::abi::Sequence;

use super::convert::load_row_as;
use super::kv_rows::Rows;
use super::simd::{Simd, Task};
use super::{Cpu, Shared};
use crate::device::PageMassCall;

pub(super) fn page_mass(cpu: &Cpu, mut call: PageMassCall<'_>) {
    let heads = call.spec.num_kv_heads;
    let row = call.mass.layout.strides[0];
    let mass = Shared(call.mass.reborrow().ptr().cast::<f32>());
    let (job, sequences) = (Job(&call), call.plan.own_sequences());
    cpu.for_each(sequences.len() * heads, |i| {
        let (seq, head) = (&sequences[i / heads], i % heads);
        let sums = cpu.level.run(Sums { job: &job, seq, head });
        for (page, sum) in sums.into_iter().enumerate() {
            // SAFETY: the sequence's own entries of its head's row, which the door has checked.
            unsafe { *mass.get().add(head * row + seq.page_start as usize + page) += sum };
        }
    });
}

/// What all threads read.
struct Job<'a>(&'a PageMassCall<'a>);

// SAFETY: what the call points to is only read, but for the masses, and those through `Shared`, each by one thread.
unsafe impl Sync for Job<'_> {}

/// Each page's sum, of one sequence and KV head.
struct Sums<'a> {
    job: &'a Job<'a>,
    seq: &'a Sequence,
    head: usize,
}

impl Task for Sums<'_> {
    type Out = Vec<f32>;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Vec<f32> {
        let Sums { job: Job(PageMassCall { spec, plan, q, k, lse, .. }), seq, head } = self;
        let (dim, group) = (spec.head_dim, spec.group());
        let padded = dim.next_multiple_of(16);
        let (q_strides, q_size) = (q.strides(), q.dtype().size());
        let rows = seq.q_len as usize * group;
        let mut queries = vec![0f32; rows * padded];
        let mut row_lse = vec![0f32; rows];
        for r in 0..rows {
            let (token, q_head) = (seq.q_start as usize + r / group, head * group + r % group);
            let at = (token * q_strides[0] + q_head * q_strides[1]) * q_size;
            load_row_as::<S>(q.dtype(), q.ptr().add(at), queries.as_mut_ptr().add(r * padded), dim);
            let strides = lse.0.strides();
            row_lse[r] = *lse.0.ptr().cast::<f32>().add(token * strides[0] + q_head * strides[1]);
        }
        let keys = Rows::paged(k);
        let words = seq.n_tree.div_ceil(32) as usize;
        let tree_at = (seq.kv_len - seq.n_tree) as usize;
        let mut sums = vec![0f32; (seq.kv_len as usize).div_ceil(plan.page_size)];
        let mut key = [0f32; 256];
        for token in 0..seq.kv_len as usize {
            let page = plan.pages[seq.page_start as usize + token / plan.page_size] as usize;
            load_row_as::<S>(k.dtype(), keys.at(page, head, token % plan.page_size), key.as_mut_ptr(), dim);
            for r in 0..rows {
                let q_token = r / group;
                let position = seq.position as i64 + q_token as i64;
                let distance = position - token as i64;
                let mut seen = !spec.causal || distance >= 0;
                seen &= spec.window.is_none_or(|w| distance < w as i64 || (token as u32) < spec.num_sinks);
                if token >= tree_at {
                    let bit = token - tree_at;
                    let word = plan.tree_mask[seq.tree_start as usize + q_token * words + bit / 32];
                    seen &= word >> (bit % 32) & 1 == 1;
                }
                if !seen {
                    continue;
                }
                let mut sum = S::splat(0.0);
                for d in (0..padded).step_by(S::LANES) {
                    let q = S::load(queries.as_ptr().add(r * padded + d));
                    sum = S::fma(q, S::load(key.as_ptr().add(d)), sum);
                }
                let mut x = S::reduce_add(sum) * spec.softmax_scale;
                if let Some(cap) = spec.soft_cap {
                    x = cap * (x / cap).tanh();
                }
                if let Some(slopes) = &spec.alibi_slopes {
                    x -= slopes[head * group + r % group] * distance as f32;
                }
                sums[token / plan.page_size] += (x - row_lse[r]).exp();
            }
        }
        sums
    }
}
