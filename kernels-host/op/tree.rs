//! Tree attention: verification of speculated token trees.

use super::attention::AttentionPlan;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::plan::{Batch, Splits};
use crate::spec::AttentionSpec;

/// Plans attention of tree nodes over a common prefix: every query sees all KV before the last `n_tree`
/// columns, and of those what its mask says (SpecInfer, arXiv:2305.09781). No mask is looked at on the
/// prefix.
///
/// # Errors
/// [`Error::Value`] where the batch has no tree, where a causal mask, window or ALiBi is set (the
/// tree's own mask takes their place), and as [`AttentionPlan::new`].
pub fn plan(
    device: &Device,
    spec: &AttentionSpec,
    batch: &Batch<'_>,
    splits: Splits,
) -> Result<AttentionPlan> {
    if batch.tree.is_none() {
        return Err(Error::value("tree", "batch.tree", "the trees' masks", "None"));
    }
    AttentionPlan::for_op("tree", device, spec, batch, splits)
}
