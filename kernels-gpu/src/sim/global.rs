//! Global memory: allocations that are checked at every access.

use std::collections::BTreeMap;
use std::format;
use std::rc::Rc;
use std::string::String;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::vec::Vec;

use memmap2::{MmapMut, MmapOptions};

use super::clock::{Agent, Clock, Stamp};

/// Before and after each allocation: a run over its end meets nothing.
const GUARD: usize = 4096;

/// Bytes that memory delivers together.
const SECTOR: usize = 32;

/// The simulated device's memory. Pages of it cost nothing until they are touched.
#[derive(Default)]
pub struct Memory {
    allocations: Mutex<BTreeMap<u64, Allocation>>,
}

pub(super) struct Allocation {
    bytes: usize,
    data: MmapMut,
    /// A [`Mark`] for every two bytes.
    marks: MmapMut,
    /// For every sector the launch that last read it, and 1.
    readers: MmapMut,
    /// Whether bytes that no kernel has written may be read.
    initialised: bool,
}

/// Launch, CTA, lane and the lane's time of the last write; 0: none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark(u64);

impl Mark {
    const ATOMIC: u64 = 1;
    const HOST: Mark = Mark(2);

    pub(super) fn new(launch: u64, cta: u32, lane: u32, time: u32) -> Self {
        let launch = launch % 4095 + 1;
        let (cta, lane, time) = (cta as u64 & 0xf_ffff, lane as u64 & 0x3ff, time as u64 & 0xf_ffff);
        Mark(launch << 52 | cta << 32 | lane << 22 | time << 2)
    }

    fn launch(self) -> u64 {
        self.0 >> 52
    }

    fn cta(self) -> u64 {
        self.0 >> 32 & 0xf_ffff
    }

    fn lane(self) -> u64 {
        self.0 >> 22 & 0x3ff
    }

    fn time(self) -> u32 {
        (self.0 >> 2 & 0xf_ffff) as u32
    }

    /// Whether a lane that knows `clock` knows the write, of lanes of the CTA that begin with agent `first`.
    fn known(self, first: usize, clock: &Clock) -> bool {
        clock.known((first + self.lane() as usize) as Agent) >= self.time()
    }
}

/// A lane that uses global memory, and what came before.
#[derive(Clone)]
pub(super) struct Now {
    pub(super) mark: Mark,
    /// The agent that its CTA's lanes begin with, its own, and what it knows.
    pub(super) first: usize,
    pub(super) agent: Agent,
    pub(super) clock: Clock,
    /// What its CTA has learnt of others.
    pub(super) acquired: Rc<Vec<Acquired>>,
}

impl Now {
    /// Whether a write came before.
    fn knows(&self, mark: Mark) -> bool {
        if mark.launch() != self.mark.launch() {
            return true;
        }
        if mark.cta() == self.mark.cta() {
            return mark.lane() == self.mark.lane() || mark.known(self.first, &self.clock);
        }
        let known = |a: &&Acquired| a.released.cta == mark.cta() && a.is_known_to(self);
        self.acquired.iter().filter(known).any(|a| mark.known(a.released.first, &a.released.clock))
    }
}

/// What a lane of a CTA knew when it released it.
#[derive(Clone)]
struct Released {
    cta: u64,
    first: usize,
    agent: Agent,
    time: u32,
    clock: Clock,
}

/// What a lane of this CTA, at a time of its own, has learnt of another CTA by an atomic that acquires. Other lanes know it
/// once they know what the lane did then.
#[derive(Clone)]
pub(super) struct Acquired {
    released: Released,
    by: Stamp,
}

impl Acquired {
    fn is_known_to(&self, now: &Now) -> bool {
        self.by.before(&now.clock, Some(now.agent))
    }
}

/// What the atomics of a launch have released, by their address.
#[derive(Default)]
pub(super) struct Releases(BTreeMap<u64, Vec<Released>>);

