//! Append and quantised pages on a GPU: where a plan lies in device memory, and its launches.

use ferroflash_kernels::abi::{
    AppendParams, AppendQuantParams, DequantParams, INT4_GROUP, Int4Group, Int4TailToken, PageRows,
    QuantRows, ROWS_PER_CTA, RopeParams, Rows, SKIP_SLOT, SummaryParams, TouchedPage, format,
};

use super::driver::{bytes, words};
use super::params::{NO_PAGES, aligned, element, page_rows, rows};
use super::{Blob, Gpu, Offsets};
use crate::device::{AppendCall, AppendCounts, DequantCall, Storage};
use crate::error::Result;
use crate::kv::{KvMut, QuantPages};
use crate::op::append_kv::AppendPlan;
use crate::spec::RopeStyle;
use crate::tensor::View;

/// Offsets of an append plan's parts in its device memory.
struct Parts {
    slots: usize,
    cos: usize,
    sin: usize,
    touched: usize,
    groups: usize,
    tail_tokens: usize,
}

impl Parts {
    fn new(plan: &AppendPlan, counts: &AppendCounts) -> Self {
        let mut offsets = Offsets::default();
        let mut place = |bytes| offsets.place(bytes);
        Parts {
            slots: place(8 * plan.num_tokens()),
            cos: place(4 * plan.cos.len()),
            sin: place(4 * plan.sin.len()),
            touched: place(size_of::<TouchedPage>() * counts.touched_pages),
            groups: place(size_of::<Int4Group>() * counts.groups),
            tail_tokens: place(size_of::<Int4TailToken>() * counts.tail_tokens),
        }
    }
}

/// Of each page that the plan writes, how many tokens it then has.
fn touched_pages(plan: &AppendPlan) -> Vec<TouchedPage> {
    let mut written: Vec<(u32, u32)> = (0..plan.num_tokens())
        .filter_map(|t| plan.slot(t))
        .map(|(page, offset)| (page as u32, offset as u32 + 1))
        .collect();
    written.sort_unstable();
    let mut touched: Vec<TouchedPage> = Vec::new();
    for (page, tokens) in written {
        match touched.last_mut() {
            Some(t) if t.page == page => t.tokens = tokens,
            _ => touched.push(TouchedPage { page, tokens }),
        }
    }
    touched
}

/// Groups that the plan's tokens complete, and tokens that stay in tails.
fn int4_work(plan: &AppendPlan, slots: &[u64]) -> (Vec<Int4Group>, Vec<Int4TailToken>) {
    let (mut groups, mut tail_tokens) = (Vec::new(), Vec::new());
    // A sequence's tokens stand side by side, in order.
    let mut first = 0;
    for token in 0..plan.tail_slots.len() {
        let tail = plan.tail_slots[token];
        if token > 0 && plan.tail_slots[token - 1] != tail {
            first = token;
        }
        let in_group = plan.positions[token] as usize % INT4_GROUP;
        let ends = token + 1 == plan.tail_slots.len() || plan.tail_slots[token + 1] != tail;
        if in_group == INT4_GROUP - 1 {
            groups.push(Int4Group {
                slot: slots[token] - in_group as u64,
                last_token: token as u32,
                new_tokens: (token + 1 - first).min(INT4_GROUP) as u32,
                tail,
                reserved: 0,
            });
        } else if ends {
            let new = (in_group + 1).min(token + 1 - first);
            for back in (0..new).rev() {
                tail_tokens.push(Int4TailToken {
                    token: (token - back) as u32,
                    tail,
                    in_group: (in_group - back) as u32,
                    reserved: 0,
                });
            }
        }
    }
    (groups, tail_tokens)
}

/// Where a side of quantised pages is, for kernels, which ask for rows at multiples of 16 bytes.
pub(super) fn quant_rows(op: &'static str, pages: &QuantPages<View<'_>>) -> Result<QuantRows> {
    for (what, view) in pages.parts() {
        // fp8's scales, one a head, are read one by one.
        if !matches!((what, pages), ("scales", QuantPages::Fp8 { .. })) {
            aligned(op, what, view, 16)?;
        }
    }
    let (codes, params, tail, format) = match pages {
        QuantPages::F16(pages) => (pages, NO_PAGES, NO_PAGES, format::F16),
        QuantPages::Fp8 { codes, scales } => {
            let base = scales.ptr() as u64;
            (codes, PageRows { base, page: 0, head: 4, token: 0 }, NO_PAGES, format::FP8)
        }
        QuantPages::Int8 { codes, scales } => (codes, page_rows(scales), NO_PAGES, format::INT8),
        QuantPages::Int4Keys { codes, params, tail } => {
            (codes, page_rows(params), page_rows(tail), format::INT4)
        }
        QuantPages::Int4Values { codes, params } => (codes, page_rows(params), NO_PAGES, format::INT4),
    };
    Ok(QuantRows { codes: page_rows(codes), params, tail, format, reserved: 0 })
}

