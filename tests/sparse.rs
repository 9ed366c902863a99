//! Sparse top-k attention: the naive choice of pages, and dense attention where the budget covers all.

mod common;

use common::cases::{Case, Place, Problem, Tables, compare};
use common::reference::{Features, attend};
use common::{Elements, devices, is_gpu, rounded};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::select_pages::{PageBudget, SparsePlan};
use ferroflash::{AttentionSpec, Batch, DType, Device, KvCache, KvCacheSpec, KvFormat, KvTable, Splits};

/// A paged case with its cache filled through `append_kv`, so that it has summaries.
fn cache_of(
    device: &Device,
    problem: &Problem,
    tables: &Tables,
    page_size: usize,
    num_pages: usize,
) -> KvCache {
    let spec = &problem.case.spec;
    let (heads, dim) = (spec.num_kv_heads, spec.head_dim);
    let mut cache = KvCache::new(
        device,
        KvCacheSpec {
            num_pages,
            page_size,
            num_kv_heads: heads,
            head_dim: dim,
            format: KvFormat::Float(problem.case.kv_dtype),
            summaries: true,
        },
    )
    .unwrap();
    let mut indptr = vec![0u32];
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for (s, &(_, len)) in problem.case.lengths.iter().enumerate() {
        indptr.push(indptr[s] + len as u32);
        for t in 0..len {
            (0..heads).for_each(|h| k.extend_from_slice(&problem.k[s][h][t]));
            (0..heads).for_each(|h| v.extend_from_slice(&problem.v[s][h][t]));
        }
    }
    let batch = Batch::new(&indptr, tables.kv_table());
    let shape = [*indptr.last().unwrap() as usize, heads, dim];
    AppendPlan::from_batch(device, spec, None, &batch)
        .unwrap()
        .run(
            None,
            common::on(device, &k, &shape).view(),
            common::on(device, &v, &shape).view(),
            cache.view_mut(),
        )
        .unwrap();
    cache
}

#[test]
fn sparse_selection_is_the_naive_one_and_a_full_budget_is_dense() {
    let page_size = 16;
    let lengths: Vec<(usize, usize)> = vec![(1, 900), (1, 33), (1, 16), (1, 5), (1, 130)];
    let num_pages: usize = lengths.iter().map(|l| l.1.div_ceil(page_size)).sum::<usize>() + 2;
    for dtype in [DType::F32, DType::F16] {
        let case = Case {
            spec: AttentionSpec::new(8, 2, 64).causal(),
            lengths: lengths.clone(),
            n_tree: None,
            q_dtype: DType::F32,
            kv_dtype: dtype,
            place: Place::Paged { page_size, nhd: false, block_table: false },
            splits: Splits::Fixed(128),
            lists: None,
            q_scale: 1.0,
            seed: 21,
        };
        let shape = [lengths.len(), 8, 64];
        for device in devices() {
            let problem = Problem::for_device(&case, &device);
            let tables = Tables::new(&problem, &device);
            let cache = cache_of(&device, &problem, &tables, page_size, num_pages);
            let batch = Batch::new(&problem.qo_indptr, tables.kv_table());
            let q_tensor = Elements::new(problem.case.q_dtype, &problem.q).tensor(&device, &shape);
            let q = q_tensor.view();
            let spec = &problem.case.spec;
            let dense = problem.run(&device).out;
            for pages in [1000, 8, 3] {
                let budget = PageBudget { recent: 2, ..PageBudget::new(pages) };
                let mut plan = SparsePlan::new(&device, spec, &batch, budget, problem.case.splits).unwrap();
                plan.select(q, cache.summaries().unwrap()).unwrap();
                let unset = vec![f32::NAN; problem.q.len()];
                let mut out = Elements::new(problem.case.q_dtype, &unset).tensor(&device, &shape);
                plan.run(q, cache.view(), out.view_mut(), None).unwrap();
                let out = Elements::of_tensor(&out).to_f32();
                if pages == 1000 {
                    assert_eq!(out, dense);
                    continue;
                }
                for (s, &(_, len)) in lengths.iter().enumerate() {
                    for kv_head in 0..2 {
                        let kept = naive_selection(&problem, s, kv_head, page_size, pages);
                        let KvTable::Csr { kv_indptr, kv_indices, .. } = tables.kv_table() else { panic!() };
                        let list = &kv_indices[kv_indptr[s] as usize..kv_indptr[s + 1] as usize];
                        let expected: Vec<u32> = kept.iter().map(|&p| list[p]).collect();
                        assert_eq!(plan.chosen(s, kv_head).unwrap(), expected);
                        let tokens: Vec<usize> =
                            (0..len).filter(|t| kept.contains(&(t / page_size))).collect();
                        for head in kv_head * 4..kv_head * 4 + 4 {
                            let at = (s * 8 + head) * 64;
                            let rows = |all: &Vec<Vec<Vec<Vec<f32>>>>| -> Vec<Vec<f32>> {
                                tokens.iter().map(|&t| all[s][kv_head][t].clone()).collect()
                            };
                            let (k, v) = (rows(&problem.k), rows(&problem.v));
                            let f = Features { scale: 0.125, ..Default::default() };
                            let row = &problem.q[at..][..64];
                            let (exact, _) = attend::<f64>(row, 0, &k, &v, &f, |_| true, |p| p);
                            let dtype = problem.case.q_dtype;
                            let round_p = |p| if is_gpu(&device) { rounded(dtype, p) } else { p };
                            let (naive, _) = attend::<f32>(row, 0, &k, &v, &f, |_| true, round_p);
                            let naive: Vec<f64> =
                                naive.iter().map(|&x| rounded(dtype, x as f32) as f64).collect();
                            compare("O", &out[at..][..64], &exact, &naive, 2e-6).unwrap();
                        }
                    }
                }
            }
        }
    }
}

