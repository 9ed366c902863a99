//! What the operations refuse: each with the operation, what was expected and what came. Nothing panics.

mod common;

use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::sample::{SamplingParams, sample};
use ferroflash::op::select_pages::{PageBudget, SparsePlan};
use ferroflash::op::{decode, layer, merge, prefill, tree};
use ferroflash::{
    AttentionSpec, Batch, CpuOptions, DType, Device, Error, Kv, KvCache, KvCacheSpec, KvFormat, KvTable,
    NaturalLog, PageLists, RopeScaling, RopeSpec, SimdLevel, Splits, Tensor, TreeMask, View, ViewMut,
};
use proptest::prelude::*;

fn refused<T>(result: Result<T, Error>, words: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("not refused: {words:?}"));
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

const RAGGED: KvTable<'static> = KvTable::Ragged { kv_indptr: &[0, 5] };

#[test]
fn specs() {
    let device = Device::cpu();
    let batch = Batch::new(&[0, 5], RAGGED);
    let good = AttentionSpec::new(4, 2, 64);
    let plan = |spec: AttentionSpec| prefill::plan(&device, &spec, &batch);
    plan(good.clone()).unwrap();
    refused(plan(AttentionSpec::new(4, 3, 64)), &["prefill", "multiple of num_kv_heads", "(4, 3)"]);
    refused(plan(AttentionSpec::new(4, 0, 64)), &["num_kv_heads"]);
    refused(plan(AttentionSpec::new(4, 2, 12)), &["head_dim", "multiple of 8", "12"]);
    refused(plan(AttentionSpec::new(4, 2, 264)), &["head_dim", "256", "264"]);
    refused(plan(AttentionSpec { softmax_scale: f32::NAN, ..good.clone() }), &["softmax_scale", "NaN"]);
    refused(plan(AttentionSpec { window: Some(0), ..good.clone() }), &["window"]);
    refused(plan(AttentionSpec { soft_cap: Some(-1.0), ..good.clone() }), &["soft_cap", "-1"]);
    refused(
        plan(AttentionSpec { alibi_slopes: Some(vec![1.0]), ..good.clone() }),
        &["alibi_slopes", "4", "1"],
    );
    let sink_logits = Some(vec![0.0, 0.0, f32::INFINITY, 0.0]);
    refused(plan(AttentionSpec { sink_logits, ..good }), &["sink_logits", "inf"]);
}

#[test]
fn batches() {
    let device = Device::cpu();
    let spec = AttentionSpec::new(4, 2, 64).causal();
    let plan = |qo: &[u32], kv: KvTable<'_>| decode::plan(&device, &spec, &Batch::new(qo, kv), Splits::Auto);
    refused(plan(&[], RAGGED), &["decode", "qo_indptr", "first 0"]);
    refused(plan(&[1, 5], RAGGED), &["qo_indptr"]);
    refused(plan(&[0, 5, 3], RAGGED), &["qo_indptr", "never decrease", "5 then 3"]);
    refused(plan(&[0, 1, 2], RAGGED), &["kv_indptr", "3 entries", "2"]);
    let csr = |page_size, kv_indptr, kv_indices, last_page_len| KvTable::Csr {
        page_size,
        kv_indptr,
        kv_indices,
        last_page_len,
    };
    refused(plan(&[0, 1], csr(0, &[0, 1], &[0], &[1])), &["page_size"]);
    refused(plan(&[0, 1], csr(16, &[0, 3], &[0], &[1])), &["kv_indices", "3", "1"]);
    refused(plan(&[0, 1], csr(16, &[0, 1], &[0], &[17])), &["last_page_len", "16", "17"]);
    refused(plan(&[0, 1], csr(16, &[0, 1], &[0], &[0])), &["last_page_len"]);
    let block = |block_table, max_blocks, seq_lens| KvTable::Block {
        page_size: 16,
        block_table,
        max_blocks,
        seq_lens,
    };
    refused(plan(&[0, 1], block(&[0, 1], 2, &[33])), &["seq_lens", "2 * 16", "33"]);
    refused(plan(&[0, 1], block(&[0], 2, &[1])), &["block_table", "2", "1"]);
    let fixed = AttentionPlan::new(&device, &spec, &Batch::new(&[0, 1], RAGGED), Splits::Fixed(0));
    refused(fixed, &["Splits::Fixed"]);

    let paged = block(&[0, 1], 2, &[32]);
    let listed = |kv, q_tile, per_head, indptr, pages| {
        let lists = PageLists { q_tile, per_head, indptr, pages };
        let batch = Batch { page_lists: Some(lists), ..Batch::new(&[0, 5], kv) };
        AttentionPlan::new(&device, &spec, &batch, Splits::Auto).map(|_| ())
    };
    listed(paged, 4, true, &[0, 1, 2, 2, 4], &[0, 1, 0, 1]).unwrap();
    refused(listed(RAGGED, 4, false, &[0, 1, 2], &[0, 0]), &["page_lists", "paged"]);
    refused(listed(paged, 0, false, &[0, 1, 2], &[0, 0]), &["q_tile"]);
    refused(listed(paged, 4, false, &[0, 1], &[0]), &["page_lists.indptr", "3 entries", "2 lists"]);
    refused(listed(paged, 4, false, &[0, 1, 3], &[0, 1]), &["page_lists.pages", "at least 3"]);
    refused(listed(paged, 4, false, &[0, 2, 2], &[1, 1]), &["ascending", "1 then 1", "tile 0"]);
    refused(listed(paged, 4, false, &[0, 0, 1], &[2]), &["page_lists.pages", "tile 1", "2"]);

    let full = AttentionSpec::new(4, 2, 64);
    let tree_of = |spec: &AttentionSpec, n_tree: &[u32], mask: &[u32]| {
        let batch = Batch { tree: Some(TreeMask { n_tree, mask }), ..Batch::new(&[0, 2], RAGGED) };
        tree::plan(&device, spec, &batch, Splits::Auto).map(|_| ())
    };
    tree_of(&full, &[2], &[1, 3]).unwrap();
    refused(tree_of(&spec, &[2], &[1, 3]), &["causal"]);
    refused(tree_of(&full, &[6], &[1, 3]), &["n_tree", "5", "6"]);
    refused(tree_of(&full, &[2], &[1]), &["tree mask", "2 words", "1"]);
    refused(tree_of(&full, &[2, 2], &[1, 3]), &["n_tree", "one per sequence"]);
    refused(tree::plan(&device, &full, &Batch::new(&[0, 2], RAGGED), Splits::Auto), &["batch.tree"]);
}

