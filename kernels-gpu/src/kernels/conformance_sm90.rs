//! Hopper's instructions on data that the test chooses: the simulator's models and the GPU must agree.

use crate::abi::{ConformanceSm90Params, TensorMap, conformance as op};
use crate::isa;
use crate::tile::{BF16, F16, Half, Panels, Pending};

/// One warpgroup.
pub(super) struct Config;

impl super::Config for Config {
    const THREADS: u32 = 128;
    const MIN_CTAS: u32 = 1;
    /// A barrier before, then A and B of the largest product.
    const SHARED_BYTES: u32 = TILES + 8192 + 32768;
}

/// As [`Config`], two CTAs to a cluster.
pub(super) struct Cluster;

impl super::Config for Cluster {
    const THREADS: u32 = 128;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = Config::SHARED_BYTES;
    const CLUSTER: u32 = 2;
}

/// A producer, a consumer, and one that has nothing to do: with 168 registers a lane at launch.
pub(super) struct Roles;

impl super::Config for Roles {
    const THREADS: u32 = 384;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = TILES;
}

/// Where tiles begin; barriers stand before.
const TILES: u32 = 1024;

#[inline(always)]
fn wait(barrier: u32, parity: u32) {
    // SAFETY: every barrier here is initialised before a barrier of the CTA.
    while !unsafe { isa::mbarrier_try_wait(barrier, parity) } {}
}

/// Makes the barrier at the base one of `count` arrivals; all lanes.
#[inline(always)]
fn init(count: u32) -> u32 {
    let barrier = isa::shared_base();
    if isa::thread_x() == 0 {
        // SAFETY: nothing else uses the place.
        unsafe { isa::mbarrier_init(barrier, count) };
        isa::fence_mbarrier_init();
    }
    isa::bar_sync();
    barrier
}

/// Input words `first..` to shared memory at `to`, fenced for the async proxy; all lanes.
#[inline(always)]
fn fill(p: &ConformanceSm90Params, first: u32, to: u32, bytes: u32) {
    let mut at = 16 * isa::thread_x();
    while at < bytes {
        // SAFETY: the test gives as many words; the place is this call's.
        unsafe { isa::st_shared_4(to + at, isa::ld_global_4(p.input + 4 * first as u64 + at as u64)) };
        at += 16 * 128;
    }
    isa::fence_proxy_async();
    isa::bar_sync();
}

/// Shared memory from `from` to output; all lanes.
#[inline(always)]
fn show(output: u64, from: u32, bytes: u32) {
    let mut at = 16 * isa::thread_x();
    while at < bytes {
        // SAFETY: the test has room for it.
        unsafe { isa::st_global_4(output + at as u64, isa::ld_shared_4(from + at)) };
        at += 16 * 128;
    }
}

/// Accumulators to output, `[64, 8 T]`.
#[inline(always)]
fn show_product<const T: usize>(p: &ConformanceSm90Params, d: &[[f32; 4]; T]) {
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    for j in 0..T {
        for half in 0..2 {
            let row = 16 * warp + lane / 4 + 8 * half;
            let column = 8 * j as u32 + 2 * (lane % 4);
            let pair = [d[j][2 * half as usize], d[j][2 * half as usize + 1]].map(f32::to_bits);
            let at = p.output + 4 * (row * 8 * T as u32 + column) as u64;
            // SAFETY: the test has room for the matrix.
            unsafe { isa::st_global_2(at, pair) };
        }
    }
}

/// `A[64, 64] B[N, 64]^T`, both swizzled as the tiles are.
#[inline(always)]
fn a_bt<T: Half, const TILES_N: usize, const N: u32>(p: &ConformanceSm90Params) {
    let base = isa::shared_base() + TILES;
    fill(p, 0, base, Panels::<64, 8>::BYTES + Panels::<N, 8>::BYTES);
    let (a, b) = (Panels::<64, 8>::new(base), Panels::<N, 8>::new(base + Panels::<64, 8>::BYTES));
    // SAFETY: filled and fenced before a barrier.
    let d = unsafe { Pending::<TILES_N>::a_bt::<T, 64, N, 8>(a, 0, b) };
    show_product(p, &d.wait::<0>());
}

