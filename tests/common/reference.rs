//! The oracle: naive, independent of the crate, generic over the precision. In f64 it is the truth, in
//! f32 it is the naive implementation whose error bounds the kernels'.

use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// A precision.
pub trait Real:
    Copy
    + Debug
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + AddAssign
{
    fn of(x: f64) -> Self;
    fn f64(self) -> f64;
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
}

macro_rules! real {
    ($($t:ident),*) => { $(
        impl Real for $t {
            fn of(x: f64) -> Self { x as $t }
            fn f64(self) -> f64 { self as f64 }
            fn exp(self) -> Self { $t::exp(self) }
            fn ln(self) -> Self { $t::ln(self) }
            fn tanh(self) -> Self { $t::tanh(self) }
        }
    )* };
}
real!(f32, f64);

/// Score features, in the oracle's own words.
#[derive(Clone, Debug, Default)]
pub struct Features {
    pub scale: f64,
    pub causal: bool,
    pub window: Option<u32>,
    pub num_sinks: u32,
    pub soft_cap: Option<f32>,
    pub alibi_slope: Option<f32>,
    pub sink_logit: Option<f32>,
    /// Channels of V; `None`: as many as of Q.
    pub v_head_dim: Option<usize>,
}

/// One query row over `keys` and `values`; `visible(k_pos)` on top of the features' own mask. Unnormalised weights
/// go through `round_weight` before they meet the values.
/// Gives O and the natural LSE.
pub fn attend<T: Real>(
    q: &[f32],
    q_pos: i64,
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    f: &Features,
    visible: impl Fn(usize) -> bool,
    round_weight: impl Fn(T) -> T,
) -> (Vec<f64>, f64) {
    let v_dim = f.v_head_dim.unwrap_or(q.len());
    let scores = scores::<T>(q, q_pos, keys, f, visible);
    let sink = f.sink_logit.map(|s| T::of(s as f64));
    let mut all: Vec<T> = scores.iter().map(|s| s.1).chain(sink).collect();
    let Some(&first) = all.first() else { return (vec![0.0; v_dim], f64::NEG_INFINITY) };
    let max = all.iter().fold(first, |m, &x| if x > m { x } else { m });
    let mut total = T::of(0.0);
    for x in &mut all {
        total += (*x - max).exp();
    }
    let mut out = vec![T::of(0.0); v_dim];
    for &(k_pos, score) in &scores {
        let weight = round_weight((score - max).exp());
        for d in 0..v_dim {
            out[d] += weight * T::of(values[k_pos][d] as f64);
        }
    }
    out.iter_mut().for_each(|o| *o = *o / total);
    (out.into_iter().map(T::f64).collect(), (max + total.ln()).f64())
}

/// The scores of the keys that the row sees, with their positions.
fn scores<T: Real>(
    q: &[f32],
    q_pos: i64,
    keys: &[Vec<f32>],
    f: &Features,
    visible: impl Fn(usize) -> bool,
) -> Vec<(usize, T)> {
    let mut scores = Vec::new();
    for (k_pos, key) in keys.iter().enumerate() {
        let distance = q_pos - k_pos as i64;
        let in_window = f.window.is_none_or(|w| distance < w as i64) || (k_pos as i64) < f.num_sinks as i64;
        if f.causal && distance < 0 || !in_window || !visible(k_pos) {
            continue;
        }
        let mut score = T::of(0.0);
        for d in 0..q.len() {
            score += T::of(q[d] as f64) * T::of(key[d] as f64);
        }
        score = score * T::of(f.scale);
        if let Some(cap) = f.soft_cap {
            score = T::of(cap as f64) * (score / T::of(cap as f64)).tanh();
        }
        if let Some(slope) = f.alibi_slope {
            score += T::of(slope as f64) * T::of(-distance as f64);
        }
        scores.push((k_pos, score));
    }
    scores
}

/// How far a rounding to f32 of each score can move the elements of O, to first order: O moves with score `j` by
/// `p_j * (v_j - O)`, and a sum of products is rounded by up to half a unit of the sum of their magnitudes. Large
/// logits make this more than all else, and what an implementation in f32 shows of it is one draw of chance.
pub fn score_rounding(
    q: &[f32],
    q_pos: i64,
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
    f: &Features,
    visible: impl Fn(usize) -> bool,
    (out, lse): (&[f64], f64),
) -> Vec<f64> {
    let mut moved = vec![0.0; out.len()];
    for (k_pos, score) in scores::<f64>(q, q_pos, keys, f, visible) {
        let products = q.iter().zip(&keys[k_pos]).map(|(&q, &k)| (q as f64 * k as f64).abs());
        let magnitude = products.sum::<f64>() * f.scale;
        let weight = (score - lse).exp() * magnitude * f32::EPSILON as f64 / 2.0;
        for (d, moved) in moved.iter_mut().enumerate() {
            *moved += weight * (values[k_pos][d] as f64 - out[d]).abs();
        }
    }
    moved
}

/// Rotates one head: `pairs[i]` are the channels of pair `i`, `angles[i]` its angle.
pub fn rotate(x: &[f32], pairs: &[(usize, usize)], angles: &[f64], factor: f64) -> Vec<f64> {
    let mut y: Vec<f64> = x.iter().map(|&x| x as f64).collect();
    for (&(a, b), angle) in pairs.iter().zip(angles) {
        let (sin, cos) = (angle.sin() * factor, angle.cos() * factor);
        let (xa, xb) = (x[a] as f64, x[b] as f64);
        y[a] = xa * cos - xb * sin;
        y[b] = xb * cos + xa * sin;
    }
    y
}
