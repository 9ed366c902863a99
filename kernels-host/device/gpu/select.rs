//! Page selection on a GPU: scores and lists stay in device memory, where the attention kernels find them.

use ferroflash_kernels::abi::{ROWS_PER_CTA, SCORE_PAGES, SelectItem, SelectParams};

use super::attention::Workspace;
use super::driver::{bytes, words};
use super::params::{aligned, element, page_rows, rows};
use super::{Blob, Gpu, Offsets};
use crate::device::{SelectCall, SelectPlan, Storage};
use crate::error::Result;
use crate::plan::Plan;
use crate::spec::AttentionSpec;

/// Offsets of a selection's items, pages and scores.
struct SelectBlob {
    pages: usize,
    scores: usize,
    bytes: usize,
}

impl SelectBlob {
    fn new(items: usize, pages: usize, heads: usize) -> Self {
        let mut offsets = Offsets::default();
        offsets.place(size_of::<SelectItem>() * items);
        let (pages_at, scores) = (offsets.place(4 * pages), offsets.place(0));
        SelectBlob { pages: pages_at, scores, bytes: scores + 4 * pages * heads }
    }
}

impl Gpu {
    pub(super) fn select_workspace(&self, plan: &SelectPlan<'_>) -> Result<Storage> {
        let heads = plan.spec.num_kv_heads;
        let mut items = Vec::new();
        for (seq, chosen) in plan.sequences.iter().zip(plan.chosen) {
            let num_pages = (seq.kv_len as usize).div_ceil(plan.page_size) as u64;
            for head in 0..heads as u64 {
                items.push(SelectItem {
                    pages: seq.page_start,
                    scores: seq.page_start * heads as u64 + head * num_pages,
                    chosen: chosen.page_start + head * chosen.pages_per_head as u64,
                    q_token: seq.q_start as u32,
                    kv_head: head as u32,
                    num_pages: num_pages as u32,
                    count: chosen.pages_per_head,
                });
            }
        }
        let mut blob = Blob::default();
        blob.put(bytes(&items));
        blob.put(bytemuck::cast_slice(plan.pages));
        let memory = self.scratch(SelectBlob::new(items.len(), plan.pages.len(), heads).bytes)?;
        self.driver.upload(&blob.data, memory.at())?;
        Ok(Storage::Device(memory))
    }

    pub(super) fn run_select(&self, call: SelectCall<'_>) -> Result<()> {
        let SelectCall { select, workspace, attention, plan, budget, q, summaries } = call;
        let spec = select.spec;
        // Read 16 bytes at a time.
        for (what, view) in [("q", &q), ("summaries", &summaries)] {
            aligned("select_pages", what, view, 16)?;
        }
        let items = select.sequences.len() * spec.num_kv_heads;
        let blob = SelectBlob::new(items, select.pages.len(), spec.num_kv_heads);
        let most = select.sequences.iter().map(|s| (s.kv_len as usize).div_ceil(select.page_size)).max();
        let params = SelectParams {
            q: rows(&q),
            summaries: page_rows(&summaries),
            items: workspace.address(),
            pages: workspace.address() + blob.pages as u64,
            scores: workspace.address() + blob.scores as u64,
            chosen: attention.address() + Workspace::new(spec, plan).pages as u64,
            group: spec.group() as u32,
            head_dim: spec.head_dim as u32,
            sinks: budget.sinks.min(u32::MAX as usize) as u32,
            recent: budget.recent.min(u32::MAX as usize) as u32,
            negate: (spec.softmax_scale < 0.0) as u32,
            page_ctas: most.unwrap_or(0).div_ceil(ROWS_PER_CTA * SCORE_PAGES) as u32,
            summary_dtype: element(summaries.dtype()),
            reserved: 0,
        };
        self.launch("score_pages", [items * params.page_ctas as usize, 1], words(&params))?;
        self.launch("top_k_pages", [items, 1], words(&params))
    }

    pub(super) fn read_chosen(
        &self,
        spec: &AttentionSpec,
        plan: &Plan,
        attention: &Storage,
        range: std::ops::Range<usize>,
    ) -> Result<Vec<u32>> {
        let mut pages = vec![0u32; range.len()];
        let at = attention.address() + (Workspace::new(spec, plan).pages + 4 * range.start) as u64;
        self.driver.download(at, bytemuck::cast_slice_mut(&mut pages))?;
        Ok(pages)
    }
}
