//! Bulk copies: what the copy engine does by itself, as early or as late as it may.

use std::format;
use std::panic::Location;
use std::string::String;
use std::vec::Vec;

use super::clock::Stamp;
use super::cluster::Cluster;
use super::global::Now;
use super::lane::{self, with};
use super::shared::{Actor, Flight};
use super::tensor_map::{self, Piece};

/// Copies on their way, and the groups of stores.
#[derive(Default)]
pub(super) struct Bulk {
    loads: Vec<Load>,
    stores: Vec<Store>,
    /// Lanes' groups: how many each has closed.
    groups: std::collections::BTreeMap<usize, u32>,
}

struct Load {
    /// CTA and shared address of the mbarrier that it counts at.
    barrier: (usize, u32),
    rank: usize,
    pieces: Vec<(u32, Source)>,
    thread: usize,
    line: &'static Location<'static>,
    now: Now,
}

/// 16 bytes: there already, or to be read.
enum Source {
    Data([u32; 4]),
    Global(u64),
}

struct Store {
    thread: usize,
    /// Of the lane's groups, counted from 1.
    group: u32,
    pieces: Vec<(u64, u32)>,
    /// Read early: shared memory as it was.
    data: Option<Vec<[u32; 4]>>,
    line: &'static Location<'static>,
    now: Now,
}

/// A tensor map's box to the same place in each CTA of `ctas`, or in the lane's own.
#[track_caller]
pub(crate) fn tma_load(shared: u32, map: u64, at: &[i32], barrier: u32, ctas: Option<u16>) {
    let line = Location::caller();
    with(|c, thread| {
        let pieces = c.pieces(thread, line, map, at, shared);
        let sources: Vec<_> = pieces
            .iter()
            .map(|p| (p.shared, p.global.map_or(Source::Data([0; 4]), Source::Global)))
            .collect();
        c.load(thread, line, sources, barrier, ctas);
    });
}

/// `bytes` bytes side by side.
#[track_caller]
pub(crate) fn bulk_load(shared: u32, from: u64, bytes: u32, barrier: u32) {
    let line = Location::caller();
    with(|c, thread| {
        c.check(thread, line, multiple_of_16(&[shared as u64, from, bytes as u64]));
        let pieces = (0..bytes / 16).map(|i| (shared + 16 * i, Source::Global(from + 16 * i as u64)));
        c.load(thread, line, pieces.collect(), barrier, None);
    });
}

#[track_caller]
pub(crate) fn tma_store(map: u64, at: &[i32], shared: u32) {
    let line = Location::caller();
    with(|c, thread| {
        let pieces = c.pieces(thread, line, map, at, shared);
        // What lies outside the tensor is not written.
        let pieces = pieces.iter().filter_map(|p| p.global.map(|g| (g, p.shared)));
        c.store(thread, line, pieces.collect());
    });
}

#[track_caller]
pub(crate) fn bulk_store(to: u64, shared: u32, bytes: u32) {
    let line = Location::caller();
    with(|c, thread| {
        c.check(thread, line, multiple_of_16(&[shared as u64, to, bytes as u64]));
        let pieces = (0..bytes / 16).map(|i| (to + 16 * i as u64, shared + 16 * i));
        c.store(thread, line, pieces.collect());
    });
}

fn multiple_of_16(numbers: &[u64]) -> Result<(), String> {
    match numbers.iter().find(|n| !n.is_multiple_of(16)) {
        Some(n) => Err(format!("misaligned: a bulk copy with {n:#x}, no multiple of 16")),
        None => Ok(()),
    }
}

pub(crate) fn bulk_commit() {
    with(|c, thread| *c.bulk.groups.entry(thread).or_default() += 1);
}

/// All but the lane's newest `pending` groups: read, or written too.
pub(crate) fn bulk_wait(pending: u32, read: bool) {
    with(|c, thread| {
        let closed = c.bulk.groups.get(&thread).copied().unwrap_or(0);
        let done = closed.saturating_sub(pending);
        for i in (0..c.bulk.stores.len()).rev() {
            let store = &c.bulk.stores[i];
            if store.thread == thread && store.group <= done {
                if read {
                    c.read_store(i);
                } else {
                    c.finish_store(i);
                }
            }
        }
        // The lane knows that shared memory has been read.
        let agent = c.agents.stores(thread / 32);
        c.lanes[thread].clock = c.lanes[thread].clock.with([(agent, done)].into_iter());
    });
}