/// `C[64, 8 CHUNKS] + A[64, 32] B[32, 8 CHUNKS]`, A in registers: the words after B are each lane's, two steps, and C's.
#[inline(always)]
fn plus_a_b<T: Half, const TILES_N: usize, const CHUNKS: u32>(p: &ConformanceSm90Params) {
    let base = isa::shared_base() + TILES;
    fill(p, 0, base, Panels::<32, CHUNKS>::BYTES);
    let b = Panels::<32, CHUNKS>::new(base);
    let mut at = p.input + Panels::<32, CHUNKS>::BYTES as u64;
    at += 4 * (8 + 4 * TILES_N as u64) * isa::thread_x() as u64;
    // SAFETY: the test gives these words for each lane.
    let words = |i: usize| unsafe { isa::ld_global_4(at + 16 * i as u64) };
    let (a, c) = ([words(0), words(1)], core::array::from_fn(|j| words(2 + j).map(f32::from_bits)));
    // SAFETY: filled and fenced before a barrier.
    let d = unsafe { Pending::<TILES_N>::plus_a_b::<T, 32, CHUNKS, 2>(c, &a, b) };
    show_product(p, &d.wait::<0>());
}

/// One product of `[64, 16]` and `[16, 64]` by descriptors that the test makes, its addresses relative.
#[inline(always)]
fn described<const TRANS_A: u32, const TRANS_B: u32>(p: &ConformanceSm90Params) {
    let base = isa::shared_base() + TILES;
    fill(p, 0, base, 16384);
    let [a, b] = p.descriptors.map(|d| d + (base >> 4) as u64);
    isa::wgmma_fence();
    // SAFETY: the test's descriptors stay inside what was filled and fenced.
    let mut d = unsafe { isa::wgmma_first::<8, false, TRANS_A, TRANS_B>(a, b) };
    isa::wgmma_commit();
    isa::wgmma_wait::<8, 0>(&mut d);
    show_product(p, &d);
}

/// Calls `$f` for the shape that the test asks for.
macro_rules! shape {
    ($p:ident, $f:ident, [$($n:literal $tiles:literal $last:expr),*]) => {
        match ($p.shape, $p.bf16) {
            $(
                ($n, 0) => $f::<F16, $tiles, { $last }>($p),
                ($n, _) => $f::<BF16, $tiles, { $last }>($p),
            )*
            _ => {}
        }
    };
}

#[inline(always)]
pub(super) unsafe fn body(p: &ConformanceSm90Params, maps: u64) {
    match p.op {
        op::A_BT => shape!(
            p,
            a_bt,
            [64 8 64, 80 10 80, 96 12 96, 112 14 112, 128 16 128, 144 18 144, 160 20 160, 176 22 176, 192 24 192]
        ),
        op::PLUS_A_B => {
            shape!(p, plus_a_b, [64 8 8, 96 12 12, 128 16 16, 160 20 20, 192 24 24, 256 32 32])
        }
        op::DESCRIBED => match p.shape {
            0 => described::<0, 0>(p),
            1 => described::<0, 1>(p),
            2 => described::<1, 0>(p),
            _ => described::<1, 1>(p),
        },
        op::BOXES => boxes(p, maps),
        op::RUNS => runs(p),
        _ => lanes(p),
    }
}

