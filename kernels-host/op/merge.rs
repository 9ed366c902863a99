//! Merging of attention states over disjoint KV: cascades with a shared prefix, sequence-parallel shards.

use super::Door;
use crate::device::{Device, MergeCall};
use crate::error::{Error, Result};
use crate::tensor::{NaturalLog, View, ViewMut};

/// Merges finished states of the same queries over disjoint parts of their KV (Cascade Inference;
/// ring attention, arXiv:2310.01889).
///
/// - each state: O `[total_q, num_q_heads, head_dim]` and LSE f32 `[total_q, num_q_heads]`.
/// - `out`, `lse`: the same shapes.
///
/// `lse = ln(sum_i exp(lse_i))`, `out = sum_i exp(lse_i - lse) O_i`. A state with LSE `-inf` counts for
/// nothing, whatever its O holds; where all are, O = 0 and LSE = `-inf`. Learned sinks take part in
/// the LSE: give them to one of the states only.
///
/// # Errors
/// [`Error::Value`] without states; [`Error::Shape`], [`Error::DType`] or [`Error::Device`] where
/// tensors do not fit.
pub fn merge(
    device: &Device,
    states: &[(View<'_>, NaturalLog<View<'_>>)],
    out: ViewMut<'_>,
    lse: NaturalLog<ViewMut<'_>>,
) -> Result<()> {
    let door = Door { op: "merge", device };
    let &[tokens, heads, dim] = out.shape() else {
        return Err(Error::shape(door.op, "out", "[total_q, num_q_heads, head_dim]", out.shape()));
    };
    if states.is_empty() {
        return Err(Error::value(door.op, "states", "at least one", 0));
    }
    for (o, lse) in states {
        door.floats("states' O", o, &[tokens, heads, dim])?;
        door.f32s("states' LSE", &lse.0, &[tokens, heads])?;
    }
    door.floats("out", &out.as_view(), &[tokens, heads, dim])?;
    door.f32s("lse", &lse.0.as_view(), &[tokens, heads])?;
    device.backend().merge(MergeCall { states, out, lse })
}
