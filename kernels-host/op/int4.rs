//! int4 KV pages on their own: quantise a run of tokens, read pages back.

use super::Door;
use super::append_kv::AppendPlan;
use crate::device::{DequantCall, Device};
use crate::error::{Error, Result};
use crate::kv_cache::{Int4Pages, Int4PagesMut, KvMut};
use crate::plan::{Batch, KvTable};
use crate::spec::AttentionSpec;
use crate::tensor::{DType, View, ViewMut};

/// Quantises whole pages: tokens `0..num_pages * page_size` of `k` and `v`,
/// `[total, num_kv_heads, head_dim]`, into pages `0..num_pages`. The pages' first tail is overwritten.
///
/// Each value comes back within half a scale: `(max - min) / 30` of its group, and the rounding of the
/// group's minimum and scale to f16.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] where the tensors do not fit, [`Error::Index`] without a tail.
pub fn quantize(device: &Device, k: View<'_>, v: View<'_>, pages: Int4PagesMut<'_>) -> Result<()> {
    let &[_, num_kv_heads, head_dim] = k.shape() else {
        return Err(Error::shape("int4::quantize", "k", "[total, num_kv_heads, head_dim]", k.shape()));
    };
    let spec = AttentionSpec::new(num_kv_heads, num_kv_heads, head_dim);
    spec.check("int4::quantize")?;
    spec.check_not_latent("int4::quantize")?;
    let dims = pages.as_view().check("int4::quantize", num_kv_heads, head_dim)?;
    let total = u32::try_from(dims.num_pages * dims.page_size)
        .map_err(|_| Error::value("int4::quantize", "tokens", "fewer than 2^32", "more"))?;
    let kv_indices: Vec<u32> = (0..dims.num_pages as u32).collect();
    let table = KvTable::Block {
        page_size: dims.page_size,
        block_table: &kv_indices,
        max_blocks: dims.num_pages,
        seq_lens: &[total],
    };
    let qo_indptr = [0, total];
    let batch = Batch { tail_slots: &[0], ..Batch::new(&qo_indptr, table) };
    AppendPlan::from_batch(device, &spec, None, &batch)?.run(None, k, v, KvMut::Int4(pages))
}

/// Reads all pages back: `k` and `v` are f32 `[num_pages, num_kv_heads, page_size, head_dim]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Device`] where the tensors do not fit.
pub fn dequantize(device: &Device, pages: Int4Pages<'_>, k: ViewMut<'_>, v: ViewMut<'_>) -> Result<()> {
    let door = Door { op: "int4::dequantize", device };
    let &[_, num_kv_heads, _, head_dim] = k.shape() else {
        let expected = "[num_pages, num_kv_heads, page_size, head_dim]";
        return Err(Error::shape(door.op, "k", expected, k.shape()));
    };
    let spec = AttentionSpec::new(num_kv_heads, num_kv_heads, head_dim);
    spec.check(door.op)?;
    spec.check_not_latent(door.op)?;
    let dims = pages.check(door.op, num_kv_heads, head_dim)?;
    for (what, view) in crate::Kv::Int4(pages).views() {
        door.device(what, &view)?;
    }
    let shape = [dims.num_pages, num_kv_heads, dims.page_size, head_dim];
    for (what, view) in [("k", k.as_view()), ("v", v.as_view())] {
        door.floats(what, &view, &shape)?;
        if view.dtype() != DType::F32 {
            return Err(Error::dtype(door.op, what, DType::F32, view.dtype()));
        }
    }
    device.backend().dequantize_int4(DequantCall { pages, k, v })
}