impl Releases {
    /// An atomic that acquires and releases: what others released there is learnt; what the lane knows, of its own CTA and of
    /// others, is released. `clock` is what it knows with its own past. Gives what the CTA has learnt then.
    pub(super) fn pass(&mut self, at: u64, now: &Now, clock: Clock) -> Vec<Acquired> {
        let released = self.0.entry(at).or_default();
        let mut acquired = (*now.acquired).clone();
        let by = Stamp { agent: now.agent, time: now.mark.time() };
        acquired.extend(released.iter().map(|r| Acquired { released: r.clone(), by }));
        let own = Released { cta: now.mark.cta(), first: now.first, agent: now.agent, time: by.time, clock };
        let known = acquired.iter().filter(|a| a.is_known_to(now)).map(|a| a.released.clone());
        for new in known.chain([own]).collect::<Vec<_>>() {
            // A lane knows later all that it knew before.
            match released.iter_mut().find(|r| (r.cta, r.agent) == (new.cta, new.agent)) {
                Some(before) if before.time >= new.time => {}
                Some(before) => *before = new,
                None => released.push(new),
            }
        }
        acquired
    }
}

impl Allocation {
    fn data_mut(&mut self) -> &mut [u8] {
        &mut self.data[GUARD..GUARD + self.bytes]
    }

    fn marks(&mut self, offset: usize, bytes: usize) -> &mut [Mark] {
        let all = self.marks.as_mut_ptr().cast::<Mark>();
        // SAFETY: the map holds eight bytes for every two of data, page-aligned, any bits are a `Mark`; the
        // range was checked against `bytes`.
        unsafe { std::slice::from_raw_parts_mut(all.add(offset / 2), bytes.div_ceil(2)) }
    }

    /// Counts sectors that the launch has not read before.
    fn count_sectors(&mut self, offset: usize, bytes: usize, now: Mark) -> u64 {
        let readers: &mut [u32] = {
            let all = self.readers.as_mut_ptr().cast::<u32>();
            let (first, last) = (offset / SECTOR, (offset + bytes - 1) / SECTOR);
            // SAFETY: the map holds four bytes for every sector, page-aligned; the range was checked against `bytes`.
            unsafe { std::slice::from_raw_parts_mut(all.add(first), last + 1 - first) }
        };
        let launch = now.launch() as u32 + 1;
        readers.iter_mut().map(|r| (std::mem::replace(r, launch) != launch) as u64).sum()
    }

    fn read(&mut self, offset: usize, bytes: usize, now: &Now, sectors: &mut u64) -> Result<&[u8], String> {
        *sectors += self.count_sectors(offset, bytes, now.mark);
        let initialised = self.initialised;
        for mark in self.marks(offset, bytes) {
            if mark.0 == 0 && !initialised {
                return Err("read of unwritten global memory".into());
            }
            if !now.knows(*mark) {
                return Err(format!(
                    "race: read of global memory that thread {} of CTA {} wrote in this launch with no barrier since",
                    mark.lane(),
                    mark.cta()
                ));
            }
        }
        Ok(&self.data[GUARD + offset..][..bytes])
    }

    fn write(&mut self, offset: usize, from: &[u8], now: &Now, atomic: bool) -> Result<(), String> {
        for mark in self.marks(offset, from.len()) {
            if !(now.knows(*mark) || atomic && mark.0 & Mark::ATOMIC == 1) {
                return Err(format!(
                    "race: write to global memory that thread {} of CTA {} wrote in this launch with no barrier since",
                    mark.lane(),
                    mark.cta()
                ));
            }
            *mark = Mark(now.mark.0 | atomic as u64);
        }
        self.data[GUARD + offset..][..from.len()].copy_from_slice(from);
        Ok(())
    }
}

/// The memory during a launch.
pub(super) struct Global<'a> {
    allocations: MutexGuard<'a, BTreeMap<u64, Allocation>>,
    /// Sectors read, each once a launch.
    sectors: u64,
}

