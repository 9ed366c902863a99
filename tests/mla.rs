//! Multi-head latent attention: one KV head whose rows are keys and, with their first channels, values.

mod common;

use common::cases::{Case, Outcome, Place, Problem};
use common::{Elements, Rng, devices, is_gpu};
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Error, Kv, KvCache, KvCacheSpec, KvFormat, KvTable, NaturalLog,
    PlanLimits, Splits, Tensor, TreeMask,
};

fn case(heads: usize, dims: (usize, usize), lengths: Vec<(usize, usize)>, splits: Splits) -> Case {
    Case {
        spec: AttentionSpec::new(heads, 1, dims.0).v_head_dim(dims.1).causal(),
        lengths,
        n_tree: None,
        q_dtype: DType::BF16,
        kv_dtype: DType::BF16,
        place: Place::Ragged,
        splits,
        lists: None,
        q_scale: 1.0,
        seed: 17,
    }
}

/// The case's problem with V the first channels of K, in shuffled pages or ragged.
fn run(case: Case, page_size: usize, device: &Device) -> (Problem, Outcome) {
    run_with(case, page_size, device, &mut None)
}

/// As [`run`], with a plan that has limits, where there is one.
fn run_with(
    case: Case,
    page_size: usize,
    device: &Device,
    limited: &mut Option<AttentionPlan>,
) -> (Problem, Outcome) {
    let mut problem = Problem::for_device(&case, device);
    let spec = problem.case.spec.clone();
    let (dim, v_dim) = (spec.head_dim, spec.v_head_dim);
    for (k, v) in problem.k.iter().zip(&mut problem.v) {
        v[0] = k[0].iter().map(|row| row[..v_dim].to_vec()).collect();
    }
    let pages_of = |len: usize| len.div_ceil(page_size.max(1));
    let total: usize = problem.case.lengths.iter().map(|l| pages_of(l.1)).sum();
    let mut order = Rng(3).permutation(total);
    if page_size == 0 {
        order.sort_unstable();
    }
    let mut data = vec![f32::NAN; total * page_size.max(1) * dim];
    let (mut indptr, mut last) = (vec![0u32], Vec::new());
    for (s, &(_, len)) in problem.case.lengths.iter().enumerate() {
        let first = *indptr.last().unwrap() as usize;
        for (t, row) in problem.k[s][0].iter().enumerate() {
            let size = page_size.max(1);
            let at = order[first + t / size] as usize * size + t % size;
            data[at * dim..][..dim].copy_from_slice(row);
        }
        indptr.push((first + pages_of(len)) as u32);
        last.push(if len == 0 { 0 } else { (len as u32 - 1) % page_size.max(1) as u32 + 1 });
    }
    let dtype = problem.case.kv_dtype;
    let shape = if page_size == 0 { vec![total, 1, dim] } else { vec![total, 1, page_size, dim] };
    let latent = Elements::new(dtype, &data).tensor(device, &shape);
    let k = latent.view();
    let v = k.narrow(shape.len() - 1, 0, v_dim).unwrap();
    let (kv, table) = if page_size == 0 {
        (Kv::Ragged { k, v }, KvTable::Ragged { kv_indptr: &indptr })
    } else {
        let table = KvTable::Csr { page_size, kv_indptr: &indptr, kv_indices: &order, last_page_len: &last };
        (Kv::Paged { k, v }, table)
    };
    let rows = *problem.qo_indptr.last().unwrap() as usize;
    let q = Elements::new(dtype, &problem.q).tensor(device, &[rows, spec.num_q_heads, dim]);
    let out_shape = [rows, spec.num_q_heads, v_dim];
    let mut out =
        Elements::new(dtype, &vec![f32::NAN; out_shape.iter().product()]).tensor(device, &out_shape);
    let mut lse =
        Tensor::from_slice(device, &vec![f32::NAN; rows * spec.num_q_heads], &out_shape[..2]).unwrap();
    let mut batch = Batch::new(&problem.qo_indptr, table);
    if problem.case.n_tree.is_some() {
        batch.tree = Some(TreeMask { n_tree: &problem.n_tree, mask: &problem.mask });
    }
    let mut made;
    let plan = match limited {
        Some(plan) => {
            plan.update(&batch).unwrap();
            plan
        }
        None => {
            made = AttentionPlan::new(device, &spec, &batch, problem.case.splits).unwrap();
            &mut made
        }
    };
    plan.run(q.view(), kv, out.view_mut(), Some(NaturalLog(lse.view_mut()))).unwrap();
    let outcome = Outcome { out: Elements::of_tensor(&out).to_f32(), lse: lse.to_vec().unwrap() };
    (problem, outcome)
}

