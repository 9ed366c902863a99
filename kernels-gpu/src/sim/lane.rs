//! What an instruction of the running lane does to its cluster: the bodies behind `isa` on the host.

use std::cell::Cell;
use std::collections::VecDeque;
use std::format;
use std::panic::Location;
use std::ptr;
use std::rc::Rc;
use std::string::String;
use std::vec::Vec;

use corosensei::Yielder;

use super::clock::{Clock, Stamp};
use super::cluster::Cluster;
use super::global::{Mark, Now};
use super::shared::{Actor, Flight};
use super::warp::Exchange;

/// A lane of the running cluster.
pub(super) struct Lane {
    pub(super) ready: bool,
    pub(super) done: bool,
    /// Where it waits.
    pub(super) line: Option<&'static Location<'static>>,
    /// Number of the named barrier that it waits at.
    pub(super) at_barrier: Option<u32>,
    /// Whether it waits for registers.
    pub(super) wants_registers: bool,
    /// What came before what it does now.
    pub(super) clock: Clock,
    /// Its own time: goes on with everything that others may wait for.
    pub(super) time: u32,
    yielder: *const Yielder<(), ()>,
    /// Copies since the last commit, and committed groups, oldest first.
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
    /// Shared accesses since the warp's last collective: address and bytes.
    pub(super) log: Vec<(u32, u32)>,
}

impl Lane {
    pub(super) fn new(clock: Clock) -> Self {
        Lane {
            ready: true,
            done: false,
            line: None,
            at_barrier: None,
            wants_registers: false,
            clock,
            time: 1,
            yielder: ptr::null(),
            open: Vec::new(),
            groups: VecDeque::new(),
            log: Vec::new(),
        }
    }
}

/// Registers that each lane of a CTA has at its launch, where the CTA has an SM of its own.
pub(super) fn launch_registers(threads: u32) -> u32 {
    (65536 / threads / 8 * 8).min(256)
}

/// A `cp.async` on its way.
struct Copy {
    to: u32,
    /// One or four.
    words: usize,
    /// Read early: the data; else where it will be read.
    data: Result<[u32; 4], u64>,
}

/// Place of a lane, for `isa::thread`.
pub(crate) struct Here {
    pub(crate) thread: u32,
    pub(crate) block: [u32; 2],
    pub(crate) grid: [u32; 2],
    /// In its cluster, of its CTA.
    pub(crate) rank: u32,
}

