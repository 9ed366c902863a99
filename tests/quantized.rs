//! Quantised KV: the documented forms, the bounded error, and attention over pages and tails, whatever the form of each side.

mod common;

use common::cases::compare;
use common::quant_pages::Memory;
use common::reference::{Features, attend};
use common::{Elements, Rng, devices, is_gpu, on, rounded};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::quantized;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, INT4_GROUP, Kv, KvCache, KvCacheSpec, KvCode, KvFormat, KvTable,
    PlanLimits, Splits, Tensor,
};

const CODES: [KvCode; 4] = [KvCode::F16, KvCode::Fp8, KvCode::Int8, KvCode::Int4];

#[test]
fn a_round_trip_is_within_half_a_step() {
    let mut rng = Rng(11);
    for (dim, code) in [64, 128, 96].into_iter().flat_map(|dim| CODES.map(|code| (dim, code))) {
        let (num_pages, heads, page_size) = (2, 3, 64);
        let total = num_pages * page_size;
        let mut k: Vec<f32> = rng.normals(total * heads * dim);
        let mut v: Vec<f32> = rng.normals(total * heads * dim).iter().map(|x| x * 4.0 + 0.7).collect();
        // A constant channel, a constant token, outliers, small numbers, a zero row.
        (0..total).for_each(|t| k[t * heads * dim + 5] = 2.5);
        v[..dim].fill(-1.25);
        (k[17], v[2 * dim + 3]) = (56.0, -40.0);
        v[4 * dim..5 * dim].iter_mut().for_each(|x| *x *= 1e-4);
        v[6 * dim..7 * dim].fill(0.0);
        for device in devices() {
            let mut memory = Memory::new(&device, [code; 2], [num_pages, heads, page_size, dim], 1);
            let shape = [total, heads, dim];
            let (k_in, v_in) = (on(&device, &k, &shape), on(&device, &v, &shape));
            quantized::quantize(&device, k_in.view(), v_in.view(), memory.view_mut()).unwrap();
            memory.fetch();
            let unset = vec![f32::NAN; k.len()];
            let [mut k_back, mut v_back] =
                [(); 2].map(|_| on(&device, &unset, &[num_pages, heads, page_size, dim]));
            quantized::dequantize(&device, memory.views(), k_back.view_mut(), v_back.view_mut()).unwrap();
            let [k_back, v_back] = [k_back, v_back].map(|t| t.to_vec::<f32>().unwrap());
            for (which, (x, back)) in [(&k, &k_back), (&v, &v_back)].into_iter().enumerate() {
                for (i, &x) in x.iter().enumerate() {
                    let (token, head, d) = (i / dim / heads, i / dim % heads, i % dim);
                    let (page, offset) = (token / page_size, token % page_size);
                    let (read, scale) = memory.read(which, page, head, offset, d);
                    let back = back[((page * heads + head) * page_size + offset) * dim + d];
                    assert!((read - back).abs() <= 1e-6 * read.abs(), "{code:?} {which}: {read} {back}");
                    // int4 groups are of f16.
                    let x = if code == KvCode::Int4 { rounded(DType::F16, x) } else { x };
                    let bound = memory.bound(which, x, scale);
                    assert!((x - back).abs() <= bound, "{code:?} {which}: {x} {back} {scale}");
                }
            }
        }
    }
}

/// What is beyond a form's range is clamped, and NaN is 0, also where a whole group is: nothing that attention reads is not a
/// number.
#[test]
fn what_no_code_stands_for_is_clamped() {
    for (device, code) in devices().into_iter().flat_map(|d| CODES[1..].iter().map(move |&c| (d.clone(), c)))
    {
        let mut memory = Memory::new(&device, [code; 2], [1, 1, 32, 64], 1);
        let mut x = vec![1.0f32; 32 * 64];
        (x[3], x[64], x[130]) = (f32::NAN, 1e30, f32::NEG_INFINITY);
        // A token, and a channel.
        x[5 * 64..6 * 64].fill(f32::NAN);
        (0..32).for_each(|token| x[token * 64 + 7] = f32::NAN);
        let new = on(&device, &x, &[32, 1, 64]);
        quantized::quantize(&device, new.view(), new.view(), memory.view_mut()).unwrap();
        memory.fetch();
        let all = (0..2 * 32 * 64).map(|i| memory.read(i / 2048, 0, 0, i / 64 % 32, i % 64).0);
        assert!(all.into_iter().all(f32::is_finite), "{code:?} {device:?}");
        for which in [0, 1] {
            let (large, small) = (memory.read(which, 0, 0, 1, 0).0, memory.read(which, 0, 0, 2, 2).0);
            assert!(large > 100.0 && small < -100.0, "{code:?} {which} {large} {small} {device:?}");
            for (token, channel) in [(0, 3), (5, 20), (9, 7)] {
                let zero = memory.read(which, 0, 0, token, channel).0;
                assert!(zero.abs() < 0.01, "{code:?} {which} {zero} {device:?}");
            }
        }
    }
}