impl Cluster<'_> {
    fn pieces(
        &mut self,
        thread: usize,
        line: &'static Location<'static>,
        map: u64,
        at: &[i32],
        shared: u32,
    ) -> Vec<Piece> {
        let words = if map.is_multiple_of(8) {
            // SAFETY: the address of a tensor map in the parameters, as the isa function's contract says, or in the
            // simulated device's memory: 128 bytes either way.
            Ok(unsafe { *(map as *const [u64; 16]) })
        } else {
            Err(format!("misaligned: a tensor map at {map:#x}"))
        };
        let pieces = words.and_then(tensor_map::decode).and_then(|spec| {
            let pieces = tensor_map::pieces(&spec, at, shared)?;
            Ok(pieces.collect())
        });
        self.check(thread, line, pieces)
    }

    fn load(
        &mut self,
        thread: usize,
        line: &'static Location<'static>,
        sources: Vec<(u32, Source)>,
        barrier: u32,
        ctas: Option<u16>,
    ) {
        let own = self.rank(thread);
        let now = self.now(thread);
        let ranks: Vec<usize> = match ctas {
            None => Vec::from([own]),
            Some(mask) => (0..16).filter(|r| mask >> r & 1 == 1).collect(),
        };
        if let Some(&missing) = ranks.iter().find(|&&r| r >= self.ctas.len()) {
            self.raise(thread, Some(line), format!("multicast to CTA {missing} of {}", self.ctas.len()));
        }
        // The barrier of each CTA must be seen initialised.
        let barriers: Vec<(usize, u32)> = ranks
            .iter()
            .map(|&rank| self.mbarrier_for_copy(thread, line, lane::map_shared(barrier, rank as u32)))
            .collect();
        // Read once, whatever the number of CTAs; now, or when it arrives.
        let early = self.rng.bits() & 1 == 0;
        let mut data = Vec::new();
        for (shared, source) in sources {
            if let Source::Global(from) = source {
                self.stats.global_copied += 16;
                let read = self.global.read::<4>(from, &now);
                let read = self.check(thread, line, read);
                data.push((shared, early.then_some(read), from));
            } else {
                data.push((shared, Some([0; 4]), 0));
            }
        }
        for (rank, barrier) in ranks.into_iter().zip(barriers) {
            let stamp = self.stamp(thread);
            let Cluster { ctas, lanes, fences, .. } = self;
            let who = Actor { stamp, clock: &lanes[thread].clock, lane: Some(thread as u16) };
            let flight = Flight::Bulk(thread as u16);
            let shared = &mut ctas[rank].shared;
            let departed =
                data.iter().try_for_each(|(at, ..)| shared.depart_async(*at, 4, &who, fences, flight));
            self.check(thread, line, departed);
            let pieces = data
                .iter()
                .map(|&(at, data, from)| (at, data.map_or(Source::Global(from), Source::Data)))
                .collect();
            self.bulk.loads.push(Load { barrier, rank, pieces, thread, line, now: now.clone() });
        }
    }

    fn store(&mut self, thread: usize, line: &'static Location<'static>, pieces: Vec<(u64, u32)>) {
        let group = self.bulk.groups.get(&thread).copied().unwrap_or(0) + 1;
        let stamp = Stamp { agent: self.agents.stores(thread / 32), time: group };
        let rank = self.rank(thread);
        let now = self.now(thread);
        let Cluster { ctas, lanes, fences, .. } = self;
        let who = Actor { stamp, clock: &lanes[thread].clock, lane: Some(thread as u16) };
        let shared = &mut ctas[rank].shared;
        let mut data = Vec::new();
        let mut read = Ok(());
        for &(_, at) in &pieces {
            match shared.read_async(at, 4, &who, fences) {
                Ok(words) => data.push([words[0], words[1], words[2], words[3]]),
                Err(what) => read = Err(what),
            }
        }
        self.check(thread, line, read);
        let early = self.rng.bits() & 1 == 0;
        let data = early.then_some(data);
        self.bulk.stores.push(Store { thread, group, pieces, data, line, now });
    }

    /// Reads a store's shared memory, if it has not been read.
    fn read_store(&mut self, i: usize) {
        let rank = self.rank(self.bulk.stores[i].thread);
        let Store { pieces, data, .. } = &mut self.bulk.stores[i];
        if data.is_none() {
            let shared = &self.ctas[rank].shared;
            *data = Some(pieces.iter().map(|&(_, at)| shared.now(at)).collect());
        }
    }

    fn finish_store(&mut self, i: usize) {
        self.read_store(i);
        let store = self.bulk.stores.swap_remove(i);
        for ((to, _), data) in store.pieces.iter().zip(store.data.unwrap_or_default()) {
            self.stats.global_written += 16;
            let written = self.global.write(*to, data, &store.now);
            self.check(store.thread, store.line, written);
        }
    }

    /// One of the copies on their way arrives; false where there is none.
    pub(super) fn finish_one_bulk(&mut self) -> bool {
        let (loads, stores) = (self.bulk.loads.len(), self.bulk.stores.len());
        if loads + stores == 0 {
            return false;
        }
        let which = self.rng.below(loads + stores);
        if which >= loads {
            self.finish_store(which - loads);
            return true;
        }
        let Load { barrier, rank, pieces, thread, line, now } = self.bulk.loads.swap_remove(which);
        let stamp = self.load_stamp(barrier.0, barrier.1);
        let bytes = 16 * pieces.len() as u32;
        for (at, source) in pieces {
            let data = match source {
                Source::Data(data) => data,
                Source::Global(from) => {
                    let read = self.global.read::<4>(from, &now);
                    self.check(thread, line, read)
                }
            };
            self.ctas[rank].shared.land(at, &data, stamp, false);
        }
        self.complete_bytes(barrier.0, barrier.1, bytes);
        true
    }
}
