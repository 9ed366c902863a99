//! Attention over a planned batch: long and short queries, ragged, paged or quantised KV, in one call.

use super::Door;
use crate::device::{AttentionCall, Device, Storage};
use crate::error::{Error, Result};
use crate::kv::{Kv, PageDims};
use crate::plan::{Batch, KvTable, Plan, PlanLimits, Schedule, Splits};
use crate::spec::AttentionSpec;
use crate::tensor::{NaturalLog, View, ViewMut};

/// One step's attention: made once from the step's lengths, run by every layer.
///
/// Softmax is computed online over KV blocks (FlashAttention-2, arXiv:2307.08691); where the plan splits
/// a row's KV over workers, the partial states are merged in order (Flash-Decoding).
pub struct AttentionPlan {
    op: &'static str,
    device: Device,
    spec: AttentionSpec,
    plan: Plan,
    workspace: Storage,
    limits: Option<(PlanLimits, Splits)>,
}

impl AttentionPlan {
    /// Plans a batch of any mix of query lengths.
    ///
    /// # Errors
    /// A [`Error::Value`] names the parameter of `spec` or `batch` that is out of its domain.
    pub fn new(device: &Device, spec: &AttentionSpec, batch: &Batch<'_>, splits: Splits) -> Result<Self> {
        Self::for_op("attention", device, spec, batch, splits)
    }

    pub(crate) fn for_op(
        op: &'static str,
        device: &Device,
        spec: &AttentionSpec,
        batch: &Batch<'_>,
        splits: Splits,
    ) -> Result<Self> {
        let schedule = device.backend().schedule(spec, batch, splits);
        let plan = Plan::new(op, spec, batch, splits, schedule)?;
        Self::from_plan(op, device, spec, plan)
    }

    pub(crate) fn from_plan(
        op: &'static str,
        device: &Device,
        spec: &AttentionSpec,
        plan: Plan,
    ) -> Result<Self> {
        let workspace = device.backend().plan_attention(spec, &plan)?;
        Ok(AttentionPlan { op, device: device.clone(), spec: spec.clone(), plan, workspace, limits: None })
    }

    /// A plan for decode batches up to `limits`, of none at first: [`AttentionPlan::update`] gives it another batch. On a
    /// GPU it keeps its memory, of [`AttentionPlan::workspace_bytes`], and a run is the same launch whatever the batch: one
    /// that was captured in a graph may be replayed after an update. Tensors of a run have `limits.q_tokens` rows, of which
    /// those past the batch's are left alone.
    ///
    /// # Errors
    /// [`Error::Value`] where `spec` or `splits` is out of its domain.
    pub fn with_limits(
        device: &Device,
        spec: &AttentionSpec,
        limits: PlanLimits,
        splits: Splits,
    ) -> Result<Self> {
        const OP: &str = "attention";
        if spec.quantized_kv && matches!(splits, Splits::Fixed(_)) {
            // Their rows, of many tokens and of few, are one kernel's, whose launches differ with the batch.
            return Err(Error::value(OP, "splits", "Splits::Auto, for quantised KV under limits", "Fixed"));
        }
        let table =
            KvTable::Block { page_size: limits.page_size, block_table: &[], max_blocks: 0, seq_lens: &[] };
        let plan = Self::limited(OP, device, spec, &Batch::new(&[0], table), (limits, splits))?;
        let made = Self::from_plan(OP, device, spec, plan)?;
        Ok(AttentionPlan { limits: Some((limits, splits)), ..made })
    }

    /// Plans another batch, in place. The work of runs before is not disturbed: on a GPU this follows them in the device's
    /// stream.
    ///
    /// # Errors
    /// [`Error::Value`] where the plan has no limits, the batch is beyond them or is no decode batch (more than 16 rows, the
    /// query group times the tokens, of a sequence, but for latent attention without a fixed split; page lists); and as
    /// [`AttentionPlan::new`]. The plan is then as it was.
    pub fn update(&mut self, batch: &Batch<'_>) -> Result<()> {
        let Some(limits) = self.limits else {
            let expected = "a plan made by AttentionPlan::with_limits";
            return Err(Error::value(self.op, "update", expected, "a plan without limits"));
        };
        let plan = Self::limited(self.op, &self.device, &self.spec, batch, limits)?;
        self.device.backend().update_attention(&self.spec, &plan, &mut self.workspace)?;
        self.plan = plan;
        Ok(())
    }