/// A box from the first map, as it stands in shared memory; and the same bytes as a box of the second.
#[inline(always)]
fn boxes(p: &ConformanceSm90Params, maps: u64) {
    let (barrier, tile) = (init(1), isa::shared_base() + TILES);
    let [c0, c1, c2, c3, _] = p.at;
    if isa::thread_x() == 0 {
        // SAFETY: the tile is free, the barrier initialised, the maps are the parameters'.
        unsafe {
            isa::prefetch_tensor_map(maps);
            isa::mbarrier_arrive_expect_tx(barrier, p.bytes);
            match p.shape {
                2 => isa::tma_load(tile, maps, [c0, c1], barrier, isa::Keep::FIRST_OUT),
                3 => isa::tma_load(tile, maps, [c0, c1, c2], barrier, isa::Keep::LAST_OUT),
                4 => isa::tma_load(tile, maps, [c0, c1, c2, c3], barrier, isa::Keep::LAST_OUT),
                _ => isa::tma_load(tile, maps, p.at, barrier, isa::Keep::LAST_OUT),
            }
        }
    }
    wait(barrier, 0);
    show(p.output, tile, p.bytes);
    if isa::thread_x() == 0 {
        let to = maps + size_of::<TensorMap>() as u64;
        // SAFETY: the tile was written by the async proxy, which reads it.
        unsafe {
            match p.shape {
                2 => isa::tma_store(to, [c0, c1], tile),
                3 => isa::tma_store(to, [c0, c1, c2], tile),
                4 => isa::tma_store(to, [c0, c1, c2, c3], tile),
                _ => isa::tma_store(to, p.at, tile),
            }
        }
        isa::bulk_commit();
        isa::bulk_wait::<0>();
    }
}

/// Bytes side by side in, and by way of ordinary stores out again, turned round.
#[inline(always)]
fn runs(p: &ConformanceSm90Params) {
    let (barrier, tile) = (init(1), isa::shared_base() + TILES);
    let back = tile + p.bytes;
    if isa::thread_x() == 0 {
        // SAFETY: the tile is free, the barrier initialised; the test gives as many bytes.
        unsafe {
            isa::mbarrier_arrive_expect_tx(barrier, p.bytes);
            isa::bulk_load(tile, p.input, p.bytes, barrier);
        }
    }
    wait(barrier, 0);
    let mut at = 4 * isa::thread_x();
    while at < p.bytes {
        // SAFETY: the run has arrived; the other half is free.
        unsafe { isa::st_shared_1(back + p.bytes - 4 - at, isa::ld_shared_1(tile + at)) };
        at += 4 * 128;
    }
    isa::fence_proxy_async();
    isa::bar_sync();
    if isa::thread_x() == 0 {
        // SAFETY: written and fenced before the barrier; the test has room.
        unsafe { isa::bulk_store(p.output, back, p.bytes) };
        isa::bulk_commit();
        isa::bulk_wait_read::<0>();
        isa::bulk_wait::<0>();
    }
}

/// Exchanges between lanes: by mbarrier, by named barriers, by `stmatrix`; and which lane `elect` chooses.
#[inline(always)]
fn lanes(p: &ConformanceSm90Params) {
    let (barrier, lane) = (init(128), isa::thread_x());
    let tile = isa::shared_base() + TILES;
    // SAFETY: the test gives 16 words a lane, and takes as many.
    let word = |i: u32| unsafe { isa::ld_global_1(p.input + 4 * (16 * lane + i) as u64) }[0];
    // SAFETY: as above.
    let put = |i: u32, x: u32| unsafe { isa::st_global_1(p.output + 4 * (16 * lane + i) as u64, [x]) };
    // Two phases: each lane shows the next one's word.
    for phase in 0..2 {
        // SAFETY: a word a lane and phase; read after the phase, to which all have arrived.
        unsafe {
            let words = tile + 512 * phase;
            isa::st_shared_1(words + 4 * lane, [word(phase)]);
            isa::mbarrier_arrive(barrier);
            wait(barrier, phase);
            put(phase, isa::ld_shared_1(words + 4 * ((lane + 1) % 128))[0]);
        }
    }
    // Warps 0 and 1 give to warps 2 and 3, which wait; the givers do not.
    let words = tile + 1024;
    if lane < 64 {
        // SAFETY: the lane's word.
        unsafe { isa::st_shared_1(words + 4 * lane, [word(2)]) };
        isa::bar_arrive_named(3, 128);
        put(2, 0);
    } else {
        isa::bar_sync_named(3, 128);
        // SAFETY: written before the barrier.
        put(2, unsafe { isa::ld_shared_1(words + 4 * (lane - 64)) }[0]);
    }
    let elected = isa::elect();
    put(3, isa::ballot(elected).count_ones());
    put(4, (isa::ballot(elected) == isa::ballot(isa::elect())) as u32);
    // Each warp's four matrices, row by row.
    let mine = tile + 2048 + 512 * (lane / 32);
    // SAFETY: the warp's own 512 bytes.
    unsafe {
        isa::stmatrix_x4(mine + 16 * (lane % 32), [5, 6, 7, 8].map(word));
        isa::warp_sync();
        let row = isa::ld_shared_4(mine + 16 * (lane % 32));
        (0..4).for_each(|i| put(5 + i, row[i as usize]));
    }
    isa::wait_for_prerequisites();
    isa::launch_dependents();
}

