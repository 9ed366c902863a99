//! Plans with limits: planned anew in place, one launch whatever the batch, never more memory.

mod common;

use common::cases::{Case, Place, Problem, Tables};
use common::{Elements, devices};
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Error, NaturalLog, PlanLimits, Splits, Tensor, TreeMask,
};

const LIMITS: PlanLimits = PlanLimits { sequences: 6, q_tokens: 8, page_size: 16, pages: 200, tree_words: 8 };

fn case(lengths: Vec<(usize, usize)>, n_tree: Option<usize>, splits: Splits) -> Case {
    let spec = AttentionSpec::new(8, 2, 64);
    Case {
        spec: if n_tree.is_some() { spec } else { spec.causal() },
        lengths,
        n_tree,
        q_dtype: DType::F16,
        kv_dtype: DType::F16,
        place: Place::Paged { page_size: 16, nhd: false, block_table: false },
        splits,
        lists: None,
        q_scale: 1.0,
        seed: 3,
    }
}

#[test]
fn batches_one_after_the_other_in_the_same_memory() {
    let batches = [
        vec![(1, 700), (1, 3), (1, 1500)],
        vec![(2, 90)],
        vec![],
        vec![(1, 0), (3, 257), (1, 64), (1, 1), (1, 333), (1, 16)],
        vec![(1, 3100)],
        vec![(1, 700), (1, 3), (1, 1500)],
    ];
    for splits in [Splits::Auto, Splits::None, Splits::Fixed(128)] {
        for device in devices() {
            let spec = AttentionSpec::new(8, 2, 64).causal();
            let mut plan = AttentionPlan::with_limits(&device, &spec, LIMITS, splits).unwrap();
            let bytes = plan.workspace_bytes();
            for lengths in &batches {
                let problem = Problem::new(case(lengths.clone(), None, splits));
                let tables = Tables::new(&problem, &device);
                plan.update(&Batch::new(&problem.qo_indptr, tables.kv_table())).unwrap();
                check(&device, &mut plan, &problem, &tables);
                if common::is_gpu(&device) {
                    assert_eq!(plan.workspace_bytes(), bytes);
                }
            }
        }
    }
}

/// Runs the plan with tensors of the limits' rows, and compares with the oracle; rows past the batch's stay.
fn check(device: &Device, plan: &mut AttentionPlan, problem: &Problem, tables: &Tables) {
    let shape = [LIMITS.q_tokens, 8, 64];
    let mut q = problem.q.clone();
    q.resize(shape.iter().product(), f32::NAN);
    let q = Elements::new(DType::F16, &q).tensor(device, &shape);
    let mut out = Elements::new(DType::F16, &vec![7.5; shape.iter().product()]).tensor(device, &shape);
    let mut lse = Tensor::from_slice(device, &[7.5f32; 64], &shape[..2]).unwrap();
    let launches = |device: &Device| -> u64 { device.sim_stats().map_or(0, |s| s.launches.values().sum()) };
    let before = launches(device);
    plan.run(q.view(), tables.kv(), out.view_mut(), Some(NaturalLog(lse.view_mut()))).unwrap();
    if device.sim_stats().is_some() {
        assert_eq!(launches(device) - before, 1);
    }
    let (mut out, mut lse) = (Elements::of_tensor(&out).to_f32(), lse.to_vec::<f32>().unwrap());
    let rest = out.split_off(problem.q.len());
    assert!(rest.iter().all(|&x| x == 7.5), "rows past the batch's are left alone");
    lse.truncate(problem.q.len() / 64);
    problem.check(device, &common::cases::Outcome { out, lse }).unwrap();
}

#[test]
fn trees_within_limits() {
    for device in devices() {
        let spec = AttentionSpec::new(8, 2, 64);
        let mut plan = AttentionPlan::with_limits(&device, &spec, LIMITS, Splits::Auto).unwrap();
        for lengths in [vec![(4, 600), (3, 40)], vec![(2, 9)]] {
            let problem = Problem::new(case(lengths, Some(5), Splits::Auto));
            let tables = Tables::new(&problem, &device);
            let mut batch = Batch::new(&problem.qo_indptr, tables.kv_table());
            batch.tree = Some(TreeMask { n_tree: &problem.n_tree, mask: &problem.mask });
            plan.update(&batch).unwrap();
            check(&device, &mut plan, &problem, &tables);
        }
    }
}

#[test]
fn beyond_the_limits_is_an_error_and_the_plan_stays() {
    for device in devices() {
        let spec = AttentionSpec::new(8, 2, 64).causal();
        let mut plan = AttentionPlan::with_limits(&device, &spec, LIMITS, Splits::Auto).unwrap();
        let good = Problem::new(case(vec![(1, 700), (1, 3)], None, Splits::Auto));
        let tables = Tables::new(&good, &device);
        plan.update(&Batch::new(&good.qo_indptr, tables.kv_table())).unwrap();
        let mut refused = |lengths: Vec<(usize, usize)>, place: Option<usize>, words: &str| {
            let mut case = case(lengths, None, Splits::Auto);
            if let Some(page_size) = place {
                case.place = Place::Paged { page_size, nhd: false, block_table: true };
            }
            let problem = Problem::new(case);
            let tables = Tables::new(&problem, &device);
            let error = plan.update(&Batch::new(&problem.qo_indptr, tables.kv_table())).unwrap_err();
            assert!(matches!(error, Error::Value { .. }) && error.to_string().contains(words), "{error}");
        };
        refused(vec![(1, 16); 7], None, "at most 6");
        refused(vec![(3, 16); 3], None, "at most 8");
        refused(vec![(1, 3300)], None, "at most 200");
        refused(vec![(1, 30)], Some(8), "16");
        refused(vec![(5, 30)], None, "at most 4 query tokens");
        check(&device, &mut plan, &good, &tables);

        let batch = Batch::new(&good.qo_indptr, tables.kv_table());
        let mut plain = AttentionPlan::new(&device, &spec, &batch, Splits::Auto).unwrap();
        assert!(plain.update(&batch).unwrap_err().to_string().contains("with_limits"));
    }
}
