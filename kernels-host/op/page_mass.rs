//! The probability mass of pages: which of them attention falls on.

use super::Door;
use super::attention::AttentionPlan;
use crate::device::PageMassCall;
use crate::error::{Error, Result};
use crate::kv::Kv;
use crate::tensor::{NaturalLog, View, ViewMut};

const OP: &str = "page_mass";

impl AttentionPlan {
    /// Adds to each page's mass the probability that the batch's queries give its tokens, summed over tokens and the query
    /// heads of a KV head: what policies that evict or keep pages go by. Over the steps of a generation that is H2O's
    /// accumulated score (arXiv:2306.14048), over the last queries of a prompt SnapKV's (arXiv:2404.14469), by pages.
    ///
    /// - `q`, `kv`: those of [`AttentionPlan::run`]; keys alone are read, once more.
    /// - `lse`: f32 `[total_q, num_q_heads]`, what [`AttentionPlan::run`] gave.
    /// - `mass`: f32 `[num_kv_heads, entries]`, an entry for each page of each sequence in the order of the batch's page
    ///   tables. All masses of a sequence and KV head together grow by its rows (by less with learned sinks).
    ///
    /// # Errors
    /// [`Error::Value`] for ragged or quantised KV, page lists and plans with limits; [`Error::Shape`], [`Error::DType`] or
    /// [`Error::Device`] where tensors do not fit.
    pub fn page_mass(
        &self,
        q: View<'_>,
        kv: Kv<'_>,
        lse: NaturalLog<View<'_>>,
        mass: ViewMut<'_>,
    ) -> Result<()> {
        let (device, spec, plan) = (self.device(), self.spec(), self.plan());
        let door = Door { op: OP, device };
        spec.check_not_latent(OP)?;
        let Kv::Paged { k, .. } = &kv else {
            return Err(Error::value(OP, "kv", "float pages", "ragged or quantised KV"));
        };
        if !plan.logical_pages.is_empty() || plan.reserved.is_some() {
            let expected = "a plan without page lists and limits";
            return Err(Error::value(OP, "plan", expected, "one with them"));
        }
        let rows = [plan.total_q, spec.num_q_heads, spec.head_dim];
        door.floats("q", &q, &rows)?;
        door.f32s("lse", &lse.0, &rows[..2])?;
        for (what, view) in kv.views() {
            door.device(what, &view)?;
        }
        let dims = kv.check(OP, spec.num_kv_heads, (spec.head_dim, spec.v_head_dim))?;
        door.page_size(plan.page_size, dims.page_size)?;
        door.pages("the page table", plan.num_pages, dims.num_pages)?;
        door.f32s("mass", &mass.as_view(), &[spec.num_kv_heads, plan.pages.len()])?;
        crate::kv::expect_unit_stride(OP, "mass", &mass.as_view())?;
        let workspace = self.workspace();
        device.backend().page_mass(PageMassCall { spec, plan, workspace, q, k: *k, lse, mass })
    }
}
