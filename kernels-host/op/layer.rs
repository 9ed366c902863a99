//! What a transformer layer needs around attention.

use super::Door;
use crate::device::{Device, EmbeddingCall, Ids, RmsNormCall, SiluMulCall};
use crate::error::{Error, Result};
use crate::tensor::{View, ViewMut};

/// `out = x / sqrt(mean(x^2) + eps) * weight` per row (arXiv:1910.07467).
///
/// `x`, `out`: `[rows, dim]` or `[tokens, heads, dim]`; `weight`: `[dim]`; float types in any mix,
/// arithmetic in f32. With `residual`, of the same shape, `x` is added to it first and the sum is normalised: `residual += x`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Device`], or [`Error::Value`] for a bad `eps`.
pub fn rms_norm(
    device: &Device,
    x: View<'_>,
    residual: Option<ViewMut<'_>>,
    weight: View<'_>,
    eps: f32,
    out: ViewMut<'_>,
) -> Result<()> {
    check_rms_norm(device, &x, residual.as_ref(), &weight, eps, &out)?;
    device.backend().rms_norm(RmsNormCall { x: Some(x), residual, weight, eps, out })
}

/// [`rms_norm`] where `out` is `x` itself.
///
/// # Errors
/// As [`rms_norm`].
pub fn rms_norm_in_place(
    device: &Device,
    x: ViewMut<'_>,
    residual: Option<ViewMut<'_>>,
    weight: View<'_>,
    eps: f32,
) -> Result<()> {
    check_rms_norm(device, &x.as_view(), residual.as_ref(), &weight, eps, &x)?;
    device.backend().rms_norm(RmsNormCall { x: None, residual, weight, eps, out: x })
}

fn check_rms_norm(
    device: &Device,
    x: &View<'_>,
    residual: Option<&ViewMut<'_>>,
    weight: &View<'_>,
    eps: f32,
    out: &ViewMut<'_>,
) -> Result<()> {
    let door = Door { op: "rms_norm", device };
    let shape = x.shape();
    if !(2..=3).contains(&shape.len()) {
        return Err(Error::shape(door.op, "x", "[rows, dim] or [tokens, heads, dim]", shape));
    }
    door.floats("x", x, shape)?;
    if let Some(residual) = residual {
        door.floats("residual", &residual.as_view(), shape)?;
    }
    door.floats("weight", weight, &shape[shape.len() - 1..])?;
    door.floats("out", &out.as_view(), shape)?;
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(Error::value(door.op, "eps", "a finite number of at least 0", eps));
    }
    Ok(())
}

/// `out = gate / (1 + exp(-gate)) * up` (SwiGLU, arXiv:2002.05202).
///
/// `gate_up`: `[rows, 2 * dim]`, gates first; `out`: `[rows, dim]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Device`].
pub fn silu_mul(device: &Device, gate_up: View<'_>, out: ViewMut<'_>) -> Result<()> {
    let door = Door { op: "silu_mul", device };
    let [rows, dim] = two_dims(&door, "out", &out.as_view())?;
    door.floats("gate_up", &gate_up, &[rows, 2 * dim])?;
    door.floats("out", &out.as_view(), &[rows, dim])?;
    device.backend().silu_mul(SiluMulCall { gate_up, out })
}

/// `out[i] = table[ids[i]]`.
///
/// `table`: `[vocab, dim]`; `out`: `[ids.len(), dim]`.
///
/// # Errors
/// [`Error::Index`] for an id outside the table; [`Error::Shape`], [`Error::DType`], [`Error::Device`].
pub fn embedding(device: &Device, table: View<'_>, ids: &[u32], out: ViewMut<'_>) -> Result<()> {
    let door = Door { op: "embedding", device };
    let [vocab, dim] = two_dims(&door, "table", &table)?;
    door.floats("table", &table, &[vocab, dim])?;
    door.floats("out", &out.as_view(), &[ids.len(), dim])?;
    if let Some((i, &id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= vocab) {
        let what = format!("ids[{i}]");
        return Err(Error::Index { op: door.op, what, index: id as i64, limit: vocab as u64 });
    }
    device.backend().embedding(EmbeddingCall { table, ids: Ids::Host(ids), out })
}

/// [`embedding`] of ids that are on the device, where [`sample_on_device`](super::sample::sample_on_device) left them:
/// a step needs no word from the host. An id past the table, which nobody can check before, gives a row of NaN.
///
/// `ids`: u32 `[tokens]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::Device`].
pub fn embedding_on_device(device: &Device, table: View<'_>, ids: View<'_>, out: ViewMut<'_>) -> Result<()> {
    let door = Door { op: "embedding", device };
    let [vocab, dim] = two_dims(&door, "table", &table)?;
    door.floats("table", &table, &[vocab, dim])?;
    let tokens = door.ids(&ids)?;
    door.floats("out", &out.as_view(), &[tokens, dim])?;
    device.backend().embedding(EmbeddingCall { table, ids: Ids::Device(ids), out })
}

fn two_dims(door: &Door<'_>, what: &'static str, view: &View<'_>) -> Result<[usize; 2]> {
    view.shape().try_into().map_err(|_| Error::shape(door.op, what, "two dimensions", view.shape()))
}
