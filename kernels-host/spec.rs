//! What is computed: the static side of attention and of rotary embeddings.

use std::f64::consts::PI;

use ferroflash_kernels::abi::ScoreParams;

use crate::error::{Error, Result};

/// Static description of an attention layer: heads, mask and score features.
///
/// `score = softmax_scale * dot(q, k)`, then the soft cap, then ALiBi, then the mask.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads, a multiple of `num_kv_heads` (equal: MHA; 1 KV head: MQA; between: GQA).
    pub num_q_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Channels per head of queries and keys: a multiple of 8, at most 256; with one KV head and `v_head_dim` up to 512, at
    /// most 576 (multi-head latent attention: DeepSeek's 576 and 512; on a GPU V is then a view of K's first channels).
    pub head_dim: usize,
    /// Channels per head of values and outputs: a multiple of 8, at most `head_dim`. [`AttentionSpec::new`] sets
    /// `head_dim`; fewer are for views of K and V (DeepSeek's 192 and 128), not for quantised KV.
    pub v_head_dim: usize,
    /// Factor on the dot product; [`AttentionSpec::new`] sets `1 / sqrt(head_dim)`.
    pub softmax_scale: f32,
    /// Whether a query sees only keys up to its own position. The last query stands at the last key
    /// (bottom-right alignment), so a chunk of queries over a longer KV works as chunked prefill.
    pub causal: bool,
    /// Sliding window: a key is visible while `q_pos - k_pos < window`, the query's own key included.
    pub window: Option<u32>,
    /// Attention sinks: the first keys that stay visible outside the window (StreamingLLM,
    /// arXiv:2309.17453).
    pub num_sinks: u32,
    /// `cap * tanh(score / cap)` (Gemma 2).
    pub soft_cap: Option<f32>,
    /// ALiBi slopes, one per query head: `slope * (k_pos - q_pos)` is added (arXiv:2108.12409).
    pub alibi_slopes: Option<Vec<f32>>,
    /// Learned sink logits, one per query head: each takes part in the softmax's denominator as a key
    /// with no value, and so in the LSE.
    pub sink_logits: Option<Vec<f32>>,
    /// Whether plans are for [`Kv::Quantized`](crate::Kv::Quantized), which has kernels of its own, and for no other.
    pub quantized_kv: bool,
}

impl AttentionSpec {
    /// Full attention with scale `1 / sqrt(head_dim)`.
    pub fn new(num_q_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        AttentionSpec {
            num_q_heads,
            num_kv_heads,
            head_dim,
            v_head_dim: head_dim,
            softmax_scale: 1.0 / (head_dim.max(1) as f32).sqrt(),
            causal: false,
            window: None,
            num_sinks: 0,
            soft_cap: None,
            alibi_slopes: None,
            sink_logits: None,
            quantized_kv: false,
        }
    }

    /// Plans are for quantised KV.
    pub fn quantized_kv(mut self) -> Self {
        self.quantized_kv = true;
        self
    }

    /// Sets `causal`.
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// Sets the sliding window.
    pub fn window(mut self, window: u32) -> Self {
        self.window = Some(window);
        self
    }

    /// Sets the channels of values and outputs.
    pub fn v_head_dim(mut self, v_head_dim: usize) -> Self {
        self.v_head_dim = v_head_dim;
        self
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads
    }

    /// Whether this is latent attention: heads too wide for other kernels.
    pub(crate) fn is_latent(&self) -> bool {
        self.head_dim > 256 && self.num_kv_heads == 1 && self.v_head_dim <= 512
    }

    /// For operations that have no latent form.
    pub(crate) fn check_not_latent(&self, op: &'static str) -> Result<()> {
        if self.is_latent() {
            return Err(Error::value(op, "head_dim", "at most 256", self.head_dim));
        }
        Ok(())
    }

