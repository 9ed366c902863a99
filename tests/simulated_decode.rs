//! Decoding on the simulator, beyond right results: page sizes and orders that must not show in the bits, what is read.

mod common;

use common::cases::{Case, Place, Problem, every_kernel_and_mask};
use ferroflash::{AttentionSpec, DType, Device, Splits};

fn case(spec: AttentionSpec, lengths: Vec<(usize, usize)>, place: Place, splits: Splits) -> Case {
    Case {
        spec,
        lengths,
        n_tree: None,
        q_dtype: DType::BF16,
        kv_dtype: DType::BF16,
        place,
        splits,
        lists: None,
        q_scale: 1.0,
        seed: 11,
    }
}

fn paged(page_size: usize) -> Place {
    Place::Paged { page_size, nhd: page_size.is_multiple_of(16), block_table: true }
}

/// Blocks begin at the same tokens whatever the pages, and parts are merged in the order of KV whoever does it: the bits
/// depend on neither, nor on the seed that draws who comes last.
#[test]
fn neither_pages_nor_who_comes_last_show_in_the_bits() {
    for (head_dim, group, splits) in [
        (64, 1, Splits::Auto),
        (96, 3, Splits::None),
        (128, 8, Splits::Auto),
        (192, 2, Splits::Fixed(128)),
        (256, 5, Splits::Auto),
    ] {
        let spec = || AttentionSpec::new(2 * group, 2, head_dim).causal();
        let lengths = || vec![(1, 900), (2, 333), (1, 0), (1, 65)];
        let contiguous = Problem::new(case(spec(), lengths(), Place::Ragged, splits));
        let device = Device::sim(2);
        let expected = contiguous.run(&device);
        contiguous.check(&device, &expected).unwrap();
        for (seed, page_size) in [1, 16, 24, 64, 100, 256].into_iter().enumerate() {
            let got = Problem::new(case(spec(), lengths(), paged(page_size), splits))
                .run(&Device::sim(seed as u64));
            assert!(got.out == expected.out && got.lse == expected.lse, "{head_dim} {page_size}");
        }
    }
}

/// Every head dimension's kernels with every mask, each case with a seed of its own.
#[test]
fn every_kernel_with_every_mask() {
    every_kernel_and_mask(100, |spec, dtype, kind, seed| {
        let splits = [Splits::Auto, Splits::Fixed(192), Splits::None, Splits::Auto][kind];
        let place = paged([1, 16, 3, 64][kind]);
        let case = case(spec, vec![(3, 700), (1, 33), (8, 257)], place, splits);
        Problem::new(Case { q_dtype: dtype, kv_dtype: dtype, ..case }).run_and_check(&Device::sim(seed));
    });
}

/// Each K and V byte comes once for a query group. What memory delivers besides (page table, queries, items, states of
/// parts) is within 2%, of pages of one token 4 bytes for the 1024 of a token's two heads.
#[test]
fn a_group_reads_its_kv_once() {
    for (place, batch, len) in
        [(Place::Ragged, 1, 9000), (paged(16), 1, 9000), (paged(1), 3, 5000), (paged(64), 8, 2000)]
    {
        let device = Device::sim(3);
        let lengths = vec![(1, len); batch];
        Problem::new(case(AttentionSpec::new(8, 2, 128).causal(), lengths, place, Splits::Auto)).run(&device);
        let stats = device.sim_stats().unwrap();
        let kv = (batch * 2 * len * 2 * 128 * 2) as u64;
        assert_eq!(stats.global_copied, kv, "{place:?}");
        let all = stats.distinct_read;
        println!("{place:?}, {batch} of {len}: {:.3} of K and V", all as f64 / kv as f64);
        assert!(all as f64 <= 1.02 * kv as f64, "{place:?}: {all} of {kv}");
        assert_eq!(stats.launches.values().sum::<u64>(), 1);
        assert_eq!(stats.shared_cycles, stats.shared_cycles_ideal, "bank conflicts");
    }
}

/// Verifying a tree reads its prefix once for all nodes of a tile of 128 rows, here 32 nodes of four heads; two tiles stand
/// side by side in the order of work, so that memory delivers the prefix once to both. No mask is looked at on the way.
#[test]
fn a_tree_reads_its_prefix_once() {
    for device in [Device::sim(7), Device::sim_hopper(7)] {
        for (nodes, tiles) in [(32, 1), (64, 2)] {
            let (prefix, dim) = (6000, 128);
            let case =
                case(AttentionSpec::new(8, 2, dim), vec![(nodes, prefix + nodes)], paged(16), Splits::Auto);
            let problem = Problem::new(Case { n_tree: Some(nodes), ..case });
            let before = device.sim_stats().unwrap();
            let outcome = problem.run(&device);
            problem.check(&device, &outcome).unwrap();
            let after = device.sim_stats().unwrap();
            let kv = ((prefix + nodes) * 2 * 2 * dim * 2) as u64;
            let (copied, distinct) =
                (after.global_copied - before.global_copied, after.distinct_read - before.distinct_read);
            // Queries come once for each piece of a tile's KV. What memory delivers has the states of pieces too, which of
            // so short a prefix are many; still less than a second reading of it.
            println!("{nodes} nodes: {copied} copied, {distinct} delivered, K and V are {kv}");
            let queries = copied - tiles * kv;
            assert!(queries.is_multiple_of(128 * dim as u64 * 2) && queries < tiles * kv / 4, "{queries}");
            assert!(distinct >= kv && (distinct as f64) < 1.5 * kv as f64);
        }
    }
}
