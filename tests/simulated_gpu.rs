//! What the simulator shows beyond right results: offsets past 2^31 elements, no bank conflicts, bytes read, speed.

mod common;

use std::time::Instant;

use common::cases::{Case, Place, Problem};
use common::on;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{AttentionSpec, Batch, DType, Device, Error, Kv, KvTable, Splits, Tensor};
use half::f16;

fn case(head_dim: usize, lengths: Vec<(usize, usize)>, page_size: usize) -> Case {
    Case {
        spec: AttentionSpec::new(8, 2, head_dim).causal(),
        lengths,
        n_tree: None,
        q_dtype: DType::F16,
        kv_dtype: DType::F16,
        place: Place::Paged { page_size, nhd: false, block_table: false },
        splits: Splits::None,
        lists: None,
        q_scale: 1.0,
        seed: 3,
    }
}

/// Two pages more than 2^31 elements apart, in memory that takes room only where it is touched.
#[test]
fn offsets_are_64_bit() {
    let device = Device::sim(1);
    let (heads, page_size, dim) = (1, 64, 64);
    let num_pages = (1usize << 31) / (heads * page_size * dim) + 2;
    let shape = [num_pages, heads, page_size, dim];
    let pool = || Tensor::zeros(&device, DType::F16, &shape).unwrap();
    let (mut k, mut v) = (pool(), pool());
    // The last page through a view of its own; the append writes it, the attention reads it.
    let far = num_pages as u32 - 1;
    let spec = AttentionSpec::new(1, 1, dim);
    let mut rng = common::Rng(4);
    let rows: Vec<f16> = rng.normals(2 * page_size * dim).into_iter().map(f16::from_f32).collect();
    let values: Vec<f16> = rng.normals(2 * page_size * dim).into_iter().map(f16::from_f32).collect();
    let table = [far, 0];
    let seq_lens = [2 * page_size as u32];
    let kv = KvTable::Block { page_size, block_table: &table, max_blocks: 2, seq_lens: &seq_lens };
    let indptr = [0, 2 * page_size as u32];
    let new = [2 * page_size, heads, dim];
    ferroflash::op::append_kv::AppendPlan::from_batch(&device, &spec, None, &Batch::new(&indptr, kv))
        .unwrap()
        .run(
            None,
            on(&device, &rows, &new).view(),
            on(&device, &values, &new).view(),
            ferroflash::KvMut::Paged { k: k.view_mut(), v: v.view_mut(), summaries: None },
        )
        .unwrap();
    let q: Vec<f16> = rng.normals(dim).into_iter().map(f16::from_f32).collect();
    let q = on(&device, &q, &[1, 1, dim]);
    let mut far_out = Tensor::zeros(&device, DType::F16, &[1, 1, dim]).unwrap();
    let batch = Batch::new(&[0, 1], kv);
    AttentionPlan::new(&device, &spec, &batch, Splits::None)
        .unwrap()
        .run(q.view(), Kv::Paged { k: k.view(), v: v.view() }, far_out.view_mut(), None)
        .unwrap();
    // The same tokens side by side.
    let (k, v) = (on(&device, &rows, &new), on(&device, &values, &new));
    let batch = Batch::new(&[0, 1], KvTable::Ragged { kv_indptr: &indptr });
    let mut near_out = Tensor::zeros(&device, DType::F16, &[1, 1, dim]).unwrap();
    AttentionPlan::new(&device, &spec, &batch, Splits::None)
        .unwrap()
        .run(q.view(), Kv::Ragged { k: k.view(), v: v.view() }, near_out.view_mut(), None)
        .unwrap();
    assert_eq!(far_out.to_vec::<f16>().unwrap(), near_out.to_vec::<f16>().unwrap());
    assert!(far_out.to_vec::<f16>().unwrap().iter().any(|x| x.to_f32() != 0.0));
}

