//! Barriers: of CTAs, of some of their warps by number, of clusters, and `mbarrier`s in shared memory.

use std::collections::BTreeMap;
use std::format;
use std::panic::Location;
use std::string::String;
use std::vec::Vec;

use super::clock::{Agent, Clock, Stamp};
use super::cluster::Cluster;
use super::lane::{suspend, with};
use super::shared::Actor;

/// A CTA's barriers.
#[derive(Default)]
pub(super) struct Barriers {
    named: [Named; 16],
    mbarriers: BTreeMap<u32, Mbarrier>,
}

/// A barrier by number.
#[derive(Default)]
struct Named {
    expected: u32,
    /// Lanes that wait, and what those that only arrived had done.
    waiting: Vec<usize>,
    arrived: Vec<Clock>,
}

/// An `mbarrier`.
struct Mbarrier {
    agent: Agent,
    initialised: Stamp,
    count: u32,
    /// Arrivals and bytes that the phase waits for. Bytes may arrive before they are expected.
    pending: u32,
    bytes: i64,
    /// Phases that are complete.
    phase: u32,
    /// What was released to this phase, and to the last complete one.
    releases: Option<Clock>,
    complete: Clock,
    /// Lanes that wait for this phase.
    waiting: Vec<usize>,
}

/// `bar.sync` (or, not `wait`ing, `bar.arrive`) of barrier `id` by `threads` lanes.
#[track_caller]
pub(crate) fn bar_named(id: u32, threads: u32, wait: bool) {
    let line = Location::caller();
    let wait = with(|c, thread| {
        let w = thread / 32;
        // Lanes that only arrive are past the barrier before their neighbours come to it.
        if let Some((name, other)) = c.warps[w].at.filter(|_| wait) {
            let what = format!("lanes of a warp diverge: this one is at bar.sync, others at {name}, {other}");
            c.raise(thread, Some(line), what);
        }
        let others = c.lanes[w * 32..w * 32 + 32].iter().filter(|l| wait && l.at_barrier.is_some());
        if let Some(other) = others.filter_map(|l| l.line).find(|&l| l != line) {
            c.raise(thread, Some(line), format!("a warp's lanes are at different barriers: {other}"));
        }
        let all = c.launch.kernel.threads;
        let rank = c.rank(thread);
        let own = rank * all as usize..(rank + 1) * all as usize;
        if let (0, Some(gone)) = (id, c.lanes[own].iter().position(|l| l.done)) {
            c.raise(thread, Some(line), format!("bar.sync after thread {gone} has returned"));
        }
        if id > 15 || threads == 0 || !threads.is_multiple_of(32) || threads > all {
            c.raise(thread, Some(line), format!("barrier {id} of {threads} lanes: 0 to 15, of whole warps"));
        }
        let released = (!wait).then(|| c.release(thread));
        let barrier = &mut c.ctas[rank].barriers.named[id as usize];
        let here = barrier.waiting.len() + barrier.arrived.len();
        if here > 0 && barrier.expected != threads {
            let what = format!("barrier {id} of {threads} lanes, of {} for others", barrier.expected);
            c.raise(thread, Some(line), what);
        }
        barrier.expected = threads;
        match released {
            Some(clock) => barrier.arrived.push(clock),
            None => barrier.waiting.push(thread),
        }
        c.lanes[thread].line = Some(line);
        if here + 1 < threads as usize {
            c.lanes[thread].at_barrier = wait.then_some(id);
            return wait;
        }
        let Named { waiting, arrived, .. } = std::mem::take(barrier);
        *c.stats.collectives.entry("bar.sync").or_default() += 1;
        c.pass(thread, &waiting, &arrived);
        false
    });
    if wait {
        suspend();
    }
}

/// `bar.sync 0` of all lanes.
#[track_caller]
pub(crate) fn barrier() {
    let threads = with(|c, _| c.launch.kernel.threads);
    bar_named(0, threads, true);
}

/// `barrier.cluster`.
#[track_caller]
pub(crate) fn cluster_sync() {
    let line = Location::caller();
    let wait = with(|c, thread| {
        c.at_cluster_barrier.push(thread);
        c.lanes[thread].line = Some(line);
        if c.at_cluster_barrier.len() < c.lanes.len() {
            return true;
        }
        let waiting = std::mem::take(&mut c.at_cluster_barrier);
        c.pass(thread, &waiting, &[]);
        false
    });
    if wait {
        suspend();
    }
}

