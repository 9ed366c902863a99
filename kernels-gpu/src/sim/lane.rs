//! What an instruction of the running lane does to its CTA: the bodies behind `isa` on the host.

use std::cell::Cell;
use std::collections::VecDeque;
use std::format;
use std::panic::Location;
use std::ptr;
use std::string::String;
use std::vec::Vec;

use corosensei::Yielder;

use super::cta::Cta;
use super::global::Mark;
use super::shared::Stamp;
use super::warp::Exchange;

/// A lane of the running CTA.
pub(super) struct Lane {
    pub(super) ready: bool,
    pub(super) done: bool,
    /// Where it waits.
    pub(super) line: Option<&'static Location<'static>>,
    /// Barrier of the CTA that it waits for; 0: none yet.
    pub(super) waits_at_barrier: u32,
    yielder: *const Yielder<(), ()>,
    /// Copies since the last commit, and committed groups, oldest first.
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
    /// Shared accesses since the warp's last collective: address and bytes.
    pub(super) log: Vec<(u32, u32)>,
}

impl Default for Lane {
    fn default() -> Self {
        Lane {
            ready: true,
            done: false,
            line: None,
            waits_at_barrier: 0,
            yielder: ptr::null(),
            open: Vec::new(),
            groups: VecDeque::new(),
            log: Vec::new(),
        }
    }
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
}

