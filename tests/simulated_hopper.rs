//! Hopper's prefill kernels on the simulator, beyond right results: when they are chosen, that neither pages nor boxes show
//! in the bits, what they read, in which order work is taken.

mod common;

use common::cases::{Case, Place, Problem, every_kernel_and_mask};
use ferroflash::op::attention::AttentionPlan;
use ferroflash::{AttentionSpec, Batch, DType, Device, Kv, KvTable, Splits, Tensor};
use ferroflash_kernels::abi::{PREFILL_SM90, PrefillTile};
use ferroflash_kernels::kernels::ALTERNATIVES;

fn case(spec: AttentionSpec, lengths: Vec<(usize, usize)>, place: Place) -> Case {
    Case {
        spec,
        lengths,
        n_tree: None,
        q_dtype: DType::BF16,
        kv_dtype: DType::BF16,
        place,
        splits: Splits::None,
        lists: None,
        q_scale: 1.0,
        seed: 11,
    }
}

fn paged(page_size: usize) -> Place {
    Place::Paged { page_size, nhd: page_size.is_multiple_of(16), block_table: true }
}

/// Warpgroup products of a case's run.
fn products(case: Case) -> u64 {
    let device = Device::sim_hopper(1);
    Problem::new(case).run(&device);
    device.sim_stats().unwrap().collectives.get("wgmma").copied().unwrap_or(0)
}

#[test]
fn hoppers_kernels_take_what_they_can() {
    let spec = || AttentionSpec::new(4, 2, 64).causal();
    let plain = || case(spec(), vec![(100, 200)], Place::Ragged);
    assert!(products(plain()) > 0);
    assert!(products(Case { place: paged(1), ..plain() }) > 0);
    assert!(products(Case { lists: Some((16, true)), place: paged(16), ..plain() }) > 0);
    // Few rows are for decoding; fixed splits have one arithmetic for many and few; a group of more rows than a tile.
    assert_eq!(products(Case { lengths: vec![(1, 200)], ..plain() }), 0);
    assert_eq!(products(Case { splits: Splits::Fixed(64), ..plain() }), 0);
    assert_eq!(products(case(AttentionSpec::new(130, 1, 64), vec![(2, 40)], Place::Ragged)), 0);
    // Not on another GPU.
    let device = Device::sim(1);
    Problem::new(plain()).run(&device);
    assert!(!device.sim_stats().unwrap().collectives.contains_key("wgmma"));
}

/// Whole blocks come as boxes of the tensor map, as long as the page allows (64, 16 or 8 tokens), or row by row (pages of
/// 1 and 100); blocks begin at the same tokens in all of them, so that the bits are the same.
#[test]
fn pages_of_any_size_have_the_bits_of_contiguous_kv() {
    for (head_dim, group) in [(64, 1), (96, 3), (128, 8), (192, 2), (256, 7)] {
        let spec = || AttentionSpec::new(2 * group, 2, head_dim).causal();
        let lengths = || vec![(90, 500), (40, 333)];
        let device = Device::sim_hopper(2);
        let contiguous = Problem::new(case(spec(), lengths(), Place::Ragged));
        let expected = contiguous.run(&device);
        contiguous.check(&device, &expected).unwrap();
        for page_size in [1, 16, 24, 64, 100, 256] {
            let got = Problem::new(case(spec(), lengths(), paged(page_size))).run(&device);
            assert!(got.out == expected.out && got.lse == expected.lse, "{head_dim} {page_size}");
        }
    }
}

/// Every head dimension's kernels, plain and with extras, under windows with sinks that skip blocks; each
/// case has a seed of its own.
#[test]
fn every_kernel_with_every_mask() {
    every_kernel_and_mask(0, |spec, dtype, _, seed| {
        let case = case(spec, vec![(70, 700), (33, 33)], Place::Ragged);
        Problem::new(Case { q_dtype: dtype, kv_dtype: dtype, ..case })
            .run_and_check(&Device::sim_hopper(seed));
    });
}

