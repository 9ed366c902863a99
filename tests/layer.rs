//! What stands around attention: merging, norms, gates, embeddings, sampling, tensors.

mod common;

use common::reference::{Features, attend};
use common::{Elements, Rng, close, devices, on};
use ferroflash::op::sample::{SamplingParams, sample, sample_on_device};
use ferroflash::op::{layer, merge};
use ferroflash::{DType, Device, NaturalLog, Tensor};
use proptest::prelude::*;

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
            let (row, l) = attend::<f64>(q, 0, &keys[range.clone()], &values[range], &f, |_| true, |p| p);
            o.extend(row.iter().map(|&x| x as f32));
            lse.push(l as f32);
        }
        states.push((o, lse));
    }
    states[3].0.fill(f32::NAN);
    let whole: Vec<(Vec<f64>, f64)> =
        q.chunks(dim).map(|q| attend::<f64>(q, 0, &keys, &values, &f, |_| true, |p| p)).collect();
    for device in devices() {
        let shape = [tokens, heads, dim];
        let tensors: Vec<_> =
            states.iter().map(|(o, lse)| (on(&device, o, &shape), on(&device, lse, &shape[..2]))).collect();
        let views: Vec<_> = tensors.iter().map(|(o, lse)| (o.view(), NaturalLog(lse.view()))).collect();
        let run = |views: &[_]| {
            let mut out = on(&device, &vec![f32::NAN; q.len()], &shape);
            let mut lse = on(&device, &vec![f32::NAN; tokens * heads], &shape[..2]);
            merge::merge(&device, views, out.view_mut(), NaturalLog(lse.view_mut())).unwrap();
            (out.to_vec::<f32>().unwrap(), lse.to_vec::<f32>().unwrap())
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
            let mut sum = on(&device, &residual, &shape);
            let mut out = on(&device, &vec![f32::NAN; rows * dim], &shape);
            let weights = on(&device, &weight, &[dim]);
            layer::rms_norm(
                &device,
                on(&device, &x, &shape).view(),
                Some(sum.view_mut()),
                weights.view(),
                1e-5,
                out.view_mut(),
            ).unwrap();
            layer::rms_norm_in_place(&device, sum.view_mut(), None, weights.view(), 1e-5).unwrap();
            let out = out.to_vec::<f32>().unwrap();
            prop_assert_eq!(&sum.to_vec::<f32>().unwrap(), &out);
            for r in 0..rows {
                let row: Vec<f64> = (0..dim).map(|d| (x[r * dim + d] + residual[r * dim + d]) as f64).collect();
                let mean = row.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                let exact: Vec<f64> =
                    row.iter().zip(&weight).map(|(x, w)| x / (mean + 1e-5).sqrt() * *w as f64).collect();
                close(&out[r * dim..][..dim], &exact, 4e-6);
            }
            let mut out = on(&device, &vec![f32::NAN; rows * dim], &shape);
            layer::silu_mul(&device, on(&device, &gate_up, &[rows, 2 * dim]).view(), out.view_mut()).unwrap();
            let out = out.to_vec::<f32>().unwrap();
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
            let mut out = on(&device, &[f32::NAN; 4 * 7], &[4, 7]);
            layer::embedding(&device, table.tensor(&device, &[10, 7]).view(), &ids, out.view_mut()).unwrap();
            let out = out.to_vec::<f32>().unwrap();
            for (row, &id) in out.chunks(7).zip(&ids) {
                assert_eq!(row, &table.to_f32()[id as usize * 7..][..7]);
            }
        }
    }
}

/// Sampled ids feed the embedding without the host; an id past the table is a row of NaN.
#[test]
fn ids_stay_on_the_device() {
    let table: Vec<f32> = (0..12).map(|x| x as f32).collect();
    for device in devices() {
        let logits = on(&device, &[0.0f32, 3.0, 1.0, 9.0, 2.0, 1.0], &[2, 3]);
        let mut ids = on(&device, &[u32::MAX; 3], &[3]);
        let greedy = [SamplingParams::default(); 2];
        let first_two = ids.view_mut().narrow(0, 0, 2).unwrap();
        sample_on_device(&device, logits.view(), &greedy, first_two).unwrap();
        let mut out = on(&device, &[0f32; 12], &[3, 4]);
        let table = on(&device, &table, &[3, 4]);
        layer::embedding_on_device(&device, table.view(), ids.view(), out.view_mut()).unwrap();
        let out = out.to_vec::<f32>().unwrap();
        assert_eq!(out[..8], [4.0, 5.0, 6.0, 7.0, 0.0, 1.0, 2.0, 3.0]);
        assert!(out[8..].iter().all(|x| x.is_nan()));
        let short = ids.view_mut().narrow(0, 0, 1).unwrap();
        assert!(sample_on_device(&device, logits.view(), &greedy, short).is_err());
    }
}