    fn limited(
        op: &'static str,
        device: &Device,
        spec: &AttentionSpec,
        batch: &Batch<'_>,
        (limits, splits): (PlanLimits, Splits),
    ) -> Result<Plan> {
        // Shared prefixes have launches of their own.
        let schedule = Schedule { cascade: None, ..device.backend().schedule(spec, batch, splits) };
        let mut plan = Plan::new(op, spec, batch, splits, schedule)?;
        plan.reserve(op, spec, &limits, splits, schedule)?;
        Ok(plan)
    }

    /// The work items, for looking at.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(crate) fn parts_mut(&mut self) -> (&Plan, &mut Storage) {
        (&self.plan, &mut self.workspace)
    }

    pub(crate) fn workspace(&self) -> &Storage {
        &self.workspace
    }

    pub(crate) fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of device memory that the plan holds.
    pub fn workspace_bytes(&self) -> usize {
        self.workspace.len()
    }

    /// Computes attention.
    ///
    /// - `q`: `[total_q, num_q_heads, head_dim]`, f32, f16 or bf16, last dimension contiguous; `out`: the same with
    ///   `v_head_dim`.
    /// - `kv`: as planned: ragged `[total_kv, num_kv_heads, head_dim]` (V: `v_head_dim`), pages of the planned size, or
    ///   quantised ones.
    /// - `lse`: f32 `[total_q, num_q_heads]`.
    ///
    /// A row with nothing to attend to gives O = 0 and LSE = `-inf` (with a learned sink: its logit).
    /// Arithmetic is in f32 whatever the types. KV slots past a sequence's length are not read.
    pub fn run(
        &mut self,
        q: View<'_>,
        kv: Kv<'_>,
        out: ViewMut<'_>,
        lse: Option<NaturalLog<ViewMut<'_>>>,
    ) -> Result<()> {
        let door = Door { op: self.op, device: &self.device };
        let AttentionSpec { num_q_heads, num_kv_heads, head_dim, v_head_dim, .. } = self.spec;
        let rows = [self.plan.total_q, num_q_heads, head_dim];
        door.floats("q", &q, &rows)?;
        door.floats("out", &out.as_view(), &[self.plan.total_q, num_q_heads, v_head_dim])?;
        if let Some(lse) = &lse {
            door.f32s("lse", &lse.0.as_view(), &rows[..2])?;
        }
        for (what, view) in kv.views() {
            door.device(what, &view)?;
        }
        let dims = kv.check(self.op, num_kv_heads, (head_dim, v_head_dim))?;
        self.check_kv(&door, &kv, dims)?;
        self.device.backend().attention(AttentionCall {
            op: self.op,
            spec: &self.spec,
            plan: &self.plan,
            workspace: &mut self.workspace,
            q,
            kv,
            out,
            lse,
        })
    }

    fn check_kv(&self, door: &Door<'_>, kv: &Kv<'_>, dims: PageDims) -> Result<()> {
        let plan = &self.plan;
        let quantized = matches!(kv, Kv::Quantized { .. });
        if quantized != self.spec.quantized_kv {
            let (expected, got) = if quantized {
                ("float KV, or a plan whose spec says quantized_kv", "quantised KV")
            } else {
                ("quantised KV, as the plan's spec says", "float KV")
            };
            return Err(Error::value(self.op, "kv", expected, got));
        }
        if let Kv::Ragged { .. } = kv {
            if plan.page_size != 0 {
                return Err(Error::value(self.op, "kv", "paged KV, as planned", "ragged KV"));
            }
            if dims.page_size < plan.total_kv {
                let expected = format_args!("at least {} rows", plan.total_kv).to_string();
                return Err(Error::shape(self.op, "k", expected, dims.page_size));
            }
            return Ok(());
        }
        if plan.page_size == 0 {
            return Err(Error::value(self.op, "kv", "ragged KV, as planned", "paged KV"));
        }
        door.page_size(plan.page_size, dims.page_size)?;
        door.pages("the page table", plan.num_pages, dims.num_pages)?;
        match plan.num_tails {
            None if kv.has_tails() => {
                Err(Error::value(self.op, "tail_slots", "one per sequence for int4 keys", "none"))
            }
            Some(needed) if kv.has_tails() && needed > dims.num_tails => Err(Error::Index {
                op: self.op,
                what: "tail_slots".into(),
                index: needed as i64 - 1,
                limit: dims.num_tails as u64,
            }),
            _ => Ok(()),
        }
    }
}

impl std::fmt::Debug for AttentionPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} on {}: {} sequences, {} shared prefixes, {} query tokens, {} work items, {} merges, {} bytes of workspace",
            self.op,
            self.device.id(),
            self.plan.own_sequences().len(),
            self.plan.shared_prefixes().len(),
            self.plan.total_q,
            self.plan.items.len(),
            self.plan.merges.len(),
            self.workspace_bytes()
        )
    }
}