/// K and V come once for each tile of rows, from its first visible block to its last; shared memory has no bank conflicts.
#[test]
fn a_tile_reads_its_blocks_once() {
    let (q_len, kv_len, head_dim) = (256, 1024, 128);
    for (place, window) in
        [(Place::Ragged, None), (paged(16), None), (paged(1), None), (paged(16), Some(128))]
    {
        let mut spec = AttentionSpec::new(2, 2, head_dim).causal();
        spec.window = window;
        let device = Device::sim_hopper(3);
        Problem::new(case(spec, vec![(q_len, kv_len)], place)).run(&device);
        let stats = device.sim_stats().unwrap();
        // Two heads, two tiles of 128 rows each, blocks of 128 tokens: of 1024, the first tile sees 7 and the second 8;
        // under the window both see two.
        let blocks = if window.is_some() { 2 + 2 } else { 7 + 8 };
        let kv = 2 * blocks * 128 * 2 * head_dim * 2;
        let q = 2 * q_len * head_dim * 2;
        assert_eq!(stats.global_copied, (kv + q) as u64, "{place:?} {window:?}");
        assert!(stats.shared_accesses > 0);
        assert_eq!(stats.shared_cycles, stats.shared_cycles_ideal, "{place:?}");
    }
}

/// Work that is more K and V than fits in the L2 cache (of a simulated GPU, 256 KiB) is taken in sections that fit in half of
/// it, longest items first in each; every row against every token that it may see, once.
#[test]
fn items_are_ordered_by_sections() {
    let (heads, head_dim, len) = (4, 64, 448);
    let spec = AttentionSpec::new(heads, heads, head_dim).causal();
    let indptr = [0, len, 2 * len];
    let batch = Batch::new(&indptr, KvTable::Ragged { kv_indptr: &indptr });
    let plan = AttentionPlan::new(&Device::sim_hopper(1), &spec, &batch, Splits::Auto).unwrap();
    let items = plan.plan().work_items();
    assert!(plan.plan().merge_items().is_empty(), "enough items for all: none is split");
    let cost = |i: &ferroflash_kernels::abi::WorkItem| (i.row_end - i.row_start) * i.kv_end.div_ceil(64);
    // A head's K and V are 112 KiB, a section has one.
    let tiles = (len as usize).div_ceil(128);
    assert_eq!(items.len(), 2 * heads * tiles);
    for section in items.chunks(tiles) {
        assert!(section.iter().all(|i| (i.seq, i.kv_head) == (section[0].seq, section[0].kv_head)));
        assert!(section.windows(2).all(|w| cost(&w[0]) >= cost(&w[1])));
        let mut rows: Vec<_> = section.iter().map(|i| (i.row_start, i.row_end, i.kv_end)).collect();
        rows.sort_unstable();
        assert_eq!(rows, [(0, 128, 128), (128, 256, 256), (256, 384, 384), (384, 448, 448)]);
    }
}

/// Partial states of split items, by fewer tiles than processors.
#[test]
fn long_items_are_split_where_there_are_few() {
    for v_head_dim in [128, 64] {
        let spec = AttentionSpec::new(1, 1, 128).v_head_dim(v_head_dim);
        let case = Case { splits: Splits::Auto, ..case(spec, vec![(40, 3000)], paged(16)) };
        for seed in 0..3 {
            let device = Device::sim_hopper(seed);
            let problem = Problem::new(case.clone());
            let outcome = problem.run(&device);
            problem.check(&device, &outcome).unwrap();
        }
    }
}

