//! Attention on a GPU: where a plan lies in device memory, and its launches.

use ferroflash_kernels::abi::{
    AttentionParams, AttentionQuantParams, DecodeMlaSm90Params, DecodeParams, DecodeQuantParams, Divisor,
    KV_BLOCK, MergeItem, MergePartialsParams, PageMassParams, PageRows, ROWS_PER_CTA, RangeParams, Sequence,
    TokenRows, WorkItem, box_rows,
};

use super::append::quant_rows;
use super::driver::{Launch, bytes, words};
use super::params::{NO_PAGES, aligned, page_rows, ragged_rows, same_half, token_rows};
use super::{CTAS_PER_PROCESSOR, Gpu, Offsets};
use crate::device::{AttentionCall, PageMassCall, Storage};
use crate::error::{Error, Result};
use crate::kv::Kv;
use crate::plan::Plan;
use crate::spec::AttentionSpec;
use crate::tensor::DType;

/// Kernels by head_dim, the smallest that holds a row.
const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

type Family = [[&'static str; 5]; 2];

macro_rules! family {
    ($name:literal) => {
        [family!($name, "_f16"), family!($name, "_bf16")]
    };
    ($name:literal, $dtype:literal) => {
        [
            concat!($name, $dtype, "_d64"),
            concat!($name, $dtype, "_d96"),
            concat!($name, $dtype, "_d128"),
            concat!($name, $dtype, "_d192"),
            concat!($name, $dtype, "_d256"),
        ]
    };
}

const PREFILL: Family = family!("prefill");
const DECODE: Family = family!("decode");
/// By the shared memory that they need.
const DECODE_MLA: [[&str; 2]; 2] =
    [["decode_mla_f16", "decode_mla_f16_large"], ["decode_mla_bf16", "decode_mla_bf16_large"]];
const DECODE_MLA_SM90: [&str; 2] = ["decode_mla_sm90_f16", "decode_mla_sm90_bf16"];
const PREFILL_QUANTIZED: Family = family!("prefill_quantized");
/// By type and head_dim: other sizes than [`HEAD_DIMS`].
const DECODE_QUANTIZED: [[(usize, &str); 3]; 2] = [
    [
        (64, "decode_quantized_f16_d64"),
        (128, "decode_quantized_f16_d128"),
        (256, "decode_quantized_f16_d256"),
    ],
    [
        (64, "decode_quantized_bf16_d64"),
        (128, "decode_quantized_bf16_d128"),
        (256, "decode_quantized_bf16_d256"),
    ],
];

fn entry(family: &'static Family, dtype: DType, head_dim: usize) -> &'static str {
    let size = HEAD_DIMS.iter().position(|&d| head_dim <= d).unwrap_or(HEAD_DIMS.len() - 1);
    family[(dtype == DType::BF16) as usize][size]
}

/// Offsets of a plan's parts in its workspace.
pub(super) struct Workspace {
    pub(super) items: usize,
    ranges: usize,
    merges: usize,
    splits: usize,
    pub(super) sequences: usize,
    pub(super) pages: usize,
    logical_pages: usize,
    tree_mask: usize,
    alibi_slopes: usize,
    sink_logits: usize,
    /// Counters, 0 between launches.
    next_item: usize,
    arrivals: usize,
    /// Everything before is uploaded.
    partials: usize,
    pub(super) bytes: usize,
}

impl Workspace {
    pub(super) fn new(spec: &AttentionSpec, plan: &Plan) -> Self {
        let mut offsets = Offsets::default();
        let mut place = |bytes| offsets.place(bytes);
        let floats = |x: &Option<Vec<f32>>| 4 * x.as_ref().map_or(0, Vec::len);
        let n = plan.sizes();
        let mut w = Workspace {
            items: place(size_of::<WorkItem>() * n.items),
            ranges: place(4 * n.ranges),
            merges: place(size_of::<MergeItem>() * n.merges),
            splits: place(4 * n.splits),
            sequences: place(size_of::<Sequence>() * n.sequences),
            pages: place(4 * n.pages),
            logical_pages: place(4 * n.logical_pages),
            tree_mask: place(4 * n.tree_mask),
            alibi_slopes: place(floats(&spec.alibi_slopes)),
            sink_logits: place(floats(&spec.sink_logits)),
            next_item: place(4),
            arrivals: place(4 * n.range_merges),
            partials: place(0),
            bytes: 0,
        };
        w.bytes = w.partials + 4 * n.partial_rows * ferroflash_kernels::abi::partial_stride(spec.v_head_dim);
        w
    }

    /// What every attention kernel is given: `rows` of queries, outputs and LSE, pages of K and V.
    fn params(
        &self,
        spec: &AttentionSpec,
        plan: &Plan,
        storage: &Storage,
        [q, out, lse]: [TokenRows; 3],
        (k, v): (PageRows, PageRows),
    ) -> AttentionParams {
        let at = |offset: usize| storage.address() + offset as u64;
        let optional = |there: bool, offset: usize| if there { at(offset) } else { 0 };
        AttentionParams {
            q,
            out,
            lse,
            k,
            v,
            items: at(self.items),
            sequences: at(self.sequences),
            pages: at(self.pages),
            logical_pages: optional(!plan.logical_pages.is_empty(), self.logical_pages),
            tree_mask: at(self.tree_mask),
            alibi_slopes: optional(spec.alibi_slopes.is_some(), self.alibi_slopes),
            sink_logits: optional(spec.sink_logits.is_some(), self.sink_logits),
            partials: at(self.partials),
            score: spec.score_params(),
            group: Divisor::new(spec.group() as u32),
            page_size: Divisor::new(plan.page_size as u32),
            head_dim: spec.head_dim as u32,
            v_head_dim: spec.v_head_dim as u32,
            section: plan.section as u32,
        }
    }

    fn fill(&self, spec: &AttentionSpec, plan: &Plan) -> Vec<u8> {
        let mut data = vec![0u8; self.partials];
        let mut put = |at: usize, from: &[u8]| data[at..at + from.len()].copy_from_slice(from);
        put(self.items, bytes(&plan.items));
        put(self.ranges, bytemuck::cast_slice(&plan.ranges));
        put(self.merges, bytes(&plan.merges));
        put(self.splits, bytemuck::cast_slice(&plan.splits));
        put(self.sequences, bytes(&plan.sequences));
        put(self.pages, bytemuck::cast_slice(&plan.pages));
        put(self.logical_pages, bytemuck::cast_slice(&plan.logical_pages));
        put(self.tree_mask, bytemuck::cast_slice(&plan.tree_mask));
        put(self.alibi_slopes, bytemuck::cast_slice(spec.alibi_slopes.as_deref().unwrap_or(&[])));
        put(self.sink_logits, bytemuck::cast_slice(spec.sink_logits.as_deref().unwrap_or(&[])));
        data
    }
}

/// Items that ranges are made of.
fn range_items(plan: &Plan) -> usize {
    plan.ranges.last().map_or(0, |&n| n as usize)
}

impl Gpu {
    /// Decode CTAs that are on a multiprocessor together: those that stay should all be there at once.
    pub(super) fn decode_ctas(&self, spec: &AttentionSpec, wide: bool) -> usize {
        // Those of both types are alike.
        let entry = if wide { DECODE_MLA_SM90[1] } else { self.decode_entry(spec, DType::BF16) };
        self.driver.resident_ctas(entry).clamp(1, CTAS_PER_PROCESSOR)
    }

    fn decode_entry(&self, spec: &AttentionSpec, dtype: DType) -> &'static str {
        if spec.quantized_kv {
            let [smaller @ .., largest] = &DECODE_QUANTIZED[(dtype == DType::BF16) as usize];
            return smaller.iter().find(|e| spec.head_dim <= e.0).unwrap_or(largest).1;
        }
        if !spec.is_latent() {
            return entry(&DECODE, dtype, spec.head_dim);
        }
        let [small, large] = DECODE_MLA[(dtype == DType::BF16) as usize];
        if self.driver.resident_ctas(large) > 0 { large } else { small }
    }

    pub(super) fn plan_workspace(&self, spec: &AttentionSpec, plan: &Plan) -> Result<Storage> {
        let workspace = Workspace::new(spec, plan);
        let memory = self.scratch(workspace.bytes)?;
        self.driver.upload(&workspace.fill(spec, plan), memory.at())?;
        Ok(Storage::Device(memory))
    }

    pub(super) fn update_workspace(
        &self,
        spec: &AttentionSpec,
        plan: &Plan,
        storage: &Storage,
    ) -> Result<()> {
        self.driver.upload(&Workspace::new(spec, plan).fill(spec, plan), storage.address())
    }

    pub(super) fn run_attention(&self, call: AttentionCall<'_>) -> Result<()> {
        let AttentionCall { op, spec, plan, workspace: storage, q, kv, out, lse } = call;
        let out_view = out.as_view();
        let dtype = same_half(op, &[("q", &q), ("out", &out_view)])?;
        aligned(op, "q", &q, 16)?;
        // Hopper's kernels write 16 bytes at a time.
        aligned(op, "out", &out_view, if plan.hopper { 16 } else { 4 })?;
        let (k, v) = match &kv {
            Kv::Ragged { k, v } | Kv::Paged { k, v } => {
                same_half(op, &[("q", &q), ("k", k), ("v", v)])?;
                aligned(op, "k", k, 16)?;
                aligned(op, "v", v, 16)?;
                let same = v.ptr() == k.ptr() && v.strides() == k.strides();
                if spec.is_latent() && !same {
                    let expected = "a view of k's first channels, for more than 256 channels on a GPU";
                    return Err(Error::value(op, "v", expected, "memory of its own"));
                }
                let rows = |view| if plan.page_size == 0 { ragged_rows(view) } else { page_rows(view) };
                (rows(k), rows(v))
            }
            Kv::Quantized { .. } => (NO_PAGES, NO_PAGES),
        };
        let lse = lse.as_ref().map(|lse| lse.0.as_view());
        let rows = [token_rows(Some(&q)), token_rows(Some(&out_view)), token_rows(lse.as_ref())];
        let workspace = Workspace::new(spec, plan);
        let mut params = workspace.params(spec, plan, storage, rows, (k, v));
        let at = |offset: usize| storage.address() + offset as u64;
        let ranges = RangeParams {
            ranges: at(workspace.ranges),
            merges: at(workspace.merges),
            splits: at(workspace.splits),
            arrivals: at(workspace.arrivals),
        };
        let ctas = [plan.ranges.len().saturating_sub(1), 1];
        let others = plan.items.len() - range_items(plan);
        let further = (range_items(plan) * size_of::<WorkItem>()) as u64;
        match &kv {
            Kv::Quantized { k, v } => {
                let (k, v) = (quant_rows(op, k)?, quant_rows(op, v)?);
                let mut quant = AttentionQuantParams { attention: params, k, v };
                let decode = DecodeQuantParams { quant, ranges };
                self.launch(self.decode_entry(spec, dtype), ctas, words(&decode))?;
                quant.attention.items += further;
                let prefill = entry(&PREFILL_QUANTIZED, dtype, spec.head_dim);
                self.launch(prefill, [others, 1], words(&quant))?;
            }
            Kv::Ragged { k, .. } | Kv::Paged { k, .. } if spec.is_latent() && plan.hopper => {
                let params = DecodeMlaSm90Params {
                    map: self.kv_map(&kv, k, (spec.head_dim, 64), box_rows(KV_BLOCK, plan.page_size))?,
                    attention: params,
                    ranges,
                    box_rows: box_rows(KV_BLOCK, plan.page_size).unwrap_or(0) as u32,
                    reserved: 0,
                };
                self.launch(DECODE_MLA_SM90[(dtype == DType::BF16) as usize], ctas, words(&params))?;
            }
            _ => {
                let decode = DecodeParams { attention: params, ranges };
                self.launch(self.decode_entry(spec, dtype), ctas, words(&decode))?;
                params.items += further;
                if plan.hopper {
                    let next_item = at(workspace.next_item);
                    self.launch_prefill_sm90(spec, plan, &params, (&q, &kv), next_item, others)?;
                } else {
                    self.launch(entry(&PREFILL, dtype, spec.head_dim), [others, 1], words(&params))?;
                }
            }
        }

        // Those of ranges are done.
        let merges = &plan.merges[plan.range_merges..];
        let most_rows = merges.iter().map(|m| m.row_end - m.row_start).max().unwrap_or(0);
        let merge = MergePartialsParams {
            out: params.out,
            lse: params.lse,
            items: at(workspace.merges) + (plan.range_merges * size_of::<MergeItem>()) as u64,
            sequences: params.sequences,
            sink_logits: params.sink_logits,
            partials: params.partials,
            splits: at(workspace.splits),
            group: params.group,
            v_head_dim: spec.v_head_dim as u32,
        };
        let name = if dtype == DType::BF16 { "merge_partials_bf16" } else { "merge_partials_f16" };
        self.launch(name, [merges.len(), (most_rows as usize).div_ceil(ROWS_PER_CTA)], words(&merge))
    }

    pub(super) fn run_page_mass(&self, call: PageMassCall<'_>) -> Result<()> {
        let PageMassCall { spec, plan, workspace: storage, q, k, lse, mass } = call;
        const OP: &str = "page_mass";
        let dtype = same_half(OP, &[("q", &q), ("k", &k)])?;
        aligned(OP, "q", &q, 16)?;
        aligned(OP, "k", &k, 16)?;
        let rows = [token_rows(Some(&q)), token_rows(None), token_rows(Some(&lse.0))];
        let mass = mass.as_view();
        let most = plan.own_sequences().iter().map(|s| (s.kv_len as usize).div_ceil(plan.page_size)).max();
        let page_ctas = most.unwrap_or(0).div_ceil(ROWS_PER_CTA);
        let params = PageMassParams {
            attention: Workspace::new(spec, plan).params(
                spec,
                plan,
                storage,
                rows,
                (page_rows(&k), NO_PAGES),
            ),
            mass: mass.ptr() as u64,
            mass_head: 4 * mass.strides()[0] as u64,
            page_ctas: page_ctas as u32,
            reserved: 0,
        };
        let name = if dtype == DType::BF16 { "page_mass_bf16" } else { "page_mass_f16" };
        self.launch(name, [plan.own_sequences().len() * page_ctas, spec.num_kv_heads], words(&params))
    }

    /// A launch of no CTAs is none.
    pub(super) fn launch(&self, entry: &'static str, grid: [usize; 2], params: &[u64]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        self.driver.launch(Launch { entry, grid: grid.map(|n| n as u32), params })
    }
}
