//! Flash prefill: attention of long query runs.

use super::attention::AttentionPlan;
use crate::device::Device;
use crate::error::Result;
use crate::plan::{Batch, Splits};
use crate::spec::AttentionSpec;

/// Plans attention with one worker per query tile, each walking all of its KV (FlashAttention-2,
/// arXiv:2307.08691).
///
/// Causal masks are aligned bottom-right: with more KV than queries, the queries are the last ones, so
/// a chunk of a longer prompt is prefilled by passing all KV up to its end.
///
/// # Errors
/// As [`AttentionPlan::new`].
pub fn plan(device: &Device, spec: &AttentionSpec, batch: &Batch<'_>) -> Result<AttentionPlan> {
    AttentionPlan::for_op("prefill", device, spec, batch, Splits::None)
}
