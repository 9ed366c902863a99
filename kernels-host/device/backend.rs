//! The seam between the operations and the devices: one checked call per operation.
//!
//! An operation checks shapes, types, indices and devices at its door and then hands one of these
//! structs down; a backend may rely on all of it.

use std::ops::Range;
use std::sync::Arc;

use ferroflash_kernels::abi::{PrefillTile, Sequence};

use crate::device::{DeviceId, Storage};
use crate::error::Result;
use crate::kv::{Kv, KvMut, QuantPages};
use crate::op::append_kv::AppendPlan;
use crate::op::sample::SamplingParams;
use crate::op::select_pages::PageBudget;
use crate::plan::{Batch, Plan, Schedule, Splits};
use crate::spec::AttentionSpec;
use crate::tensor::{NaturalLog, View, ViewMut};

/// Attention over a planned batch.
pub(crate) struct AttentionCall<'a> {
    pub(crate) op: &'static str,
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) plan: &'a Plan,
    /// What [`Backend::plan_attention`] gave.
    pub(crate) workspace: &'a mut Storage,
    pub(crate) q: View<'a>,
    pub(crate) kv: Kv<'a>,
    pub(crate) out: ViewMut<'a>,
    pub(crate) lse: Option<NaturalLog<ViewMut<'a>>>,
}

/// Probability mass of pages.
pub(crate) struct PageMassCall<'a> {
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) plan: &'a Plan,
    /// What [`Backend::plan_attention`] gave.
    pub(crate) workspace: &'a Storage,
    pub(crate) q: View<'a>,
    pub(crate) k: View<'a>,
    pub(crate) lse: NaturalLog<View<'a>>,
    pub(crate) mass: ViewMut<'a>,
}

/// Merge of finished states of the same rows over disjoint KV.
pub(crate) struct MergeCall<'a> {
    pub(crate) states: &'a [(View<'a>, NaturalLog<View<'a>>)],
    pub(crate) out: ViewMut<'a>,
    pub(crate) lse: NaturalLog<ViewMut<'a>>,
}

/// Rotation of Q and K and writing of K and V into pages.
pub(crate) struct AppendCall<'a> {
    pub(crate) plan: &'a AppendPlan,
    pub(crate) q: Option<ViewMut<'a>>,
    pub(crate) k: View<'a>,
    pub(crate) v: View<'a>,
    pub(crate) kv: KvMut<'a>,
}

/// Sizes of the parts of an append plan's device memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AppendCounts {
    pub(crate) touched_pages: usize,
    pub(crate) groups: usize,
    pub(crate) tail_tokens: usize,
}

/// What a selection chooses from, and for which lists.
pub(crate) struct SelectPlan<'a> {
    pub(crate) spec: &'a AttentionSpec,
    pub(crate) page_size: usize,
    /// The sequences with all their pages.
    pub(crate) sequences: &'a [Sequence],
    pub(crate) pages: &'a [u32],
    /// The sequences with their chosen pages: a list per KV head, in ascending logical order.
    pub(crate) chosen: &'a [Sequence],
}

/// Top-k page selection: rewrites the page lists of an attention plan.
pub(crate) struct SelectCall<'a> {
    pub(crate) select: SelectPlan<'a>,
    /// What [`Backend::plan_select`] gave.
    pub(crate) workspace: &'a mut Storage,
    /// The attention plan's workspace, and what else of it the lists are found by.
    pub(crate) attention: &'a mut Storage,
    pub(crate) plan: &'a Plan,
    pub(crate) budget: PageBudget,
    pub(crate) q: View<'a>,
    pub(crate) summaries: View<'a>,
}

/// Quantised pages back to f32.
pub(crate) struct DequantCall<'a> {
    /// Of keys and of values.
    pub(crate) pages: [QuantPages<View<'a>>; 2],
    pub(crate) k: ViewMut<'a>,
    pub(crate) v: ViewMut<'a>,
}

/// Root-mean-square norm over the last dimension.
pub(crate) struct RmsNormCall<'a> {
    /// `None`: in place, the input is `out`.
    pub(crate) x: Option<View<'a>>,
    pub(crate) residual: Option<ViewMut<'a>>,
    pub(crate) weight: View<'a>,
    pub(crate) eps: f32,
    pub(crate) out: ViewMut<'a>,
}

/// `silu(gate) * up`.
pub(crate) struct SiluMulCall<'a> {
    pub(crate) gate_up: View<'a>,
    pub(crate) out: ViewMut<'a>,
}