#[test]
fn deepseeks_heads_and_others() {
    let lengths = || vec![(1, 700), (2, 130), (1, 0), (5, 65), (1, 1)];
    for (heads, dims) in [(16, (576, 512)), (5, (576, 512)), (70, (576, 512)), (8, (320, 256)), (3, (264, 8))]
    {
        for splits in [Splits::Auto, Splits::Fixed(128), Splits::None] {
            for device in devices() {
                for page_size in [0, 16, 1, 100] {
                    if page_size != 16 && (splits != Splits::Auto || heads != 5) {
                        continue;
                    }
                    let (problem, outcome) = run(case(heads, dims, lengths(), splits), page_size, &device);
                    problem
                        .check(&device, &outcome)
                        .unwrap_or_else(|e| panic!("{e} {heads} {dims:?} {splits:?} {page_size} {device:?}"));
                }
            }
        }
    }
}

/// Drafted tokens in a tree, a learned sink, a soft cap.
#[test]
fn trees_and_scores() {
    for device in devices() {
        let mut case = case(6, (576, 512), vec![(9, 300), (4, 40)], Splits::Auto);
        case.spec.causal = false;
        case.spec.soft_cap = Some(3.0);
        case.spec.sink_logits = Some(vec![0.5, -1.0, 2.0, 0.0, 1.0, 0.3]);
        case.n_tree = Some(9);
        let (problem, outcome) = run(case, 16, &device);
        problem.check(&device, &outcome).unwrap();
    }
}

/// All of DeepSeek's heads against sequences in parts; windows, sinks, ALiBi and a scale that turns the order of scores round.
#[test]
fn many_heads_and_masks() {
    for device in devices() {
        for features in 0..3 {
            let mut case = case(128, (576, 512), vec![(1, 500), (1, 64), (1, 0), (2, 130)], Splits::Auto);
            match features {
                1 => {
                    case.spec.window = Some(100);
                    case.spec.num_sinks = 3;
                }
                2 => {
                    case.spec.alibi_slopes = Some((0..128).map(|h| h as f32 / 1000.0).collect());
                    case.spec.softmax_scale = -0.05;
                    case.kv_dtype = DType::F16;
                    case.q_dtype = DType::F16;
                }
                _ => {}
            }
            let page_sizes = if features == 0 { &[0, 64, 24][..] } else { &[64] };
            for &page_size in page_sizes {
                let (problem, outcome) = run(case.clone(), page_size, &device);
                problem
                    .check(&device, &outcome)
                    .unwrap_or_else(|e| panic!("{e} {features} {page_size} {device:?}"));
            }
        }
    }
}

/// However many rows a sequence has, a plan with limits takes it, in one launch and the same memory.
#[test]
fn many_heads_within_limits() {
    let limits = PlanLimits { sequences: 5, q_tokens: 4, page_size: 64, pages: 40, tree_words: 0 };
    for device in devices() {
        let spec = case(128, (576, 512), vec![], Splits::Auto).spec;
        let plan = |splits| AttentionPlan::with_limits(&device, &spec, limits, splits).unwrap();
        let mut limited = Some(plan(Splits::Auto));
        let bytes = |plan: &Option<AttentionPlan>| plan.as_ref().unwrap().workspace_bytes();
        let before = bytes(&limited);
        for lengths in [vec![(1, 700), (1, 3), (1, 64), (1, 1)], vec![(4, 130)], vec![(2, 0), (2, 300)]] {
            let case = case(128, (576, 512), lengths.clone(), Splits::Auto);
            let launches = || device.sim_stats().map_or(0, |s| s.launches.values().sum::<u64>());
            let started = launches();
            let (problem, outcome) = run_with(case, 64, &device, &mut limited);
            problem.check(&device, &outcome).unwrap_or_else(|e| panic!("{e} {lengths:?} {device:?}"));
            if is_gpu(&device) {
                assert_eq!(bytes(&limited), before);
            }
            assert!(device.sim_stats().is_none() || launches() == started + 1);
        }
        // A fixed split has room for a tile of rows only.
        let table = KvTable::Block { page_size: 64, block_table: &[0], max_blocks: 1, seq_lens: &[10] };
        let refused = plan(Splits::Fixed(64)).update(&Batch::new(&[0, 1], table)).unwrap_err();
        assert!(refused.to_string().contains("query tokens of a sequence"), "{refused}");
    }
}

