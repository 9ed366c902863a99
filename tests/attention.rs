//! Attention against the f64 oracle: generated cases, hostile ones, and bits that must not move.

mod common;

use common::cases::{Case, Place, Problem};
use common::devices;
use ferroflash::{AttentionSpec, DType, Splits};
use proptest::prelude::*;

fn base() -> Case {
    Case {
        spec: AttentionSpec::new(4, 2, 64).causal(),
        lengths: vec![(3, 70), (1, 65)],
        n_tree: None,
        q_dtype: DType::F32,
        kv_dtype: DType::F32,
        place: Place::Ragged,
        splits: Splits::Auto,
        lists: None,
        q_scale: 1.0,
        seed: 7,
    }
}

fn check(case: Case) {
    for device in devices() {
        Problem::for_device(&case, &device).run_and_check(&device);
    }
}

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        Just(Place::Ragged),
        (prop_oneof![Just(1), Just(3), Just(16), Just(64), Just(100)], any::<bool>(), any::<bool>())
            .prop_map(|(page_size, nhd, block_table)| Place::Paged { page_size, nhd, block_table }),
    ]
}

fn splits() -> impl Strategy<Value = Splits> {
    prop_oneof![Just(Splits::Auto), Just(Splits::None), Just(Splits::Fixed(64)), Just(Splits::Fixed(200))]
}

fn spec() -> impl Strategy<Value = AttentionSpec> {
    let heads = prop_oneof![Just((1, 1)), Just((3, 3)), Just((4, 2)), Just((6, 1)), Just((9, 3))];
    let head_dim = prop_oneof![Just(8), Just(40), Just(64), Just(80), Just(96), Just(128), Just(256)];
    let window = prop_oneof![Just(None), (1u32..200).prop_map(Some)];
    (heads, head_dim, any::<bool>(), window, 0u32..6, 0u32..16, any::<u64>()).prop_map(
        |((q, kv), head_dim, causal, window, num_sinks, features, seed)| {
            let mut spec = AttentionSpec::new(q, kv, head_dim);
            spec.causal = causal;
            spec.window = window;
            spec.num_sinks = num_sinks;
            let mut rng = common::Rng(seed);
            if features & 3 == 0 {
                spec.soft_cap = Some(3.0);
            }
            if features & 4 == 0 {
                spec.alibi_slopes = Some((0..q).map(|h| 0.5f32.powi(h as i32 + 1)).collect());
            }
            if features & 8 == 0 {
                spec.sink_logits = Some(rng.normals(q));
            }
            spec
        },
    )
}

