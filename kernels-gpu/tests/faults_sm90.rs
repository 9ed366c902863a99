//! As `faults.rs`, for what works beside the lanes on Hopper: mbarriers, bulk copies, `wgmma`, the async proxy. Each kernel
//! takes a number: 0 is right, every other one breaks it in one way, and must be found under every seed.

#![allow(clippy::undocumented_unsafe_blocks)] // what the kernels break is what the simulator checks

use ferroflash_kernels::abi::{TensorMap, TensorMapSpec};
use ferroflash_kernels::isa;
use ferroflash_kernels::sim::{Fault, Kernel, Launch, Memory, encode, launch};
use ferroflash_kernels::tile::{F16, Panels, Pending};

const SEEDS: u64 = 8;

/// One cluster of warpgroups with 32 KiB of shared memory each; the parameters: a tensor map of 64 by 64 elements, boxes of
/// all of it, and the address of that tensor.
fn run(run: fn(*const u8), warpgroups: u32, cluster: u32, seed: u64) -> Result<(), Fault> {
    let memory = Memory::default();
    let at = memory.alloc(1 << 14, true).unwrap();
    let spec = TensorMapSpec {
        base: at,
        rank: 2,
        swizzle_bytes: 128,
        dims: [64, 64, 1, 1, 1],
        strides: [128, 16, 16, 16],
        box_dims: [64, 64, 1, 1, 1],
    };
    let TensorMap(map) = encode(&spec).unwrap();
    let params: Vec<u64> = map.into_iter().chain([at]).collect();
    let kernel = Kernel { name: "broken", threads: 128 * warpgroups, cluster, shared_bytes: 1 << 15, run };
    launch(&memory, &Launch { kernel, grid: [cluster, 1], params: &params, seed, number: seed }).map(|_| ())
}

fn works(kernel: fn(*const u8), warpgroups: u32) {
    (0..SEEDS).for_each(|seed| run(kernel, warpgroups, 1, seed).unwrap_or_else(|fault| panic!("{fault}")));
}

fn faults(kernel: fn(*const u8), warpgroups: u32, what: &str) {
    for seed in 0..SEEDS {
        let fault = run(kernel, warpgroups, 1, seed).expect_err(what);
        assert!(fault.what.contains(what), "{fault}, not {what}");
    }
}

fn tensor(params: *const u8) -> u64 {
    unsafe { *params.cast::<u64>().add(16) }
}

/// Barriers stand at the beginning, tiles from here on.
fn tile(i: u32) -> u32 {
    isa::shared_base() + 1024 + 8192 * i
}

fn barrier(i: u32) -> u32 {
    isa::shared_base() + 8 * i
}

fn wait(i: u32, parity: u32) {
    while !unsafe { isa::mbarrier_try_wait(barrier(i), parity) } {}
}

fn init(counts: &[u32]) {
    if isa::thread_x() == 0 {
        for (i, &count) in counts.iter().enumerate() {
            unsafe { isa::mbarrier_init(barrier(i as u32), count) };
        }
        isa::fence_mbarrier_init();
    }
    isa::bar_sync();
}

const BYTES: u32 = Panels::<64, 8>::BYTES;

/// Ordinary stores, then a product of what they wrote.
fn stores_then_product<const BROKEN: u32>(_: *const u8) {
    let lane = isa::thread_x();
    let (a, b) = (Panels::<64, 8>::new(tile(0)), Panels::<64, 8>::new(tile(1)));
    for i in (lane..512).step_by(128) {
        unsafe {
            isa::st_shared_4(a.chunk(i / 8, i % 8), [i; 4]);
            isa::st_shared_4(b.chunk(i / 8, i % 8), [i; 4]);
        }
    }
    if BROKEN != 1 {
        isa::fence_proxy_async();
    }
    if BROKEN != 2 {
        isa::bar_sync();
    }
    if BROKEN == 3 {
        unsafe { isa::wgmma_first::<8, false, 0, 0>(a.along_k(0, 0), b.along_k(0, 0)) };
    }
    let product = unsafe { Pending::<8>::a_bt::<F16, 64, 64, 8>(a, 0, b) };
    if BROKEN == 4 {
        // Before the product has been waited for.
        unsafe { isa::st_shared_4(b.chunk(lane / 8, lane % 8), [0; 4]) };
    }
    if BROKEN == 5 {
        product.wait::<1>();
        return;
    }
    product.wait::<0>();
    // Each warp may overwrite what no other reads: nothing, before a barrier.
    if BROKEN != 6 {
        isa::bar_sync();
    }
    unsafe { isa::st_shared_4(b.chunk(lane / 8, lane % 8), [0; 4]) };
}

