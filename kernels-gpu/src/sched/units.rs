//! Who takes what: a CTA its range of items; workers, the warps of a CTA or the CTA as one, an item's KV.

use crate::abi::{KV_BLOCK, RangeParams, WorkItem};
use crate::isa;

/// An item's KV in units, blocks or the sections of a fixed split, which `WORKERS` take in turn; this one's that are left. An
/// item without KV has one unit, of which nothing is seen.
#[derive(Clone, Copy)]
pub(crate) struct Units<const WORKERS: u32> {
    /// Tokens of a unit.
    pub(super) size: u32,
    /// Where the first one would begin if it were whole, where it does begin, and where the last ends.
    pub(super) first: u32,
    pub(super) start: u32,
    pub(super) end: u32,
    /// This worker's next.
    pub(super) next: u32,
}

/// A run of tokens, at least one, that one worker sums up in order.
#[derive(Clone, Copy)]
pub(crate) struct Unit {
    pub(crate) at: u32,
    pub(crate) end: u32,
}

impl Unit {
    pub(crate) const NONE: Unit = Unit { at: 0, end: 0 };
}

impl<const WORKERS: u32> Units<WORKERS> {
    /// `section`: tokens of a fixed split's, or 0. `turn`: units of the items before, so that turns go on from item to item.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn new(section: u32, item: &WorkItem, turn: u32, worker: u32) -> Self {
        let size = if section == 0 { KV_BLOCK as u32 } else { section };
        let (start, end) = (item.kv_start, item.kv_end);
        let end = if end > start { end } else { start + 1 };
        let first = isa::div_rem(start, size).0 * size;
        Units { size, first, start, end, next: worker.wrapping_sub(turn) % WORKERS }
    }

    /// No units.
    pub(crate) const NONE: Self = Units { size: 1, first: 0, start: 0, end: 0, next: 0 };

    /// All units of the item.
    #[inline(always)]
    pub(crate) fn count(&self) -> u32 {
        isa::div_rem(self.end - self.first - 1, self.size).0 + 1
    }

    /// Place of this worker in the item's turns: the one at place 0 takes the first unit.
    #[inline(always)]
    pub(crate) fn place(&self) -> u32 {
        self.next % WORKERS
    }

    /// Which of the item's units begins at token `at`.
    #[inline(always)]
    pub(crate) fn index(&self, at: u32) -> u32 {
        isa::div_rem(at.wrapping_sub(self.first), self.size).0
    }

    /// The worker's next unit; [`Unit::NONE`] after the last.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Unit {
        let index = self.next;
        let at = self.first.saturating_add(index.saturating_mul(self.size));
        if at >= self.end {
            return Unit::NONE;
        }
        self.next += WORKERS;
        let end = at.saturating_add(self.size);
        Unit {
            at: if at > self.start { at } else { self.start },
            end: if end < self.end { end } else { self.end },
        }
    }
}

/// The CTA's first item (0), or one past its last (1): loaded where it is needed, and not kept in registers.
#[inline(always)]
#[track_caller]
pub(crate) fn range(ranges: &RangeParams, i: u32) -> u32 {
    let at = ranges.ranges + 4 * (isa::opaque(isa::block_x()) + i) as u64;
    // SAFETY: the host gives one more than CTAs.
    let [item] = unsafe { isa::ld_global_1(at) };
    item
}
