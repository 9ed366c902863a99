//! The probability mass of pages against the naive sum in f64.

mod common;

use common::cases::{Case, Place, Problem, Tables};
use common::{Elements, devices};
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{AttentionSpec, Batch, DType, Kv, NaturalLog, Splits, Tensor, TreeMask};

/// Of every page of every sequence: `sum exp(score - lse)` over tokens, queries and the heads of the group.
fn naive(problem: &Problem, page_size: usize) -> Vec<Vec<f64>> {
    let spec = &problem.case.spec;
    let exact = problem.truth(false).exact;
    let mut mass = vec![Vec::new(); spec.num_kv_heads];
    for (s, &(q_len, kv_len)) in problem.case.lengths.iter().enumerate() {
        for (kv_head, mass) in mass.iter_mut().enumerate() {
            let mut pages = vec![0.0; kv_len.div_ceil(page_size)];
            for (token, head) in (0..q_len)
                .flat_map(|t| (kv_head * spec.group()..(kv_head + 1) * spec.group()).map(move |h| (t, h)))
            {
                let row = (problem.qo_indptr[s] as usize + token) * spec.num_q_heads + head;
                let q = &problem.q[row * spec.head_dim..][..spec.head_dim];
                let position = kv_len as i64 - q_len as i64 + token as i64;
                for column in 0..kv_len {
                    let distance = position - column as i64;
                    let hidden = spec.causal && distance < 0
                        || spec
                            .window
                            .is_some_and(|w| distance >= w as i64 && column as u32 >= spec.num_sinks);
                    if hidden || !problem.tree_visible(s, token, column) {
                        continue;
                    }
                    let k = &problem.k[s][kv_head][column];
                    let dot: f64 = q.iter().zip(k).map(|(&a, &b)| a as f64 * b as f64).sum();
                    let mut x = dot * spec.softmax_scale as f64;
                    if let Some(cap) = spec.soft_cap {
                        x = cap as f64 * (x / cap as f64).tanh();
                    }
                    if let Some(slopes) = &spec.alibi_slopes {
                        x -= slopes[head] as f64 * distance as f64;
                    }
                    pages[column / page_size] += (x - exact.lse[row]).exp();
                }
            }
            mass.extend(pages);
        }
    }
    mass
}

#[test]
fn masses_are_the_naive_sums_and_add_up_to_the_rows() {
    for (kind, head_dim) in [64, 40, 128, 256, 96].into_iter().enumerate() {
        let page_size = [16, 1, 7, 64, 16][kind];
        let mut spec = AttentionSpec::new(6, 2, head_dim).causal();
        match kind {
            1 => (spec.window, spec.num_sinks) = (Some(50), 3),
            2 => {
                (spec.soft_cap, spec.alibi_slopes) = (Some(2.0), Some(vec![0.1, 0.02, 0.3, 0.01, 0.2, 0.05]))
            }
            3 => spec.causal = false,
            _ => {}
        }
        let case = Case {
            spec,
            lengths: vec![(1, 130), (4, 77), (1, 0), (20, 20)],
            n_tree: (kind == 3).then_some(20),
            q_dtype: DType::F16,
            kv_dtype: DType::F16,
            place: Place::Paged { page_size, nhd: kind == 0, block_table: kind % 2 == 0 },
            splits: Splits::Auto,
            lists: None,
            q_scale: 1.0,
            seed: 40 + kind as u64,
        };
        for device in devices() {
            let problem = Problem::new(case.clone());
            let tables = Tables::new(&problem, &device);
            let mut batch = Batch::new(&problem.qo_indptr, tables.kv_table());
            if case.n_tree.is_some() {
                batch.tree = Some(TreeMask { n_tree: &problem.n_tree, mask: &problem.mask });
            }
            let shape = [26, 6, head_dim];
            let q = Elements::new(DType::F16, &problem.q).tensor(&device, &shape);
            let mut out = Tensor::zeros(&device, DType::F16, &shape).unwrap();
            let mut lse = Tensor::zeros(&device, DType::F32, &shape[..2]).unwrap();
            let mut plan = AttentionPlan::new(&device, &case.spec, &batch, Splits::Auto).unwrap();
            plan.run(q.view(), tables.kv(), out.view_mut(), Some(NaturalLog(lse.view_mut()))).unwrap();
            let exact = naive(&problem, page_size);
            let entries = exact[0].len();
            let mut mass = Tensor::zeros(&device, DType::F32, &[2, entries]).unwrap();
            // Twice: it is added to.
            for _ in 0..2 {
                plan.page_mass(q.view(), tables.kv(), NaturalLog(lse.view()), mass.view_mut()).unwrap();
            }
            let mass: Vec<f32> = mass.to_vec().unwrap();
            for (got, exact) in mass.iter().zip(exact.iter().flatten()) {
                assert!(
                    (*got as f64 - 2.0 * exact).abs() <= 1e-4 * exact.max(1.0),
                    "{got} {exact} {kind} {device:?}"
                );
            }
            if kind != 3 {
                // Every row has a whole of 1; the sequence without keys has none.
                let total: f64 = mass.iter().map(|&x| x as f64).sum();
                assert!((total - 2.0 * 25.0 * 6.0).abs() < 1e-2, "{total}");
            }
            let Kv::Paged { k, v } = tables.kv() else { panic!() };
            let ragged = Kv::Ragged { k, v };
            let mut small = Tensor::zeros(&device, DType::F32, &[2, entries - 1]).unwrap();
            assert!(plan.page_mass(q.view(), tables.kv(), NaturalLog(lse.view()), small.view_mut()).is_err());
            let refused = plan.page_mass(q.view(), ragged, NaturalLog(lse.view()), small.view_mut());
            assert!(refused.unwrap_err().to_string().contains("float pages"));
        }
    }
}