impl Gpu {
    pub(super) fn append_workspace(&self, plan: &AppendPlan) -> Result<(Storage, AppendCounts)> {
        let slots: Vec<u64> = (0..plan.num_tokens())
            .map(|t| plan.slot(t).map_or(SKIP_SLOT, |(page, offset)| (page * plan.page_size + offset) as u64))
            .collect();
        let touched = touched_pages(plan);
        let (groups, tail_tokens) = int4_work(plan, &slots);
        let counts = AppendCounts {
            touched_pages: touched.len(),
            groups: groups.len(),
            tail_tokens: tail_tokens.len(),
        };
        let mut blob = Blob::default();
        for part in [
            bytemuck::cast_slice(&slots),
            bytemuck::cast_slice(&plan.cos),
            bytemuck::cast_slice(&plan.sin),
            bytes(&touched),
            bytes(&groups),
            bytes(&tail_tokens),
        ] {
            blob.put(part);
        }
        let memory = self.scratch(blob.data.len())?;
        self.driver.upload(&blob.data, memory.at())?;
        Ok((Storage::Device(memory), counts))
    }

    pub(super) fn run_append(&self, call: AppendCall<'_>) -> Result<()> {
        let AppendCall { plan, q, k, v, kv } = call;
        let (storage, counts) = &plan.workspace;
        let blob = Parts::new(plan, counts);
        let at = |offset: usize| storage.address() + offset as u64;
        let rope = RopeParams {
            cos: at(blob.cos),
            sin: at(blob.sin),
            rotary_dim: plan.rotary_dim as u32,
            interleaved: (plan.rope_style == RopeStyle::Interleaved) as u32,
        };
        let q = q.as_ref().map(|q| q.as_view()).filter(|_| plan.rotary_dim > 0);
        let num_q_heads = q.as_ref().map_or(0, |q| q.shape()[1]);
        let (k_pages, v_pages, kv_dtype) = match &kv {
            KvMut::Paged { k, v, .. } => {
                (page_rows(&k.as_view()), page_rows(&v.as_view()), element(k.dtype()))
            }
            KvMut::Quantized { .. } => (NO_PAGES, NO_PAGES, 0),
        };
        let params = AppendParams {
            q: q.as_ref().map_or(Rows::NONE, rows),
            k: rows(&k),
            v: rows(&v),
            k_pages,
            v_pages,
            slots: at(blob.slots),
            rope,
            page_size: plan.page_size as u32,
            kv_dtype,
            num_q_heads: num_q_heads as u32,
            num_kv_heads: plan.num_kv_heads as u32,
            head_dim: plan.head_dim as u32,
            reserved: 0,
        };
        let heads = num_q_heads + if k_pages.base == 0 { 0 } else { 2 * plan.num_kv_heads };
        self.launch("append_kv", [plan.num_tokens(), heads.div_ceil(ROWS_PER_CTA)], words(&params))?;
        match kv {
            KvMut::Paged { summaries: Some(summaries), .. } => {
                let params = SummaryParams {
                    k_pages,
                    summaries: page_rows(&summaries.as_view()),
                    summary_dtype: element(summaries.dtype()),
                    reserved: 0,
                    touched: at(blob.touched),
                    kv_dtype,
                    head_dim: plan.head_dim as u32,
                };
                self.launch("page_summaries", [counts.touched_pages, plan.num_kv_heads], words(&params))
            }
            KvMut::Paged { .. } => Ok(()),
            KvMut::Quantized { k: keys, v: values } => {
                let (k_pages, v_pages) =
                    (keys.as_ref().map(|k| k.as_view()), values.as_ref().map(|v| v.as_view()));
                let params = AppendQuantParams {
                    k: params.k,
                    v: params.v,
                    k_pages: quant_rows("append_kv", &k_pages)?,
                    v_pages: quant_rows("append_kv", &v_pages)?,
                    slots: params.slots,
                    rope,
                    groups: at(blob.groups),
                    tail_tokens: at(blob.tail_tokens),
                    num_tail_tokens: counts.tail_tokens as u32,
                    page_size: plan.page_size as u32,
                    num_kv_heads: plan.num_kv_heads as u32,
                    head_dim: plan.head_dim as u32,
                };
                let heads = (2 * plan.num_kv_heads).div_ceil(ROWS_PER_CTA);
                self.launch("append_quantized", [plan.num_tokens(), heads], words(&params))?;
                if !k_pages.has_tails() {
                    return Ok(());
                }
                // Groups first: they take old tokens from the tails that the second launch overwrites.
                self.launch("quantize_keys_int4", [counts.groups, plan.num_kv_heads], words(&params))?;
                let count = counts.tail_tokens * plan.num_kv_heads;
                self.launch("append_tail_int4", [count.div_ceil(ROWS_PER_CTA), 1], words(&params))
            }
        }
    }

    pub(super) fn run_dequantize(&self, call: DequantCall<'_>) -> Result<()> {
        const OP: &str = "quantized::dequantize";
        let DequantCall { pages: [k_pages, v_pages], k, v } = call;
        let &[num_pages, heads, page_size, head_dim] = k.shape() else { return Ok(()) };
        let params = DequantParams {
            k_pages: quant_rows(OP, &k_pages)?,
            v_pages: quant_rows(OP, &v_pages)?,
            k: page_rows(&k.as_view()),
            v: page_rows(&v.as_view()),
            num_pages: num_pages as u32,
            page_size: page_size as u32,
            head_dim: head_dim as u32,
            reserved: 0,
        };
        self.launch("dequantize", [(num_pages * page_size).div_ceil(ROWS_PER_CTA), heads], words(&params))
    }
}
