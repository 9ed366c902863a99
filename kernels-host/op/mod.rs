//! The operations. Each checks everything at its door, and then hands one call to the device.
//!
//! | module | what it does |
//! |---|---|
//! | [`prefill`] | attention of long query runs, ragged or paged |
//! | [`decode`] | attention of short queries, KV split over workers |
//! | [`tree`] | attention of a speculated token tree |
//! | [`attention`] | any mix of them in one batch: the plan that the three above make |
//! | [`append_kv`] | rotary embedding of Q and K, writing of K and V into pages |
//! | [`select_pages`] | sparse top-k attention over chosen pages |
//! | [`AttentionPlan::page_mass`](attention::AttentionPlan::page_mass) | the probability that falls on each page |
//! | [`quantized`] | stand-alone quantising and reading back of pages |
//! | [`merge`] | merging of partial states over disjoint KV |
//! | [`layer`] | rms_norm, silu_mul, embedding |
//! | [`sample`] | next tokens from logits |

pub mod append_kv;
pub mod attention;
pub mod decode;

pub mod layer;
pub mod merge;
mod page_mass;
pub mod prefill;
pub mod quantized;
pub mod sample;
pub mod select_pages;
pub mod tree;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kv::expect_unit_stride;
use crate::tensor::{DType, View};

/// What an operation checks of its tensors.
struct Door<'a> {
    op: &'static str,
    device: &'a Device,
}

impl Door<'_> {
    fn device(&self, what: &'static str, view: &View<'_>) -> Result<()> {
        if view.layout.device == self.device.id() {
            return Ok(());
        }
        let (expected, got) = (self.device.id().to_string(), view.layout.device.to_string());
        Err(Error::Device { op: self.op, what, expected, got })
    }

    /// The device, shape and unit stride of a tensor of floats.
    fn floats(&self, what: &'static str, view: &View<'_>, shape: &[usize]) -> Result<()> {
        self.device(what, view)?;
        if view.shape() != shape {
            return Err(Error::shape(self.op, what, format_args!("{shape:?}"), view.shape()));
        }
        if !view.dtype().is_float() {
            return Err(Error::dtype(self.op, what, "f32, f16 or bf16", view.dtype()));
        }
        expect_unit_stride(self.op, what, view)
    }

    /// As [`Door::floats`], f32 only; any stride in the last dimension.
    fn f32s(&self, what: &'static str, view: &View<'_>, shape: &[usize]) -> Result<()> {
        self.device(what, view)?;
        if view.shape() != shape {
            return Err(Error::shape(self.op, what, format_args!("{shape:?}"), view.shape()));
        }
        if view.dtype() != DType::F32 {
            return Err(Error::dtype(self.op, what, DType::F32, view.dtype()));
        }
        Ok(())
    }

    /// The device and type of token ids `[tokens]`; gives their number.
    fn ids(&self, ids: &View<'_>) -> Result<usize> {
        self.device("ids", ids)?;
        let &[tokens] = ids.shape() else {
            return Err(Error::shape(self.op, "ids", "[tokens]", ids.shape()));
        };
        if ids.dtype() != DType::U32 {
            return Err(Error::dtype(self.op, "ids", DType::U32, ids.dtype()));
        }
        Ok(tokens)
    }

    fn pages(&self, what: &str, needed: usize, there: usize) -> Result<()> {
        if needed > there {
            let what = format!("largest page number in {what}");
            return Err(Error::Index { op: self.op, what, index: needed as i64 - 1, limit: there as u64 });
        }
        Ok(())
    }

    fn page_size(&self, planned: usize, there: usize) -> Result<()> {
        if planned != there {
            let expected = format_args!("{planned}, as planned").to_string();
            return Err(Error::value(self.op, "page_size", expected, there));
        }
        Ok(())
    }
}