#[test]
fn products_see_fenced_stores_and_are_waited_for() {
    works(stores_then_product::<0>, 1);
    faults(stores_then_product::<1>, 1, "no fence.proxy.async");
    faults(stores_then_product::<2>, 1, "race: read of shared");
    faults(stores_then_product::<3>, 1, "no wgmma.fence");
    faults(stores_then_product::<4>, 1, "read by wgmma");
    faults(stores_then_product::<5>, 1, "of which the wait has 0 complete");
    faults(stores_then_product::<6>, 1, "read by wgmma");
}

/// A box is loaded, and read by all.
fn load_then_read<const BROKEN: u32>(params: *const u8) {
    if isa::thread_x() == 0 {
        unsafe { isa::mbarrier_init(barrier(0), 1) };
        if BROKEN != 1 {
            isa::fence_mbarrier_init();
        }
    }
    if BROKEN != 2 {
        isa::bar_sync();
    }
    if BROKEN == 3 {
        // By the generic proxy, and not fenced: what the load overwrites.
        unsafe { isa::st_shared_4(tile(0) + 16 * isa::thread_x(), [0; 4]) };
        isa::bar_sync();
    }
    if isa::thread_x() == 0 {
        let bytes = match BROKEN {
            4 => BYTES - 16,
            5 => BYTES + 16,
            _ => BYTES,
        };
        unsafe {
            isa::mbarrier_arrive_expect_tx(barrier(0), bytes);
            isa::tma_load(tile(0), params as u64, [0, 0], barrier(0), isa::Keep::FIRST_OUT);
            if BROKEN == 6 {
                isa::mbarrier_arrive(barrier(0));
            }
        }
    }
    match BROKEN {
        7 => {}
        8 => wait(0, 1),
        _ => wait(0, 0),
    }
    unsafe { isa::ld_shared_4(tile(0) + 16 * isa::thread_x()) };
}

#[test]
fn loads_are_waited_for_on_initialised_barriers() {
    works(load_then_read::<0>, 1);
    faults(load_then_read::<1>, 1, "whose initialisation no fence followed");
    for seed in 0..SEEDS {
        // Whoever comes first, the barrier is not there or not seen.
        let fault = run(load_then_read::<2>, 1, 1, seed).unwrap_err();
        assert!(fault.what.contains("mbarrier"), "{fault}");
    }
    faults(load_then_read::<3>, 1, "overwriting of shared");
    faults(load_then_read::<4>, 1, "deadlock");
    faults(load_then_read::<5>, 1, "deadlock");
    faults(load_then_read::<6>, 1, "one arrival more");
    for seed in 0..SEEDS {
        let fault = run(load_then_read::<7>, 1, 1, seed).unwrap_err();
        let found = ["has not been waited for", "unwritten", "written by a bulk load"];
        assert!(found.iter().any(|f| fault.what.contains(f)), "{fault}");
        let fault = run(load_then_read::<8>, 1, 1, seed).unwrap_err();
        assert!(found.iter().any(|f| fault.what.contains(f)), "{fault}");
    }
}

/// A producer fills one slot three times; a consumer multiplies it by itself.
fn ring<const BROKEN: u32>(params: *const u8) {
    // A lane of each warp gives the slot back; broken, of one warp.
    init(&[1, if BROKEN == 2 { 1 } else { 4 }]);
    let slot = Panels::<64, 8>::new(tile(0));
    if isa::thread_x() == 0 {
        for round in 0..3 {
            if BROKEN != 3 {
                wait(1, round & 1 ^ 1);
            }
            unsafe {
                isa::mbarrier_arrive_expect_tx(barrier(0), BYTES);
                isa::tma_load(tile(0), params as u64, [0, 0], barrier(0), isa::Keep::FIRST_OUT);
            }
        }
    }
    if isa::thread_x() < 128 {
        return;
    }
    let give_back = || {
        if BROKEN != 4 {
            isa::warp_sync();
        }
        let lane = isa::thread_x() - 128;
        if lane == 0 || BROKEN != 2 && lane.is_multiple_of(32) {
            unsafe { isa::mbarrier_arrive(barrier(1)) };
        }
    };
    for round in 0..3 {
        wait(0, round & 1);
        if BROKEN == 4 {
            // Read by every lane, given back by one with no word of the others.
            unsafe { isa::ld_shared_1(tile(0) + 4 * isa::thread_x()) };
            give_back();
            continue;
        }
        let product = unsafe { Pending::<8>::a_bt::<F16, 64, 64, 8>(slot, 0, slot) };
        if BROKEN == 1 {
            give_back();
        }
        product.wait::<0>();
        if BROKEN != 1 {
            give_back();
        }
    }
}

