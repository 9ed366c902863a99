//! Prefixes that sequences share: found in the page tables, read once, in as many levels as there are; and never seen in
//! the results.

mod common;

use common::cases::{Case, Outcome, Place, Problem};
use common::{Elements, Rng, devices, is_gpu};
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Kv, KvTable, NaturalLog, SharedPrefix, Splits, Tensor, TreeMask,
};

const PAGE: usize = 16;

/// Sequences of which `sharing` says how many tokens each has in common with the one before it.
struct Shared {
    problem: Problem,
    pages: Vec<Vec<u32>>,
    num_pages: usize,
}

impl Shared {
    fn new(mut case: Case, sharing: &[usize], device: &Device) -> Self {
        case.place = Place::Paged { page_size: PAGE, nhd: false, block_table: false };
        let mut problem = Problem::for_device(&case, device);
        let num_pages: usize = case.lengths.iter().map(|l| l.1.div_ceil(PAGE)).sum();
        let mut free = Rng(case.seed).permutation(num_pages);
        let mut pages: Vec<Vec<u32>> = Vec::new();
        for (i, &(_, len)) in case.lengths.iter().enumerate() {
            let common = if i > 0 { sharing[i - 1] } else { 0 };
            assert!(common % PAGE == 0);
            let mut list = if i > 0 { pages[i - 1][..common / PAGE].to_vec() } else { Vec::new() };
            list.resize_with(len.div_ceil(PAGE), || free.pop().unwrap());
            pages.push(list);
            for head in 0..case.spec.num_kv_heads {
                for token in 0..common {
                    problem.k[i][head][token] = problem.k[i - 1][head][token].clone();
                    problem.v[i][head][token] = problem.v[i - 1][head][token].clone();
                }
            }
        }
        Shared { problem, pages, num_pages }
    }

    /// Runs some of the sequences; gives the prefixes that the plan shares too.
    fn run(&self, device: &Device, which: std::ops::Range<usize>) -> (Outcome, Vec<SharedPrefix>) {
        let Problem { case, qo_indptr, q, k, v, n_tree, mask, .. } = &self.problem;
        let AttentionSpec { num_q_heads, num_kv_heads: heads, head_dim: dim, .. } = case.spec;
        let lay = |rows: &Vec<Vec<Vec<Vec<f32>>>>| {
            let mut data = vec![f32::NAN; self.num_pages * heads * PAGE * dim];
            for (s, list) in self.pages.iter().enumerate() {
                for (head, tokens) in rows[s].iter().enumerate() {
                    for (t, row) in tokens.iter().enumerate() {
                        let at = (list[t / PAGE] as usize * heads + head) * PAGE + t % PAGE;
                        data[at * dim..][..dim].copy_from_slice(row);
                    }
                }
            }
            Elements::new(case.kv_dtype, &data).tensor(device, &[self.num_pages, heads, PAGE, dim])
        };
        let (k, v) = (lay(k), lay(v));
        let (first, last) = (qo_indptr[which.start], qo_indptr[which.end]);
        let qo: Vec<u32> = qo_indptr[which.start..=which.end].iter().map(|x| x - first).collect();
        let row = num_q_heads * dim;
        let shape = [(last - first) as usize, num_q_heads, dim];
        let q =
            Elements::new(case.q_dtype, &q[first as usize * row..last as usize * row]).tensor(device, &shape);
        let mut kv_indptr = vec![0u32];
        let (mut kv_indices, mut last_page_len) = (Vec::new(), Vec::new());
        for s in which.clone() {
            kv_indices.extend(&self.pages[s]);
            kv_indptr.push(kv_indices.len() as u32);
            last_page_len.push((case.lengths[s].1 as u32 - 1) % PAGE as u32 + 1);
        }
        let table = KvTable::Csr {
            page_size: PAGE,
            kv_indptr: &kv_indptr,
            kv_indices: &kv_indices,
            last_page_len: &last_page_len,
        };
        let mut batch = Batch::new(&qo, table);
        if case.n_tree.is_some() {
            batch.tree = Some(TreeMask { n_tree: &n_tree[which.clone()], mask });
        }
        let mut plan = AttentionPlan::new(device, &case.spec, &batch, case.splits).unwrap();
        let mut out =
            Elements::new(case.q_dtype, &vec![f32::NAN; shape.iter().product()]).tensor(device, &shape);
        let mut lse =
            Tensor::from_slice(device, &vec![f32::NAN; shape[0] * num_q_heads], &shape[..2]).unwrap();
        let kv = Kv::Paged { k: k.view(), v: v.view() };
        plan.run(q.view(), kv, out.view_mut(), Some(NaturalLog(lse.view_mut()))).unwrap();
        let outcome = Outcome { out: Elements::of_tensor(&out).to_f32(), lse: lse.to_vec().unwrap() };
        (outcome, plan.plan().shared_prefixes().to_vec())
    }
}

fn case(spec: AttentionSpec, lengths: &[(usize, usize)], splits: Splits) -> Case {
    Case {
        spec,
        lengths: lengths.to_vec(),
        n_tree: None,
        q_dtype: DType::F16,
        kv_dtype: DType::F16,
        place: Place::Ragged,
        splits,
        lists: None,
        q_scale: 1.0,
        seed: 8,
    }
}

