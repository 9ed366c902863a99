//! Sparse top-k attention: decode over the pages that matter.

use super::Door;
use super::attention::AttentionPlan;
use crate::device::{Device, SelectCall, SelectPlan, Storage};
use crate::error::{Error, Result};
use crate::kv::Kv;
use crate::plan::{Batch, KvTable, Plan, Schedule, Splits};
use crate::spec::AttentionSpec;
use crate::tensor::{NaturalLog, View, ViewMut};
use ferroflash_kernels::abi::Sequence;

const OP: &str = "select_pages";

/// How many pages each KV head attends to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageBudget {
    /// Pages in all, the forced ones included; a sequence with no more pages is attended densely.
    pub pages: usize,
    /// First pages that are always in.
    pub sinks: usize,
    /// Last pages that are always in, at least 1: the newest tokens.
    pub recent: usize,
}

impl PageBudget {
    /// A budget of `pages`, with the first and the last page always in.
    pub fn new(pages: usize) -> Self {
        PageBudget { pages, sinks: 1, recent: 1 }
    }
}

/// Decode over chosen pages (Quest, arXiv:2406.10774): [`SparsePlan::select`] scores each page by an
/// upper bound of its scores, the largest over a KV head's query group, and keeps the top `pages` of
/// them; [`SparsePlan::run`] attends to those alone. A budget that covers all pages gives dense
/// attention, bit for bit.
#[derive(Debug)]
pub struct SparsePlan {
    workspace: Storage,
    budget: PageBudget,
    sequences: Vec<Sequence>,
    pages: Vec<u32>,
    num_pages: usize,
    attention: AttentionPlan,
}

impl SparsePlan {
    /// Plans a batch of one query per sequence over a page table. Until [`SparsePlan::select`] has run,
    /// the first and the newest pages are the chosen ones.
    ///
    /// # Errors
    /// [`Error::Value`] for a budget below its forced pages, another query length than 1, ragged KV, a
    /// tree, a window or ALiBi (chosen pages have no neighbours to measure distance by); and as
    /// [`AttentionPlan::new`].
    pub fn new(
        device: &Device,
        spec: &AttentionSpec,
        batch: &Batch<'_>,
        budget: PageBudget,
        splits: Splits,
    ) -> Result<Self> {
        let all = Plan::lengths(OP, spec, batch)?;
        spec.check_not_latent(OP)?;
        if all.page_size == 0 {
            return Err(Error::value(OP, "batch.kv", "a page table", "ragged KV"));
        }
        if batch.tree.is_some()
            || batch.page_lists.is_some()
            || spec.window.is_some()
            || spec.alibi_slopes.is_some()
        {
            let expected = "no tree, page lists, window or ALiBi: chosen pages have no distance";
            return Err(Error::value(OP, "spec", expected, "one of them set"));
        }
        if let Some(seq) = all.sequences.iter().find(|s| s.q_len != 1) {
            return Err(Error::value(OP, "query tokens of a sequence", "1", seq.q_len));
        }
        if budget.recent == 0 || budget.sinks.saturating_add(budget.recent) > budget.pages {
            let expected = "recent of at least 1, and pages of at least sinks + recent";
            return Err(Error::value(OP, "budget", expected, format_args!("{budget:?}")));
        }

        let (mut kv_indptr, mut last_page_len) = (vec![0u32], Vec::new());
        for seq in &all.sequences {
            let num_pages = (seq.kv_len as usize).div_ceil(all.page_size);
            let count = num_pages.min(budget.pages);
            kv_indptr.push(kv_indptr.last().copied().unwrap_or(0) + count as u32);
            last_page_len.push(seq.kv_len - (num_pages.saturating_sub(1) * all.page_size) as u32);
        }
        let total = kv_indptr.last().copied().unwrap_or(0) as usize;
        let table = KvTable::Csr {
            page_size: all.page_size,
            kv_indptr: &kv_indptr,
            kv_indices: &vec![0; total],
            last_page_len: &last_page_len,
        };
        let batch = Batch { kv: table, ..*batch };
        // Lists are not known yet: that they begin alike means nothing.
        let schedule = Schedule { cascade: None, ..device.backend().schedule(spec, &batch, splits) };
        let mut plan = Plan::new(OP, spec, &batch, splits, schedule)?;
        // From one list per sequence to one per KV head.
        plan.pages.clear();
        for (chosen, seq) in plan.sequences.iter_mut().zip(&all.sequences) {
            let num_pages = (seq.kv_len as usize).div_ceil(all.page_size);
            let list = &all.pages[seq.page_start as usize..][..num_pages];
            let count = num_pages.min(budget.pages);
            let sinks = budget.sinks.min(count);
            chosen.page_start = plan.pages.len() as u64;
            chosen.pages_per_head = count as u32;
            for _ in 0..spec.num_kv_heads {
                plan.pages.extend_from_slice(&list[..sinks]);
                plan.pages.extend_from_slice(&list[num_pages - (count - sinks)..]);
            }
        }
        plan.num_pages = all.num_pages;
        for item in &mut plan.items {
            let seq = &plan.sequences[item.seq as usize];
            item.pages = seq.page_start + item.kv_head as u64 * seq.pages_per_head as u64;
        }
        let attention = AttentionPlan::from_plan(OP, device, spec, plan)?;
        let workspace = device.backend().plan_select(&SelectPlan {
            spec,
            page_size: all.page_size,
            sequences: &all.sequences,
            pages: &all.pages,
            chosen: &attention.plan().sequences,
        })?;
        Ok(SparsePlan {
            workspace,
            budget,
            sequences: all.sequences,
            pages: all.pages,
            num_pages: all.num_pages,
            attention,
        })
    }

