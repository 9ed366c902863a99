//! Where a ring of blocks is in its worker's items.

use crate::abi::{AttentionParams, DECODE_WARPS, KV_BLOCK, Sequence, WorkItem};
use crate::attn::rows::load_item;
use crate::isa;
use crate::sched::units::Units;

const BLOCK: u32 = KV_BLOCK as u32;

/// Lanes of a CTA.
pub(super) const LANES: u32 = 32 * DECODE_WARPS as u32;

/// Which block is the next one, and which comes after it.
pub(super) struct Progress<const WORKERS: u32> {
    /// Next item, and one past the last.
    pub(super) index: u32,
    pub(super) last: u32,
    /// Units of the items before the next, and the worker's in the one under way.
    pub(super) turn: u32,
    pub(super) units: Units<WORKERS>,
    pub(super) at: u32,
    pub(super) unit_end: u32,
    /// The item's.
    pub(super) kv_end: u32,
    /// What the ring needs of the item beside: [`BlockRing`] the addresses of the head's token 0 of page 0, of K and V.
    pub(super) of_item: [u64; 2],
    /// Address of the page list.
    pub(super) pages: u64,
}

impl<const WORKERS: u32> Progress<WORKERS> {
    /// Shared bytes.
    pub(super) const BYTES: u32 = 80;

    /// Before the first of items `first..last`.
    #[inline(always)]
    pub(super) fn before(first: u32, last: u32) -> Self {
        let units = Units::NONE;
        Progress {
            index: first,
            last,
            turn: 0,
            units,
            at: 0,
            unit_end: 0,
            kv_end: 0,
            of_item: [0; 2],
            pages: 0,
        }
    }

    #[inline(always)]
    #[track_caller]
    pub(super) fn load(at: u32) -> Self {
        // SAFETY: written by `store` before a barrier of the worker's.
        unsafe {
            let [index, last, turn, next] = isa::ld_shared_4(at);
            let [size, first, start, end] = isa::ld_shared_4(at + 16);
            let [token, unit_end, kv_end, _] = isa::ld_shared_4(at + 32);
            let [a, b, pages] = [48, 56, 64].map(|offset| join(isa::ld_shared_2(at + offset)));
            let units = Units { size, first, start, end, next };
            Progress { index, last, turn, units, at: token, unit_end, kv_end, of_item: [a, b], pages }
        }
    }

    /// By one lane, while no other loads it.
    #[inline(always)]
    #[track_caller]
    pub(super) fn store(&self, at: u32) {
        let Units { size, first, start, end, next } = self.units;
        // SAFETY: the ring's room for it.
        unsafe {
            isa::st_shared_4(at, [self.index, self.last, self.turn, next]);
            isa::st_shared_4(at + 16, [size, first, start, end]);
            isa::st_shared_4(at + 32, [self.at, self.unit_end, self.kv_end, 0]);
            for (offset, x) in [(48, self.of_item[0]), (56, self.of_item[1]), (64, self.pages)] {
                isa::st_shared_2(at + offset, split(x));
            }
        }
    }

    /// First token of the block after the next one, which becomes the next; `None` after the last.
    #[inline(always)]
    #[track_caller]
    pub(super) fn step(
        &mut self,
        p: &AttentionParams,
        section: u32,
        of_item: impl Fn(&Sequence, &WorkItem) -> [u64; 2],
    ) -> Option<u32> {
        while isa::agreed(self.at >= self.unit_end) {
            let unit = self.units.next();
            if isa::agreed(unit.at < unit.end) {
                (self.at, self.unit_end) = (unit.at, unit.end);
            } else if isa::agreed(self.index == self.last) {
                return None;
            } else {
                let (item, seq) = load_item(p, self.index);
                self.index += 1;
                self.units = Units::new(section, &item, self.turn, isa::thread_x() / (LANES / WORKERS));
                self.turn += self.units.count();
                self.kv_end = item.kv_end;
                self.of_item = of_item(&seq, &item);
                self.pages = p.pages + 4 * item.pages;
            }
        }
        let at = self.at;
        self.at += BLOCK;
        Some(at)
    }
}

pub(super) fn join([low, high]: [u32; 2]) -> u64 {
    low as u64 | (high as u64) << 32
}

pub(super) fn split(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}
