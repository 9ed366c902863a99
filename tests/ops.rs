//! Append, int4, page selection, merge, the layer's operations and sampling, against naive ones.

mod common;

use std::f64::consts::PI;

use common::cases::{Case, Place, Problem, Tables, compare};
use common::reference::{Features, attend, rotate};
use common::{Elements, Rng, devices, rounded};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::sample::{SamplingParams, sample};
use ferroflash::op::select_pages::{PageBudget, SparsePlan};
use ferroflash::op::{int4, layer, merge};
use ferroflash::{
    AttentionSpec, Batch, DType, Device, INT4_GROUP, Int4Pages, Int4PagesMut, Kv, KvCache, KvCacheSpec,
    KvFormat, KvMut, KvTable, NaturalLog, RopeScaling, RopeSpec, RopeStyle, Splits, Tensor, View, ViewMut,
};
use half::f16;
use proptest::prelude::*;

/// A scaling, the frequency of each pair, and the factor on cos and sin.
type RopeCase = (RopeScaling, Box<dyn Fn(usize) -> f64>, f64);

/// Naive frequencies, written from the papers; `rotary_dim` 64, theta 10000.
fn rope_cases() -> Vec<RopeCase> {
    let plain = |i: usize| 10000f64.powf(-(2.0 * i as f64) / 64.0);
    let long: Vec<f64> = (0..32).map(|i| 1.0 + i as f64).collect();
    let divisors = long.clone();
    vec![
        (RopeScaling::None, Box::new(plain), 1.0),
        (RopeScaling::Linear { factor: 4.0 }, Box::new(move |i| plain(i) / 4.0), 1.0),
        (
            RopeScaling::Ntk { factor: 8.0 },
            Box::new(|i| (10000.0 * 8f64.powf(64.0 / 62.0)).powf(-(2.0 * i as f64) / 64.0)),
            1.0,
        ),
        (
            RopeScaling::Yarn {
                factor: 4.0,
                original_max_position: 2048,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: None,
            },
            Box::new(move |i| {
                let bound = |turns: f64| 64.0 * (2048.0 / (turns * 2.0 * PI)).ln() / (2.0 * 10000f64.ln());
                let (low, high) = (bound(32.0).floor(), bound(1.0).ceil());
                let t = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(i) * ((1.0 - t) + t / 4.0)
            }),
            0.1 * 4f64.ln() + 1.0,
        ),
        (
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 8192,
            },
            Box::new(move |i| {
                let wavelength = 2.0 * PI / plain(i);
                if wavelength < 8192.0 / 4.0 {
                    plain(i)
                } else if wavelength > 8192.0 {
                    plain(i) / 8.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                    (1.0 - smooth) * plain(i) / 8.0 + smooth * plain(i)
                }
            }),
            1.0,
        ),
        (
            RopeScaling::LongRope {
                short_factor: vec![1.0; 32],
                long_factor: long,
                original_max_position: 4096,
                max_position: 131072,
                attention_factor: None,
            },
            Box::new(move |i| plain(i) / divisors[i]),
            (1.0 + 32f64.ln() / 4096f64.ln()).sqrt(),
        ),
    ]
}