#[test]
fn tensors_of_attention() {
    let device = Device::cpu();
    let spec = AttentionSpec::new(4, 2, 64);
    let mut plan = prefill::plan(&device, &spec, &Batch::new(&[0, 5], RAGGED)).unwrap();
    let zeros = |dtype, shape: &[usize]| Tensor::zeros(&device, dtype, shape).unwrap();
    let q = zeros(DType::F32, &[5, 4, 64]);
    let k = zeros(DType::F16, &[5, 2, 64]);
    let mut out = zeros(DType::F32, &[5, 4, 64]);
    let good = Kv::Ragged { k: k.view(), v: k.view() };
    plan.run(q.view(), good, out.view_mut(), None).unwrap();
    let short = zeros(DType::F32, &[4, 4, 64]);
    refused(plan.run(short.view(), good, out.view_mut(), None), &["q", "[5, 4, 64]", "[4, 4, 64]"]);
    let turned = zeros(DType::F32, &[5, 64, 4]);
    let turned = turned.view().permute(&[0, 2, 1]).unwrap();
    refused(plan.run(turned, good, out.view_mut(), None), &["stride 1"]);
    let bytes = zeros(DType::U8, &[5, 4, 64]);
    refused(plan.run(bytes.view(), good, out.view_mut(), None), &["dtype of q", "u8"]);
    let other = zeros(DType::F32, &[5, 2, 64]);
    let mixed = Kv::Ragged { k: k.view(), v: other.view() };
    refused(plan.run(q.view(), mixed, out.view_mut(), None), &["dtype of v", "f16", "f32"]);
    let few = zeros(DType::F16, &[4, 2, 64]);
    let few = Kv::Ragged { k: few.view(), v: few.view() };
    refused(plan.run(q.view(), few, out.view_mut(), None), &["at least 5 rows", "4"]);
    let pages = zeros(DType::F16, &[1, 2, 16, 64]);
    let paged = Kv::Paged { k: pages.view(), v: pages.view() };
    refused(plan.run(q.view(), paged, out.view_mut(), None), &["ragged KV, as planned"]);
    let mut lse = zeros(DType::F16, &[5, 4]);
    let lse = Some(NaturalLog(lse.view_mut()));
    refused(plan.run(q.view(), good, out.view_mut(), lse), &["lse", "f32"]);

    let table = KvTable::Csr { page_size: 16, kv_indptr: &[0, 1], kv_indices: &[3], last_page_len: &[5] };
    let mut plan = prefill::plan(&device, &spec, &Batch::new(&[0, 5], table)).unwrap();
    let run = |plan: &mut AttentionPlan, pages: &Tensor, out: &mut Tensor| {
        plan.run(q.view(), Kv::Paged { k: pages.view(), v: pages.view() }, out.view_mut(), None)
    };
    refused(run(&mut plan, &pages, &mut out), &["page number", "3", "below 1"]);
    let small = zeros(DType::F16, &[9, 2, 8, 64]);
    refused(run(&mut plan, &small, &mut out), &["page_size", "16", "8"]);
    run(&mut plan, &zeros(DType::F16, &[4, 2, 16, 64]), &mut out).unwrap();
}

