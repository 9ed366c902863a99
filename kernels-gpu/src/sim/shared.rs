//! A CTA's shared memory and its shadow: who wrote and read each word last, by which proxy.

use std::boxed::Box;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use super::SHARED_BASE;
use super::clock::{Agent, Agents, Clock, Stamp};

/// Who accesses shared memory, and what came before for them.
pub(super) struct Actor<'a> {
    pub(super) stamp: Stamp,
    pub(super) clock: &'a Clock,
    /// The lane, where it is a lane.
    pub(super) lane: Option<Agent>,
}

/// When each lane has executed `fence.proxy.async` (or, for barriers, `fence.mbarrier_init`), ascending.
pub(super) type Fences = [Vec<u32>];

/// Something that has a word as its target and has not been waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Flight {
    None,
    /// A lane's `cp.async`.
    Copy(Agent),
    /// A bulk load that a lane has issued.
    Bulk(Agent),
}

struct Word {
    writer: Stamp,
    /// Readers since the last write; those that later ones came after are left out.
    reader: Stamp,
    #[allow(clippy::box_collection)] // most words have none: a pointer is a third of a vector
    more: Option<Box<Vec<Stamp>>>,
    flight: Flight,
    /// Written by the generic proxy: the async proxy sees it after a fence.
    generic: bool,
    atomic: bool,
    written: bool,
    /// Part of an mbarrier.
    barrier: bool,
}

const FRESH: Word = Word {
    writer: Stamp::NOBODY,
    reader: Stamp::NOBODY,
    more: None,
    flight: Flight::None,
    generic: false,
    atomic: false,
    written: false,
    barrier: false,
};

/// Readers of a word that are kept before they are counted anew.
const MANY: usize = 512;

impl Word {
    fn add_reader(&mut self, who: &Actor<'_>) {
        if self.reader.before(who.clock, who.lane) || self.reader.agent == who.stamp.agent {
            self.reader = who.stamp;
            return;
        }
        let more = self.more.get_or_insert_default();
        if more.last().is_some_and(|last| last.agent == who.stamp.agent) {
            more.pop();
        }
        more.push(who.stamp);
        if more.len() > MANY {
            // Of each agent the last is enough.
            more.sort_by_key(|s| (s.agent, core::cmp::Reverse(s.time)));
            more.dedup_by_key(|s| s.agent);
        }
    }

    fn readers(&self) -> impl Iterator<Item = Stamp> {
        [self.reader].into_iter().chain(self.more.iter().flat_map(|m| m.iter().copied()))
    }
}

pub(super) struct Shared {
    data: Vec<u32>,
    shadow: Vec<Word>,
    agents: Agents,
}

impl Shared {
    pub(super) fn new(bytes: u32, agents: Agents) -> Self {
        let words = bytes.div_ceil(4) as usize;
        Shared { data: vec![0; words], shadow: (0..words).map(|_| FRESH).collect(), agents }
    }

    pub(super) fn reset(&mut self) {
        self.shadow.fill_with(|| FRESH);
    }

    fn name(&self, who: Stamp) -> String {
        let lanes = self.agents.lanes;
        match (who.agent & 0x7fff) as usize {
            lane if lane < lanes => format!("thread {lane}"),
            warp if warp < lanes + lanes / 32 => format!("wgmma of warp {}", warp - lanes),
            warp if warp < lanes + lanes / 32 * 2 => {
                format!("a bulk store of warp {}", warp - lanes - lanes / 32)
            }
            _ => "a bulk load".into(),
        }
    }

    fn flight_name(flight: Flight) -> String {
        match flight {
            Flight::Copy(lane) => format!("the cp.async of thread {lane}"),
            Flight::Bulk(lane) => format!("a bulk load of thread {lane}"),
            Flight::None => String::new(),
        }
    }

