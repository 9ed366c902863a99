//! The simulator finds what it is there to find: small kernels, each broken in one way, and the same kernel mended.

#![allow(clippy::undocumented_unsafe_blocks)] // what the kernels break is what the simulator checks

use ferroflash_kernels::isa;
use ferroflash_kernels::sim::{Fault, Kernel, Launch, Memory, launch};

const SEEDS: u64 = 8;

/// A launch of two warps with 4 KiB of shared memory; the parameter is a global buffer of `words` words.
fn run_with(
    run: fn(*const u8),
    grid: u32,
    words: usize,
    initialised: bool,
    seed: u64,
) -> Result<Vec<u32>, Fault> {
    let memory = Memory::default();
    let at = memory.alloc(4 * words, initialised).unwrap();
    let kernel = Kernel { name: "broken", threads: 64, cluster: 1, shared_bytes: 4096, run };
    launch(&memory, &Launch { kernel, grid: [grid, 1], params: &[at], seed, number: seed })?;
    let mut bytes = vec![0; 4 * words];
    memory.download(at, &mut bytes).unwrap();
    Ok(bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
}

fn run(run: fn(*const u8), seed: u64) -> Result<Vec<u32>, Fault> {
    run_with(run, 1, 256, true, seed)
}

/// The fault must come under every seed, and name this file and what it is.
fn faults(kernel: fn(*const u8), what: &str) {
    for seed in 0..SEEDS {
        let fault = run(kernel, seed).expect_err(what);
        assert!(fault.what.contains(what), "{fault}");
        assert!(fault.line.contains("faults.rs"), "{fault}");
        assert_eq!(fault.seed, seed);
    }
}

fn works(kernel: fn(*const u8)) {
    (0..SEEDS).for_each(|seed| assert!(run(kernel, seed).is_ok(), "{:?}", run(kernel, seed)));
}

fn buffer(params: *const u8) -> u64 {
    // SAFETY: the parameter struct is one address.
    unsafe { *params.cast() }
}

fn shared(word: u32) -> u32 {
    isa::shared_base() + 4 * word
}

/// Every lane reads what the next one wrote.
fn neighbour(params: *const u8, barrier: bool) {
    let thread = isa::thread_x();
    unsafe {
        isa::st_shared_1(shared(thread), [thread]);
        if barrier {
            isa::bar_sync();
        }
        let [x] = isa::ld_shared_1(shared((thread + 1) % 64));
        isa::st_global_1(buffer(params) + 4 * thread as u64, [x]);
    }
}

#[test]
fn missing_barrier() {
    works(|p| neighbour(p, true));
    for seed in 0..SEEDS {
        // Whichever lane runs first, the other's word is unwritten or raced for.
        let fault = run(|p| neighbour(p, false), seed).unwrap_err();
        assert!(fault.what.contains("race") || fault.what.contains("unwritten"), "{fault}");
    }
}

/// Sixteen bytes by `cp.async`, then read by the same lane.
fn copy(params: *const u8, wait: bool, barrier: bool) {
    let thread = isa::thread_x();
    unsafe {
        isa::cp_async_16(shared(4 * thread), buffer(params) + 16 * thread as u64, 16);
        isa::cp_async_commit();
        if wait {
            isa::cp_async_wait::<0>();
        }
        if barrier {
            isa::bar_sync();
        }
        let from = if barrier { (thread + 33) % 64 } else { thread };
        isa::ld_shared_4(shared(4 * from));
    }
}

#[test]
fn missing_wait_for_a_copy() {
    works(|p| copy(p, true, false));
    works(|p| copy(p, true, true));
    faults(|p| copy(p, false, false), "has not been waited for");
    // A barrier alone does not wait for copies.
    faults(|p| copy(p, false, true), "has not been waited for");
}

#[test]
fn a_wait_for_too_few_groups() {
    faults(
        |p| unsafe {
            isa::cp_async_16(shared(4 * isa::thread_x()), buffer(p), 16);
            isa::cp_async_commit();
            isa::cp_async_wait::<1>();
            isa::ld_shared_4(shared(4 * isa::thread_x()));
        },
        "has not been waited for",
    );
}

#[test]
fn a_lane_missing_from_a_shuffle() {
    works(|_| {
        isa::shfl_bfly(isa::thread_x(), 1);
    });
    // Lane 5 goes elsewhere: to its end, and to another shuffle.
    faults(
        |_| {
            if isa::thread_x() != 5 {
                isa::shfl_bfly(isa::thread_x(), 1);
            }
        },
        "deadlock",
    );
    faults(
        |_| {
            if isa::thread_x() == 5 {
                isa::shfl_bfly(1, 1);
            } else {
                isa::shfl_bfly(0, 1);
            }
        },
        "diverge",
    );
}

#[test]
#[allow(clippy::if_same_then_else)] // two barriers are what it is about
fn divergent_barriers() {
    faults(
        |_| {
            if isa::thread_x() % 32 < 16 {
                isa::bar_sync();
            } else {
                isa::bar_sync();
            }
        },
        "different barriers",
    );
    for seed in 0..SEEDS {
        let fault = run(
            |_| {
                if isa::thread_x() < 40 {
                    isa::bar_sync();
                }
            },
            seed,
        )
        .unwrap_err();
        assert!(fault.what.contains("has returned") || fault.what.contains("deadlock"), "{fault}");
    }
}

#[test]
fn deadlock_names_every_lane() {
    let fault = run(
        |_| {
            if isa::thread_x() < 32 {
                isa::bar_sync();
            } else {
                isa::warp_sync();
                if isa::thread_x() != 40 {
                    isa::warp_sync();
                }
            }
        },
        3,
    )
    .unwrap_err();
    assert!(fault.what.contains("deadlock") || fault.what.contains("has returned"), "{fault}");
    assert!(fault.what.contains("40"), "{fault}");
}

#[test]
fn races_on_shared_memory() {
    // Two lanes of one warp, two warps; write against write, write against read.
    faults(|_| unsafe { isa::st_shared_1(shared(isa::thread_x() % 63), [1]) }, "race");
    faults(
        |_| unsafe {
            let thread = isa::thread_x();
            isa::st_shared_1(shared(thread), [1]);
            isa::bar_sync();
            isa::ld_shared_1(shared((thread + 32) % 64));
            isa::st_shared_1(shared(thread), [2]);
        },
        "race",
    );
    // A warp's own barrier orders its own lanes, and no others.
    works(|_| unsafe {
        let thread = isa::thread_x();
        isa::st_shared_1(shared(thread), [1]);
        isa::warp_sync();
        isa::ld_shared_1(shared(thread ^ 1));
    });
    for seed in 0..SEEDS {
        let fault = run(
            |_| unsafe {
                let thread = isa::thread_x();
                isa::st_shared_1(shared(thread), [1]);
                isa::warp_sync();
                isa::ld_shared_1(shared(thread ^ 32));
            },
            seed,
        )
        .unwrap_err();
        assert!(fault.what.contains("race") || fault.what.contains("unwritten"), "{fault}");
    }
}

#[test]
fn atomics_race_with_plain_accesses_only() {
    let kernel = |p: *const u8| unsafe {
        if isa::thread_x() == 0 {
            isa::st_shared_1(shared(0), [0]);
        }
        isa::bar_sync();
        isa::atom_add_shared(shared(0), 2);
        isa::bar_sync();
        let [x] = isa::ld_shared_1(shared(0));
        isa::st_global_1(buffer(p) + 4 * isa::thread_x() as u64, [x]);
    };
    for seed in 0..SEEDS {
        assert_eq!(run(kernel, seed).unwrap()[..64], [128; 64]);
    }
    faults(
        |_| unsafe {
            if isa::thread_x() == 0 {
                isa::st_shared_1(shared(0), [0]);
            }
            isa::bar_sync();
            isa::atom_add_shared(shared(0), 2);
            isa::ld_shared_1(shared(0));
        },
        "race",
    );
}

#[test]
fn accesses_out_of_bounds_and_misaligned() {
    faults(|_| unsafe { isa::st_shared_1(shared(1024), [1]) }, "out of bounds");
    faults(|_| unsafe { isa::st_shared_1(4 * isa::thread_x(), [1]) }, "out of bounds");
    faults(|p| unsafe { isa::st_global_1(buffer(p) + 1024, [1]) }, "out of bounds");
    faults(|p| _ = unsafe { isa::ld_global_1(buffer(p) - 4) }, "out of bounds");
    faults(|_| _ = unsafe { isa::ld_global_1(64) }, "nothing is allocated");
    faults(|p| _ = unsafe { isa::ld_global_4(buffer(p) + 8) }, "misaligned");
    faults(|_| unsafe { isa::st_shared_4(shared(2), [0; 4]) }, "misaligned");
    faults(|p| unsafe { isa::cp_async_16(shared(4 * isa::thread_x()), buffer(p) + 4, 16) }, "misaligned");
    // A copy of no bytes reads nothing.
    works(|_| unsafe { isa::cp_async_16(shared(4 * isa::thread_x()), 64, 0) });
}

#[test]
fn reads_of_unwritten_memory() {
    faults(|_| _ = unsafe { isa::ld_shared_1(shared(isa::thread_x())) }, "unwritten shared");
    faults(|_| _ = unsafe { isa::ldmatrix_x4(shared(4 * (isa::thread_x() % 32))) }, "unwritten shared");
    let fault = run_with(|p| _ = unsafe { isa::ld_global_1(buffer(p)) }, 1, 64, false, 0).unwrap_err();
    assert!(fault.what.contains("unwritten global"), "{fault}");
}

#[test]
fn races_between_ctas() {
    // All CTAs write the same words.
    let same = |p: *const u8| unsafe { isa::st_global_1(buffer(p) + 4 * isa::thread_x() as u64, [1]) };
    let own = |p: *const u8| unsafe {
        isa::st_global_1(buffer(p) + 4 * (64 * isa::block_x() + isa::thread_x()) as u64, [1]);
    };
    // One CTA reads what another writes.
    let reads = |p: *const u8| unsafe {
        let thread = isa::thread_x() as u64;
        isa::st_global_1(buffer(p) + 4 * (64 * isa::block_x() as u64 + thread), [1]);
        isa::ld_global_1(buffer(p) + 4 * ((64 * isa::block_x() as u64 + thread + 64) % 192));
    };
    let adds = |p: *const u8| _ = unsafe { isa::atom_add_global(buffer(p), 1) };
    for seed in 0..SEEDS {
        assert!(run_with(same, 3, 256, true, seed).unwrap_err().what.contains("race"));
        assert!(run_with(reads, 3, 256, true, seed).unwrap_err().what.contains("race"));
        assert!(run_with(own, 3, 256, true, seed).is_ok());
        assert_eq!(run_with(adds, 3, 256, true, seed).unwrap()[0], 192);
    }
}

#[test]
fn a_kernels_panic_is_a_fault() {
    let fault = run(
        |_| {
            let lanes = [0u32; 8];
            let i = isa::thread_x() as usize;
            assert!(lanes.get(i % 64).is_some(), "lane {i} has no place");
        },
        0,
    )
    .unwrap_err();
    assert!(fault.what.contains("has no place"), "{fault}");
}

#[test]
fn bank_conflicts_are_counted() {
    let cycles = |run: fn(*const u8)| {
        let kernel = Kernel { name: "banks", threads: 32, cluster: 1, shared_bytes: 1 << 14, run };
        let memory = Memory::default();
        let stats =
            launch(&memory, &Launch { kernel, grid: [1, 1], params: &[0], seed: 0, number: 0 }).unwrap();
        (stats.shared_cycles, stats.shared_cycles_ideal)
    };
    assert_eq!(
        cycles(|_| unsafe {
            isa::st_shared_1(shared(isa::thread_x()), [1]);
            isa::warp_sync();
        }),
        (1, 1)
    );
    assert_eq!(
        cycles(|_| unsafe {
            isa::st_shared_1(shared(isa::thread_x() * 8), [1]);
            isa::warp_sync();
        }),
        (8, 1)
    );
    assert_eq!(
        cycles(|_| unsafe {
            isa::st_shared_4(shared(isa::thread_x() * 4), [1; 4]);
            isa::warp_sync();
        }),
        (4, 4)
    );
}

/// Four CTAs each write a word; the last to come to the counter adds them up.
fn last_arriver(params: *const u8, acq_rel: bool, before: bool) {
    let (at, thread) = (buffer(params), isa::thread_x());
    let mine = at + 256 * (1 + isa::block_x() as u64) + 4 * thread as u64;
    unsafe {
        isa::st_global_1(mine, [thread]);
        if before {
            isa::bar_sync();
        }
        if thread == 0 {
            let old = if acq_rel { isa::atom_inc_global_acq_rel(at, 3) } else { isa::atom_inc_global(at, 3) };
            isa::st_shared_1(shared(0), [old]);
        }
        isa::bar_sync();
        let last = isa::ld_shared_1(shared(0))[0] == 3;
        if last {
            let other = at + 256 * (1 + (isa::block_x() as u64 + 1) % 4) + 4 * ((thread as u64 + 1) % 64);
            isa::st_global_1(at + 256 * 5 + 4 * thread as u64, isa::ld_global_1(other));
        }
    }
}

#[test]
fn other_ctas_words_without_an_order() {
    let run = |run: fn(*const u8), seed| run_with(run, 4, 64 * 6, true, seed);
    for seed in 0..SEEDS {
        let words = run(|p| last_arriver(p, true, true), seed).unwrap();
        assert_eq!(words[0], 0);
        assert!((0..64).all(|t| words[64 * 5 + t] == (t as u32 + 1) % 64));
        let broken: [fn(*const u8); 2] = [|p| last_arriver(p, false, true), |p| last_arriver(p, true, false)];
        for kernel in broken {
            let fault = run(kernel, seed).unwrap_err();
            assert!(fault.what.contains("race"), "{fault}");
        }
    }
}

/// The lanes that did not come to the counter themselves look before a barrier has told them.
#[test]
fn other_ctas_words_before_a_barrier() {
    fn kernel(params: *const u8, after: bool) {
        let (at, thread) = (buffer(params), isa::thread_x());
        unsafe {
            isa::st_global_1(at + 256 * (1 + isa::block_x() as u64) + 4 * thread as u64, [7]);
            isa::bar_sync();
            if thread == 0 {
                isa::atom_inc_global_acq_rel(at, 1);
            }
            if after {
                isa::bar_sync();
            }
            if thread == 33 {
                isa::ld_global_1(at + 256 * (1 + (isa::block_x() as u64 + 1) % 2));
            }
        }
    }
    for seed in 0..SEEDS {
        // The first CTA finds nothing written; the second one, words that it has no order with.
        let broken = run_with(|p| kernel(p, false), 2, 64 * 4, true, seed);
        assert!(broken.unwrap_err().what.contains("race"));
        assert!(run_with(|p| kernel(p, true), 2, 64 * 4, true, seed).is_ok());
    }
}