/// The latent rows come once for keys and values, and for as many heads as fit a tile: 16, of Hopper's kernel 64.
#[test]
fn a_row_is_read_once() {
    for (device, heads) in [(Device::sim(1), 16), (Device::sim_hopper(1), 64)] {
        let len = 30_000;
        run(case(heads, (576, 512), vec![(1, len)], Splits::Auto), 16, &device);
        let stats = device.sim_stats().unwrap();
        let (kv, q) = ((len * 576 * 2) as u64, (heads * 576 * 2) as u64);
        // Hopper's copies are of queries too, for each part of the sequence.
        let queries = stats.global_copied - kv;
        assert!(queries.is_multiple_of(q) && queries <= 16 * q, "{queries} {q}");
        assert_eq!(queries == 0, heads == 16);
        // Besides: the states of the sequence's parts, and queries.
        println!("{} bytes delivered, the rows are {kv}", stats.distinct_read);
        assert!((stats.distinct_read as f64) < 1.02 * kv as f64);
        assert_eq!(stats.shared_cycles, stats.shared_cycles_ideal, "bank conflicts");
    }
}

#[test]
fn other_shapes_are_refused() {
    let lengths = [0u32, 10];
    let batch = Batch::new(&[0, 1], KvTable::Ragged { kv_indptr: &lengths });
    for device in devices().into_iter().filter(is_gpu) {
        let plan = |spec: AttentionSpec| AttentionPlan::new(&device, &spec, &batch, Splits::Auto);
        for (heads, kv_heads, dims) in
            [(4, 2, (576, 512)), (4, 1, (584, 512)), (4, 1, (576, 520)), (4, 1, (300, 256))]
        {
            let refused = plan(AttentionSpec::new(heads, kv_heads, dims.0).v_head_dim(dims.1));
            assert!(matches!(refused, Err(Error::Value { .. })), "{dims:?}");
        }
        // Tails, which float KV does not look at, change nothing.
        let tails = Batch { tail_slots: &[0], ..batch };
        let with_tails =
            AttentionPlan::new(&device, &AttentionSpec::new(4, 1, 576).v_head_dim(512), &tails, Splits::Auto);
        assert!(with_tails.unwrap().plan().ranges().len() > 1);
        // Quantised KV has no latent form: neither attention nor reading back.
        let spec = KvCacheSpec {
            num_pages: 1,
            page_size: 32,
            num_kv_heads: 1,
            head_dim: 320,
            format: KvFormat::int4(1),
            summaries: false,
        };
        let cache = KvCache::new(&device, spec).unwrap();
        let table = KvTable::Block { page_size: 32, block_table: &[0], max_blocks: 1, seq_lens: &[10] };
        let tails = Batch { tail_slots: &[0], ..Batch::new(&[0, 1], table) };
        let latent = AttentionSpec::new(4, 1, 320).quantized_kv();
        let refused = AttentionPlan::new(&device, &latent, &tails, Splits::Auto).unwrap_err();
        assert!(refused.to_string().contains("at most 256"), "{refused}");
        let Kv::Quantized { k: keys, v: values } = cache.view() else { panic!() };
        let mut back = [(); 2].map(|_| Tensor::zeros(&device, DType::F32, &[1, 1, 32, 320]).unwrap());
        let [k, v] = &mut back;
        let read = ferroflash::op::quantized::dequantize(&device, (keys, values), k.view_mut(), v.view_mut());
        assert!(read.is_err());
        // Values of their own.
        let mut good = plan(AttentionSpec::new(4, 1, 576).v_head_dim(512)).unwrap();
        let zeros = |shape: &[usize]| Tensor::zeros(&device, DType::F16, shape).unwrap();
        let (q, k, v, mut out) =
            (zeros(&[1, 4, 576]), zeros(&[10, 1, 576]), zeros(&[10, 1, 512]), zeros(&[1, 4, 512]));
        let kv = Kv::Ragged { k: k.view(), v: v.view() };
        let refused = good.run(q.view(), kv, out.view_mut(), None).unwrap_err();
        assert!(refused.to_string().contains("view of k"), "{refused}");
    }
}
