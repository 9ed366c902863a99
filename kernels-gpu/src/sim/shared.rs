//! A CTA's shared memory and its shadow.

use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use super::SHARED_BASE;

/// When a lane did something: barriers of its CTA and of its warp that it has passed.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) lane: u16,
    pub(super) cta: u32,
    pub(super) warp: u32,
}

/// Lanes 0 to 1023, then [`WARP`]` + w` for several lanes of warp `w`, then [`MANY`].
const WARP: u16 = 1024;
const MANY: u16 = 2047;
const NOBODY: u16 = u16::MAX;

impl Stamp {
    fn warp_index(self) -> Option<u16> {
        match self.lane {
            MANY | NOBODY => None,
            lane if lane >= WARP => Some(lane - WARP),
            lane => Some(lane / 32),
        }
    }

    /// Whether this came before `now` for certain.
    fn before(self, now: Stamp) -> bool {
        self.lane == NOBODY
            || self.lane == now.lane
            || self.cta < now.cta
            || self.warp_index() == Some(now.lane / 32) && self.warp < now.warp
    }

    /// Both, of which a later access must be after.
    fn and(self, now: Stamp) -> Stamp {
        if self.before(now) {
            now
        } else if self.warp_index() == Some(now.lane / 32) {
            Stamp { lane: WARP + now.lane / 32, ..now }
        } else {
            Stamp { lane: MANY, ..now }
        }
    }

    fn name(self) -> String {
        match self.lane {
            MANY => "several warps".into(),
            lane if lane >= WARP => format!("several lanes of warp {}", lane - WARP),
            lane => format!("thread {lane}"),
        }
    }
}

#[derive(Clone, Copy)]
struct Word {
    writer: Stamp,
    reader: Stamp,
    /// Lane whose `cp.async` has this word as its target and has not been waited for.
    in_flight: u16,
    atomic: bool,
    written: bool,
}

const FRESH: Word = Word {
    writer: Stamp { lane: NOBODY, cta: 0, warp: 0 },
    reader: Stamp { lane: NOBODY, cta: 0, warp: 0 },
    in_flight: NOBODY,
    atomic: false,
    written: false,
};

pub(super) struct Shared {
    data: Vec<u32>,
    shadow: Vec<Word>,
}

impl Shared {
    pub(super) fn new(bytes: u32) -> Self {
        let words = bytes.div_ceil(4) as usize;
        Shared { data: vec![0; words], shadow: vec![FRESH; words] }
    }

    pub(super) fn reset(&mut self) {
        self.shadow.fill(FRESH);
    }

    /// Index of the first word of an access.
    fn locate(&self, at: u32, bytes: u32) -> Result<usize, String> {
        if !at.is_multiple_of(bytes) {
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

    pub(super) fn read<const N: usize>(&mut self, at: u32, now: Stamp) -> Result<[u32; N], String> {
        let first = self.locate(at, 4 * N as u32)?;
        for (i, word) in self.shadow[first..first + N].iter_mut().enumerate() {
            let at = at + 4 * i as u32;
            if word.in_flight != NOBODY {
                return Err(format!(
                    "read of shared {at:#x} while the cp.async of thread {} into it has not been waited for",
                    word.in_flight
                ));
            }
            if !word.written {
                return Err(format!("read of unwritten shared memory at {at:#x}"));
            }
            if !word.writer.before(now) {
                let writer = word.writer.name();
                return Err(format!(
                    "race: read of shared {at:#x}, written by {writer} with no barrier since"
                ));
            }
            word.reader = word.reader.and(now);
        }
        let mut out = [0; N];
        out.copy_from_slice(&self.data[first..first + N]);
        Ok(out)
    }

    fn claim(&mut self, first: usize, n: usize, at: u32, now: Stamp, atomic: bool) -> Result<(), String> {
        for (i, word) in self.shadow[first..first + n].iter_mut().enumerate() {
            let at = at + 4 * i as u32;
            if word.in_flight != NOBODY {
                return Err(format!(
                    "write to shared {at:#x} while the cp.async of thread {} into it has not been waited for",
                    word.in_flight
                ));
            }
            if !(word.writer.before(now) || atomic && word.atomic) {
                let writer = word.writer.name();
                return Err(format!(
                    "race: write to shared {at:#x}, written by {writer} with no barrier since"
                ));
            }
            if !word.reader.before(now) {
                let reader = word.reader.name();
                return Err(format!("race: write to shared {at:#x}, read by {reader} with no barrier since"));
            }
            word.writer = if atomic && word.atomic { word.writer.and(now) } else { now };
            word.reader.lane = NOBODY;
            word.written = true;
            word.atomic = atomic;
        }
        Ok(())
    }

    pub(super) fn write<const N: usize>(&mut self, at: u32, x: [u32; N], now: Stamp) -> Result<(), String> {
        let first = self.locate(at, 4 * N as u32)?;
        self.claim(first, N, at, now, false)?;
        self.data[first..first + N].copy_from_slice(&x);
        Ok(())
    }

    /// Adds to one word, or to two as one number; gives the old value.
    pub(super) fn atomic_add(&mut self, at: u32, x: u64, words: usize, now: Stamp) -> Result<u64, String> {
        let first = self.locate(at, 4 * words as u32)?;
        if self.shadow[first..first + words].iter().any(|w| !w.written) {
            return Err(format!("atomic on unwritten shared memory at {at:#x}"));
        }
        self.claim(first, words, at, now, true)?;
        let data = &mut self.data[first..first + words];
        let old = data.iter().rev().fold(0u64, |all, &w| all << 32 | w as u64);
        let new = old.wrapping_add(x);
        data.iter_mut().enumerate().for_each(|(i, w)| *w = (new >> (32 * i)) as u32);
        Ok(old)
    }

    /// A copy of `words` words sets out; until [`Shared::land`] nobody may touch its target.
    pub(super) fn depart(&mut self, at: u32, words: usize, now: Stamp) -> Result<(), String> {
        let first = self.locate(at, 4 * words as u32)?;
        self.claim(first, words, at, now, false)?;
        self.shadow[first..first + words].iter_mut().for_each(|w| w.in_flight = now.lane);
        Ok(())
    }

    pub(super) fn land(&mut self, at: u32, x: &[u32], now: Stamp) {
        let first = (at - SHARED_BASE) as usize / 4;
        self.data[first..first + x.len()].copy_from_slice(x);
        for word in &mut self.shadow[first..first + x.len()] {
            word.in_flight = NOBODY;
            word.writer = now;
        }
    }

    /// The data of a copy arrives early: still nobody may look.
    pub(super) fn arrive_early(&mut self, at: u32, x: &[u32]) {
        let first = (at - SHARED_BASE) as usize / 4;
        self.data[first..first + x.len()].copy_from_slice(x);
    }
}