    /// Index of the first word of an access to `bytes` bytes, aligned to `align`.
    fn locate(&self, at: u32, bytes: u32, align: u32) -> Result<usize, String> {
        if !at.is_multiple_of(align) {
            return Err(format!("misaligned: {bytes} bytes at shared address {at:#x}"));
        }
        let end = SHARED_BASE as u64 + 4 * self.data.len() as u64;
        if at < SHARED_BASE || at as u64 + bytes as u64 > end {
            return Err(format!(
                "out of bounds: {bytes} bytes at shared address {at:#x}, shared memory is {SHARED_BASE:#x} to {end:#x}"
            ));
        }
        Ok((at - SHARED_BASE) as usize / 4)
    }

    /// What any read of a word needs.
    fn check_read(&self, i: usize, who: &Actor<'_>) -> Result<(), String> {
        let (word, at) = (&self.shadow[i], SHARED_BASE + 4 * i as u32);
        if word.flight != Flight::None {
            let flight = Self::flight_name(word.flight);
            return Err(format!("read of shared {at:#x} while {flight} into it has not been waited for"));
        }
        if word.barrier {
            return Err(format!("read of the mbarrier at {at:#x}"));
        }
        if !word.written {
            return Err(format!("read of unwritten shared memory at {at:#x}"));
        }
        if !word.writer.before(who.clock, who.lane) {
            let writer = self.name(word.writer);
            return Err(format!("race: read of shared {at:#x}, written by {writer} with no barrier since"));
        }
        Ok(())
    }

    pub(super) fn read<const N: usize>(&mut self, at: u32, who: &Actor<'_>) -> Result<[u32; N], String> {
        let first = self.locate(at, 4 * N as u32, 4 * N as u32)?;
        for i in first..first + N {
            self.check_read(i, who)?;
            self.shadow[i].add_reader(who);
        }
        let mut out = [0; N];
        out.copy_from_slice(&self.data[first..first + N]);
        Ok(out)
    }

    /// Whether the writer of a word has fenced it for the async proxy, as far as `who` can know.
    fn check_proxy(&self, i: usize, who: &Actor<'_>, fences: &Fences, what: &str) -> Result<(), String> {
        let word = &self.shadow[i];
        if !word.generic || word.writer.agent == Agent::MAX {
            return Ok(());
        }
        let of_writer = &fences[word.writer.agent as usize];
        let fence = of_writer.get(of_writer.partition_point(|&f| f < word.writer.time));
        let seen = fence.is_some_and(|&time| Stamp { time, ..word.writer }.before(who.clock, who.lane));
        if seen {
            return Ok(());
        }
        Err(format!(
            "{what} of shared {:#x} by the async proxy, written by an ordinary store of {} with no fence.proxy.async \
             between",
            SHARED_BASE + 4 * i as u32,
            self.name(word.writer)
        ))
    }

    /// A read by the async proxy of `words` words.
    pub(super) fn read_async(
        &mut self,
        at: u32,
        words: usize,
        who: &Actor<'_>,
        fences: &Fences,
    ) -> Result<&[u32], String> {
        let first = self.locate(at, 4 * words as u32, 16)?;
        for i in first..first + words {
            self.check_read(i, who)?;
            self.check_proxy(i, who, fences, "read")?;
            self.shadow[i].add_reader(who);
        }
        Ok(&self.data[first..first + words])
    }

    /// 16 bytes as they are now, whose read has been checked.
    pub(super) fn now(&self, at: u32) -> [u32; 4] {
        let first = (at - SHARED_BASE) as usize / 4;
        let mut out = [0; 4];
        out.copy_from_slice(&self.data[first..first + 4]);
        out
    }