/// One query a sequence, and many; every kernel size, among them rows that it does not fill; both types of queries.
#[test]
fn attention_reads_pages_and_tails() {
    let sizes =
        [(64, DType::F16), (96, DType::BF16), (128, DType::F16), (192, DType::BF16), (256, DType::F16)];
    for ((dim, half), code) in sizes.into_iter().flat_map(|size| CODES[1..].iter().map(move |&c| (size, c))) {
        attention_over([code; 2], dim, [1, 1, 1], half);
        attention_over([code; 2], dim, [20, 9, 40], half);
    }
}

#[test]
fn keys_and_values_may_differ() {
    for (k, v) in CODES.into_iter().flat_map(|k| CODES.map(|v| (k, v))) {
        attention_over([k, v], 64, [1, 2, 1], DType::F16);
        attention_over([k, v], 128, [1, 30, 3], DType::BF16);
    }
}

/// `half`: the type of queries on devices that take no f32.
fn attention_over(codes: [KvCode; 2], dim: usize, q_lens: [usize; 3], half: DType) {
    let mut rng = Rng(5);
    let (heads, page_size) = (2, 64);
    let spec = AttentionSpec::new(4, heads, dim).causal().quantized_kv();
    // Appended in two steps, so that groups fill up across calls.
    let (first, second) = ([70usize, 31, 1], [83usize, 32, 64]);
    let tables: [&[u32]; 3] = [&[4, 1], &[0, u32::MAX], &[3, u32::MAX]];
    let block_table: Vec<u32> = tables.concat();
    let tail_slots = [2, 0, 1];
    let rows: Vec<(Vec<f32>, Vec<f32>)> =
        second.iter().map(|n| (rng.normals(n * heads * dim), rng.normals(n * heads * dim))).collect();
    let total_q: usize = q_lens.iter().sum();
    let q = rng.normals(total_q * 4 * dim);
    for device in devices() {
        let mut memory = Memory::new(&device, codes, [5, heads, page_size, dim], 3);
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
            let (k, v) = (on(&device, &k, &shape), on(&device, &v, &shape));
            let append = AppendPlan::from_batch(&device, &spec, None, &batch).unwrap();
            append.run(None, k.view(), v.view(), memory.view_mut()).unwrap();
        }
        let seq_lens = second.map(|n| n as u32);
        let table =
            KvTable::Block { page_size, block_table: &block_table, max_blocks: 2, seq_lens: &seq_lens };
        let qo_indptr = [0, q_lens[0], q_lens[0] + q_lens[1], total_q].map(|n| n as u32);
        let batch = Batch { tail_slots: &tail_slots, ..Batch::new(&qo_indptr, table) };
        memory.fetch();
        let dtype = if is_gpu(&device) { half } else { DType::F32 };
        // Tensor cores take f16 keys, values and weights.
        let product = |x: f32| if is_gpu(&device) { rounded(DType::F16, x) } else { x };
        let q: Vec<f32> = q.iter().map(|&x| rounded(dtype, x)).collect();
        let (k, v) = memory.views();
        let run = |batch: &Batch<'_>, q: &[f32], splits| {
            let shape = [q.len() / 4 / dim, 4, dim];
            let queries = Elements::new(dtype, q).tensor(&device, &shape);
            let mut out = Elements::new(dtype, &vec![f32::NAN; q.len()]).tensor(&device, &shape);
            AttentionPlan::new(&device, &spec, batch, splits)
                .unwrap()
                .run(queries.view(), Kv::Quantized { k, v }, out.view_mut(), None)
                .unwrap();
            Elements::of_tensor(&out).to_f32()
        };
        let out = run(&batch, &q, Splits::Auto);
        let fixed = run(&batch, &q, Splits::Fixed(64));
        // Rows of many tokens have the bits that they have alone.
        let last = |x: &[f32]| -> Vec<f32> {
            let row = |&end: &u32| x[(end as usize - 1) * 4 * dim..end as usize * 4 * dim].to_vec();
            qo_indptr[1..].iter().flat_map(row).collect()
        };
        let alone = Batch { qo_indptr: &[0, 1, 2, 3], ..batch };
        assert_eq!(run(&alone, &last(&q), Splits::Fixed(64)), last(&fixed), "{codes:?} {device:?}");
        // Of all rows together: a row's weights are rounded alike for all of its channels, so one row is few samples.
        let (mut all_exact, mut all_naive, mut got) = (Vec::new(), Vec::new(), [Vec::new(), Vec::new()]);
        for s in 0..3 {
            for head in 0..4 {
                let row = |which: usize, token: usize| -> Vec<f32> {
                    let page = tables[s][token / page_size] as usize;
                    let in_tail = which == 0
                        && codes[0] == KvCode::Int4
                        && token >= second[s] / INT4_GROUP * INT4_GROUP;
                    (0..dim)
                        .map(|d| {
                            if in_tail {
                                rounded(DType::F16, rows[s].0[(token * heads + head / 2) * dim + d])
                            } else {
                                memory.read(which, page, head / 2, token % page_size, d).0
                            }
                        })
                        .collect()
                };
                let keys: Vec<_> = (0..second[s]).map(|t| row(0, t)).collect();
                let values: Vec<_> = (0..second[s]).map(|t| row(1, t)).collect();
                let products = |rows: &[Vec<f32>]| -> Vec<Vec<f32>> {
                    rows.iter().map(|r| r.iter().map(|&x| product(x)).collect()).collect()
                };
                let (near_keys, near_values) = (products(&keys), products(&values));
                // Of int4 values codes and minima meet weights of their own: rounded, and with a span rounded again.
                let minima: Vec<Vec<f32>> = (0..second[s])
                    .map(|t| {
                        (0..dim)
                            .map(|d| memory.min_of_value(tables[s][t / page_size], head / 2, t, d))
                            .collect()
                    })
                    .collect();
                let above: Vec<Vec<f32>> = values
                    .iter()
                    .zip(&minima)
                    .map(|(x, min)| x.iter().zip(min).map(|(x, min)| x - min).collect())
                    .collect();
                let folded = is_gpu(&device) && codes[1] == KvCode::Int4;
                let scale = 1.0 / (dim as f32).sqrt();
                let features = Features { scale: scale as f64, causal: true, ..Default::default() };
                for token in 0..q_lens[s] {
                    let at = ((qo_indptr[s] as usize + token) * 4 + head) * dim;
                    let q = &q[at..][..dim];
                    let position = (second[s] - q_lens[s] + token) as i64;
                    let (exact, _) = attend::<f64>(q, position, &keys, &values, &features, |_| true, |p| p);
                    let near = |values: &[Vec<f32>], weight: &dyn Fn(f32) -> f32| {
                        attend::<f32>(q, position, &near_keys, values, &features, |_| true, weight).0
                    };
                    let naive = if folded {
                        let (codes, minima) =
                            (near(&above, &|p| product(product(p) * 0.3) / 0.3), near(&minima, &product));
                        codes.iter().zip(&minima).map(|(a, b)| a + b).collect()
                    } else {
                        near(&near_values, &product)
                    };
                    let naive: Vec<f64> =
                        naive.iter().map(|&x: &f64| rounded(dtype, x as f32) as f64).collect();
                    all_naive.extend(naive);
                    all_exact.extend(exact);
                    for (got, out) in got.iter_mut().zip([&out, &fixed]) {
                        got.extend_from_slice(&out[at..][..dim]);
                    }
                }
            }
        }
        for got in &got {
            compare("O", got, &all_exact, &all_naive, 2e-6)
                .unwrap_or_else(|e| panic!("{e}\n{codes:?}, {dim} channels, {q_lens:?} queries, {device:?}"));
        }
    }
}