    /// Chooses pages for `q` `[batch, num_q_heads, head_dim]` from the cache's `summaries`
    /// `[num_pages, num_kv_heads, 2, head_dim]` (minimum, maximum), of any float type. Of equal scores the earlier page wins.
    pub fn select(&mut self, q: View<'_>, summaries: View<'_>) -> Result<()> {
        let device = self.attention.device().clone();
        let door = Door { op: OP, device: &device };
        let spec = self.attention.spec().clone();
        door.floats("q", &q, &[self.sequences.len(), spec.num_q_heads, spec.head_dim])?;
        let num_pages = summaries.shape().first().copied().unwrap_or(0);
        door.floats("summaries", &summaries, &[num_pages, spec.num_kv_heads, 2, spec.head_dim])?;
        door.pages("the page table", self.num_pages, num_pages)?;
        let (plan, attention) = self.attention.parts_mut();
        device.backend().select_pages(SelectCall {
            select: SelectPlan {
                spec: &spec,
                page_size: plan.page_size,
                sequences: &self.sequences,
                pages: &self.pages,
                chosen: &plan.sequences,
            },
            workspace: &mut self.workspace,
            attention,
            plan,
            budget: self.budget,
            q,
            summaries,
        })
    }

    /// Pages that a KV head of a sequence attends to, in the order of its tokens; none for a sequence or head
    /// that is not there. For looking at: it waits for the device.
    pub fn chosen(&self, sequence: usize, kv_head: usize) -> Result<Vec<u32>> {
        let (plan, spec) = (self.attention.plan(), self.attention.spec());
        let Some(seq) = plan.sequences.get(sequence).filter(|_| kv_head < spec.num_kv_heads) else {
            return Ok(Vec::new());
        };
        let count = seq.pages_per_head as usize;
        let start = seq.page_start as usize + kv_head * count;
        let backend = self.attention.device().backend();
        backend.chosen_pages(spec, plan, self.attention.workspace(), start..start + count)
    }

    /// Attention over the chosen pages; the tensors are those of [`AttentionPlan::run`].
    pub fn run(
        &mut self,
        q: View<'_>,
        kv: Kv<'_>,
        out: ViewMut<'_>,
        lse: Option<NaturalLog<ViewMut<'_>>>,
    ) -> Result<()> {
        self.attention.run(q, kv, out, lse)
    }
}