#[test]
fn slots_are_given_back_by_all_who_read_them() {
    works(ring::<0>, 2);
    faults(ring::<1>, 2, "read by wgmma");
    faults(ring::<2>, 2, "read by wgmma");
    for seed in 0..SEEDS {
        let fault = run(ring::<3>, 2, 1, seed).unwrap_err();
        let found =
            ["has not been waited for", "read by wgmma", "written by a bulk load", "one arrival more"];
        assert!(found.iter().any(|f| fault.what.contains(f)), "{fault}");
    }
    faults(ring::<4>, 2, "read by thread");
}

/// Ordinary stores, then a bulk store of them, then others in their place.
fn stores_then_bulk_store<const BROKEN: u32>(params: *const u8) {
    let mine = tile(0) + 16 * isa::thread_x();
    unsafe { isa::st_shared_4(mine, [7; 4]) };
    if BROKEN != 1 {
        isa::fence_proxy_async();
    }
    isa::bar_sync();
    if isa::thread_x() == 0 {
        unsafe { isa::bulk_store(tensor(params), tile(0), 2048) };
        isa::bulk_commit();
        match BROKEN {
            2 => {}
            3 => isa::bulk_wait_read::<1>(),
            _ => isa::bulk_wait_read::<0>(),
        }
    }
    if BROKEN != 4 {
        isa::bar_sync();
    }
    unsafe { isa::st_shared_4(mine, [8; 4]) };
}

#[test]
fn bulk_stores_have_read_before_others_write() {
    works(stores_then_bulk_store::<0>, 1);
    faults(stores_then_bulk_store::<1>, 1, "no fence.proxy.async");
    faults(stores_then_bulk_store::<2>, 1, "read by a bulk store");
    faults(stores_then_bulk_store::<3>, 1, "read by a bulk store");
    faults(stores_then_bulk_store::<4>, 1, "race");
}

/// One warpgroup passes words of global memory to another, which meets it at a barrier of its own or not at all.
fn global_baton<const BROKEN: u32>(params: *const u8) {
    let (lane, at) = (isa::thread_x() % 128, tensor(params));
    if isa::thread_x() < 128 {
        unsafe { isa::st_global_1(at + 4 * lane as u64, [lane]) };
        isa::bar_arrive_named(2, 256);
    } else {
        if BROKEN != 1 || lane >= 32 {
            isa::bar_sync_named(2, 256);
        } else {
            unsafe { isa::ld_global_1(at + 4 * (lane ^ 1) as u64) };
            return isa::bar_sync_named(2, 256);
        }
        unsafe { isa::ld_global_1(at + 4 * (lane ^ 1) as u64) };
    }
}

#[test]
fn named_barriers_order_global_memory() {
    works(global_baton::<0>, 2);
    // Found where the reader comes after the writer: a write after a read is not looked for.
    let found = (0..SEEDS).filter_map(|seed| run(global_baton::<1>, 2, 1, seed).err());
    let found: Vec<Fault> = found.collect();
    assert!(!found.is_empty() && found.iter().all(|fault| fault.what.contains("race: read of global")));
}

/// One warpgroup writes, another reads.
fn baton<const BROKEN: u32>(_: *const u8) {
    let lane = isa::thread_x() % 128;
    if isa::thread_x() < 128 {
        unsafe { isa::st_shared_1(tile(0) + 4 * lane, [lane]) };
        match BROKEN {
            1 => {}
            2 => isa::bar_arrive_named(3, 128),
            _ => isa::bar_arrive_named(2, 256),
        }
    } else {
        match BROKEN {
            1 => {}
            3 => isa::bar_sync_named(2, 128),
            _ => isa::bar_sync_named(2, 256),
        }
        unsafe { isa::ld_shared_1(tile(0) + 4 * lane) };
    }
}