/// Pages by the documented rule: first page and last two in, then the largest upper bounds.
fn naive_selection(
    problem: &Problem,
    s: usize,
    kv_head: usize,
    page_size: usize,
    budget: usize,
) -> Vec<usize> {
    let keys = &problem.k[s][kv_head];
    let n = keys.len().div_ceil(page_size);
    if n <= budget {
        return (0..n).collect();
    }
    let bound = |page: usize| -> f64 {
        let rows = &keys[page * page_size..((page + 1) * page_size).min(keys.len())];
        (kv_head * 4..kv_head * 4 + 4)
            .map(|head| {
                let q = &problem.q[(s * 8 + head) * 64..][..64];
                (0..64)
                    .map(|d| rows.iter().map(|r| q[d] as f64 * r[d] as f64).fold(f64::NEG_INFINITY, f64::max))
                    .sum::<f64>()
            })
            .fold(f64::NEG_INFINITY, f64::max)
    };
    let mut others: Vec<usize> = (1..n - 2).collect();
    others.sort_by(|&a, &b| bound(b).total_cmp(&bound(a)).then(a.cmp(&b)));
    let mut kept = vec![0, n - 2, n - 1];
    kept.extend(others.into_iter().take(budget - 3));
    kept.sort_unstable();
    kept
}

/// Scoring reads each summary once, and attention the chosen pages alone.
#[test]
fn a_small_budget_reads_little() {
    let (page_size, len, dim, budget) = (16, 12_000, 128, 16);
    let num_pages = len / page_size;
    let device = Device::sim(4);
    let case = Case {
        spec: AttentionSpec::new(8, 2, dim).causal(),
        lengths: vec![(1, len)],
        n_tree: None,
        q_dtype: DType::BF16,
        kv_dtype: DType::BF16,
        place: Place::Paged { page_size, nhd: false, block_table: false },
        splits: Splits::Auto,
        lists: None,
        q_scale: 1.0,
        seed: 5,
    };
    let problem = Problem::new(case);
    let tables = Tables::new(&problem, &device);
    let cache = cache_of(&device, &problem, &tables, page_size, num_pages + 2);
    let q = Elements::new(DType::BF16, &problem.q).tensor(&device, &[1, 8, dim]);
    let mut out = ferroflash::Tensor::zeros(&device, DType::BF16, &[1, 8, dim]).unwrap();
    let batch = Batch::new(&problem.qo_indptr, tables.kv_table());
    let spec = &problem.case.spec;
    let mut plan = SparsePlan::new(&device, spec, &batch, PageBudget::new(budget), Splits::Auto).unwrap();
    let read = || device.sim_stats().unwrap().distinct_read;
    let before = read();
    plan.select(q.view(), cache.summaries().unwrap()).unwrap();
    let (selection, summaries) = (read() - before, 2 * num_pages * 2 * dim * 2);
    // Besides: the page table, and the scores, which top-k reads.
    let besides = 2 * num_pages * 4 * 2;
    println!("selection reads {selection} bytes, summaries are {summaries}");
    assert!(selection as f64 <= 1.02 * (summaries + besides) as f64);
    let before = read();
    plan.run(q.view(), cache.view(), out.view_mut(), None).unwrap();
    let (attention, chosen) = (read() - before, 2 * budget * page_size * 2 * dim * 2);
    println!("attention reads {attention} bytes, the chosen pages are {chosen}");
    assert!(
        attention as f64 <= 1.02 * chosen as f64 + 8192.0,
        "pages, and 8 KiB of queries, plan and states"
    );
}