impl Cluster<'_> {
    /// A barrier that `last` completed lets its lanes go on.
    fn pass(&mut self, last: usize, waiting: &[usize], arrived: &[Clock]) {
        let mut warps: Vec<usize> = waiting.iter().map(|t| t / 32).collect();
        warps.dedup();
        warps.into_iter().for_each(|w| self.count_conflicts(w));
        if let Some(&first) = waiting.first() {
            arrived.iter().for_each(|clock| self.acquire(first, clock));
            self.meet(waiting);
        }
        for &thread in waiting {
            self.lanes[thread].at_barrier = None;
            self.lanes[thread].ready = thread != last;
        }
    }

    /// The mbarrier at `at`, which the lane has seen initialised.
    fn mbarrier(&mut self, thread: usize, line: &'static Location<'static>, at: u32) -> (usize, u32) {
        let (rank, at) = self.window(thread, at);
        let Some(barrier) = self.ctas[rank].barriers.mbarriers.get(&at) else {
            self.raise(thread, Some(line), format!("no mbarrier has been initialised at shared {at:#x}"));
        };
        if !barrier.initialised.before(&self.lanes[thread].clock, Some(thread as u16)) {
            let what = format!(
                "race: the mbarrier at shared {at:#x} is used with no barrier since its initialisation"
            );
            self.raise(thread, Some(line), what);
        }
        (rank, at)
    }

    /// As [`Cluster::mbarrier`], for a bulk copy that a lane issues: the initialisation is fenced too.
    pub(super) fn mbarrier_for_copy(
        &mut self,
        thread: usize,
        line: &'static Location<'static>,
        at: u32,
    ) -> (usize, u32) {
        let (rank, at) = self.mbarrier(thread, line, at);
        let initialised = self.ctas[rank].barriers.mbarriers[&at].initialised;
        let fences = &self.fences[initialised.agent as usize];
        let fence = fences.get(fences.partition_point(|&f| f < initialised.time));
        let clock = &self.lanes[thread].clock;
        if !fence.is_some_and(|&time| Stamp { time, ..initialised }.before(clock, Some(thread as u16))) {
            let what = format!(
                "a bulk copy counts at the mbarrier at {at:#x}, whose initialisation no fence followed"
            );
            self.raise(thread, Some(line), what);
        }
        (rank, at)
    }

    /// Who the loads that complete on a barrier's present phase are, when they are waited for.
    pub(super) fn load_stamp(&self, rank: usize, at: u32) -> Stamp {
        let barrier = &self.ctas[rank].barriers.mbarriers[&at];
        Stamp { agent: barrier.agent, time: barrier.phase + 1 }
    }

    /// Bytes of a copy have arrived.
    pub(super) fn complete_bytes(&mut self, rank: usize, at: u32, bytes: u32) {
        if let Some(barrier) = self.ctas[rank].barriers.mbarriers.get_mut(&at) {
            barrier.bytes -= bytes as i64;
        }
        self.complete_phase(rank, at);
    }

    /// Completes a barrier's phase, where nothing is missing, and lets those go on that wait for it.
    fn complete_phase(&mut self, rank: usize, at: u32) {
        let fresh = Clock::new(self.agents);
        let Some(barrier) = self.ctas[rank].barriers.mbarriers.get_mut(&at) else { return };
        if barrier.pending > 0 || barrier.bytes != 0 {
            return;
        }
        barrier.phase += 1;
        barrier.pending = barrier.count;
        let released = barrier.releases.take().unwrap_or(fresh);
        barrier.complete = released.with([(barrier.agent, barrier.phase)].into_iter());
        for thread in std::mem::take(&mut barrier.waiting) {
            self.lanes[thread].ready = true;
        }
    }
}

#[track_caller]
pub(crate) fn mbarrier_init(at: u32, count: u32) {
    let line = Location::caller();
    with(|c, thread| {
        let (rank, at) = c.window(thread, at);
        let stamp = c.stamp(thread);
        let who = Actor { stamp, clock: &c.lanes[thread].clock, lane: Some(thread as u16) };
        let made = c.ctas[rank].shared.make_barrier(at, &who).and_then(|()| {
            if count == 0 || count >= 1 << 20 {
                return Err(format!("an mbarrier of {count} arrivals: 1 to 2^20 - 1"));
            }
            c.agents
                .barrier(c.mbarriers)
                .ok_or_else(|| String::from("the simulator counts 64 mbarriers a cluster"))
        });
        let agent = c.check(thread, line, made);
        c.mbarriers += 1;
        let barrier = Mbarrier {
            agent,
            initialised: stamp,
            count,
            pending: count,
            bytes: 0,
            phase: 0,
            releases: None,
            complete: Clock::new(c.agents),
            waiting: Vec::new(),
        };
        c.ctas[rank].barriers.mbarriers.insert(at, barrier);
    });
}

/// An arrival, and bytes to come.
#[track_caller]
pub(crate) fn mbarrier_arrive(at: u32, bytes: u32) {
    let line = Location::caller();
    with(|c, thread| {
        let (rank, at) = c.mbarrier(thread, line, at);
        let released = c.release(thread);
        let fault = {
            let super::cluster::Cluster { ctas, joins, .. } = c;
            let Some(barrier) = ctas[rank].barriers.mbarriers.get_mut(&at) else { return };
            barrier.releases = Some(match &barrier.releases {
                Some(before) => joins.join(before, &released),
                None => released,
            });
            barrier.bytes += bytes as i64;
            let fault = barrier.pending == 0;
            barrier.pending = barrier.pending.saturating_sub(1);
            fault
        };
        if fault {
            let what = format!("one arrival more at the mbarrier at {at:#x} than its phase waits for");
            c.raise(thread, Some(line), what);
        }
        c.complete_phase(rank, at);
    });
}

/// Whether the phase of `parity` is complete: waits for it, or (drawn) gives up early once.
#[track_caller]
pub(crate) fn mbarrier_try_wait(at: u32, parity: u32) -> bool {
    let line = Location::caller();
    loop {
        let done = with(|c, thread| {
            let (rank, at) = c.mbarrier(thread, line, at);
            let gives_up = c.rng.below(8) == 0;
            let Some(barrier) = c.ctas[rank].barriers.mbarriers.get_mut(&at) else { return Some(false) };
            if barrier.phase & 1 != parity {
                let complete = barrier.complete.clone();
                c.acquire(thread, &complete);
                return Some(true);
            }
            if gives_up {
                return Some(false);
            }
            barrier.waiting.push(thread);
            c.lanes[thread].line = Some(line);
            None
        });
        match done {
            Some(done) => return done,
            None => suspend(),
        }
    }
}
