//! Runs kernels on the host, lane by lane.
//!
//! Every lane is a coroutine. A collective (barrier, shuffle, `mma`, `wgmma`) suspends its lane until all lanes of the
//! warp, warpgroup or CTA have come to the same call; then one model computes all results. Shared and global memory
//! keep shadows, and every lane a vector clock: a race, a read of unwritten bytes or of a copy still in flight, an
//! access out of bounds or misaligned is a [`Fault`] that names kernel, CTA, lane and source line.
//!
//! | what works beside the lanes | how it is modelled |
//! |---|---|
//! | `cp.async` | arrives at once or when it is waited for, as the seed draws |
//! | bulk copies (TMA) | arrive between any two turns of the lanes, or when all wait; nobody may touch their target before a lane has waited for the mbarrier they count at |
//! | `wgmma` | registers hold NaN until the group is waited for; what it reads may not be written before |
//! | the async proxy | sees ordinary stores only after their lane's `fence.proxy.async`, known to who issues the operation |
//! | clusters | all CTAs of one run together |
//!
//! Clusters run one after another in an order drawn from the seed, and so do warps inside; accesses of two CTAs to the
//! same global bytes are a fault all the same, for on a GPU they have no order, unless atomics that release and acquire
//! stand between, with barriers on both sides.
//!
//! What it does not see: a write to global memory that another lane has read before without a barrier between (of
//! shared memory it does); reads by lanes that bulk loads overwrite need an order but no proxy fence, as in practice; CTAs
//! of different clusters that wait for each other, which here would wait for ever: a deadlock; grids that depend on each
//! other run one after the other.

mod barrier;
mod bulk;
mod clock;
mod cluster;
mod global;
mod lane;
mod shared;
mod tensor_map;
mod warp;
mod wgmma;

pub(crate) use barrier::{
    bar_named, barrier, cluster_sync, mbarrier_arrive, mbarrier_init, mbarrier_try_wait,
};
pub(crate) use bulk::{bulk_commit, bulk_load, bulk_store, bulk_wait, tma_load, tma_store};
pub use cluster::{Kernel, Launch, launch};
pub use global::Memory;
pub(crate) use lane::{
    atom_add_shared, atom_add_shared_u64, atom_global, atom_global_acq_rel, collective, cp_async,
    cp_async_commit, cp_async_wait, fence_proxy, here, map_shared, read_global, read_global_u16, read_shared,
    warp_sync, write_global, write_global_u16, write_shared,
};
pub use tensor_map::encode;
pub(crate) use warp::{bf16_value, f16_value, ldmatrix_x4, mma_m16n8k16, stmatrix_x4};
pub(crate) use wgmma::{A, set_registers, wgmma, wgmma_commit, wgmma_fence, wgmma_wait};

use std::collections::BTreeMap;
use std::fmt;
use std::string::String;

/// Where dynamic shared memory begins: not 0, so that a forgotten base is out of bounds.
pub(crate) const SHARED_BASE: u32 = 1024;

/// What a kernel did wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Entry name.
    pub kernel: String,
    /// CTA.
    pub block: [u32; 2],
    /// Lane, as its index in the CTA.
    pub thread: u32,
    /// Source line of the instruction.
    pub line: String,
    /// What happened.
    pub what: String,
    /// The seed that gives it again.
    pub seed: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault { kernel, block, thread, line, what, seed } = self;
        write!(f, "{kernel}: CTA {block:?}, thread {thread}, {line}: {what} (simulator seed {seed})")
    }
}

impl std::error::Error for Fault {}

/// What a launch did.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Launches by entry.
    pub launches: BTreeMap<&'static str, u64>,
    /// Warp-wide instructions by name.
    pub collectives: BTreeMap<&'static str, u64>,
    /// Bytes that lanes loaded from global memory, each access counted.
    pub global_read: u64,
    /// Bytes that asynchronous copies brought from global memory.
    pub global_copied: u64,
    /// Bytes of the 32-byte sectors that loads and copies touched, each sector once a launch: what memory has to deliver
    /// where the cache holds the rest.
    pub distinct_read: u64,
    /// Bytes written to global memory.
    pub global_written: u64,
    /// Warp-wide accesses of shared memory that were looked at for bank conflicts.
    pub shared_accesses: u64,
    /// Cycles that they took.
    pub shared_cycles: u64,
    /// Cycles that they would have taken without bank conflicts.
    pub shared_cycles_ideal: u64,
}

impl Stats {
    /// Adds the counts of another launch.
    pub fn add(&mut self, other: &Stats) {
        for (counts, more) in
            [(&mut self.launches, &other.launches), (&mut self.collectives, &other.collectives)]
        {
            for (name, n) in more {
                *counts.entry(name).or_default() += n;
            }
        }
        self.global_read += other.global_read;
        self.global_copied += other.global_copied;
        self.distinct_read += other.distinct_read;
        self.global_written += other.global_written;
        self.shared_accesses += other.shared_accesses;
        self.shared_cycles += other.shared_cycles;
        self.shared_cycles_ideal += other.shared_cycles_ideal;
    }
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}