std::thread_local! {
    static CTA: Cell<*mut Cta<'static>> = const { Cell::new(ptr::null_mut()) };
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

/// Called before a lane is resumed.
pub(super) fn set_current(cta: *mut Cta<'static>, thread: usize) {
    CTA.set(cta);
    THREAD.set(thread);
}

pub(super) fn current_thread() -> usize {
    THREAD.get()
}

/// Called first thing by a lane.
pub(super) fn enter(thread: usize, yielder: &Yielder<(), ()>) {
    with(|cta, _| cta.lanes[thread].yielder = yielder);
}

/// The running CTA, for as long as `f` runs; `f` never suspends.
fn with<R>(f: impl FnOnce(&mut Cta<'static>, usize) -> R) -> R {
    let cta = CTA.get();
    assert!(!cta.is_null(), "a kernel runs under sim::launch only");
    // SAFETY: `set_current` was called with the CTA that drives this lane; the driver holds no reference into
    // it while a lane runs, and lanes run one at a time.
    f(unsafe { &mut *cta }, THREAD.get())
}

fn suspend() {
    let yielder = with(|cta, thread| cta.lanes[thread].yielder);
    // SAFETY: set by `enter` on this lane's own stack, which is alive while the lane runs.
    unsafe { (*yielder).suspend(()) }
}

pub(crate) fn here() -> Here {
    with(|cta, thread| Here { thread: thread as u32, block: cta.block, grid: cta.launch.grid })
}

impl Cta<'_> {
    pub(super) fn stamp(&self, thread: usize) -> Stamp {
        Stamp { lane: thread as u16, cta: self.epoch, warp: self.warps[thread / 32].epoch }
    }

    fn mark(&self, thread: usize) -> Mark {
        let index = self.block[1] * self.launch.grid[0] + self.block[0];
        Mark::new(self.launch.number, index, thread as u32, self.epoch)
    }

    pub(super) fn check<T>(
        &self,
        thread: usize,
        line: &'static Location<'static>,
        result: Result<T, String>,
    ) -> T {
        result.unwrap_or_else(|what| self.raise(thread, Some(line), what))
    }
}

/// All lanes of a warp bring `args` to the same line; `model` computes what each takes away.
#[track_caller]
pub(crate) fn collective(
    name: &'static str,
    args: &[u32],
    model: impl FnOnce(&mut Exchange<'_>),
) -> [u32; 4] {
    let line = Location::caller();
    let wait = with(|cta, thread| {
        let (w, lane) = (thread / 32, thread % 32);
        let warp = &mut cta.warps[w];
        match warp.at {
            Some((other_name, other_line)) if (other_name, other_line) != (name, line) => {
                let what = format!(
                    "lanes of a warp diverge: this one is at {name}, others at {other_name}, {other_line}"
                );
                cta.raise(thread, Some(line), what)
            }
            _ => warp.at = Some((name, line)),
        }
        warp.args[lane][..args.len()].copy_from_slice(args);
        warp.arrived += 1;
        if warp.arrived < 32 {
            cta.lanes[thread].line = Some(line);
            return true;
        }
        *cta.stats.collectives.entry(name).or_default() += 1;
        cta.count_conflicts(w);
        let mut exchange = Exchange::take(cta, w, line);
        model(&mut exchange);
        exchange.give();
        cta.warps[w].arrived = 0;
        cta.warps[w].at = None;
        cta.lanes[w * 32..w * 32 + 32].iter_mut().for_each(|l| l.ready = true);
        cta.lanes[thread].ready = false;
        false
    });
    if wait {
        suspend();
    }
    with(|cta, thread| cta.warps[thread / 32].out[thread % 32])
}

#[track_caller]
pub(crate) fn warp_sync() {
    collective("bar.warp", &[], |w| w.next_epoch());
}

#[track_caller]
pub(crate) fn barrier() {
    let line = Location::caller();
    let wait = with(|cta, thread| {
        let w = thread / 32;
        if let Some((name, other)) = cta.warps[w].at {
            let what = format!("lanes of a warp diverge: this one is at bar.sync, others at {name}, {other}");
            cta.raise(thread, Some(line), what);
        }
        let mut others = cta.lanes[w * 32..w * 32 + 32].iter().filter(|l| l.waits_at_barrier > cta.epoch);
        if let Some(other) = others.find_map(|l| l.line.filter(|&l| l != line)) {
            cta.raise(thread, Some(line), format!("a warp's lanes are at different barriers: {other}"));
        }
        if let Some(gone) = cta.lanes.iter().position(|l| l.done) {
            cta.raise(thread, Some(line), format!("bar.sync after thread {gone} has returned"));
        }
        cta.at_barrier += 1;
        cta.lanes[thread].line = Some(line);
        if cta.at_barrier < cta.lanes.len() as u32 {
            cta.lanes[thread].waits_at_barrier = cta.epoch + 1;
            return true;
        }
        *cta.stats.collectives.entry("bar.sync").or_default() += 1;
        (0..cta.warps.len()).for_each(|w| cta.count_conflicts(w));
        cta.at_barrier = 0;
        cta.epoch += 1;
        cta.lanes.iter_mut().for_each(|l| l.ready = true);
        cta.lanes[thread].ready = false;
        false
    });
    if wait {
        suspend();
    }
}

/// `N` words from global memory, first in an array of four.
fn read_words<const N: usize>(cta: &mut Cta<'_>, from: u64, mark: Mark) -> Result<[u32; 4], String> {
    let read = cta.global.read::<N>(from, mark)?;
    let mut words = [0; 4];
    words[..N].copy_from_slice(&read);
    Ok(words)
}

#[track_caller]
pub(crate) fn cp_async<const N: usize>(to: u32, from: u64, bytes: u32) {
    let line = Location::caller();
    with(|cta, thread| {
        let (stamp, mark) = (cta.stamp(thread), cta.mark(thread));
        let departed = cta.shared.depart(to, N, stamp);
        cta.check(thread, line, departed);
        // Drawn: the data is there at once, or only when it is waited for.
        let data = if bytes == 0 {
            Ok([0; 4])
        } else {
            cta.stats.global_copied += 4 * N as u64;
            let data = read_words::<N>(cta, from, mark);
            let data = cta.check(thread, line, data);
            if cta.rng.bits() & 1 == 0 { Ok(data) } else { Err(from) }
        };
        if let Ok(data) = data {
            cta.shared.arrive_early(to, &data[..N]);
        }
        cta.lanes[thread].open.push(Copy { to, words: N, data });
        cta.lanes[thread].log.push((to, 4 * N as u32));
    });
}

pub(crate) fn cp_async_commit() {
    with(|cta, thread| {
        let group = std::mem::take(&mut cta.lanes[thread].open);
        cta.lanes[thread].groups.push_back(group);
    });
}

#[track_caller]
pub(crate) fn cp_async_wait(pending: usize) {
    let line = Location::caller();
    with(|cta, thread| {
        while cta.lanes[thread].groups.len() > pending {
            let group = cta.lanes[thread].groups.pop_front().unwrap_or_default();
            let (stamp, mark) = (cta.stamp(thread), cta.mark(thread));
            for copy in group {
                let data = match copy.data {
                    Ok(data) => data,
                    Err(from) => {
                        let data = match copy.words {
                            1 => read_words::<1>(cta, from, mark),
                            _ => read_words::<4>(cta, from, mark),
                        };
                        cta.check(thread, line, data)
                    }
                };
                cta.shared.land(copy.to, &data[..copy.words], stamp);
            }
        }
    });
}

#[track_caller]
pub(crate) fn read_shared<const N: usize>(at: u32) -> [u32; N] {
    let line = Location::caller();
    with(|cta, thread| {
        let stamp = cta.stamp(thread);
        let read = cta.shared.read(at, stamp);
        cta.lanes[thread].log.push((at, 4 * N as u32));
        cta.check(thread, line, read)
    })
}

#[track_caller]
pub(crate) fn write_shared<const N: usize>(at: u32, x: [u32; N]) {
    let line = Location::caller();
    with(|cta, thread| {
        let stamp = cta.stamp(thread);
        let written = cta.shared.write(at, x, stamp);
        cta.lanes[thread].log.push((at, 4 * N as u32));
        cta.check(thread, line, written);
    });
}

#[track_caller]
pub(crate) fn atom_add_shared(at: u32, x: u32) -> u32 {
    let line = Location::caller();
    with(|cta, thread| {
        let stamp = cta.stamp(thread);
        let old = cta.shared.atomic_add(at, x as u64, 1, stamp);
        cta.check(thread, line, old) as u32
    })
}

#[track_caller]
pub(crate) fn atom_add_shared_u64(at: u32, x: u64) {
    let line = Location::caller();
    with(|cta, thread| {
        let stamp = cta.stamp(thread);
        let old = cta.shared.atomic_add(at, x, 2, stamp);
        cta.check(thread, line, old);
    });
}

#[track_caller]
pub(crate) fn read_global<const N: usize>(at: u64) -> [u32; N] {
    let line = Location::caller();
    with(|cta, thread| {
        cta.stats.global_read += 4 * N as u64;
        let mark = cta.mark(thread);
        let read = cta.global.read(at, mark);
        cta.check(thread, line, read)
    })
}

#[track_caller]
pub(crate) fn write_global<const N: usize>(at: u64, x: [u32; N]) {
    let line = Location::caller();
    with(|cta, thread| {
        cta.stats.global_written += 4 * N as u64;
        let mark = cta.mark(thread);
        let written = cta.global.write(at, x, mark);
        cta.check(thread, line, written);
    });
}

#[track_caller]
pub(crate) fn read_global_u16(at: u64) -> u32 {
    let line = Location::caller();
    with(|cta, thread| {
        cta.stats.global_read += 2;
        let mark = cta.mark(thread);
        let read = cta.global.read_u16(at, mark);
        cta.check(thread, line, read)
    })
}

#[track_caller]
pub(crate) fn write_global_u16(at: u64, x: u32) {
    let line = Location::caller();
    with(|cta, thread| {
        cta.stats.global_written += 2;
        let mark = cta.mark(thread);
        let written = cta.global.write_u16(at, x, mark);
        cta.check(thread, line, written);
    });
}

#[track_caller]
pub(crate) fn atom_add_global(at: u64, x: u32) -> u32 {
    let line = Location::caller();
    with(|cta, thread| {
        let mark = cta.mark(thread);
        let old = cta.global.atomic_add(at, x, mark);
        cta.check(thread, line, old)
    })
}