#[test]
fn append_rotates_and_writes_to_slots() {
    let (tokens, q_heads, kv_heads, dim, page_size) = (9, 4, 2, 96, 5);
    let spec = AttentionSpec::new(q_heads, kv_heads, dim);
    let positions: Vec<u32> = vec![0, 1, 2, 77, 78, 100_000, 5, 6, 7];
    let slots: Vec<i64> = vec![3, 4, 5, 14, 0, 9, -1, 1, 2];
    let mut rng = Rng(3);
    for style in [RopeStyle::HalfRotated, RopeStyle::Interleaved] {
        for (scaling, frequency, factor) in rope_cases() {
            let rope = RopeSpec { rotary_dim: 64, theta: 10000.0, style, scaling };
            let pairs: Vec<(usize, usize)> = (0..32)
                .map(|i| if style == RopeStyle::HalfRotated { (i, i + 32) } else { (2 * i, 2 * i + 1) })
                .collect();
            let q = rng.normals(tokens * q_heads * dim);
            let k = rng.normals(tokens * kv_heads * dim);
            let v = rng.normals(tokens * kv_heads * dim);
            let turned = |x: &[f32], token: usize| {
                let angles: Vec<f64> = (0..32).map(|i| positions[token] as f64 * frequency(i)).collect();
                rotate(x, &pairs, &angles, factor)
            };
            for device in devices() {
                let plan = AppendPlan::from_slots(&device, &spec, Some(&rope), page_size, &slots, &positions)
                    .unwrap();
                let shape = [3, kv_heads, page_size, dim];
                let mut k_pages = vec![f32::NAN; shape.iter().product()];
                let mut v_pages = k_pages.clone();
                let mut q_out = q.clone();
                plan.run(
                    Some(ViewMut::from_slice(&mut q_out, &[tokens, q_heads, dim]).unwrap()),
                    View::from_slice(&k, &[tokens, kv_heads, dim]).unwrap(),
                    View::from_slice(&v, &[tokens, kv_heads, dim]).unwrap(),
                    KvMut::Paged {
                        k: ViewMut::from_slice(&mut k_pages, &shape).unwrap(),
                        v: ViewMut::from_slice(&mut v_pages, &shape).unwrap(),
                        summaries: None,
                    },
                )
                .unwrap();
                for token in 0..tokens {
                    for head in 0..q_heads {
                        let at = (token * q_heads + head) * dim;
                        close(&q_out[at..][..dim], &turned(&q[at..][..dim], token), 1e-6);
                    }
                    let Ok(slot) = usize::try_from(slots[token]) else { continue };
                    for head in 0..kv_heads {
                        let from = (token * kv_heads + head) * dim;
                        let to = ((slot / page_size * kv_heads + head) * page_size + slot % page_size) * dim;
                        close(&k_pages[to..][..dim], &turned(&k[from..][..dim], token), 1e-6);
                        assert_eq!(&v_pages[to..][..dim], &v[from..][..dim]);
                    }
                }
            }
        }
    }
}

fn close(got: &[f32], exact: &[f64], tolerance: f64) {
    for (g, e) in got.iter().zip(exact) {
        assert!((*g as f64 - e).abs() <= tolerance * e.abs().max(1.0), "{g} {e}");
    }
}

/// int4 pages in the test's own memory.
struct Int4Memory {
    codes: [Vec<u8>; 2],
    params: [Vec<f16>; 2],
    tails: [Vec<f16>; 2],
    num_pages: usize,
    heads: usize,
    page_size: usize,
    dim: usize,
    v_group: usize,
    num_tails: usize,
}

impl Int4Memory {
    fn new(num_pages: usize, heads: usize, page_size: usize, dim: usize, num_tails: usize) -> Self {
        let v_group = [32, 16, 8].into_iter().find(|&g| dim.is_multiple_of(g)).unwrap();
        let tokens = num_pages * heads * page_size;
        let nan = f16::NAN;
        Int4Memory {
            codes: [vec![0xa5; tokens * dim / 2], vec![0x5a; tokens * dim / 2]],
            params: [vec![nan; tokens / INT4_GROUP * 2 * dim], vec![nan; tokens * 2 * dim / v_group]],
            tails: [(); 2].map(|_| vec![nan; num_tails * heads * INT4_GROUP * dim]),
            num_pages,
            heads,
            page_size,
            dim,
            v_group,
            num_tails,
        }
    }

    fn shapes(&self) -> ([usize; 4], [usize; 5], [usize; 5], [usize; 4]) {
        let Int4Memory { num_pages, heads, page_size, dim, v_group, num_tails, .. } = *self;
        (
            [num_pages, heads, page_size, dim / 2],
            [num_pages, heads, page_size / INT4_GROUP, 2, dim],
            [num_pages, heads, page_size, 2, dim / v_group],
            [num_tails, heads, INT4_GROUP, dim],
        )
    }