    fn claim(&mut self, first: usize, n: usize, who: &Actor<'_>, atomic: bool) -> Result<(), String> {
        for i in first..first + n {
            let (word, at) = (&self.shadow[i], SHARED_BASE + 4 * i as u32);
            if word.flight != Flight::None {
                let flight = Self::flight_name(word.flight);
                return Err(format!(
                    "write to shared {at:#x} while {flight} into it has not been waited for"
                ));
            }
            if word.barrier {
                return Err(format!("write to the mbarrier at {at:#x}"));
            }
            if !(word.writer.before(who.clock, who.lane) || atomic && word.atomic) {
                let writer = self.name(word.writer);
                return Err(format!(
                    "race: write to shared {at:#x}, written by {writer} with no barrier since"
                ));
            }
            if let Some(reader) = word.readers().find(|r| !r.before(who.clock, who.lane)) {
                let reader = self.name(reader);
                return Err(format!("race: write to shared {at:#x}, read by {reader} with no barrier since"));
            }
            let word = &mut self.shadow[i];
            word.writer = who.stamp;
            (word.reader, word.more) = (Stamp::NOBODY, None);
            (word.written, word.generic, word.atomic) = (true, true, atomic);
        }
        Ok(())
    }

    pub(super) fn write<const N: usize>(
        &mut self,
        at: u32,
        x: [u32; N],
        who: &Actor<'_>,
    ) -> Result<(), String> {
        let first = self.locate(at, 4 * N as u32, 4 * N as u32)?;
        self.claim(first, N, who, false)?;
        self.data[first..first + N].copy_from_slice(&x);
        Ok(())
    }

    /// Adds to one word, or to two as one number; gives the old value.
    pub(super) fn atomic_add(
        &mut self,
        at: u32,
        x: u64,
        words: usize,
        who: &Actor<'_>,
    ) -> Result<u64, String> {
        let first = self.locate(at, 4 * words as u32, 4 * words as u32)?;
        if self.shadow[first..first + words].iter().any(|w| !w.written) {
            return Err(format!("atomic on unwritten shared memory at {at:#x}"));
        }
        self.claim(first, words, who, true)?;
        let data = &mut self.data[first..first + words];
        let old = data.iter().rev().fold(0u64, |all, &w| all << 32 | w as u64);
        let new = old.wrapping_add(x);
        data.iter_mut().enumerate().for_each(|(i, w)| *w = (new >> (32 * i)) as u32);
        Ok(old)
    }

    /// Two words become an mbarrier.
    pub(super) fn make_barrier(&mut self, at: u32, who: &Actor<'_>) -> Result<(), String> {
        let first = self.locate(at, 8, 8)?;
        self.claim(first, 2, who, false)?;
        self.shadow[first..first + 2].iter_mut().for_each(|w| w.barrier = true);
        Ok(())
    }

    /// An asynchronous copy of `words` words sets out; until it lands nobody may touch its target.
    pub(super) fn depart(
        &mut self,
        at: u32,
        words: usize,
        who: &Actor<'_>,
        flight: Flight,
    ) -> Result<(), String> {
        let first = self.locate(at, 4 * words as u32, 4 * words.min(4) as u32)?;
        self.claim(first, words, who, false)?;
        self.shadow[first..first + words].iter_mut().for_each(|w| w.flight = flight);
        Ok(())
    }

    /// As [`Shared::depart`], by the async proxy: what ordinary stores have written there must be fenced.
    pub(super) fn depart_async(
        &mut self,
        at: u32,
        words: usize,
        who: &Actor<'_>,
        fences: &Fences,
        flight: Flight,
    ) -> Result<(), String> {
        let first = self.locate(at, 4 * words as u32, 16)?;
        (first..first + words).try_for_each(|i| self.check_proxy(i, who, fences, "overwriting"))?;
        self.depart(at, words, who, flight)
    }

    /// The copy is there, written by `writer`.
    pub(super) fn land(&mut self, at: u32, x: &[u32], writer: Stamp, generic: bool) {
        let first = (at - SHARED_BASE) as usize / 4;
        self.data[first..first + x.len()].copy_from_slice(x);
        for word in &mut self.shadow[first..first + x.len()] {
            word.flight = Flight::None;
            word.writer = writer;
            word.generic = generic;
        }
    }

    /// The data of a copy arrives early: still nobody may look.
    pub(super) fn arrive_early(&mut self, at: u32, x: &[u32]) {
        let first = (at - SHARED_BASE) as usize / 4;
        self.data[first..first + x.len()].copy_from_slice(x);
    }
}
