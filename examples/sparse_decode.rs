//! Decode over the pages that matter: `cargo run --release --example sparse_decode`.
//!
//! Fills a paged cache with 16k tokens, decodes one token densely and over a budget of 64 pages, and
//! prints how far apart the answers are and how many pages each KV head chose in common.

use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::decode;
use ferroflash::op::select_pages::{PageBudget, SparsePlan};
use ferroflash::{
    AttentionSpec, Batch, DType, Device, KvCache, KvCacheSpec, KvFormat, KvTable, RopeSpec, Splits, Tensor,
};

fn main() -> ferroflash::Result<()> {
    let device = Device::auto();
    let (tokens, page_size, dim) = (16_384u32, 16usize, 64usize);
    let spec = AttentionSpec::new(8, 2, dim).causal();
    let mut cache = KvCache::new(
        &device,
        KvCacheSpec {
            num_pages: tokens as usize / page_size,
            page_size,
            num_kv_heads: 2,
            head_dim: dim,
            format: KvFormat::Float(DType::F16),
            summaries: true,
        },
    )?;

    // Keys that drift, so that neighbours are alike, as in real text.
    let wave = |i: usize| ((i / (2 * dim)) as f32 * 0.003 + (i % dim) as f32).sin() * 3.0;
    let kv: Vec<f32> = (0..tokens as usize * 2 * dim).map(wave).collect();
    let kv = Tensor::from_slice(&device, &kv, &[tokens as usize, 2, dim])?;
    let page_table: Vec<u32> = (0..tokens / page_size as u32).rev().collect();
    let table = KvTable::Csr {
        page_size,
        kv_indptr: &[0, page_table.len() as u32],
        kv_indices: &page_table,
        last_page_len: &[page_size as u32],
    };
    let rope = RopeSpec::new(dim, 500_000.0);
    AppendPlan::from_batch(&device, &spec, Some(&rope), &Batch::new(&[0, tokens], table))?.run(
        None,
        kv.view(),
        kv.view(),
        cache.view_mut(),
    )?;

    let q: Vec<f32> = (0..8 * dim).map(|i| wave(i * 31)).collect();
    let q = Tensor::from_slice(&device, &q, &[1, 8, dim])?;
    let batch = Batch::new(&[0, 1], table);
    let mut dense = Tensor::zeros(&device, DType::F32, &[1, 8, dim])?;
    decode::plan(&device, &spec, &batch, Splits::Auto)?.run(
        q.view(),
        cache.view(),
        dense.view_mut(),
        None,
    )?;

    let mut sparse = Tensor::zeros(&device, DType::F32, &[1, 8, dim])?;
    let mut plan = SparsePlan::new(&device, &spec, &batch, PageBudget::new(64), Splits::Auto)?;
    if let Some(summaries) = cache.summaries() {
        plan.select(q.view(), summaries)?;
    }
    plan.run(q.view(), cache.view(), sparse.view_mut(), None)?;

    let (dense, sparse) = (dense.to_vec::<f32>()?, sparse.to_vec::<f32>()?);
    let difference = dense.iter().zip(&sparse).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    let (first, second) = (plan.chosen(0, 0)?, plan.chosen(0, 1)?);
    let common = first.iter().filter(|page| second.contains(page)).count();
    println!(
        "64 of {} pages; largest difference {difference:.2e}; {common} pages in common",
        page_table.len()
    );
    Ok(())
}