    fn view(&self) -> Int4Pages<'_> {
        let (codes, k_params, v_params, tail) = self.shapes();
        Int4Pages {
            k_codes: View::from_slice(&self.codes[0], &codes).unwrap(),
            k_params: View::from_slice(&self.params[0], &k_params).unwrap(),
            v_codes: View::from_slice(&self.codes[1], &codes).unwrap(),
            v_params: View::from_slice(&self.params[1], &v_params).unwrap(),
            k_tail: View::from_slice(&self.tails[0], &tail).unwrap(),
            v_tail: View::from_slice(&self.tails[1], &tail).unwrap(),
        }
    }

    fn view_mut(&mut self) -> Int4PagesMut<'_> {
        let (codes, k_params, v_params, tail) = self.shapes();
        let [kc, vc] = &mut self.codes;
        let [kp, vp] = &mut self.params;
        let [kt, vt] = &mut self.tails;
        Int4PagesMut {
            k_codes: ViewMut::from_slice(kc, &codes).unwrap(),
            k_params: ViewMut::from_slice(kp, &k_params).unwrap(),
            v_codes: ViewMut::from_slice(vc, &codes).unwrap(),
            v_params: ViewMut::from_slice(vp, &v_params).unwrap(),
            k_tail: ViewMut::from_slice(kt, &tail).unwrap(),
            v_tail: ViewMut::from_slice(vt, &tail).unwrap(),
        }
    }

    /// One value, by the documented layout; `which` 0 is K, 1 is V.
    fn read(&self, which: usize, page: usize, head: usize, offset: usize, d: usize) -> (f32, f32) {
        let half = self.dim / 2;
        let row = (page * self.heads + head) * self.page_size + offset;
        let byte = self.codes[which][row * half + d % half];
        let code = if d < half { byte & 15 } else { byte >> 4 };
        let (at, n, column) = if which == 0 {
            (row / INT4_GROUP, self.dim, d)
        } else {
            (row, self.dim / self.v_group, d / self.v_group)
        };
        let min = self.params[which][at * 2 * n + column].to_f32();
        let scale = self.params[which][at * 2 * n + n + column].to_f32();
        (min + scale * code as f32, scale)
    }
}

#[test]
fn int4_round_trip_is_within_half_a_scale() {
    let mut rng = Rng(11);
    for dim in [64, 128, 40, 72] {
        let (num_pages, heads, page_size) = (2, 3, 64);
        let total = num_pages * page_size;
        let mut k = rng.normals(total * heads * dim);
        let mut v: Vec<f32> = rng.normals(total * heads * dim).iter().map(|x| x * 40.0 + 7.0).collect();
        // A constant channel, a constant token, an outlier.
        (0..total).for_each(|t| k[t * heads * dim + 5] = 2.5);
        v[..dim].fill(-1.25);
        k[17] = 300.0;
        for device in devices() {
            let mut memory = Int4Memory::new(num_pages, heads, page_size, dim, 1);
            let shape = [total, heads, dim];
            let view = |x| View::from_slice(x, &shape).unwrap();
            int4::quantize(&device, view(&k), view(&v), memory.view_mut()).unwrap();
            let pages = [num_pages, heads, page_size, dim];
            let (mut k_back, mut v_back) = (vec![f32::NAN; k.len()], vec![f32::NAN; k.len()]);
            int4::dequantize(
                &device,
                memory.view(),
                ViewMut::from_slice(&mut k_back, &pages).unwrap(),
                ViewMut::from_slice(&mut v_back, &pages).unwrap(),
            )
            .unwrap();
            for (which, (x, back)) in [(&k, &k_back), (&v, &v_back)].into_iter().enumerate() {
                for (i, x) in x.iter().enumerate() {
                    let (token, head, d) = (i / dim / heads, i / dim % heads, i % dim);
                    let (page, offset) = (token / page_size, token % page_size);
                    let (read, scale) = memory.read(which, page, head, offset, d);
                    let back = back[((page * heads + head) * page_size + offset) * dim + d];
                    assert!((read - back).abs() <= 1e-6 * read.abs(), "{read} {back}");
                    let x = f16::from_f32(*x).to_f32();
                    assert!((x - back).abs() <= 0.5001 * scale + 1e-6 * x.abs(), "{x} {back} {scale}");
                }
            }
        }
    }
}

