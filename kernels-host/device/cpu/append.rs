//! Append on the CPU: rotate, convert, write into pages; summaries and groups of int4 keys kept up.
#![allow(unsafe_op_in_unsafe_fn)]

use super::Cpu;
use super::convert::{load_row_as, store_row_as};
use super::kv_rows::Rows;
use super::quantized::QuantRows;
use super::simd::{Simd, Task};
use crate::device::AppendCall;
use crate::kv::KvMut;
use crate::op::append_kv::AppendPlan;
use crate::spec::RopeStyle;
use crate::tensor::DType;

/// Channels of a head at most, where KV is appended.
pub(super) const MAX_DIM: usize = 256;

pub(super) fn append_kv(cpu: &Cpu, call: AppendCall<'_>) {
    let AppendCall { plan, q, k, v, kv } = call;
    let job = Append {
        plan,
        q: q.as_ref().map(|q| (Ragged::new(&q.as_view()), q.shape()[1])),
        k: Ragged::new(&k),
        v: Ragged::new(&v),
        to: match &kv {
            KvMut::Paged { k, v, summaries } => To::Paged {
                dtype: k.dtype(),
                k: Rows::paged(&k.as_view()),
                v: Rows::paged(&v.as_view()),
                summaries: summaries.as_ref().map(|s| (s.dtype(), Rows::paged(&s.as_view()))),
            },
            KvMut::Quantized { k, v } => To::Quantized {
                k: QuantRows::new(&k.as_ref().map(|k| k.as_view())),
                v: QuantRows::new(&v.as_ref().map(|v| v.as_view())),
            },
        },
    };
    let tokens = plan.num_tokens();
    if let Some((_, heads)) = job.q
        && plan.rotary_dim > 0
    {
        cpu.for_rows(tokens, tokens * heads * plan.head_dim, |range| {
            cpu.level.run(RotateQ { job: &job, range });
        });
    }
    // A head's tokens in order: summaries and int4 groups of a page see them as they come.
    cpu.for_rows(plan.num_kv_heads, 2 * tokens * plan.num_kv_heads * plan.head_dim, |heads| {
        for head in heads {
            cpu.level.run(WriteHead { job: &job, head });
        }
    });
}

/// Rows `[token, head]` of a ragged tensor; strides in bytes.
struct Ragged {
    dtype: DType,
    ptr: *const u8,
    token: usize,
    head: usize,
}

impl Ragged {
    fn new(view: &crate::tensor::View<'_>) -> Self {
        let size = view.dtype().size();
        let strides = view.strides();
        Ragged { dtype: view.dtype(), ptr: view.ptr(), token: strides[0] * size, head: strides[1] * size }
    }

    fn at(&self, token: usize, head: usize) -> *const u8 {
        self.ptr.wrapping_add(token * self.token + head * self.head)
    }
}

enum To {
    Paged { dtype: DType, k: Rows, v: Rows, summaries: Option<(DType, Rows)> },
    Quantized { k: QuantRows, v: QuantRows },
}

struct Append<'a> {
    plan: &'a AppendPlan,
    q: Option<(Ragged, usize)>,
    k: Ragged,
    v: Ragged,
    to: To,
}

// SAFETY: `RotateQ` tasks write the Q rows of their own tokens, `WriteHead` tasks the pages of their
// own head, and the plan holds no slot twice.
unsafe impl Sync for Append<'_> {}

struct RotateQ<'a> {
    job: &'a Append<'a>,
    range: std::ops::Range<usize>,
}

impl Task for RotateQ<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let plan = self.job.plan;
        let Some((q, heads)) = &self.job.q else { return };
        let mut row = [0f32; MAX_DIM];
        for token in self.range {
            for head in 0..*heads {
                let at = q.at(token, head);
                // Only the rotated channels change.
                load_row_as::<S>(q.dtype, at, row.as_mut_ptr(), plan.rotary_dim);
                rotate(plan, token, &mut row);
                store_row_as::<S>(q.dtype, row.as_ptr(), at.cast_mut(), plan.rotary_dim);
            }
        }
    }
}

struct WriteHead<'a> {
    job: &'a Append<'a>,
    head: usize,
}

impl Task for WriteHead<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let WriteHead { job, head } = self;
        let plan = job.plan;
        let dim = plan.head_dim;
        let (mut k, mut v) = ([0f32; MAX_DIM], [0f32; MAX_DIM]);
        for token in 0..plan.num_tokens() {
            let Some((page, offset)) = plan.slot(token) else { continue };
            load_row_as::<S>(job.k.dtype, job.k.at(token, head), k.as_mut_ptr(), dim);
            load_row_as::<S>(job.v.dtype, job.v.at(token, head), v.as_mut_ptr(), dim);
            rotate(plan, token, &mut k);
            match &job.to {
                To::Paged { dtype, k: k_rows, v: v_rows, summaries } => {
                    let to = k_rows.at(page, head, offset).cast_mut();
                    store_row_as::<S>(*dtype, k.as_ptr(), to, dim);
                    store_row_as::<S>(*dtype, v.as_ptr(), v_rows.at(page, head, offset).cast_mut(), dim);
                    if let Some((summary_dtype, summaries)) = summaries {
                        // What attention will read, not what came in, bounds the scores.
                        load_row_as::<S>(*dtype, to, k.as_mut_ptr(), dim);
                        let mut bound = [0f32; MAX_DIM];
                        for (side, further) in [(0, f32::min as fn(f32, f32) -> f32), (1, f32::max)] {
                            let row = summaries.at(page, head, side).cast_mut();
                            if offset == 0 {
                                bound = k;
                            } else {
                                load_row_as::<S>(*summary_dtype, row, bound.as_mut_ptr(), dim);
                                bound.iter_mut().zip(&k).for_each(|(b, &x)| *b = further(x, *b));
                            }
                            store_row_as::<S>(*summary_dtype, bound.as_ptr(), row, dim);
                        }
                    }
                }
                To::Quantized { k: k_rows, v: v_rows } => {
                    let tail = plan.tail_slots.get(token).map_or(0, |&tail| tail as usize);
                    let (at, place) = ((page, head, offset), (tail, plan.positions[token] as usize));
                    k_rows.store::<S>(at, place, &k[..dim]);
                    v_rows.store::<S>(at, place, &v[..dim]);
                }
            }
        }
    }
}

/// Rotates the first `rotary_dim` channels by the token's angles.
#[inline(always)]
fn rotate(plan: &AppendPlan, token: usize, row: &mut [f32; MAX_DIM]) {
    let half = plan.rotary_dim / 2;
    let cos = &plan.cos[token * half..][..half];
    let sin = &plan.sin[token * half..][..half];
    match plan.rope_style {
        RopeStyle::HalfRotated => {
            let (a, b) = row[..2 * half].split_at_mut(half);
            for i in 0..half {
                (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
            }
        }
        RopeStyle::Interleaved => {
            for (i, pair) in row[..2 * half].chunks_exact_mut(2).enumerate() {
                (pair[0], pair[1]) =
                    (pair[0] * cos[i] - pair[1] * sin[i], pair[1] * cos[i] + pair[0] * sin[i]);
            }
        }
    }
}