#[test]
fn sampling_follows_the_distribution_and_the_seed() {
    for device in devices() {
        sampling_on(&device);
    }
}

fn sampling_on(device: &Device) {
    // Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1; a NaN that must never come.
    let logits = [0.5f32.ln(), f32::NAN, 0.25f32.ln(), 0.125f32.ln(), 0.125f32.ln()];
    let n = if common::is_gpu(device) { 500 } else { 4000 };
    let draw = |params: SamplingParams| {
        let rows = logits.repeat(n);
        let all: Vec<SamplingParams> =
            (0..n).map(|step| SamplingParams { step: step as u64, ..params }).collect();
        let mut ids = vec![0; n];
        sample(device, on(device, &rows, &[n, 5]).view(), &all, &mut ids).unwrap();
        ids
    };
    let share = |ids: &[u32], id: u32| ids.iter().filter(|&&i| i == id).count() as f64 / n as f64;
    let hot = SamplingParams { temperature: 1.0, seed: 42, ..Default::default() };
    let ids = draw(hot);
    for (id, p) in [(0, 0.5), (1, 0.0), (2, 0.25), (3, 0.125), (4, 0.125)] {
        assert!((share(&ids, id) - p).abs() < 0.05, "token {id}: {}", share(&ids, id));
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

/// A vocabulary of real size, with ties and infinities: what each setting may draw.
#[test]
fn sampling_from_many_logits() {
    let n = 3000;
    let mut rng = Rng(31);
    let mut logits: Vec<f32> = rng.normals(n).iter().map(|x| (x * 8.0).round() / 8.0).collect();
    logits[77] = f32::NEG_INFINITY;
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let weight = |i: usize| (logits[i] as f64).exp();
    let total: f64 = (0..n).map(weight).sum();
    let settings = [(0, 1.0), (50, 1.0), (0, 0.3), (200, 0.5)];
    for device in devices() {
        for (top_k, top_p) in settings {
            let kept = &order[..if top_k > 0 { top_k } else { n }];
            let mass: f64 = if top_k > 0 { kept.iter().map(|&i| weight(i)).sum() } else { total };
            let mut sum = 0.0;
            let enough = kept.iter().position(|&i| {
                sum += weight(i);
                sum >= top_p as f64 * mass - 1e-4 * mass
            });
            let allowed = &kept[..enough.map_or(kept.len(), |i| (i + 2).min(kept.len()))];
            let params: Vec<SamplingParams> = (0..20)
                .map(|step| SamplingParams {
                    temperature: 1.0,
                    top_k,
                    top_p,
                    seed: 5,
                    step,
                    ..Default::default()
                })
                .collect();
            let mut ids = vec![0; 20];
            sample(&device, on(&device, &logits.repeat(20), &[20, n]).view(), &params, &mut ids).unwrap();
            assert!(
                ids.iter().all(|&id| allowed.contains(&(id as usize))),
                "{device:?} {top_k} {top_p} {ids:?}"
            );
            if top_k == 0 && top_p == 1.0 {
                // The same draw as summing in token order.
                let mut cpu = vec![0; 20];
                let cpu_device = Device::cpu();
                sample(&cpu_device, on(&cpu_device, &logits.repeat(20), &[20, n]).view(), &params, &mut cpu)
                    .unwrap();
                assert_eq!(ids, cpu, "{device:?}");
            }
        }
        let greedy = [SamplingParams::default()];
        let mut ids = [0];
        sample(&device, on(&device, &logits, &[1, n]).view(), &greedy, &mut ids).unwrap();
        assert_eq!(ids[0] as usize, order[0]);
    }
}