    pub(crate) fn score_params(&self) -> ScoreParams {
        ScoreParams {
            scale: self.softmax_scale,
            soft_cap: self.soft_cap.unwrap_or(0.0),
            window: self.window.unwrap_or(0),
            num_sinks: self.num_sinks,
            causal: self.causal as u32,
        }
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        let heads = (self.num_q_heads, self.num_kv_heads);
        if heads.0 == 0 || heads.1 == 0 || !heads.0.is_multiple_of(heads.1) || heads.0 > 1 << 16 {
            return Err(Error::value(
                op,
                "num_q_heads, num_kv_heads",
                "num_q_heads a positive multiple of num_kv_heads, at most 65536",
                format_args!("{heads:?}"),
            ));
        }
        let most = if self.is_latent() { 576 } else { 256 };
        if self.head_dim == 0 || self.head_dim > most || !self.head_dim.is_multiple_of(8) {
            let expected =
                "a multiple of 8 from 8 to 256, or to 576 with one KV head and v_head_dim of 512 at most";
            return Err(Error::value(op, "head_dim", expected, self.head_dim));
        }
        if self.v_head_dim == 0 || self.v_head_dim > self.head_dim || !self.v_head_dim.is_multiple_of(8) {
            let expected = format_args!("a multiple of 8 from 8 to head_dim, {}", self.head_dim).to_string();
            return Err(Error::value(op, "v_head_dim", expected, self.v_head_dim));
        }
        if self.quantized_kv && (self.is_latent() || self.v_head_dim != self.head_dim) {
            let expected = "at most 256, and v_head_dim the same, for quantised KV";
            let got = format_args!("{} and {}", self.head_dim, self.v_head_dim).to_string();
            return Err(Error::value(op, "head_dim", expected, got));
        }
        if !self.softmax_scale.is_finite() {
            return Err(Error::value(op, "softmax_scale", "a finite number", self.softmax_scale));
        }
        if self.window == Some(0) {
            return Err(Error::value(op, "window", "at least 1 (the query's own key), or None", 0));
        }
        if let Some(cap) = self.soft_cap
            && !(cap.is_finite() && cap > 0.0)
        {
            return Err(Error::value(op, "soft_cap", "a finite number above 0, or None", cap));
        }
        let per_head = [("alibi_slopes", &self.alibi_slopes), ("sink_logits", &self.sink_logits)];
        for (what, values) in per_head {
            let Some(values) = values else { continue };
            if values.len() != self.num_q_heads {
                return Err(Error::value(
                    op,
                    what,
                    format_args!("one per query head, {}", self.num_q_heads),
                    values.len(),
                ));
            }
            if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
                return Err(Error::value(op, what, "finite numbers", bad));
            }
        }
        Ok(())
    }
}

/// Which channels of a head make up a rotated pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// Channel `i` with `i + rotary_dim / 2` (GPT-NeoX, Hugging Face's Llama).
    HalfRotated,
    /// Channel `2i` with `2i + 1` (GPT-J, the original Llama).
    Interleaved,
}

/// How the frequencies are changed to reach beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by `factor` (position interpolation, arXiv:2306.15595).
    Linear {
        /// New context over trained context.
        factor: f64,
    },
    /// The base enlarged by `factor ^ (dim / (dim - 2))` (NTK-aware scaling).
    Ntk {
        /// New context over trained context.
        factor: f64,
    },
    /// Interpolation by parts with an attention factor (YaRN, arXiv:2309.00071).
    Yarn {
        /// New context over trained context.
        factor: f64,
        /// Trained context in tokens.
        original_max_position: usize,
        /// Rotations above which a frequency is kept (paper: 32).
        beta_fast: f64,
        /// Rotations below which a frequency is interpolated (paper: 1).
        beta_slow: f64,
        /// Factor on cos and sin; `None`: `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
    },
    /// Llama 3.1's smooth interpolation of low frequencies.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Trained context in tokens.
        original_max_position: usize,
    },
    /// A divisor per frequency (LongRoPE, arXiv:2402.13753): `short_factor` while the model's
    /// `max_position` is at most the trained one, else `long_factor`.
    LongRope {
        /// Divisors inside the trained context, `rotary_dim / 2` of them.
        short_factor: Vec<f64>,
        /// Divisors beyond it.
        long_factor: Vec<f64>,
        /// Trained context in tokens.
        original_max_position: usize,
        /// Context in tokens that the model is run with.
        max_position: usize,
        /// Factor on cos and sin; `None`: `sqrt(1 + ln(max / original) / ln(original))`.
        attention_factor: Option<f64>,
    },
}