#[test]
fn appends() {
    let device = Device::cpu();
    let spec = AttentionSpec::new(4, 2, 64);
    let rope = RopeSpec::new(64, 10000.0);
    let from = |slots: &[i64], positions: &[u32]| {
        AppendPlan::from_slots(&device, &spec, Some(&rope), 4, slots, positions)
    };
    refused(from(&[0, 1], &[0]), &["append_kv", "positions", "2", "1"]);
    refused(from(&[3, -1, 3], &[0, 1, 2]), &["slot 3 twice"]);
    let wide = RopeSpec::new(128, 10000.0);
    refused(AppendPlan::from_slots(&device, &spec, Some(&wide), 4, &[0], &[0]), &["rotary_dim", "64", "128"]);
    for (scaling, word) in [
        (RopeScaling::Linear { factor: 0.0 }, "factor"),
        (RopeScaling::Ntk { factor: f64::NAN }, "factor"),
        (
            RopeScaling::LongRope {
                short_factor: vec![1.0; 3],
                long_factor: vec![],
                original_max_position: 10,
                max_position: 20,
                attention_factor: None,
            },
            "short_factor",
        ),
    ] {
        let rope = RopeSpec { scaling, ..rope.clone() };
        refused(AppendPlan::from_slots(&device, &spec, Some(&rope), 4, &[0], &[0]), &["rope", word]);
    }
    let ragged = AppendPlan::from_batch(&device, &spec, None, &Batch::new(&[0, 5], RAGGED));
    refused(ragged, &["page table", "ragged"]);

    let plan = from(&[8], &[0]).unwrap();
    let k = Tensor::zeros(&device, DType::F32, &[1, 2, 64]).unwrap();
    let cache = |format, num_pages, page_size| {
        let spec =
            KvCacheSpec { num_pages, page_size, num_kv_heads: 2, head_dim: 64, format, summaries: false };
        KvCache::new(&device, spec)
    };
    let float = KvFormat::Float(DType::F32);
    let run = |cache: &mut KvCache| plan.run(None, k.view(), k.view(), cache.view_mut());
    refused(run(&mut cache(float, 2, 4).unwrap()), &["slots", "2", "below 2"]);
    refused(run(&mut cache(float, 3, 5).unwrap()), &["page_size", "4", "5"]);
    run(&mut cache(float, 3, 4).unwrap()).unwrap();
    let int4 = KvFormat::int4(1);
    refused(cache(int4, 1, 40), &["page_size", "32", "40"]);
    let plan = AppendPlan::from_slots(&device, &spec, None, 32, &[0], &[0]).unwrap();
    let into_int4 = plan.run(None, k.view(), k.view(), cache(int4, 1, 32).unwrap().view_mut());
    refused(into_int4, &["tail_slots", "from_batch"]);
    refused(cache(float, usize::MAX / 2, 4), &["allocate"]);
}

