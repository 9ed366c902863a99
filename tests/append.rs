//! Append with fused RoPE against naive rotations, every scaling written from its paper.

mod common;

use std::f64::consts::PI;

use common::reference::rotate;
use common::{Elements, Rng, close, devices, on};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::{AttentionSpec, DType, KvMut, RopeScaling, RopeSpec, RopeStyle, Tensor};
use half::f16;

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
                let unset = vec![f32::NAN; shape.iter().product()];
                let (mut k_pages, mut v_pages) = (on(&device, &unset, &shape), on(&device, &unset, &shape));
                let mut q_out = on(&device, &q, &[tokens, q_heads, dim]);
                plan.run(
                    Some(q_out.view_mut()),
                    on(&device, &k, &[tokens, kv_heads, dim]).view(),
                    on(&device, &v, &[tokens, kv_heads, dim]).view(),
                    KvMut::Paged { k: k_pages.view_mut(), v: v_pages.view_mut(), summaries: None },
                )
                .unwrap();
                let [q_out, k_pages, v_pages] = [q_out, k_pages, v_pages].map(|t| t.to_vec::<f32>().unwrap());
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

/// Minima and maxima of the keys as they are stored, in the keys' type or f32, over two appends to the same pages.
#[test]
fn summaries_are_exact_in_both_types() {
    let (page_size, heads, dim, tokens) = (8, 2, 40, 20);
    let spec = AttentionSpec::new(heads, heads, dim);
    let mut rng = Rng(9);
    let rows: Vec<f16> = rng.normals(tokens * heads * dim).into_iter().map(f16::from_f32).collect();
    for device in devices() {
        let k = on(&device, &rows, &[tokens, heads, dim]);
        for dtype in [DType::F16, DType::F32] {
            let pages = [3, heads, page_size, dim];
            let (mut k_pages, mut v_pages) = (
                Tensor::zeros(&device, DType::F16, &pages).unwrap(),
                Tensor::zeros(&device, DType::F16, &pages).unwrap(),
            );
            let mut summaries = Tensor::zeros(&device, dtype, &[3, heads, 2, dim]).unwrap();
            for (from, to) in [(0, 13), (13, tokens)] {
                let slots: Vec<i64> = (from as i64..to as i64).collect();
                let positions: Vec<u32> = (from as u32..to as u32).collect();
                let plan =
                    AppendPlan::from_slots(&device, &spec, None, page_size, &slots, &positions).unwrap();
                let new = || k.view().narrow(0, from, to - from).unwrap();
                let kv = KvMut::Paged {
                    k: k_pages.view_mut(),
                    v: v_pages.view_mut(),
                    summaries: Some(summaries.view_mut()),
                };
                plan.run(None, new(), new(), kv).unwrap();
            }
            let got = Elements::of_tensor(&summaries).to_f32();
            for (page, head, d) in
                (0..3).flat_map(|p| (0..heads).flat_map(move |h| (0..dim).map(move |d| (p, h, d))))
            {
                let own = (page * page_size..((page + 1) * page_size).min(tokens))
                    .map(|t| rows[(t * heads + head) * dim + d].to_f32());
                let at = |side| got[((page * heads + head) * 2 + side) * dim + d];
                assert_eq!(at(0), own.clone().fold(f32::INFINITY, f32::min), "{device:?} {dtype}");
                assert_eq!(at(1), own.fold(f32::NEG_INFINITY, f32::max), "{device:?} {dtype}");
            }
        }
    }
}