#[test]
fn int4_attention_reads_pages_and_tails() {
    let mut rng = Rng(5);
    let (heads, dim, page_size) = (2, 64, 64);
    let spec = AttentionSpec::new(4, heads, dim).causal();
    // Appended in two steps, so that groups fill up across calls.
    let (first, second) = ([70usize, 31, 1], [83usize, 32, 64]);
    let tables: [&[u32]; 3] = [&[4, 1], &[0, u32::MAX], &[3, u32::MAX]];
    let block_table: Vec<u32> = tables.concat();
    let tail_slots = [2, 0, 1];
    let rows: Vec<(Vec<f32>, Vec<f32>)> =
        second.iter().map(|n| (rng.normals(n * heads * dim), rng.normals(n * heads * dim))).collect();
    let q = rng.normals(3 * 4 * dim);
    for device in devices() {
        let mut memory = Int4Memory::new(5, heads, page_size, dim, 3);
        for (from, to) in [([0, 0, 0], first), (first, second)] {
            let (mut qo_indptr, mut k, mut v) = (vec![0u32], Vec::new(), Vec::new());
            for s in 0..3 {
                qo_indptr.push(qo_indptr[s] + (to[s] - from[s]) as u32);
                k.extend_from_slice(&rows[s].0[from[s] * heads * dim..to[s] * heads * dim]);
                v.extend_from_slice(&rows[s].1[from[s] * heads * dim..to[s] * heads * dim]);
            }
            let seq_lens = to.map(|n| n as u32);
            let table =
                KvTable::Block { page_size, block_table: &block_table, max_blocks: 2, seq_lens: &seq_lens };
            let batch = Batch { tail_slots: &tail_slots, ..Batch::new(&qo_indptr, table) };
            let shape = [qo_indptr[3] as usize, heads, dim];
            AppendPlan::from_batch(&device, &spec, None, &batch)
                .unwrap()
                .run(
                    None,
                    View::from_slice(&k, &shape).unwrap(),
                    View::from_slice(&v, &shape).unwrap(),
                    KvMut::Int4(memory.view_mut()),
                )
                .unwrap();
        }
        let seq_lens = second.map(|n| n as u32);
        let table =
            KvTable::Block { page_size, block_table: &block_table, max_blocks: 2, seq_lens: &seq_lens };
        let batch = Batch { tail_slots: &tail_slots, ..Batch::new(&[0, 1, 2, 3], table) };
        let mut out = vec![f32::NAN; q.len()];
        AttentionPlan::new(&device, &spec, &batch, Splits::Auto)
            .unwrap()
            .run(
                View::from_slice(&q, &[3, 4, dim]).unwrap(),
                Kv::Int4(memory.view()),
                ViewMut::from_slice(&mut out, &[3, 4, dim]).unwrap(),
                None,
            )
            .unwrap();
        for s in 0..3 {
            for head in 0..4 {
                let row = |which: usize, token: usize| -> Vec<f32> {
                    let page = tables[s][token / page_size] as usize;
                    let full = second[s] / INT4_GROUP * INT4_GROUP;
                    let source = if which == 0 { &rows[s].0 } else { &rows[s].1 };
                    (0..dim)
                        .map(|d| {
                            if token < full {
                                memory.read(which, page, head / 2, token % page_size, d).0
                            } else {
                                rounded(DType::F16, source[(token * heads + head / 2) * dim + d])
                            }
                        })
                        .collect()
                };
                let keys: Vec<_> = (0..second[s]).map(|t| row(0, t)).collect();
                let values: Vec<_> = (0..second[s]).map(|t| row(1, t)).collect();
                let at = (s * 4 + head) * dim;
                let features = Features { scale: 0.125, ..Default::default() };
                let (exact, _) = attend::<f64>(&q[at..][..dim], 0, &keys, &values, &features, |_| true);
                let (naive, _) = attend::<f32>(&q[at..][..dim], 0, &keys, &values, &features, |_| true);
                compare("O", &out[at..][..dim], &exact, &naive, 2e-6).unwrap();
            }
        }
    }
}

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
            View::from_slice(&k, &shape).unwrap(),
            View::from_slice(&v, &shape).unwrap(),
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
        let problem = Problem::new(Case {
            spec: AttentionSpec::new(8, 2, 64).causal(),
            lengths: lengths.clone(),
            n_tree: None,
            q_dtype: DType::F32,
            kv_dtype: dtype,
            place: Place::Paged { page_size, nhd: false, block_table: false },
            splits: Splits::Fixed(128),
            q_scale: 1.0,
            seed: 21,
        });
        let tables = Tables::new(&problem);
        let shape = [lengths.len(), 8, 64];
        for device in devices() {
            let cache = cache_of(&device, &problem, &tables, page_size, num_pages);
            let batch = Batch::new(&problem.qo_indptr, tables.kv_table());
            let q = View::from_slice(&problem.q, &shape).unwrap();
            let spec = &problem.case.spec;
            let dense = problem.run(&device).out;
            for pages in [1000, 8, 3] {
                let budget = PageBudget { recent: 2, ..PageBudget::new(pages) };
                let mut plan = SparsePlan::new(&device, spec, &batch, budget, problem.case.splits).unwrap();
                plan.select(q, cache.summaries().unwrap()).unwrap();
                let mut out = vec![f32::NAN; problem.q.len()];
                plan.run(q, cache.view(), ViewMut::from_slice(&mut out, &shape).unwrap(), None).unwrap();
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
                        assert_eq!(plan.chosen(s, kv_head), expected);
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
                            let (exact, _) = attend::<f64>(row, 0, &k, &v, &f, |_| true);
                            let (naive, _) = attend::<f32>(row, 0, &k, &v, &f, |_| true);
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

#[test]
fn merging_shards_gives_the_whole() {
    let mut rng = Rng(9);
    let (tokens, heads, dim) = (5, 3, 40);
    let q = rng.normals(tokens * heads * dim);
    let keys: Vec<Vec<f32>> = (0..90).map(|_| rng.normals(dim)).collect();
    let values: Vec<Vec<f32>> = (0..90).map(|_| rng.normals(dim)).collect();
    let f = Features { scale: 0.3, ..Default::default() };
    // Shards of the KV; two of them empty, one of those with garbage for O.
    let cuts = [0, 0, 40, 41, 41, 90];
    let mut states: Vec<(Vec<f32>, Vec<f32>)> = Vec::new();
    for shard in cuts.windows(2) {
        let (mut o, mut lse) = (Vec::new(), Vec::new());
        for q in q.chunks(dim) {
            let range = shard[0]..shard[1];
            let (row, l) = attend::<f64>(q, 0, &keys[range.clone()], &values[range], &f, |_| true);
            o.extend(row.iter().map(|&x| x as f32));
            lse.push(l as f32);
        }
        states.push((o, lse));
    }
    states[3].0.fill(f32::NAN);
    let whole: Vec<(Vec<f64>, f64)> =
        q.chunks(dim).map(|q| attend::<f64>(q, 0, &keys, &values, &f, |_| true)).collect();
    for device in devices() {
        let shape = [tokens, heads, dim];
        let views: Vec<_> = states
            .iter()
            .map(|(o, lse)| {
                let lse = NaturalLog(View::from_slice(lse, &shape[..2]).unwrap());
                (View::from_slice(o, &shape).unwrap(), lse)
            })
            .collect();
        let run = |views: &[_]| {
            let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; tokens * heads]);
            let lse_view = NaturalLog(ViewMut::from_slice(&mut lse, &shape[..2]).unwrap());
            merge::merge(&device, views, ViewMut::from_slice(&mut out, &shape).unwrap(), lse_view).unwrap();
            (out, lse)
        };
        let (out, lse) = run(&views);
        for (row, (o, l)) in whole.iter().enumerate() {
            close(&out[row * dim..][..dim], o, 2e-6);
            close(&lse[row..][..1], &[*l], 2e-6);
        }
        let (out, lse) = run(&[views[0], views[3]]);
        assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn layer_operations(rows in 0usize..40, dim in prop_oneof![1usize..40, 500usize..600], seed: u64) {
        let mut rng = Rng(seed);
        let x = rng.normals(rows * dim);
        let residual = rng.normals(rows * dim);
        let weight = rng.normals(dim);
        let gate_up: Vec<f32> = rng.normals(rows * 2 * dim).iter().map(|x| x * 20.0).collect();
        let shape = [rows, dim];
        for device in devices() {
            let mut sum = residual.clone();
            let mut out = vec![f32::NAN; rows * dim];
            layer::rms_norm(
                &device,
                View::from_slice(&x, &shape).unwrap(),
                Some(ViewMut::from_slice(&mut sum, &shape).unwrap()),
                View::from_slice(&weight, &[dim]).unwrap(),
                1e-5,
                ViewMut::from_slice(&mut out, &shape).unwrap(),
            ).unwrap();
            let mut in_place = sum.clone();
            let view = ViewMut::from_slice(&mut in_place, &shape).unwrap();
            layer::rms_norm_in_place(&device, view, None, View::from_slice(&weight, &[dim]).unwrap(), 1e-5).unwrap();
            prop_assert_eq!(&in_place, &out);
            for r in 0..rows {
                let row: Vec<f64> = (0..dim).map(|d| (x[r * dim + d] + residual[r * dim + d]) as f64).collect();
                let mean = row.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                let exact: Vec<f64> =
                    row.iter().zip(&weight).map(|(x, w)| x / (mean + 1e-5).sqrt() * *w as f64).collect();
                close(&out[r * dim..][..dim], &exact, 4e-6);
            }
            let mut out = vec![f32::NAN; rows * dim];
            layer::silu_mul(
                &device,
                View::from_slice(&gate_up, &[rows, 2 * dim]).unwrap(),
                ViewMut::from_slice(&mut out, &shape).unwrap(),
            ).unwrap();
            for r in 0..rows {
                let exact: Vec<f64> = (0..dim).map(|d| {
                    let (g, u) = (gate_up[r * 2 * dim + d] as f64, gate_up[(r * 2 + 1) * dim + d] as f64);
                    g / (1.0 + (-g).exp()) * u
                }).collect();
                close(&out[r * dim..][..dim], &exact, 2e-6);
            }
        }
    }
}

#[test]
fn embedding_copies_rows() {
    let mut rng = Rng(2);
    let table = rng.normals(10 * 7);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let table = Elements::new(dtype, &table);
        let ids = [3, 9, 0, 3];
        for device in devices() {
            let mut out = vec![f32::NAN; 4 * 7];
            let view = ViewMut::from_slice(&mut out, &[4, 7]).unwrap();
            layer::embedding(&device, table.view(&[10, 7]), &ids, view).unwrap();
            for (row, &id) in out.chunks(7).zip(&ids) {
                assert_eq!(row, &table.to_f32()[id as usize * 7..][..7]);
            }
        }
    }
}

