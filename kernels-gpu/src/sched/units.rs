//! How the warps of a CTA share an item's KV.

use crate::abi::{AttentionParams, DECODE_WARPS, KV_BLOCK, WorkItem};
use crate::isa;

const WARPS: u32 = DECODE_WARPS as u32;

/// An item's KV in units, blocks or the sections of a fixed split, which warps take in turn; this warp's that are left. An
/// item without KV has one unit, of which nothing is seen.
#[derive(Clone, Copy)]
pub(crate) struct Units {
    /// Tokens of a unit.
    pub(super) size: u32,
    /// Where the first one would begin if it were whole, where it does begin, and where the last ends.
    pub(super) first: u32,
    pub(super) start: u32,
    pub(super) end: u32,
    /// This warp's next.
    pub(super) next: u32,
}

/// A run of tokens, at least one, that one warp sums up in order.
#[derive(Clone, Copy)]
pub(crate) struct Unit {
    /// Among the item's.
    pub(crate) index: u32,
    pub(crate) at: u32,
    pub(crate) end: u32,
}

impl Unit {
    pub(crate) const NONE: Unit = Unit { index: 0, at: 0, end: 0 };
}

impl Units {
    /// `turn`: units of the items before, so that turns go on from item to item.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn new(p: &AttentionParams, item: &WorkItem, turn: u32, warp: u32) -> Self {
        let size = if p.section == 0 { KV_BLOCK as u32 } else { p.section };
        let (start, end) = (item.kv_start, item.kv_end);
        let end = if end > start { end } else { start + 1 };
        let first = isa::div_rem(start, size).0 * size;
        Units { size, first, start, end, next: warp.wrapping_sub(turn) % WARPS }
    }

    /// No units.
    pub(crate) const NONE: Units = Units { size: 1, first: 0, start: 0, end: 0, next: 0 };

    /// All units of the item.
    #[inline(always)]
    pub(crate) fn count(&self) -> u32 {
        isa::div_rem(self.end - self.first - 1, self.size).0 + 1
    }

    /// Place of this warp in the item's turns: the warp at place 0 takes the first unit.
    #[inline(always)]
    pub(crate) fn place(&self) -> u32 {
        self.next % WARPS
    }

    /// The warp's next unit; [`Unit::NONE`] after the last.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> Unit {
        let index = self.next;
        let at = self.first.saturating_add(index.saturating_mul(self.size));
        if at >= self.end {
            return Unit::NONE;
        }
        self.next += WARPS;
        let end = at.saturating_add(self.size);
        Unit {
            index,
            at: if at > self.start { at } else { self.start },
            end: if end < self.end { end } else { self.end },
        }
    }
}
