//! Plans with limits: planned anew in place, one launch whatever the batch, never more memory.

mod common;

use common::cases::{Case, Place, Problem, Tables};
use common::{Elements, devices};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Error, KvCache, KvCacheSpec, KvFormat, KvTable, NaturalLog,
    PlanLimits, Splits, Tensor, TreeMask,
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

        // Limits that no memory would hold.
        for limits in [
            PlanLimits { sequences: usize::MAX, ..LIMITS },
            PlanLimits { pages: usize::MAX, ..LIMITS },
            PlanLimits { q_tokens: 1 << 40, ..LIMITS },
            PlanLimits { page_size: 0, ..LIMITS },
            PlanLimits { pages: 1 << 28, page_size: 1 << 20, ..LIMITS },
        ] {
            let refused = AttentionPlan::with_limits(&device, &spec, limits, Splits::Fixed(64));
            assert!(matches!(refused, Err(Error::Value { .. })), "{limits:?}");
        }
        let batch = Batch::new(&good.qo_indptr, tables.kv_table());
        let mut plain = AttentionPlan::new(&device, &spec, &batch, Splits::Auto).unwrap();
        assert!(plain.update(&batch).unwrap_err().to_string().contains("with_limits"));
    }
}

/// int4 sequences, which keep their newest tokens in tails: other batches in the same memory, the same launch.
#[test]
fn int4_within_limits() {
    let (page_size, heads, dim) = (32, 2, 64);
    for device in devices() {
        let spec = AttentionSpec::new(8, heads, dim).causal().quantized_kv();
        let format = KvFormat::int4(3);
        let cache_spec = KvCacheSpec {
            num_pages: 40,
            page_size,
            num_kv_heads: heads,
            head_dim: dim,
            format,
            summaries: false,
        };
        let mut cache = KvCache::new(&device, cache_spec).unwrap();
        let (lens, table): ([u32; 3], Vec<u32>) = ([500, 33, 64], (0..48).map(|i| (i * 7) % 40).collect());
        // Sequence `i` has the first pages of row `i`, 16, 2 and 2 of them, which no other has.
        let rows = [&table[..16], &table[16..32], &table[32..]];
        let mut rng = common::Rng(4);
        for (i, &len) in lens.iter().enumerate() {
            let kv = KvTable::Block { page_size, block_table: rows[i], max_blocks: 16, seq_lens: &[len] };
            let indptr = [0, len];
            let batch = Batch { tail_slots: &[i as u32], ..Batch::new(&indptr, kv) };
            let numbers = rng.normals(len as usize * heads * dim);
            let new = common::on(&device, &numbers, &[len as usize, heads, dim]);
            let append = AppendPlan::from_batch(&device, &spec, None, &batch).unwrap();
            append.run(None, new.view(), new.view(), cache.view_mut()).unwrap();
        }
        let limits = PlanLimits { sequences: 3, q_tokens: 3, page_size, pages: 48, tree_words: 0 };
        let mut reused = AttentionPlan::with_limits(&device, &spec, limits, Splits::Auto).unwrap();
        let q = Elements::new(DType::F16, &rng.normals(3 * 8 * dim)).tensor(&device, &[3, 8, dim]);
        for which in [vec![0], vec![1, 2], vec![0, 1, 2]] {
            let n = which.len();
            let block_table: Vec<u32> = which.iter().flat_map(|&i| rows[i].iter().copied()).collect();
            let seq_lens: Vec<u32> = which.iter().map(|&i| lens[i]).collect();
            let tails: Vec<u32> = which.iter().map(|&i| i as u32).collect();
            let indptr: Vec<u32> = (0..=n as u32).collect();
            let kv =
                KvTable::Block { page_size, block_table: &block_table, max_blocks: 16, seq_lens: &seq_lens };
            let batch = Batch { tail_slots: &tails, ..Batch::new(&indptr, kv) };
            let run = |plan: &mut AttentionPlan, rows: usize| {
                let mut out = Tensor::zeros(&device, DType::F16, &[rows, 8, dim]).unwrap();
                plan.run(q.view().narrow(0, 0, rows).unwrap(), cache.view(), out.view_mut(), None).unwrap();
                Elements::of_tensor(&out).to_f32()
            };
            let expected = run(&mut AttentionPlan::new(&device, &spec, &batch, Splits::Auto).unwrap(), n);
            assert!(expected.iter().any(|&x| x != 0.0));
            reused.update(&batch).unwrap();
            assert_eq!(run(&mut reused, 3)[..expected.len()], expected);
        }
    }
}