/// Copies in, `ldmatrix` out, and the exchange of S: no shared access waits for a bank.
#[test]
fn shared_memory_has_no_bank_conflicts() {
    for head_dim in [64, 96, 128, 192, 256] {
        for (name, lengths) in [("prefill", vec![(100, 300)]), ("decode", vec![(1, 300)])] {
            let device = Device::sim(1);
            Problem::new(case(head_dim, lengths, 16)).run(&device);
            let stats = device.sim_stats().unwrap();
            println!(
                "{name} d{head_dim}: {} shared accesses of a warp, {} cycles, {} without conflicts",
                stats.shared_accesses, stats.shared_cycles, stats.shared_cycles_ideal
            );
            assert!(stats.shared_accesses > 0);
            assert_eq!(stats.shared_cycles, stats.shared_cycles_ideal, "{name} d{head_dim}");
        }
    }
}

/// Decode copies each K and V byte once for a whole query group, and Q.
#[test]
fn decode_reads_the_cache_once() {
    let (head_dim, len) = (128, 4000);
    for splits in [Splits::None, Splits::Fixed(512)] {
        let device = Device::sim(1);
        let problem = Problem::new(Case { splits, ..case(head_dim, vec![(1, len)], 16) });
        problem.run(&device);
        let stats = device.sim_stats().unwrap();
        let kv = (2 * 2 * len * head_dim * 2) as u64;
        let q = (8 * head_dim * 2) as u64;
        let items = stats.global_copied - kv;
        println!("{} bytes copied, K and V are {kv}, {} more loaded", stats.global_copied, stats.global_read);
        assert!(items.is_multiple_of(q / 2) && items <= 16 * q, "Q once for each work item");
    }
}

#[test]
fn what_gpu_kernels_do_not_take_is_refused_with_what_would_work() {
    let device = Device::sim(1);
    let spec = AttentionSpec::new(2, 2, 64);
    let batch = Batch::new(&[0, 1], KvTable::Ragged { kv_indptr: &[0, 3] });
    let mut plan = AttentionPlan::new(&device, &spec, &batch, Splits::Auto).unwrap();
    let tensor = |dtype, rows| Tensor::zeros(&device, dtype, &[rows, 2, 64]).unwrap();
    let mut run = |q: &Tensor, k: &Tensor, v: &Tensor, out: &mut Tensor| {
        plan.run(q.view(), Kv::Ragged { k: k.view(), v: v.view() }, out.view_mut(), None)
    };
    let half = |rows| tensor(DType::F16, rows);
    let refused = run(&tensor(DType::F32, 1), &half(3), &half(3), &mut tensor(DType::F32, 1)).unwrap_err();
    assert_eq!(refused.to_string(), "attention: dtype of q: expected f16 or bf16 on a GPU, got f32");
    let refused = run(&half(1), &tensor(DType::BF16, 3), &tensor(DType::BF16, 3), &mut half(1)).unwrap_err();
    assert!(matches!(refused, Error::DType { what: "k", .. }), "{refused}");
    assert!(run(&half(1), &half(3), &half(3), &mut half(1)).is_ok());
    // Rows that do not begin at 16 bytes.
    let wide = Tensor::zeros(&device, DType::F16, &[1, 2, 68]).unwrap();
    let q = wide.view().narrow(2, 4, 64).unwrap();
    let mut out = half(1);
    let (k, v) = (half(3), half(3));
    let refused = plan.run(q, Kv::Ragged { k: k.view(), v: v.view() }, out.view_mut(), None).unwrap_err();
    assert!(refused.to_string().contains("multiples of 16 bytes"), "{refused}");
    // Memory of another device.
    let other = Tensor::zeros(&Device::sim(2), DType::F16, &[1, 2, 64]).unwrap();
    let kv = Kv::Ragged { k: k.view(), v: v.view() };
    assert!(matches!(plan.run(other.view(), kv, out.view_mut(), None), Err(Error::Device { .. })));
}

/// The speed is printed, not asserted.
#[test]
fn cases_in_a_row() {
    let device = Device::sim(1);
    let problem = Problem::new(case(64, vec![(1, 200), (30, 130)], 16));
    let (start, cases) = (Instant::now(), 20);
    let outcomes: Vec<_> = (0..cases).map(|_| problem.run(&device)).collect();
    let seconds = start.elapsed().as_secs_f64();
    println!("{:.0} cases a second (8 heads, 64 channels, 200 and 130 tokens)", cases as f64 / seconds);
    outcomes.iter().for_each(|outcome| problem.check(&device, outcome).unwrap());
}