#[test]
fn named_barriers() {
    works(baton::<0>, 2);
    for seed in 0..SEEDS {
        let fault = run(baton::<1>, 2, 1, seed).unwrap_err();
        assert!(fault.what.contains("race") || fault.what.contains("unwritten"), "{fault}");
        let fault = run(baton::<3>, 2, 1, seed).unwrap_err();
        let found = ["race", "unwritten", "of 256 for others", "of 128 for others"];
        assert!(found.iter().any(|f| fault.what.contains(f)), "{fault}");
    }
    faults(baton::<2>, 2, "deadlock");
}

#[test]
fn registers_are_there_before_they_are_taken() {
    // Three warpgroups have 168 each.
    works(
        |_| match isa::thread_x() / 128 {
            0 => isa::registers_down::<24>(),
            _ => isa::registers_up::<240>(),
        },
        3,
    );
    faults(
        |_| match isa::thread_x() / 128 {
            0 => isa::registers_down::<56>(),
            _ => isa::registers_up::<240>(),
        },
        3,
        "deadlock",
    );
    faults(|_| isa::registers_down::<176>(), 3, "setmaxnreg.dec 176 with 168");
}

#[test]
fn barriers_are_not_data() {
    faults(
        |_| {
            init(&[1]);
            unsafe { isa::ld_shared_1(barrier(0)) };
        },
        1,
        "read of the mbarrier",
    );
    faults(
        |_| {
            init(&[1]);
            unsafe { isa::st_shared_1(barrier(0), [0]) };
        },
        1,
        "write to the mbarrier",
    );
    faults(|_| unsafe { isa::mbarrier_arrive(barrier(0)) }, 1, "no mbarrier has been initialised");
    faults(
        |_| {
            init(&[0]);
        },
        1,
        "an mbarrier of 0 arrivals",
    );
}

/// Boxes that are not where a box can be, or of no map.
#[test]
fn boxes_are_aligned_and_of_a_map() {
    fn load<const BROKEN: u32>(params: *const u8) {
        init(&[1]);
        if isa::thread_x() == 0 {
            unsafe {
                isa::mbarrier_arrive_expect_tx(barrier(0), BYTES);
                let (map, keep) = (params as u64, isa::Keep::LAST_OUT);
                match BROKEN {
                    1 => isa::tma_load(tile(0) + 512, map, [0, 0], barrier(0), keep),
                    2 => isa::tma_load(tile(0), map, [0, 0, 0], barrier(0), keep),
                    3 => isa::tma_load(tile(0), map + 8, [0, 0], barrier(0), keep),
                    4 => isa::tma_load(tile(3), map, [0, 0], barrier(0), keep),
                    5 => isa::bulk_load(tile(0), tensor(params) + 8, 64, barrier(0)),
                    _ => isa::tma_load(tile(0), map, [0, 0], barrier(0), keep),
                }
            }
        }
    }
    works(load::<0>, 1);
    faults(load::<1>, 1, "at a multiple of 1024");
    faults(load::<2>, 1, "3 coordinates for a tensor of rank 2");
    faults(load::<3>, 1, "no tensor map");
    faults(load::<4>, 1, "out of bounds");
    faults(load::<5>, 1, "no multiple of 16");
}

/// Two CTAs, one box for both.
fn multicast<const BROKEN: u32>(params: *const u8) {
    init(&[1]);
    if BROKEN != 1 {
        isa::cluster_sync();
    }
    if isa::thread_x() == 0 {
        unsafe { isa::mbarrier_arrive_expect_tx(barrier(0), BYTES) };
        if isa::cluster_rank() == 0 {
            let ctas = if BROKEN == 2 { 7 } else { 3 };
            unsafe { isa::tma_load_multicast(tile(0), params as u64, [0, 0], barrier(0), ctas) };
        }
    }
    wait(0, 0);
    unsafe { isa::ld_shared_1(tile(0) + 4 * isa::thread_x()) };
    isa::cluster_sync();
}

#[test]
fn multicast_reaches_ctas_that_are_there() {
    for seed in 0..SEEDS {
        run(multicast::<0>, 1, 2, seed).unwrap_or_else(|fault| panic!("{fault}"));
        // Whoever comes first, the other's barrier is not there or not seen.
        let fault = run(multicast::<1>, 1, 2, seed).unwrap_err();
        assert!(fault.what.contains("mbarrier"), "{fault}");
        let fault = run(multicast::<2>, 1, 2, seed).unwrap_err();
        assert!(fault.what.contains("multicast to CTA 2 of 2"), "{fault}");
    }
}