fn lengths() -> impl Strategy<Value = Vec<(usize, usize)>> {
    let kv_len = prop_oneof![Just(0usize), 1usize..4, 60usize..70, 1usize..600];
    let q_len = prop_oneof![Just(0usize), Just(1), 2usize..10, 1usize..150];
    proptest::collection::vec((q_len, kv_len), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn generated_cases(
        spec in spec(), lengths in lengths(), q_dtype in dtype(), kv_dtype in dtype(),
        place in place(), splits in splits(), q_scale in prop_oneof![Just(1.0f32), Just(30.0)], seed: u64,
    ) {
        check(Case { spec, lengths, n_tree: None, q_dtype, kv_dtype, place, splits, lists: None, q_scale, seed });
    }

    #[test]
    fn generated_trees(
        lengths in lengths(), n_tree in prop_oneof![Just(0usize), 1usize..40, 200usize..257],
        dtype in dtype(), place in place(), splits in splits(), seed: u64,
    ) {
        let spec = AttentionSpec::new(4, 2, 64);
        check(Case {
            spec, lengths, n_tree: Some(n_tree), q_dtype: dtype, kv_dtype: dtype, place, splits, lists: None,
            q_scale: 1.0, seed,
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn generated_page_lists(
        mut spec in spec(), lengths in lengths(), dtype in dtype(), page_size in prop_oneof![Just(1), Just(3), Just(16), Just(100)],
        splits in splits(), q_tile in prop_oneof![Just(1), Just(16), Just(50), Just(1000)], per_head: bool, seed: u64,
    ) {
        spec.alibi_slopes = None;
        let place = Place::Paged { page_size, nhd: false, block_table: true };
        check(Case {
            spec, lengths, n_tree: None, q_dtype: dtype, kv_dtype: dtype, place, splits,
            lists: Some((q_tile, per_head)), q_scale: 1.0, seed,
        });
    }
}

/// Whole blocks of listed pages on both edges of causal masks and windows, whose tokens stand far apart.
#[test]
fn page_lists_meet_the_edges_of_masks() {
    for seed in 0..4 {
        for window in [None, Some(90)] {
            let mut case = Case { lengths: vec![(149, 300), (20, 520)], seed, ..base() };
            case.spec.window = window;
            case.place = Place::Paged { page_size: 16, nhd: false, block_table: false };
            case.lists = Some((16, seed % 2 == 0));
            check(case);
        }
    }
}

/// DeepSeek's heads of 192 and 128 channels, and others that are not a kernel's own; long queries and single ones.
#[test]
fn values_with_fewer_channels_than_keys() {
    for (head_dim, v_head_dim) in [(192, 128), (192, 64), (72, 40), (256, 200), (128, 8)] {
        for place in [Place::Ragged, Place::Paged { page_size: 16, nhd: false, block_table: true }] {
            let mut case = Case { lengths: vec![(70, 150), (1, 300)], place, ..base() };
            case.spec = AttentionSpec::new(4, 2, head_dim).v_head_dim(v_head_dim).causal();
            case.splits = if v_head_dim == 128 { Splits::Fixed(64) } else { Splits::Auto };
            check(case.clone());
            case.splits = Splits::Auto;
            check(case);
        }
    }
}

/// Lists that name every page are dense attention, bit for bit.
#[test]
fn full_page_lists_are_dense() {
    let place = Place::Paged { page_size: 16, nhd: false, block_table: false };
    for splits in [Splits::None, Splits::Fixed(128)] {
        let case = Case { lengths: vec![(70, 300), (1, 90)], place, splits, ..base() };
        for device in devices() {
            let mut problem = Problem::for_device(&case, &device);
            let dense = problem.run(&device);
            problem.case.lists = Some((128, false));
            problem.list_pages = (0..300u32.div_ceil(16)).chain(0..90u32.div_ceil(16)).collect();
            problem.list_indptr = vec![0, 19, 25];
            let listed = problem.run(&device);
            assert!(dense.out == listed.out && dense.lse == listed.lse, "{device:?}");
        }
    }
}

#[test]
fn empty_rows_are_zero_and_minus_infinity() {
    // More queries than keys: the first two see nothing; and a sequence without keys.
    let case = Case { lengths: vec![(5, 3), (2, 0)], ..base() };
    for device in devices() {
        let problem = Problem::for_device(&case, &device);
        let outcome = problem.run(&device);
        problem.check(&device, &outcome).unwrap();
        let heads = 4;
        for row in (0..2 * heads).chain(5 * heads..7 * heads) {
            assert_eq!(outcome.lse[row], f32::NEG_INFINITY);
            assert!(outcome.out[row * 64..][..64].iter().all(|&x| x == 0.0));
        }
    }
}

#[test]
fn long_kv_is_split_and_merged() {
    let mut case = Case { lengths: vec![(1, 5000), (4, 3000)], ..base() };
    // Sections longer than anything, and than a u32, are one.
    let whole = [Splits::Fixed(1 << 32), Splits::Fixed(usize::MAX)];
    for splits in [Splits::Auto, Splits::None, Splits::Fixed(512)].into_iter().chain(whole) {
        case.splits = splits;
        check(case.clone());
    }
}

/// The bits of the last query's row, computed in many surroundings.
#[test]
fn fixed_splits_make_a_row_independent_of_its_batch() {
    let case = Case { lengths: vec![(150, 700)], splits: Splits::Fixed(256), ..base() };
    for device in devices() {
        let whole = Problem::for_device(&case, &device);
        let expected = whole.run(&device);
        let row_values = 4 * 64;
        for (place, others, q_len) in [
            (Place::Ragged, 0, 150),
            (Place::Ragged, 3, 1),
            (Place::Paged { page_size: 1, nhd: false, block_table: false }, 2, 7),
            (Place::Paged { page_size: 48, nhd: true, block_table: true }, 1, 129),
        ] {
            // Chunked prefill: the same sequence, its last `q_len` queries, among `others`.
            let mut lengths = vec![(2, 900); others];
            lengths.push((q_len, 700));
            let mut part = Problem::new(Case { lengths, place, ..whole.case.clone() });
            (part.k[others], part.v[others]) = (whole.k[0].clone(), whole.v[0].clone());
            let at = part.q.len() - q_len * row_values;
            part.q[at..].copy_from_slice(&whole.q[(150 - q_len) * row_values..]);
            let got = part.run(&device);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let tail = (150 - q_len) * row_values;
            assert!(
                bits(&got.out[at..]) == bits(&expected.out[tail..]),
                "{place:?} {others} {q_len} {device:?}"
            );
        }
    }
}

#[test]
fn the_same_call_gives_the_same_bits() {
    let case = Case { lengths: vec![(1, 4000), (90, 400)], ..base() };
    for device in devices() {
        let problem = Problem::for_device(&case, &device);
        let (a, b) = (problem.run(&device), problem.run(&device));
        assert!(a.out == b.out && a.lse == b.lse, "{device:?}");
    }
}