/// A plan is run by every layer: the counter that CTAs take items from is back at 0 after each run. Outputs begin at 16
/// bytes, or the error says so.
#[test]
fn a_plan_runs_again_and_again() {
    let (device, len) = (Device::sim_hopper(4), 300);
    let spec = AttentionSpec::new(2, 2, 64).causal();
    let indptr = [0, len];
    let batch = Batch::new(&indptr, KvTable::Ragged { kv_indptr: &indptr });
    let mut plan = AttentionPlan::new(&device, &spec, &batch, Splits::None).unwrap();
    let shape = [len as usize, 2, 64];
    let data: Vec<half::bf16> =
        common::Rng(9).normals(len as usize * 128).into_iter().map(half::bf16::from_f32).collect();
    let qkv = Tensor::from_slice(&device, &data, &shape).unwrap();
    let kv = Kv::Ragged { k: qkv.view(), v: qkv.view() };
    let mut outputs = Vec::new();
    for _ in 0..3 {
        let mut out = Tensor::zeros(&device, DType::BF16, &shape).unwrap();
        plan.run(qkv.view(), kv, out.view_mut(), None).unwrap();
        outputs.push(out.to_vec::<half::bf16>().unwrap());
    }
    assert!(outputs[0].iter().any(|x| x.to_f32() != 0.0));
    assert!(outputs[1] == outputs[0] && outputs[2] == outputs[0]);
    let mut wide = Tensor::zeros(&device, DType::BF16, &[len as usize, 2, 68]).unwrap();
    let out = wide.view_mut().narrow(2, 4, 64).unwrap();
    let refused = plan.run(qkv.view(), kv, out, None).unwrap_err();
    assert!(refused.to_string().contains("multiples of 16 bytes"), "{refused}");
}

/// Tiles that are not in use compute the same, with two and three consumers: what a search on a GPU times is attention.
#[test]
fn tiles_not_in_use_are_right_too() {
    let check = |device: &Device, head_dim, v_head_dim, entry: &str| {
        let spec = AttentionSpec::new(4, 2, head_dim).v_head_dim(v_head_dim).causal();
        let problem = Problem::new(case(spec, vec![(150, 700), (33, 33)], paged(16)));
        let outcome = problem.run(device);
        problem.check(device, &outcome).unwrap_or_else(|e| panic!("{entry}: {e}"));
        assert!(device.sim_stats().unwrap().launches.contains_key(entry), "{entry}");
    };
    // SAFETY: tiles of the kernels' table.
    let with_tile = |device: Device, tile| unsafe { device.with_prefill_tile(tile) };
    for (seed, (tile, entry)) in ALTERNATIVES.iter().enumerate() {
        let device = with_tile(Device::sim_hopper(seed as u64), *tile).unwrap();
        check(&device, tile.head_dim, tile.v_head_dim, entry.name);
    }
    // One that does not hold the channels is not used; not every device has Hopper's kernels.
    let small = ALTERNATIVES[0].0;
    check(&with_tile(Device::sim_hopper(0), small).unwrap(), 128, 128, "prefill_sm90_bf16_d128");
    assert!(with_tile(Device::cpu(), small).is_none() && with_tile(Device::sim(0), small).is_none());
}

#[test]
fn tiles_rows_and_boxes_by_the_problem() {
    let name = |k, v| PrefillTile::choose(k, v).map(|t| t.name);
    assert_eq!(name(64, 64), Some("d64"));
    assert_eq!(name(72, 72), Some("d96"));
    assert_eq!(name(192, 128), Some("d192_128"));
    assert_eq!(name(192, 136), Some("d192"));
    assert_eq!(name(256, 8), Some("d256"));
    assert_eq!(name(264, 8), None);
    for tile in PREFILL_SM90 {
        println!("{tile}");
        for group in 1..=130 {
            let rows = tile.q_rows(group);
            assert_eq!(rows.is_some(), group <= 128);
            assert!(rows.is_none_or(|r| r.is_multiple_of(group) && r <= 128 && r + group > 128));
        }
        assert_eq!(tile.box_rows(0), Some(tile.block), "ragged KV comes a block at a time");
        assert_eq!(tile.box_rows(16), Some(16));
        assert!([1, 4, 100].iter().all(|&page_size| tile.box_rows(page_size).is_none()));
        for page_size in 1..600 {
            let Some(rows) = tile.box_rows(page_size) else { continue };
            assert!(
                rows.is_multiple_of(8) && tile.block.is_multiple_of(rows) && page_size.is_multiple_of(rows)
            );
        }
    }
}
