//! Sampling on the CPU.

use super::Cpu;
use super::Shared;
use super::convert::load_row_as;
use super::simd::{Simd, Task};
use crate::device::{IdsMut, SampleCall};
use crate::op::sample::{SamplingParams, random_bits};

pub(super) fn sample(cpu: &Cpu, call: SampleCall<'_>) {
    let vocab = call.logits.shape()[1];
    let (dtype, stride) = (call.logits.dtype(), call.logits.strides()[0]);
    let logits = Shared(call.logits.ptr().cast_mut());
    let (ids, id_stride) = match call.ids {
        IdsMut::Host(ids) => (Shared(ids.as_mut_ptr()), 1),
        IdsMut::Device(ids) => (Shared(ids.ptr().cast()), ids.strides()[0]),
    };
    cpu.for_each(call.params.len(), |i| {
        let mut row = vec![0f32; vocab];
        let from = logits.get().wrapping_add(i * stride * dtype.size());
        cpu.level.run(Load { dtype, from, to: &mut row });
        // SAFETY: there are as many ids as params, checked at the door, and each index comes once.
        unsafe { *ids.get().add(i * id_stride) = next_token(&row, &call.params[i]) };
    });
}

struct Load<'a> {
    dtype: crate::DType,
    from: *const u8,
    to: &'a mut [f32],
}

impl Task for Load<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `from` is a row of the logits, as long as `to`.
        unsafe { load_row_as::<S>(self.dtype, self.from, self.to.as_mut_ptr(), self.to.len()) }
    }
}

fn next_token(logits: &[f32], params: &SamplingParams) -> u32 {
    let best = argmax(logits);
    if params.temperature == 0.0 || !logits[best].is_finite() {
        return best as u32;
    }
    let max = logits[best];
    let weight = |x: f32| ((x - max) / params.temperature).exp() as f64;
    // NaN counts as -inf.
    let mut kept: Vec<(u32, f64)> = logits
        .iter()
        .enumerate()
        .map(|(i, &x)| (i as u32, if x.is_nan() { 0.0 } else { weight(x) }))
        .collect();
    let by_weight = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if params.top_k > 0 && params.top_k < kept.len() {
        kept.select_nth_unstable_by(params.top_k - 1, by_weight);
        kept.truncate(params.top_k);
    }
    if params.top_p < 1.0 {
        kept.sort_unstable_by(by_weight);
        let total: f64 = kept.iter().map(|k| k.1).sum();
        let mut mass = 0.0;
        let enough = kept.iter().position(|k| {
            mass += k.1;
            mass >= params.top_p as f64 * total
        });
        kept.truncate(enough.map_or(kept.len(), |i| i + 1));
    }
    // The best token's weight is 1, so the threshold is min_p itself.
    kept.retain(|k| k.1 >= params.min_p as f64 && k.1 > 0.0);
    // In token order, so that the draw does not depend on how the set was found.
    kept.sort_unstable_by_key(|k| k.0);
    let total: f64 = kept.iter().map(|k| k.1).sum();
    let mut left = uniform(params.seed, params.step) * total;
    for &(id, weight) in &kept {
        left -= weight;
        if left < 0.0 {
            return id;
        }
    }
    kept.last().map_or(best as u32, |k| k.0)
}

/// The largest logit, the first of equal ones; NaN never wins.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &x) in logits.iter().enumerate() {
        if x > logits[best] || logits[best].is_nan() && !x.is_nan() {
            best = i;
        }
    }
    best
}

/// A number in [0, 1), depending on nothing but seed and step.
fn uniform(seed: u64, step: u64) -> f64 {
    (random_bits(seed, step) >> 11) as f64 / (1u64 << 53) as f64
}