impl Global<'_> {
    /// Bytes of the sectors that the launch has read.
    pub(super) fn distinct_bytes(&self) -> u64 {
        self.sectors * SECTOR as u64
    }

    fn locate(&mut self, at: u64, bytes: usize) -> Result<(&mut Allocation, usize, &mut u64), String> {
        if !at.is_multiple_of(bytes as u64) {
            return Err(format!("misaligned: {bytes} bytes at global address {at:#x}"));
        }
        let Global { allocations, sectors } = self;
        let found = allocations.range_mut(..=at).next_back().map(|(start, a)| (a, (at - start) as usize));
        match found {
            Some((a, offset)) if offset + bytes <= a.bytes => Ok((a, offset, sectors)),
            Some((a, offset)) if offset < a.bytes + GUARD => Err(format!(
                "out of bounds: {bytes} bytes at offset {offset} of an allocation of {} bytes",
                a.bytes
            )),
            _ => Err(format!(
                "out of bounds: {bytes} bytes at global address {at:#x}, where nothing is allocated"
            )),
        }
    }

    pub(super) fn read<const N: usize>(&mut self, at: u64, now: &Now) -> Result<[u32; N], String> {
        let (allocation, offset, sectors) = self.locate(at, 4 * N)?;
        let bytes = allocation.read(offset, 4 * N, now, sectors)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Ok(words)
    }

    pub(super) fn write<const N: usize>(&mut self, at: u64, x: [u32; N], now: &Now) -> Result<(), String> {
        let (allocation, offset, _) = self.locate(at, 4 * N)?;
        let mut bytes = [0u8; 16];
        for (to, word) in bytes.chunks_exact_mut(4).zip(x) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        allocation.write(offset, &bytes[..4 * N], now, false)
    }

    pub(super) fn read_u16(&mut self, at: u64, now: &Now) -> Result<u32, String> {
        let (allocation, offset, sectors) = self.locate(at, 2)?;
        let bytes = allocation.read(offset, 2, now, sectors)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]) as u32)
    }

    pub(super) fn write_u16(&mut self, at: u64, x: u32, now: &Now) -> Result<(), String> {
        let (allocation, offset, _) = self.locate(at, 2)?;
        allocation.write(offset, &(x as u16).to_le_bytes(), now, false)
    }

    pub(super) fn atomic(&mut self, at: u64, f: impl FnOnce(u32) -> u32, now: &Now) -> Result<u32, String> {
        let (allocation, offset, _) = self.locate(at, 4)?;
        let bytes = &allocation.data_mut()[offset..][..4];
        let old = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        allocation.write(offset, &f(old).to_le_bytes(), now, true)?;
        Ok(old)
    }
}

impl Memory {
    pub(super) fn lock(&self) -> Global<'_> {
        Global { allocations: self.allocations.lock().unwrap_or_else(PoisonError::into_inner), sectors: 0 }
    }

    /// Address of `bytes` bytes, zeros that may be read or (`initialised` false) bytes that may not be read
    /// before they are written; `None` where there is not enough memory.
    pub fn alloc(&self, bytes: usize, initialised: bool) -> Option<u64> {
        let map = |bytes: usize| MmapOptions::new().len(bytes).no_reserve_swap().map_anon().ok();
        let data = map(bytes.checked_add(2 * GUARD)?)?;
        let marks = map(bytes.checked_mul(4)?.checked_add(16)?)?;
        let readers = map(bytes / SECTOR * 4 + 8)?;
        let at = data.as_ptr() as u64 + GUARD as u64;
        self.lock().allocations.insert(at, Allocation { bytes, data, marks, readers, initialised });
        Some(at)
    }

    /// Gives an allocation back.
    pub fn free(&self, at: u64) {
        self.lock().allocations.remove(&at);
    }

    /// Copies from the host; the error says what is wrong with the range.
    pub fn upload(&self, from: &[u8], to: u64) -> Result<(), String> {
        self.range(to, from.len(), |allocation, offset| {
            allocation.data_mut()[offset..][..from.len()].copy_from_slice(from);
            if from.len() == allocation.bytes {
                allocation.initialised = true;
            } else {
                allocation.marks(offset, from.len()).fill(Mark::HOST);
            }
        })
    }

    /// Copies to the host.
    pub fn download(&self, from: u64, to: &mut [u8]) -> Result<(), String> {
        self.range(from, to.len(), |allocation, offset| {
            to.copy_from_slice(&allocation.data_mut()[offset..][..to.len()]);
        })
    }

    fn range(&self, at: u64, bytes: usize, f: impl FnOnce(&mut Allocation, usize)) -> Result<(), String> {
        let mut global = self.lock();
        let found =
            global.allocations.range_mut(..=at).next_back().map(|(start, a)| ((at - start) as usize, a));
        match found {
            Some((offset, allocation)) if offset + bytes <= allocation.bytes => {
                f(allocation, offset);
                Ok(())
            }
            _ => Err(format!("{bytes} bytes at {at:#x} are not inside an allocation")),
        }
    }
}