#[test]
fn sampling_follows_the_distribution_and_the_seed() {
    let device = Device::cpu();
    // Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1; a NaN that must never come.
    let logits = [0.5f32.ln(), f32::NAN, 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
    let n = 4000;
    let draw = |params: SamplingParams| {
        let rows = logits.repeat(n);
        let all: Vec<SamplingParams> =
            (0..n).map(|step| SamplingParams { step: step as u64, ..params }).collect();
        let mut ids = vec![0; n];
        sample(&device, View::from_slice(&rows, &[n, 5]).unwrap(), &all, &mut ids).unwrap();
        ids
    };
    let share = |ids: &[u32], id: u32| ids.iter().filter(|&&i| i == id).count() as f64 / n as f64;
    let hot = SamplingParams { temperature: 1.0, seed: 42, ..Default::default() };
    let ids = draw(hot);
    for (id, p) in [(0, 0.5), (1, 0.0), (2, 0.25), (3, 0.125), (4, 0.125)] {
        assert!((share(&ids, id) - p).abs() < 0.03, "token {id}: {}", share(&ids, id));
    }
    assert_eq!(ids, draw(hot));
    assert_ne!(ids, draw(SamplingParams { seed: 43, ..hot }));
    let only = |ids: Vec<u32>, allowed: &[u32]| {
        let mut seen = ids;
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, allowed);
    };
    only(draw(SamplingParams::default()), &[0]);
    only(draw(SamplingParams { top_k: 2, ..hot }), &[0, 2]);
    only(draw(SamplingParams { top_p: 0.7, ..hot }), &[0, 2]);
    only(draw(SamplingParams { top_p: 0.76, ..hot }), &[0, 2, 3]);
    only(draw(SamplingParams { min_p: 0.3, ..hot }), &[0, 2]);
    only(draw(SamplingParams { min_p: 1.0, ..hot }), &[0]);
    assert!(share(&draw(SamplingParams { temperature: 0.5, ..hot }), 0) > 0.68);
}

#[test]
fn tensors_keep_their_elements() {
    let device = Device::auto();
    let tensor = Tensor::from_slice(&device, &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]).unwrap();
    assert_eq!(tensor.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let turned = tensor.view().permute(&[1, 0]).unwrap();
    assert_eq!((turned.shape(), turned.strides()), (&[3, 2][..], &[1, 3][..]));
}