/// Two levels, a sequence that shares with nobody, one that is all prefix, one whose queries do not see all that it shares.
#[test]
fn prefixes_in_levels() {
    let lengths = [(1, 700), (2, 641), (1, 640), (1, 900), (3, 450), (1, 500), (60, 680), (1, 520)];
    let sharing = [512, 640, 256, 256, 0, 256, 384];
    for splits in [Splits::Auto, Splits::Fixed(64), Splits::Fixed(192), Splits::None] {
        for device in devices() {
            let mut spec = AttentionSpec::new(4, 2, 64).causal();
            spec.sink_logits = Some(vec![0.3, -1.0, 0.1, 2.0]);
            let shared = Shared::new(case(spec, &lengths, splits), &sharing, &device);
            let (outcome, prefixes) = shared.run(&device, 0..lengths.len());
            shared.problem.check(&device, &outcome).unwrap_or_else(|e| panic!("{e} {splits:?} {device:?}"));
            let tokens: Vec<_> = prefixes.iter().map(|p| (p.sequences.clone(), p.tokens.clone())).collect();
            match splits {
                Splits::None => assert!(tokens.is_empty()),
                Splits::Fixed(192) => {
                    for expected in [(0..5, 0..192), (0..3, 192..384)] {
                        assert!(tokens.contains(&expected), "{tokens:?} {device:?}");
                    }
                }
                _ => {
                    for expected in [(0..5, 0..256), (0..3, 256..512), (1..3, 512..640)] {
                        assert!(tokens.contains(&expected), "{tokens:?} {device:?}");
                    }
                }
            }
            // A row's bits under a fixed split do not show who it shares with.
            if let Splits::Fixed(_) = splits {
                let row = 4 * 64;
                for s in 0..lengths.len() {
                    let (alone, prefixes) = shared.run(&device, s..s + 1);
                    assert!(prefixes.is_empty());
                    let at = shared.problem.qo_indptr[s] as usize;
                    assert!(alone.out == outcome.out[at * row..][..alone.out.len()], "{s} {device:?}");
                    assert!(alone.lse == outcome.lse[at * 4..][..alone.lse.len()], "{s} {device:?}");
                }
            }
        }
    }
}

/// More sequences than fit in a tile of rows; every head dimension's kernels.
#[test]
fn many_sequences_on_one_prefix() {
    for (heads, dim, n) in [((8, 1), 64, 40), ((6, 2), 128, 50), ((4, 4), 256, 20)] {
        let lengths: Vec<(usize, usize)> = (0..n).map(|i| (1 + i % 2, 300 + 7 * i)).collect();
        for device in devices().into_iter().filter(is_gpu) {
            let spec = AttentionSpec::new(heads.0, heads.1, dim).causal();
            let shared = Shared::new(case(spec, &lengths, Splits::Auto), &vec![256; n - 1], &device);
            let (outcome, prefixes) = shared.run(&device, 0..n);
            shared.problem.check(&device, &outcome).unwrap();
            assert_eq!(prefixes.iter().map(|p| p.sequences.len()).sum::<usize>(), n);
            assert!(prefixes.iter().all(|p| p.tokens == (0..256)));
        }
    }
}

/// Trees of one prompt: each sees all before its own tree.
#[test]
fn trees_share_a_prefix() {
    for device in devices() {
        let spec = AttentionSpec::new(4, 2, 64);
        let case = Case { n_tree: Some(20), ..case(spec, &[(20, 340), (7, 340), (20, 333)], Splits::Auto) };
        let shared = Shared::new(case, &[320, 256], &device);
        let (outcome, prefixes) = shared.run(&device, 0..3);
        shared.problem.check(&device, &outcome).unwrap();
        assert_eq!(prefixes, [SharedPrefix { sequences: 0..3, tokens: 0..256 }]);
    }
}

/// Where rows see a prefix differently it is not shared.
#[test]
fn windows_and_slopes_do_not_share() {
    let device = Device::cpu();
    for kind in 0..2 {
        let mut spec = AttentionSpec::new(4, 2, 64).causal();
        match kind {
            0 => spec.window = Some(100),
            _ => spec.alibi_slopes = Some(vec![0.1; 4]),
        }
        let shared = Shared::new(case(spec, &[(1, 400), (1, 410)], Splits::Auto), &[384], &device);
        let (outcome, prefixes) = shared.run(&device, 0..2);
        shared.problem.check(&device, &outcome).unwrap();
        assert!(prefixes.is_empty());
    }
}

/// The prefix is read once, every suffix once.
#[test]
fn a_prefix_is_read_once() {
    let (n, prefix, own) = (16, 2048, 64);
    let lengths = vec![(1, prefix + own); n];
    for device in [Device::sim(5), Device::sim_hopper(5)] {
        let spec = AttentionSpec::new(8, 2, 128).causal();
        let shared = Shared::new(case(spec, &lengths, Splits::Auto), &vec![prefix; n - 1], &device);
        let before = device.sim_stats().unwrap();
        let (_, prefixes) = shared.run(&device, 0..n);
        assert_eq!(prefixes.len(), 1);
        let copied = device.sim_stats().unwrap().global_copied - before.global_copied;
        let kv = 2 * (prefix + n * own) * 2 * 128 * 2;
        let q = n * 8 * 128 * 2;
        println!("{copied} bytes copied, K and V are {kv}, queries {q}");
        // What is left are whole tiles of the prefix's queries, of one KV head, once for each of its splits.
        let queries = copied as usize - kv;
        assert!(queries.is_multiple_of(q / 2) && queries <= 16 * q, "{queries}");
    }
}
