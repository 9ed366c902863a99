//! Next tokens from logits.

use super::Door;
use crate::device::{Device, IdsMut, SampleCall};
use crate::error::{Error, Result};
use crate::tensor::{View, ViewMut};

/// How one request's next token is drawn.
///
/// The logits are divided by the temperature; then `top_k`, `top_p` and `min_p` narrow the candidates,
/// in this order; then one is drawn by weight, with the random number of (`seed`, `step`). The result
/// depends on nothing else: not on the batch, not on earlier draws.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0: the largest logit, the lowest id of equal ones.
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens; 0: all.
    pub top_k: usize,
    /// Keeps the most likely tokens up to this probability mass, at least one; 1: all.
    pub top_p: f32,
    /// Keeps tokens at least this likely, as a share of the most likely one (arXiv:2407.01082); 0: all.
    pub min_p: f32,
    /// The request's seed.
    pub seed: u64,
    /// The number of the token in the request.
    pub step: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, step: 0 }
    }
}

impl SamplingParams {
    /// Whether every number is in its domain.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "sample";
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::value(OP, "temperature", "a finite number of at least 0", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::value(OP, "top_p", "above 0, at most 1", self.top_p));
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return Err(Error::value(OP, "min_p", "from 0 to 1", self.min_p));
        }
        Ok(())
    }
}

/// Draws `ids[i]` from row `i` of `logits`, `[rows, vocab]`, as `params[i]` says. NaN is never drawn.
///
/// # Errors
/// [`Error::Value`] for parameters out of their domain or counts that differ; [`Error::Shape`],
/// [`Error::DType`], [`Error::Device`].
pub fn sample(device: &Device, logits: View<'_>, params: &[SamplingParams], ids: &mut [u32]) -> Result<()> {
    check(device, &logits, params, ids.len())?;
    device.backend().sample(SampleCall { logits, params, ids: IdsMut::Host(ids) })
}

/// [`sample`] with the ids left on the device, u32 `[rows]`: nothing waits.
///
/// # Errors
/// As [`sample`].
pub fn sample_on_device(
    device: &Device,
    logits: View<'_>,
    params: &[SamplingParams],
    ids: ViewMut<'_>,
) -> Result<()> {
    let rows = Door { op: "sample", device }.ids(&ids.as_view())?;
    check(device, &logits, params, rows)?;
    device.backend().sample(SampleCall { logits, params, ids: IdsMut::Device(ids) })
}

fn check(device: &Device, logits: &View<'_>, params: &[SamplingParams], ids: usize) -> Result<()> {
    let door = Door { op: "sample", device };
    let &[rows, vocab] = logits.shape() else {
        return Err(Error::shape(door.op, "logits", "[rows, vocab]", logits.shape()));
    };
    door.floats("logits", logits, &[rows, vocab])?;
    if vocab == 0 {
        return Err(Error::shape(door.op, "logits", "at least one token in the vocabulary", logits.shape()));
    }
    for (what, len) in [("params", params.len()), ("ids", ids)] {
        if len != rows {
            let expected = format_args!("one per row, {rows}").to_string();
            return Err(Error::value(door.op, what, expected, len));
        }
    }
    params.iter().try_for_each(SamplingParams::check)
}

/// 64 random bits from Philox 4x32-10 (Salmon et al., SC 2011): the seed is the key, the step the counter, so a
/// request's draws depend on nothing else.
pub(crate) fn random_bits(seed: u64, step: u64) -> u64 {
    let mut c = [step as u32, (step >> 32) as u32, 0, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let a = 0xD251_1F53u64 * c[0] as u64;
        let b = 0xCD9E_8D57u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    (c[0] as u64) << 32 | c[1] as u64
}

#[cfg(test)]
mod tests {
    #[test]
    fn random_bits_are_philox() {
        // The published known answer for key 0 and counter 0 starts 6627e8d5 e169c58d.
        assert_eq!(super::random_bits(0, 0), 0x6627_e8d5_e169_c58d);
    }
}