std::thread_local! {
    static CLUSTER: Cell<*mut Cluster<'static>> = const { Cell::new(ptr::null_mut()) };
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

/// Called before a lane is resumed.
pub(super) fn set_current(cluster: *mut Cluster<'static>, thread: usize) {
    CLUSTER.set(cluster);
    THREAD.set(thread);
}

pub(super) fn current_thread() -> usize {
    THREAD.get()
}

/// Called first thing by a lane.
pub(super) fn enter(thread: usize, yielder: &Yielder<(), ()>) {
    with(|c, _| c.lanes[thread].yielder = yielder);
}

/// The running cluster, for as long as `f` runs; `f` never suspends.
pub(super) fn with<R>(f: impl FnOnce(&mut Cluster<'static>, usize) -> R) -> R {
    let cluster = CLUSTER.get();
    assert!(!cluster.is_null(), "a kernel runs under sim::launch only");
    // SAFETY: `set_current` was called with the cluster that drives this lane; the driver holds no reference into
    // it while a lane runs, and lanes run one at a time.
    f(unsafe { &mut *cluster }, THREAD.get())
}

pub(super) fn suspend() {
    let yielder = with(|c, thread| c.lanes[thread].yielder);
    // SAFETY: set by `enter` on this lane's own stack, which is alive while the lane runs.
    unsafe { (*yielder).suspend(()) }
}

pub(crate) fn here() -> Here {
    with(|c, thread| {
        let rank = c.rank(thread);
        let thread = thread as u32 % c.launch.kernel.threads;
        Here { thread, block: c.ctas[rank].block, grid: c.launch.grid, rank: rank as u32 }
    })
}

impl Cluster<'_> {
    /// The lane, as it is now.
    pub(super) fn stamp(&self, thread: usize) -> Stamp {
        Stamp { agent: thread as u16, time: self.lanes[thread].time }
    }

    /// The lane, as it comes to global memory.
    pub(super) fn now(&self, thread: usize) -> Now {
        let (rank, lane) = (self.rank(thread), &self.lanes[thread]);
        let cta = &self.ctas[rank];
        let index = cta.block[1] * self.launch.grid[0] + cta.block[0];
        let threads = self.launch.kernel.threads;
        Now {
            mark: Mark::new(self.launch.number, index, thread as u32 % threads, lane.time),
            first: rank * threads as usize,
            agent: thread as u16,
            clock: lane.clock.clone(),
            acquired: cta.acquired.clone(),
        }
    }

    pub(super) fn check<T>(
        &self,
        thread: usize,
        line: &'static Location<'static>,
        result: Result<T, String>,
    ) -> T {
        result.unwrap_or_else(|what| self.raise(thread, Some(line), what))
    }

    /// What the lane has done so far, for others; what it does from now on is later.
    pub(super) fn release(&mut self, thread: usize) -> Clock {
        let lane = &mut self.lanes[thread];
        let released = lane.clock.with([(thread as u16, lane.time)].into_iter());
        lane.time += 1;
        released
    }

    /// Everything in `clock` came before what the lane does from now on.
    pub(super) fn acquire(&mut self, thread: usize, clock: &Clock) {
        let joined = self.joins.join(&self.lanes[thread].clock, clock);
        self.lanes[thread].clock = joined;
    }

    /// All of these lanes meet: what each did came before what any of them does from now on.
    pub(super) fn meet(&mut self, threads: &[usize]) {
        let mut all = self.lanes[threads[0]].clock.clone();
        for &thread in threads {
            all = self.joins.join(&all, &self.lanes[thread].clock);
        }
        let all = all.with(threads.iter().map(|&t| (t as u16, self.lanes[t].time)));
        for &thread in threads {
            self.lanes[thread].clock = all.clone();
            self.lanes[thread].time += 1;
        }
    }

    /// The shared memory that an address of a lane is in, and the address there.
    pub(super) fn window(&self, thread: usize, at: u32) -> (usize, u32) {
        match at >> WINDOW_BITS {
            0 => (self.rank(thread), at),
            // Of a CTA that is not there: the lane's own finds the address out of bounds.
            rank if rank as usize > self.ctas.len() => (self.rank(thread), at),
            rank => (rank as usize - 1, at & ((1 << WINDOW_BITS) - 1)),
        }
    }

    /// An access of a lane to shared memory.
    fn access<T>(
        &mut self,
        thread: usize,
        line: &'static Location<'static>,
        at: u32,
        bytes: u32,
        f: impl FnOnce(&mut super::shared::Shared, u32, &Actor<'_>) -> Result<T, String>,
    ) -> T {
        let (rank, at) = self.window(thread, at);
        let stamp = self.stamp(thread);
        let Cluster { ctas, lanes, .. } = self;
        let who = Actor { stamp, clock: &lanes[thread].clock, lane: Some(thread as u16) };
        let result = f(&mut ctas[rank].shared, at, &who);
        lanes[thread].log.push((at, bytes));
        self.check(thread, line, result)
    }
}

/// Addresses in the cluster's window: the CTA's rank and one, above these bits. Without, the lane's own CTA.
const WINDOW_BITS: u32 = 24;

pub(crate) fn map_shared(at: u32, rank: u32) -> u32 {
    at | (rank + 1) << WINDOW_BITS
}

/// All lanes of a warp bring `args` to the same line; `model` computes what each takes away.
#[track_caller]
pub(crate) fn collective(
    name: &'static str,
    args: &[u32],
    model: impl FnOnce(&mut Exchange<'_>),
) -> [u32; 4] {
    let line = Location::caller();
    let wait = with(|c, thread| {
        let (w, lane) = (thread / 32, thread % 32);
        let warp = &mut c.warps[w];
        match warp.at {
            Some((other_name, other_line)) if (other_name, other_line) != (name, line) => {
                let what = format!(
                    "lanes of a warp diverge: this one is at {name}, others at {other_name}, {other_line}"
                );
                c.raise(thread, Some(line), what)
            }
            _ => warp.at = Some((name, line)),
        }
        warp.args[lane][..args.len()].copy_from_slice(args);
        warp.arrived += 1;
        if warp.arrived < 32 {
            c.lanes[thread].line = Some(line);
            return true;
        }
        *c.stats.collectives.entry(name).or_default() += 1;
        c.count_conflicts(w);
        let mut exchange = Exchange::take(c, w, line);
        model(&mut exchange);
        exchange.give();
        c.warps[w].arrived = 0;
        c.warps[w].at = None;
        c.lanes[w * 32..w * 32 + 32].iter_mut().for_each(|l| l.ready = true);
        c.lanes[thread].ready = false;
        false
    });
    if wait {
        suspend();
    }
    with(|c, thread| c.warps[thread / 32].out[thread % 32])
}

#[track_caller]
pub(crate) fn warp_sync() {
    collective("bar.warp", &[], |w| w.meet());
}

/// `N` words from global memory, first in an array of four.
fn read_words<const N: usize>(c: &mut Cluster<'_>, from: u64, now: &Now) -> Result<[u32; 4], String> {
    let read = c.global.read::<N>(from, now)?;
    let mut words = [0; 4];
    words[..N].copy_from_slice(&read);
    Ok(words)
}

#[track_caller]
pub(crate) fn cp_async<const N: usize>(to: u32, from: u64, bytes: u32) {
    let line = Location::caller();
    with(|c, thread| {
        let now = c.now(thread);
        let flight = Flight::Copy(thread as u16);
        c.access(thread, line, to, 4 * N as u32, |shared, at, who| shared.depart(at, N, who, flight));
        // Drawn: the data is there at once, or only when it is waited for.
        let data = if bytes == 0 {
            Ok([0; 4])
        } else {
            c.stats.global_copied += 4 * N as u64;
            let data = read_words::<N>(c, from, &now);
            let data = c.check(thread, line, data);
            if c.rng.bits() & 1 == 0 { Ok(data) } else { Err(from) }
        };
        let rank = c.rank(thread);
        if let Ok(data) = data {
            c.ctas[rank].shared.arrive_early(to, &data[..N]);
        }
        c.lanes[thread].open.push(Copy { to, words: N, data });
    });
}

pub(crate) fn cp_async_commit() {
    with(|c, thread| {
        let group = std::mem::take(&mut c.lanes[thread].open);
        c.lanes[thread].groups.push_back(group);
    });
}

#[track_caller]
pub(crate) fn cp_async_wait(pending: usize) {
    let line = Location::caller();
    with(|c, thread| {
        while c.lanes[thread].groups.len() > pending {
            let group = c.lanes[thread].groups.pop_front().unwrap_or_default();
            let (stamp, now, rank) = (c.stamp(thread), c.now(thread), c.rank(thread));
            for copy in group {
                let data = match copy.data {
                    Ok(data) => data,
                    Err(from) => {
                        let data = match copy.words {
                            1 => read_words::<1>(c, from, &now),
                            _ => read_words::<4>(c, from, &now),
                        };
                        c.check(thread, line, data)
                    }
                };
                c.ctas[rank].shared.land(copy.to, &data[..copy.words], stamp, true);
            }
        }
    });
}

/// The lane's stores so far are for the async proxy too.
pub(crate) fn fence_proxy() {
    with(|c, thread| {
        let lane = &mut c.lanes[thread];
        c.fences[thread].push(lane.time);
        lane.time += 1;
    });
}

#[track_caller]
pub(crate) fn read_shared<const N: usize>(at: u32) -> [u32; N] {
    let line = Location::caller();
    with(|c, thread| c.access(thread, line, at, 4 * N as u32, |shared, at, who| shared.read(at, who)))
}

#[track_caller]
pub(crate) fn write_shared<const N: usize>(at: u32, x: [u32; N]) {
    let line = Location::caller();
    with(|c, thread| c.access(thread, line, at, 4 * N as u32, |shared, at, who| shared.write(at, x, who)));
}

#[track_caller]
fn atomic_shared(at: u32, x: u64, words: usize) -> u64 {
    let line = Location::caller();
    with(|c, thread| {
        let (rank, at) = c.window(thread, at);
        let stamp = c.stamp(thread);
        let who = Actor { stamp, clock: &c.lanes[thread].clock, lane: Some(thread as u16) };
        let old = c.ctas[rank].shared.atomic_add(at, x, words, &who);
        c.check(thread, line, old)
    })
}

#[track_caller]
pub(crate) fn atom_add_shared(at: u32, x: u32) -> u32 {
    atomic_shared(at, x as u64, 1) as u32
}

#[track_caller]
pub(crate) fn atom_add_shared_u64(at: u32, x: u64) {
    atomic_shared(at, x, 2);
}

#[track_caller]
pub(crate) fn read_global<const N: usize>(at: u64) -> [u32; N] {
    let line = Location::caller();
    with(|c, thread| {
        c.stats.global_read += 4 * N as u64;
        let now = c.now(thread);
        let read = c.global.read(at, &now);
        c.check(thread, line, read)
    })
}

#[track_caller]
pub(crate) fn write_global<const N: usize>(at: u64, x: [u32; N]) {
    let line = Location::caller();
    with(|c, thread| {
        c.stats.global_written += 4 * N as u64;
        let now = c.now(thread);
        let written = c.global.write(at, x, &now);
        c.check(thread, line, written);
    });
}

#[track_caller]
pub(crate) fn read_global_u16(at: u64) -> u32 {
    let line = Location::caller();
    with(|c, thread| {
        c.stats.global_read += 2;
        let now = c.now(thread);
        let read = c.global.read_u16(at, &now);
        c.check(thread, line, read)
    })
}

#[track_caller]
pub(crate) fn write_global_u16(at: u64, x: u32) {
    let line = Location::caller();
    with(|c, thread| {
        c.stats.global_written += 2;
        let now = c.now(thread);
        let written = c.global.write_u16(at, x, &now);
        c.check(thread, line, written);
    });
}

/// The word becomes `f` of itself; gives the old one.
#[track_caller]
pub(crate) fn atom_global(at: u64, f: impl FnOnce(u32) -> u32) -> u32 {
    let line = Location::caller();
    with(|c, thread| {
        let now = c.now(thread);
        let old = c.global.atomic(at, f, &now);
        c.check(thread, line, old)
    })
}

/// As [`atom_global`]; what CTAs did before is known to those that come to the word after them.
#[track_caller]
pub(crate) fn atom_global_acq_rel(at: u64, f: impl FnOnce(u32) -> u32) -> u32 {
    with(|c, thread| {
        let (now, rank) = (c.now(thread), c.rank(thread));
        let clock = c.release(thread);
        c.ctas[rank].acquired = Rc::new(c.releases.pass(at, &now, clock));
    });
    atom_global(at, f)
}