/// Rotary position embedding (RoFormer, arXiv:2104.09864).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeSpec {
    /// Leading channels of each head that are rotated, even, at most `head_dim`; the rest pass through.
    pub rotary_dim: usize,
    /// Base of the frequencies, 10000 in the paper.
    pub theta: f64,
    /// Pairing.
    pub style: RopeStyle,
    /// Context extension.
    pub scaling: RopeScaling,
}

impl RopeSpec {
    /// Half-rotated pairs over all of `head_dim`, no scaling.
    pub fn new(head_dim: usize, theta: f64) -> Self {
        RopeSpec { rotary_dim: head_dim, theta, style: RopeStyle::HalfRotated, scaling: RopeScaling::None }
    }

    /// Angle per position of each pair, in radians, and the factor on cos and sin.
    pub fn frequencies(&self) -> Result<(Vec<f64>, f64)> {
        self.check()?;
        let dim = self.rotary_dim as f64;
        let base = |theta: f64| -> Vec<f64> {
            (0..self.rotary_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / dim)).collect()
        };
        let plain = base(self.theta);
        Ok(match &self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Ntk { factor } => {
                let exponent = if dim > 2.0 { dim / (dim - 2.0) } else { 1.0 };
                (base(self.theta * factor.powf(exponent)), 1.0)
            }
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
                // The (real-valued) pair that makes `rotations` turns over the trained context.
                let pair = |rotations: f64| {
                    dim * (*original_max_position as f64 / (rotations * 2.0 * PI)).ln()
                        / (2.0 * self.theta.ln())
                };
                let low = pair(*beta_fast).floor().max(0.0);
                let high = pair(*beta_slow).ceil().min(dim - 1.0);
                let ramp = |i: f64| ((i - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                let mixed = plain.iter().enumerate().map(|(i, f)| {
                    let interpolated = ramp(i as f64);
                    f / factor * interpolated + f * (1.0 - interpolated)
                });
                let default = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
                (mixed.collect(), attention_factor.unwrap_or(default))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let original = *original_max_position as f64;
                let scaled = plain.iter().map(|f| {
                    let turns = original * f / (2.0 * PI);
                    let keep =
                        ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    (1.0 - keep) * f / factor + keep * f
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position,
                max_position,
                attention_factor,
            } => {
                let long = max_position > original_max_position;
                let divisors = if long { long_factor } else { short_factor };
                let original = *original_max_position as f64;
                let default = if long {
                    (1.0 + (*max_position as f64 / original).ln() / original.ln()).sqrt()
                } else {
                    1.0
                };
                let scaled = plain.iter().zip(divisors).map(|(f, d)| f / d);
                (scaled.collect(), attention_factor.unwrap_or(default))
            }
        })
    }

    fn check(&self) -> Result<()> {
        const OP: &str = "rope";
        if self.rotary_dim < 2 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > 256 {
            return Err(Error::value(OP, "rotary_dim", "an even number from 2 to 256", self.rotary_dim));
        }
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return Err(Error::value(OP, "theta", "a finite number above 1", self.theta));
        }
        let positive = |what: &'static str, x: f64| {
            if x.is_finite() && x > 0.0 {
                Ok(())
            } else {
                Err(Error::value(OP, what, "a finite number above 0", x))
            }
        };
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } | RopeScaling::Ntk { factor } => positive("factor", *factor),
            RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, attention_factor } => {
                positive("factor", *factor)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                positive("attention_factor", attention_factor.unwrap_or(1.0))?;
                positive("original_max_position", *original_max_position as f64)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)?;
                positive("original_max_position", *original_max_position as f64)
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position,
                max_position,
                attention_factor,
            } => {
                for (what, factors) in [("short_factor", short_factor), ("long_factor", long_factor)] {
                    let pairs = self.rotary_dim / 2;
                    if factors.len() != pairs {
                        let expected = format_args!("one per rotated pair, {pairs}").to_string();
                        return Err(Error::value(OP, what, expected, factors.len()));
                    }
                    factors.iter().try_for_each(|&f| positive(what, f))?;
                }
                positive("attention_factor", attention_factor.unwrap_or(1.0))?;
                positive("max_position", *max_position as f64)?;
                positive("original_max_position - 1", *original_max_position as f64 - 1.0)
            }
        }
    }
}