/// Each byte of codes, scales and tails comes once for a query group; what memory delivers besides is within 2%.
#[test]
fn a_group_reads_its_codes_once() {
    let (heads, dim, len) = (2, 128, 6000 + 20);
    for (k, v) in CODES.into_iter().flat_map(|k| CODES.map(|v| (k, v))) {
        let device = Device::sim(3);
        let spec = AttentionSpec::new(4 * heads, heads, dim).causal().quantized_kv();
        let page_size = 32;
        let num_pages = usize::div_ceil(len, page_size);
        let format = KvFormat::Quantized { k, v, num_tails: 1 };
        let sizes = KvCacheSpec {
            num_pages,
            page_size,
            num_kv_heads: heads,
            head_dim: dim,
            format,
            summaries: false,
        };
        let cache = KvCache::new(&device, sizes).unwrap();
        let block_table: Vec<u32> = Rng(1).permutation(num_pages);
        let seq_lens = [len as u32];
        let table = KvTable::Block {
            page_size,
            block_table: &block_table,
            max_blocks: num_pages,
            seq_lens: &seq_lens,
        };
        let batch = Batch { tail_slots: &[0], ..Batch::new(&[0, 1], table) };
        let q = Tensor::zeros(&device, DType::F16, &[1, 4 * heads, dim]).unwrap();
        let mut out = Tensor::zeros(&device, DType::F16, &[1, 4 * heads, dim]).unwrap();
        let mut plan = AttentionPlan::new(&device, &spec, &batch, Splits::Auto).unwrap();
        let before = device.sim_stats().unwrap();
        plan.run(q.view(), cache.view(), out.view_mut(), None).unwrap();
        let after = device.sim_stats().unwrap();
        let (copied, delivered) =
            (after.global_copied - before.global_copied, after.distinct_read - before.distinct_read);
        // Of a token: codes, and params by the eight tokens or, of keys, by the group.
        let by_eight = usize::next_multiple_of(len, 8);
        let (groups, in_tail) = (len / INT4_GROUP, len % INT4_GROUP);
        let bytes = |code, is_v: bool| match code {
            KvCode::F16 => 2 * len * dim,
            KvCode::Fp8 => len * dim,
            KvCode::Int8 => len * dim + 2 * by_eight,
            KvCode::Int4 if is_v => len * dim / 2 + 2 * by_eight * dim / INT4_GROUP,
            KvCode::Int4 => groups * (INT4_GROUP * dim / 2 + 4 * dim) + 2 * in_tail * dim,
        };
        let kv = (heads * (bytes(k, false) + bytes(v, true))) as u64;
        println!("{k:?} {v:?}: {:.3} of K and V delivered", delivered as f64 / kv as f64);
        assert_eq!(copied, kv, "{k:?} {v:?}");
        assert!(delivered as f64 <= 1.02 * kv as f64, "{k:?} {v:?}: {delivered} of {kv}");
    }
}

