//! Online softmax of 16 packed rows, two of them in each lane (rows `lane / 4` and `+ 8`), a block of columns a step
//! (FlashAttention-2, arXiv:2307.08691).
//!
//! What has been accumulated is scaled anew only where a row's maximum grows. In exact arithmetic it need not be scaled
//! then either, as long as weights stay in range. But weights are rounded to 16 bits: relative to the true maximum
//! the largest weight is 1, which has no rounding error, and relative to an older one it would have.

use core::f32::consts::LOG2_E;

use crate::abi::ScoreParams;
use crate::attn::rows::LaneRows;
use crate::isa;

/// Scores of 16 rows against 8 `TILES` columns: C fragments.
pub(crate) type Scores<const TILES: usize> = [[f32; 4]; TILES];

/// Maximum of a row that has seen nothing: finite, so that `-inf` less it is `-inf`, and below every logit but those
/// in the last two binary orders of `f32`, which weigh nothing.
const NOTHING: f32 = -f32::MAX / 4.0;

/// Maximum (a base-2 logit) and sum of a lane's two rows. The sum is over the lane's own columns until
/// [`State::reduced`].
#[derive(Clone, Copy)]
pub(crate) struct State {
    pub(crate) m: [f32; 2],
    pub(crate) l: [f32; 2],
}

/// How dot products become base-2 logits.
pub(crate) struct Logits {
    /// The logit is this times what [`Logits::apply`] left.
    pub(crate) factor: f32,
    scale: f32,
    soft_cap: f32,
    in_place: bool,
}

impl Logits {
    /// `slopes`: whether ALiBi is added.
    #[inline(always)]
    pub(crate) fn new(score: &ScoreParams, slopes: bool) -> Self {
        // A plain positive scale is folded into the exponential. Maxima of products scaled by anything else
        // would not be maxima of logits.
        let in_place = score.soft_cap > 0.0 || slopes || score.scale <= 0.0;
        let scale = score.scale * LOG2_E;
        Logits {
            factor: if in_place { 1.0 } else { scale },
            scale: score.scale,
            soft_cap: score.soft_cap,
            in_place,
        }
    }

    /// Soft cap and ALiBi on columns from `at`.
    #[inline(always)]
    pub(crate) fn apply<const TILES: usize>(&self, s: &mut Scores<TILES>, rows: &LaneRows<'_>, at: u32) {
        if !self.in_place {
            return;
        }
        let alibi = rows.place.p.alibi_slopes != 0;
        let (positions, _) = rows.positions();
        let to_unit = self.scale * isa::rcp(self.soft_cap);
        for r in 0..2 {
            let slope = if alibi { rows.slope(r) } else { 0.0 };
            let distance = (at + 2 * (isa::thread_x() % 4)) as i32 - positions[r];
            for j in 0..TILES {
                for i in 0..2 {
                    let x = s[j][2 * r + i];
                    // A branch for each element, on purpose: across one the assembler does not gather many
                    // `tanh` in flight, for which it has no registers.
                    let x =
                        if self.soft_cap > 0.0 { self.soft_cap * tanh(x * to_unit) } else { x * self.scale };
                    // Without slopes this adds 0.
                    s[j][2 * r + i] = isa::fma(slope, (distance + (8 * j + i) as i32) as f32, x * LOG2_E);
                }
            }
        }
    }
}

/// `tanh x = 1 - 2 / (e^2x + 1)`, exact to a few f32 ulp of 1; the hardware's `tanh.approx` is off by 2^-11.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 * isa::rcp(isa::ex2(2.0 * LOG2_E * x) + 1.0)
}

impl State {
    pub(crate) const EMPTY: State = State { m: [NOTHING; 2], l: [0.0; 2] };

    /// Takes a block of columns in: `s` becomes weights; gives the factors for what was accumulated before, mostly 1.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn step<const TILES: usize>(&mut self, s: &mut Scores<TILES>, factor: f32) -> [f32; 2] {
        let mut correction = [1.0; 2];
        for r in 0..2 {
            let mut max = isa::max_nan(s[0][2 * r], s[0][2 * r + 1]);
            for j in 1..TILES {
                max = isa::max_nan(max, isa::max_nan(s[j][2 * r], s[j][2 * r + 1]));
            }
            max = isa::max_nan(max, f32::from_bits(isa::shfl_bfly(max.to_bits(), 1)));
            max = isa::max_nan(max, f32::from_bits(isa::shfl_bfly(max.to_bits(), 2)));
            let new = max * factor;
            // False where `new` is NaN: the weights will be.
            if new > self.m[r] {
                correction[r] = isa::ex2(self.m[r] - new);
                self.m[r] = new;
            }
            // One chain of sums: exponentials come more slowly than it goes on.
            let mut sum = 0.0;
            for j in 0..TILES {
                for x in &mut s[j][2 * r..2 * r + 2] {
                    *x = isa::ex2(isa::fma(*x, factor, -self.m[r]));
                    sum += *x;
                }
            }
            self.l[r] = isa::fma(self.l[r], correction[r], sum);
        }
        correction
    }

    /// The state with sums over all columns; the maximum of a row that has seen nothing becomes `-inf`.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn reduced(&self) -> State {
        let mut state = *self;
        for r in 0..2 {
            let l = state.l[r] + f32::from_bits(isa::shfl_bfly(state.l[r].to_bits(), 1));
            state.l[r] = l + f32::from_bits(isa::shfl_bfly(l.to_bits(), 2));
            state.m[r] = if state.m[r] == NOTHING { f32::NEG_INFINITY } else { state.m[r] };
        }
        state
    }
}

/// Scales what was accumulated before a [`State::step`], where any row of the warp has to be.
#[inline(always)]
#[track_caller]
pub(crate) fn rescale<const TILES: usize>(o: &mut [[f32; 4]; TILES], correction: [f32; 2]) {
    if isa::ballot(correction != [1.0; 2]) != 0 {
        for tile in o {
            for i in 0..4 {
                tile[i] *= correction[i / 2];
            }
        }
    }
}

/// A row that has seen nothing subtracts 0, not `-inf`: its weights come out 0, not NaN.
#[inline(always)]
fn guarded(m: f32) -> f32 {
    if m == f32::NEG_INFINITY { 0.0 } else { m }
}

/// Merges two reduced states of a row: the new maximum and sum, and the factors of the two sides.
#[inline(always)]
pub(crate) fn merge(m: [f32; 2], l: [f32; 2]) -> (f32, f32, [f32; 2]) {
    let new = isa::max_nan(m[0], m[1]);
    let base = guarded(new);
    let factors = [isa::ex2(m[0] - base), isa::ex2(m[1] - base)];
    (new, isa::fma(l[0], factors[0], l[1] * factors[1]), factors)
}

/// A finished row's factor for O and its natural-log LSE. A learned sink is a key without a value.
#[inline(always)]
pub(crate) fn finish(m: f32, l: f32, sink: Option<f32>) -> (f32, f32) {
    let (mut m, mut l, mut factor) = (m, l, 1.0);
    if let Some(sink) = sink {
        let (new, sum, factors) = merge([m, sink * LOG2_E], [l, 1.0]);
        (m, l, factor) = (new, sum, factors[0]);
    }
    if l == 0.0 {
        return (0.0, f32::NEG_INFINITY);
    }
    (factor * isa::rcp(l), (m + isa::lg2(l)) * core::f32::consts::LN_2)
}