/// Token ids: on the host, checked; or u32 on the device, as they are.
pub(crate) enum Ids<'a> {
    Host(&'a [u32]),
    Device(View<'a>),
}

/// Where token ids go.
pub(crate) enum IdsMut<'a> {
    Host(&'a mut [u32]),
    Device(ViewMut<'a>),
}

/// Rows of a table. An id past the table (only on the device) gives a row of NaN.
pub(crate) struct EmbeddingCall<'a> {
    pub(crate) table: View<'a>,
    pub(crate) ids: Ids<'a>,
    pub(crate) out: ViewMut<'a>,
}

/// Next tokens from logits.
pub(crate) struct SampleCall<'a> {
    pub(crate) logits: View<'a>,
    pub(crate) params: &'a [SamplingParams],
    pub(crate) ids: IdsMut<'a>,
}

/// Hopper's instructions on chosen data; for tests.
pub struct ConformanceSm90<'a> {
    /// The entry.
    pub entry: &'static str,
    /// What is asked for; addresses and maps are filled in.
    pub params: ferroflash_kernels::abi::ConformanceSm90Params,
    /// Tensors that the maps describe, their addresses offsets in bytes: of input, of output.
    pub tensors: Option<[ferroflash_kernels::abi::TensorMapSpec; 2]>,
    /// Words that the launch is given, and those that the output has before it.
    pub input: &'a [u32],
    /// As `input`.
    pub output: &'a [u32],
    /// CTAs.
    pub grid: u32,
}

/// A device.
pub(crate) trait Backend: Send + Sync {
    fn id(&self) -> DeviceId;
    fn description(&self) -> String;
    /// How a plan divides its work.
    fn schedule(&self, spec: &AttentionSpec, batch: &Batch<'_>, splits: Splits) -> Schedule;
    /// Waits for all work before.
    fn synchronize(&self) -> Result<()>;
    /// Calls `f` once, on the device's threads where it has some.
    fn enter(&self, f: &mut (dyn FnMut() + Send));
    /// Zeroed memory.
    fn alloc(&self, bytes: usize) -> Result<Storage>;
    fn upload(&self, from: &[u8], to: &mut Storage) -> Result<()>;
    fn download(&self, from: &Storage, to: &mut [u8]) -> Result<()>;

    /// Device memory for a plan: its partial states, and whatever else its runs need there.
    fn plan_attention(&self, spec: &AttentionSpec, plan: &Plan) -> Result<Storage>;
    /// Another plan with the same limits takes the place of the one that the memory is of.
    fn update_attention(&self, spec: &AttentionSpec, plan: &Plan, workspace: &mut Storage) -> Result<()>;
    fn attention(&self, call: AttentionCall<'_>) -> Result<()>;
    fn page_mass(&self, call: PageMassCall<'_>) -> Result<()>;
    fn merge(&self, call: MergeCall<'_>) -> Result<()>;
    /// Device memory for an append plan.
    fn plan_append(&self, plan: &AppendPlan) -> Result<(Storage, AppendCounts)>;
    fn append_kv(&self, call: AppendCall<'_>) -> Result<()>;
    /// Device memory for a selection.
    fn plan_select(&self, plan: &SelectPlan<'_>) -> Result<Storage>;
    fn select_pages(&self, call: SelectCall<'_>) -> Result<()>;
    /// Entries `range` of an attention plan's page lists as they are now.
    fn chosen_pages(
        &self,
        spec: &AttentionSpec,
        plan: &Plan,
        attention: &Storage,
        range: Range<usize>,
    ) -> Result<Vec<u32>>;
    fn dequantize(&self, call: DequantCall<'_>) -> Result<()>;
    fn rms_norm(&self, call: RmsNormCall<'_>) -> Result<()>;
    fn silu_mul(&self, call: SiluMulCall<'_>) -> Result<()>;
    fn embedding(&self, call: EmbeddingCall<'_>) -> Result<()>;
    fn sample(&self, call: SampleCall<'_>) -> Result<()>;
    /// One instruction on chosen words, on devices that run the GPU kernels; for tests.
    fn run_conformance(&self, _op: u32, _input: &[u32]) -> Option<Result<(Vec<u32>, u32)>> {
        None
    }
    /// As [`Backend::run_conformance`], on devices that run Hopper's kernels.
    fn run_conformance_sm90(&self, _call: &ConformanceSm90<'_>) -> Option<Result<Vec<u32>>> {
        None
    }
    /// The same device with another tile for Hopper's prefill, where it holds the channels; `None` on devices without.
    fn with_prefill_tile(&self, _tile: PrefillTile) -> Option<Arc<dyn Backend>> {
        None
    }
}
