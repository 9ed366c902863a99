//! Quantised KV pages on their own: quantise a run of tokens, read pages back.

use super::Door;
use super::append_kv::AppendPlan;
use crate::device::{DequantCall, Device};
use crate::error::{Error, Result};
use crate::kv::{Kv, KvMut, QuantPages};
use crate::plan::{Batch, KvTable};
use crate::spec::AttentionSpec;
use crate::tensor::{DType, View, ViewMut};

/// Quantises whole pages: tokens `0..num_pages * page_size` of `k` and `v`, `[total, num_kv_heads, head_dim]`, into pages
/// `0..num_pages`. Of int4 keys the first tail is overwritten.
///
/// Each value comes back within half a scale: of int4 `(max - min) / 30` of its group and what minimum and scale lose, being
/// rounded, of int8 `max / 254` of its row; of fp8 within 1/16 of itself, or 2^-10 scales.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] where the tensors do not fit, [`Error::Index`] without a tail.
pub fn quantize(device: &Device, k: View<'_>, v: View<'_>, pages: KvMut<'_>) -> Result<()> {
    const OP: &str = "quantized::quantize";
    let &[_, num_kv_heads, head_dim] = k.shape() else {
        return Err(Error::shape(OP, "k", "[total, num_kv_heads, head_dim]", k.shape()));
    };
    let spec = AttentionSpec::new(num_kv_heads, num_kv_heads, head_dim);
    spec.check(OP)?;
    spec.check_not_latent(OP)?;
    let dims = pages.as_view().check(OP, num_kv_heads, (head_dim, head_dim))?;
    let total = u32::try_from(dims.num_pages * dims.page_size)
        .map_err(|_| Error::value(OP, "tokens", "fewer than 2^32", "more"))?;
    let kv_indices: Vec<u32> = (0..dims.num_pages as u32).collect();
    let table = KvTable::Block {
        page_size: dims.page_size,
        block_table: &kv_indices,
        max_blocks: dims.num_pages,
        seq_lens: &[total],
    };
    let qo_indptr = [0, total];
    let batch = Batch { tail_slots: &[0], ..Batch::new(&qo_indptr, table) };
    AppendPlan::from_batch(device, &spec, None, &batch)?.run(None, k, v, pages)
}

/// Reads all pages back, but for tails: `k` and `v` are f32 `[num_pages, num_kv_heads, page_size, head_dim]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`] or [`Error::Device`] where the tensors do not fit.
pub fn dequantize(
    device: &Device,
    (k_pages, v_pages): (QuantPages<View<'_>>, QuantPages<View<'_>>),
    k: ViewMut<'_>,
    v: ViewMut<'_>,
) -> Result<()> {
    let door = Door { op: "quantized::dequantize", device };
    let &[_, num_kv_heads, _, head_dim] = k.shape() else {
        let expected = "[num_pages, num_kv_heads, page_size, head_dim]";
        return Err(Error::shape(door.op, "k", expected, k.shape()));
    };
    let spec = AttentionSpec::new(num_kv_heads, num_kv_heads, head_dim);
    spec.check(door.op)?;
    spec.check_not_latent(door.op)?;
    let kv = Kv::Quantized { k: k_pages, v: v_pages };
    let dims = kv.check(door.op, num_kv_heads, (head_dim, head_dim))?;
    for (what, view) in kv.views() {
        door.device(what, &view)?;
    }
    let shape = [dims.num_pages, num_kv_heads, dims.page_size, head_dim];
    for (what, view) in [("k", k.as_view()), ("v", v.as_view())] {
        door.floats(what, &view, &shape)?;
        if view.dtype() != DType::F32 {
            return Err(Error::dtype(door.op, what, DType::F32, view.dtype()));
        }
    }
    device.backend().dequantize(DequantCall { pages: [k_pages, v_pages], k, v })
}
