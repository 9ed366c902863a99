//! Slots of shared memory that one side fills and the other empties, with an mbarrier for each fact.

use crate::isa;

/// A ring of `SLOTS` slots: `full` barriers, then `empty` ones.
#[derive(Clone, Copy)]
pub(crate) struct Stages<const SLOTS: u32> {
    at: u32,
}

/// How often slots have had their turn: says which slot is next, and the parity of its phase. Each side counts by itself.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<const SLOTS: u32>(u32);

impl<const SLOTS: u32> Cursor<SLOTS> {
    pub(crate) const START: Self = {
        assert!(SLOTS.is_power_of_two());
        Cursor(0)
    };

    #[inline(always)]
    pub(crate) fn slot(self) -> u32 {
        self.0 % SLOTS
    }

    #[inline(always)]
    fn parity(self) -> u32 {
        (self.0 / SLOTS) & 1
    }

    /// The turn before this one, of a ring of the same length that is a turn behind.
    #[inline(always)]
    pub(crate) fn previous(self) -> Self {
        Cursor(self.0.wrapping_sub(1))
    }

    /// The same turn of a ring of another length.
    #[inline(always)]
    pub(crate) fn of<const OTHER: u32>(self) -> Cursor<OTHER> {
        Cursor(self.0)
    }

    #[inline(always)]
    pub(crate) fn advance(&mut self) {
        self.0 = self.0.wrapping_add(1);
    }
}

/// A slot that is full, until it is given back: what stands there is reached through it alone.
#[must_use]
pub(crate) struct Full<const SLOTS: u32>(Cursor<SLOTS>);

impl<const SLOTS: u32> Full<SLOTS> {
    #[inline(always)]
    pub(crate) fn slot(&self) -> u32 {
        self.0.slot()
    }
}

#[inline(always)]
#[track_caller]
fn wait(barrier: u32, parity: u32) {
    // SAFETY: barriers of `Stages` are initialised before they are used.
    while !unsafe { isa::mbarrier_try_wait(barrier, parity) } {}
}

impl<const SLOTS: u32> Stages<SLOTS> {
    /// Shared bytes of the barriers.
    pub(crate) const BYTES: u32 = 16 * SLOTS;

    /// Barriers at `at`, a multiple of 8, initialised elsewhere.
    #[inline(always)]
    pub(crate) fn new(at: u32) -> Self {
        Stages { at }
    }

    /// Initialises the barriers, by one lane: a slot is full after one arrival and the bytes it announces, and empty
    /// after `readers` arrivals. A barrier and `fence_mbarrier_init` stand between this and any use.
    ///
    /// # Safety
    /// The barriers are shared memory that nothing else uses.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn init(&self, readers: u32) {
        for slot in 0..SLOTS {
            // SAFETY: the caller's promise.
            unsafe {
                isa::mbarrier_init(self.full(slot), 1);
                isa::mbarrier_init(self.empty(slot), readers);
            }
        }
    }

    /// The barrier that tells that a slot is full.
    #[inline(always)]
    pub(crate) fn full(&self, slot: u32) -> u32 {
        self.at + 8 * slot
    }

    #[inline(always)]
    fn empty(&self, slot: u32) -> u32 {
        self.at + 8 * (SLOTS + slot)
    }

    /// Waits until the slot may be filled; at once in the first round.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn wait_empty(&self, cursor: Cursor<SLOTS>) {
        wait(self.empty(cursor.slot()), cursor.parity() ^ 1);
    }

    /// Waits until the slot is full.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn wait_full(&self, cursor: Cursor<SLOTS>) -> Full<SLOTS> {
        wait(self.full(cursor.slot()), cursor.parity());
        Full(cursor)
    }

    /// Gives the slot back, by one lane of each warp after all of its lanes are done with it.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn release(&self, full: Full<SLOTS>) {
        isa::warp_sync();
        if isa::thread_x().is_multiple_of(32) {
            // SAFETY: initialised before the slot was filled.
            unsafe { isa::mbarrier_arrive(self.empty(full.slot())) };
        }
    }
}
