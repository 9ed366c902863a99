//! Split-KV flash decoding: attention of one or a few queries per sequence over long KV.

use super::attention::AttentionPlan;
use crate::device::Device;
use crate::error::Result;
use crate::plan::{Batch, Splits};
use crate::spec::AttentionSpec;

/// Plans attention with each sequence's KV divided over workers as `splits` says, the query heads of a
/// KV head together so that each K and V is read once.
///
/// # Errors
/// As [`AttentionPlan::new`].
pub fn plan(
    device: &Device,
    spec: &AttentionSpec,
    batch: &Batch<'_>,
    splits: Splits,
) -> Result<AttentionPlan> {
    AttentionPlan::for_op("decode", device, spec, batch, splits)
}