/// What is asked for in vain gets an error that says what would work.
#[test]
fn what_does_not_fit_is_refused() {
    let device = Device::cpu();
    let cache = |format, page_size, head_dim| {
        let sizes =
            KvCacheSpec { num_pages: 2, page_size, num_kv_heads: 2, head_dim, format, summaries: false };
        KvCache::new(&device, sizes)
    };
    let refused = |result: ferroflash::Result<()>, words: &[&str]| {
        let text = result.unwrap_err().to_string();
        assert!(words.iter().all(|w| text.contains(w)), "{text}");
    };
    refused(cache(KvFormat::int4(1), 16, 64).map(drop), &["page_size", "32", "16"]);
    refused(cache(KvFormat::int4(1), 32, 72).map(drop), &["head_dim", "32", "72"]);
    refused(cache(KvFormat::INT8, 12, 64).map(drop), &["page_size", "8", "12"]);
    refused(cache(KvFormat::FP8, 3, 72).map(drop), &["head_dim", "16", "72"]);
    let mut fp8 = cache(KvFormat::FP8, 3, 64).unwrap();
    refused(fp8.set_scales(&[1.0], &[1.0, 1.0]), &["k", "2 scales", "1"]);
    refused(fp8.set_scales(&[1.0, 0.0], &[1.0, 1.0]), &["above 0", "0"]);
    fp8.set_scales(&[0.5, 2.0], &[1.0, 1.0]).unwrap();

    let table = KvTable::Block { page_size: 3, block_table: &[0, 1], max_blocks: 2, seq_lens: &[4] };
    let batch = Batch::new(&[0, 1], table);
    let q = Tensor::zeros(&device, DType::F32, &[1, 2, 64]).unwrap();
    let mut out = Tensor::zeros(&device, DType::F32, &[1, 2, 64]).unwrap();
    let spec = AttentionSpec::new(2, 2, 64);
    let float = cache(KvFormat::Float(DType::F16), 3, 64).unwrap();
    let mut plain = AttentionPlan::new(&device, &spec, &batch, Splits::Auto).unwrap();
    refused(plain.run(q.view(), fp8.view(), out.view_mut(), None), &["quantized_kv"]);
    let quantized_spec = spec.quantized_kv();
    let mut plan = AttentionPlan::new(&device, &quantized_spec, &batch, Splits::Auto).unwrap();
    refused(plan.run(q.view(), float.view(), out.view_mut(), None), &["quantised KV", "float KV"]);
    plan.run(q.view(), fp8.view(), out.view_mut(), None).unwrap();
    let int4 = cache(KvFormat::int4(1), 32, 64).unwrap();
    let Kv::Quantized { k, v } = int4.view() else { panic!() };
    let table = KvTable::Block { page_size: 32, block_table: &[0], max_blocks: 1, seq_lens: &[4] };
    let batch = Batch { tail_slots: &[0], ..Batch::new(&[0, 1], table) };
    let mut plan = AttentionPlan::new(&device, &quantized_spec, &batch, Splits::Auto).unwrap();
    let exchanged = Kv::Quantized { k: v, v: k };
    refused(plan.run(q.view(), exchanged, out.view_mut(), None), &["Int4Keys as keys"]);
    let limits = PlanLimits { sequences: 1, q_tokens: 1, page_size: 32, pages: 1, tree_words: 0 };
    let fixed = AttentionPlan::with_limits(&device, &quantized_spec, limits, Splits::Fixed(64));
    refused(fixed.map(drop), &["splits", "Auto"]);
}