#[test]
fn the_rest() {
    let device = Device::cpu();
    let (data, mut out) = (vec![0f32; 12], vec![0f32; 12]);
    let view = |shape: &[usize]| View::from_slice(&data, shape).unwrap();
    refused(View::from_slice(&data, &[5, 3]), &["12"]);
    refused(View::from_slice_strided(&data, &[usize::MAX, 2], &[usize::MAX, 1]), &["12"]);
    refused(ViewMut::from_slice_strided(&mut out, &[3, 4], &[0, 1]), &["twice"]);
    refused(ViewMut::from_slice_strided(&mut out, &[3, 4], &[2, 1]), &["twice"]);
    refused(view(&[3, 4]).narrow(0, 2, 2), &["dimension 0"]);
    refused(view(&[3, 4]).permute(&[0, 0]), &["permutation"]);

    let view_mut = |shape: &[usize]| {
        let out: &'static mut [f32] = Box::leak(out.clone().into_boxed_slice());
        ViewMut::from_slice(out, shape).unwrap()
    };
    let norm = layer::rms_norm(&device, view(&[3, 4]), None, view(&[12]), 1e-5, view_mut(&[3, 4]));
    refused(norm, &["rms_norm", "weight", "[4]", "[12]"]);
    let weight = View::from_slice(&[1.0f32; 4], &[4]).unwrap();
    let norm = layer::rms_norm(&device, view(&[3, 4]), None, weight, -1.0, view_mut(&[3, 4]));
    refused(norm, &["eps", "-1"]);
    refused(layer::silu_mul(&device, view(&[3, 4]), view_mut(&[3, 4])), &["gate_up", "[3, 8]"]);
    let ids = [0, 3];
    refused(
        layer::embedding(&device, view(&[3, 4]), &ids, view_mut(&[2, 6]).narrow(1, 0, 4).unwrap()),
        &["ids[1]", "3"],
    );
    let merged = merge::merge(&device, &[], view_mut(&[1, 3, 4]), NaturalLog(view_mut(&[4, 3])));
    refused(merged, &["merge", "states"]);
    let mut ids = [0; 3];
    let params = [SamplingParams::default(); 3];
    refused(sample(&device, view(&[3, 4]), &params[..2], &mut ids), &["params", "3", "2"]);
    for bad in [
        SamplingParams { temperature: f32::NAN, ..Default::default() },
        SamplingParams { top_p: 0.0, ..Default::default() },
        SamplingParams { min_p: 2.0, ..Default::default() },
    ] {
        refused(sample(&device, view(&[3, 4]), &[params[0], bad, params[0]], &mut ids), &["sample"]);
    }

    let spec = AttentionSpec::new(4, 2, 64);
    let table =
        KvTable::Csr { page_size: 4, kv_indptr: &[0, 3], kv_indices: &[0, 1, 2], last_page_len: &[2] };
    let sparse = |spec: &AttentionSpec, q_len: u32, kv, budget| {
        SparsePlan::new(&device, spec, &Batch::new(&[0, q_len], kv), budget, Splits::Auto)
    };
    sparse(&spec, 1, table, PageBudget::new(2)).unwrap();
    refused(sparse(&spec, 1, table, PageBudget::new(1)), &["budget"]);
    refused(sparse(&spec, 2, table, PageBudget::new(2)), &["query tokens", "2"]);
    refused(sparse(&spec, 1, RAGGED, PageBudget::new(2)), &["page table"]);
    refused(sparse(&spec.clone().window(5), 1, table, PageBudget::new(2)), &["window"]);

    let missing = if cfg!(target_arch = "x86_64") { SimdLevel::Neon } else { SimdLevel::Avx2 };
    let options = CpuOptions { simd: Some(missing), ..Default::default() };
    refused(Device::cpu_with(options), &["not available"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the tables hold, a plan and a run are an error or an answer.
    #[test]
    fn wild_tables_never_panic(
        qo in proptest::collection::vec(0u32..9, 0..5), indptr in proptest::collection::vec(0u32..9, 0..5),
        indices in proptest::collection::vec(0u32..12, 0..9), last in proptest::collection::vec(0u32..6, 0..5),
        page_size in 0usize..6, block: bool, causal: bool, max_blocks in 0usize..4, fitting: bool,
    ) {
        let device = Device::cpu();
        // Half of the time the tables fit together, so that only page numbers can be wrong.
        let (mut qo, mut indptr, mut indices, mut last, mut page_size) = (qo, indptr, indices, last, page_size);
        if fitting {
            let n = qo.len();
            let prefix_sums = |x: &[u32]| {
                let mut sums = vec![0];
                (0..n).for_each(|i| sums.push(sums[i] + x.get(i).map_or(1, |x| x % 4)));
                sums
            };
            (qo, indptr) = (prefix_sums(&qo), prefix_sums(&indptr));
            page_size = page_size.max(1);
            let limit = if block { max_blocks * page_size + 1 } else { page_size };
            last = (0..n).map(|i| last.get(i).copied().unwrap_or(3) % limit as u32 + !block as u32).collect();
            let pages = if block { n * max_blocks } else { indptr[n] as usize };
            indices = (0..pages).map(|i| indices.get(i).copied().unwrap_or(i as u32 % 10)).collect();
        }
        let mut spec = AttentionSpec::new(2, 1, 8);
        spec.causal = causal;
        let table = if block {
            KvTable::Block { page_size, block_table: &indices, max_blocks, seq_lens: &last }
        } else {
            KvTable::Csr { page_size, kv_indptr: &indptr, kv_indices: &indices, last_page_len: &last }
        };
        let batch = Batch::new(&qo, table);
        let total = qo.last().copied().unwrap_or(0) as usize;
        let q = vec![0.5f32; total * 16];
        let mut out = q.clone();
        let pages = vec![0.5f32; 10 * page_size * 8];
        if let Ok(mut plan) = AttentionPlan::new(&device, &spec, &batch, Splits::Auto) {
            let view = View::from_slice(&pages, &[10, 1, page_size, 8]).unwrap();
            let _ = plan.run(
                View::from_slice(&q, &[total, 2, 8]).unwrap(),
                Kv::Paged { k: view, v: view },
                ViewMut::from_slice(&mut out, &[total, 2, 8]).unwrap(),
                None,
            );
        }
        let _ = AppendPlan::from_batch(&device, &spec, None, &batch);
    }
}