/// Two CTAs: the first one's multicast, the second one's remote arrival.
#[inline(always)]
pub(super) unsafe fn cluster(p: &ConformanceSm90Params, maps: u64) {
    let (barrier, tile) = (init(1), isa::shared_base() + TILES);
    let rank = isa::cluster_rank();
    // Of the first CTA: arrivals from the second.
    let seen = barrier + 8;
    if isa::thread_x() == 0 {
        // SAFETY: nothing else uses the place.
        unsafe { isa::mbarrier_init(seen, 1) };
        isa::fence_mbarrier_init();
    }
    isa::cluster_sync();
    if isa::thread_x() == 0 {
        // SAFETY: both CTAs' tiles are free, their barriers initialised.
        unsafe {
            isa::mbarrier_arrive_expect_tx(barrier, p.bytes);
            if rank == 0 {
                isa::tma_load_multicast(tile, maps, [p.at[0], p.at[1]], barrier, 3);
            }
        }
    }
    wait(barrier, 0);
    show(p.output + (rank * p.bytes) as u64, tile, p.bytes);
    if rank == 1 && isa::thread_x() == 0 {
        // SAFETY: the first CTA waits for it before it ends.
        unsafe { isa::mbarrier_arrive_cluster(isa::map_shared(seen, 0)) };
    }
    if rank == 0 {
        wait(seen, 0);
    }
    isa::cluster_sync();
}

/// A producer with few registers, a consumer with many, and a ring of one slot between them.
#[inline(always)]
pub(super) unsafe fn roles(p: &ConformanceSm90Params, _: u64) {
    let full = init(128);
    let empty = full + 8;
    if isa::thread_x() == 0 {
        // SAFETY: nothing else uses the place.
        unsafe { isa::mbarrier_init(empty, 128) };
    }
    isa::bar_sync();
    let (lane, slot) = (isa::thread_x() % 128, isa::shared_base() + 512);
    let role = isa::shfl_idx(isa::thread_x() / 128, 0);
    if role == 0 {
        isa::registers_down::<24>();
        for round in 0..4 {
            wait(empty, round & 1 ^ 1);
            // SAFETY: the slot is empty; the test gives four words a lane.
            unsafe {
                let word = isa::ld_global_1(p.input + 4 * (4 * lane + round) as u64);
                isa::st_shared_1(slot + 4 * lane, word);
                isa::mbarrier_arrive(full);
            }
        }
    } else if role == 2 {
        isa::registers_down::<24>();
    } else {
        isa::registers_up::<240>();
        for round in 0..4 {
            wait(full, round & 1);
            // SAFETY: the slot is full; the test takes four words a lane.
            unsafe {
                let word = isa::ld_shared_1(slot + 4 * (127 - lane));
                isa::mbarrier_arrive(empty);
                isa::st_global_1(p.output + 4 * (4 * lane + round) as u64, word);
            }
        }
    }
}
