//! Shared memory of a CTA: what stands where, and the barriers that tell who may use it.

use crate::abi::{DECODE_MLA_SM90_ROWS, KV_BLOCK};
use crate::attn::rows::Place;
use crate::attn::softmax::State;
use crate::isa;
use crate::sched::{Full, Stages};
use crate::tile::Panels;

/// Slots of each part of KV.
pub(super) const SLOTS: u32 = 2;

const ROWS: u32 = DECODE_MLA_SM90_ROWS as u32;
const TOKENS: u32 = KV_BLOCK as u32;

/// Chunks of 8 channels of the lower part, whose values are the helper's: 256 channels; of the upper, the scorer's: 320, the
/// last 64 of which are no values.
pub(super) const LOWER: u32 = 32;
pub(super) const UPPER: u32 = 40;

/// Q and KV in two parts of their channels; P; places of the consumers; corrections and states of the rows; whether the CTA
/// has come last to a merge; barriers.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    base: u32,
}

/// What the scorer tells the helper of each row: the factor for what was accumulated before, and in the end the state.
pub(super) struct Told {
    base: u32,
}

impl Layout {
    const Q_UPPER: u32 = Panels::<ROWS, LOWER>::BYTES;
    const LOWER: u32 = Self::Q_UPPER + Panels::<ROWS, UPPER>::BYTES;
    const UPPER: u32 = Self::LOWER + SLOTS * Panels::<TOKENS, LOWER>::BYTES;
    const P: u32 = Self::UPPER + SLOTS * Panels::<TOKENS, UPPER>::BYTES;
    const PLACES: u32 = Self::P + Panels::<ROWS, 8>::BYTES;
    const TOLD: u32 = Self::PLACES + 2 * Place::BYTES;
    const FLAG: u32 = Self::TOLD + Told::BYTES;
    const Q_BARRIERS: u32 = Self::FLAG + 8;
    const LOWER_BARRIERS: u32 = Self::Q_BARRIERS + Stages::<1>::BYTES;
    const UPPER_BARRIERS: u32 = Self::LOWER_BARRIERS + Stages::<SLOTS>::BYTES;

    /// Shared bytes.
    pub(super) const BYTES: u32 = Self::UPPER_BARRIERS + Stages::<SLOTS>::BYTES;

    #[inline(always)]
    pub(super) fn new() -> Self {
        Layout { base: isa::shared_base() }
    }

    /// Address of a chunk of Q, for the producer.
    #[inline(always)]
    pub(super) fn q_chunk(&self, row: u32, chunk: u32) -> u32 {
        let (lower, upper) = self.q();
        if chunk < LOWER { lower.chunk(row, chunk) } else { upper.chunk(row, chunk - LOWER) }
    }

    #[inline(always)]
    fn q(&self) -> (Panels<ROWS, LOWER>, Panels<ROWS, UPPER>) {
        (Panels::new(self.base), Panels::new(self.base + Self::Q_UPPER))
    }

    /// Q's parts, once they are there.
    #[inline(always)]
    pub(super) fn full_q(&self, _: &Full<1>) -> (Panels<ROWS, LOWER>, Panels<ROWS, UPPER>) {
        self.q()
    }

    /// A slot of KV's lower part: for the producer, or once it is full.
    #[inline(always)]
    pub(super) fn lower(&self, slot: u32) -> Panels<TOKENS, LOWER> {
        Panels::new(self.base + Self::LOWER + slot * Panels::<TOKENS, LOWER>::BYTES)
    }

    /// A slot of its upper part, as [`Layout::lower`].
    #[inline(always)]
    pub(super) fn upper(&self, slot: u32) -> Panels<TOKENS, UPPER> {
        Panels::new(self.base + Self::UPPER + slot * Panels::<TOKENS, UPPER>::BYTES)
    }

    /// P, from the scorer's to the helper's barrier.
    #[inline(always)]
    pub(super) fn p(&self) -> Panels<ROWS, 8> {
        Panels::new(self.base + Self::P)
    }

    /// Address of the [`Place`] of consumer `consumer`: each has its own, as neither waits for the other to begin an item.
    #[inline(always)]
    pub(super) fn place(&self, consumer: u32) -> u32 {
        self.base + Self::PLACES + consumer * Place::BYTES
    }

    /// See [`Told`].
    #[inline(always)]
    pub(super) fn told(&self) -> Told {
        Told { base: self.base + Self::TOLD }
    }

    /// A word for the consumers' merges.
    #[inline(always)]
    pub(super) fn flag(&self) -> u32 {
        self.base + Self::FLAG
    }

    /// Q is there.
    #[inline(always)]
    pub(super) fn q_stages(&self) -> Stages<1> {
        Stages::new(self.base + Self::Q_BARRIERS)
    }

    /// The lower part of a block is there.
    #[inline(always)]
    pub(super) fn lower_stages(&self) -> Stages<SLOTS> {
        Stages::new(self.base + Self::LOWER_BARRIERS)
    }

    /// The upper part of a block is there.
    #[inline(always)]
    pub(super) fn upper_stages(&self) -> Stages<SLOTS> {
        Stages::new(self.base + Self::UPPER_BARRIERS)
    }

    /// Initialises the barriers, by all lanes, which may go on to use everything.
    ///
    /// # Safety
    /// Nothing uses the shared memory yet.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn prepare(&self) {
        if isa::thread_x() == 0 {
            // A lane of each warp that reads a slot gives it back.
            // SAFETY: the caller's promise.
            unsafe {
                self.q_stages().init(4);
                self.lower_stages().init(8);
                self.upper_stages().init(4);
                isa::fence_mbarrier_init();
            }
        }
        isa::bar_sync();
    }
}

impl Told {
    const BYTES: u32 = 3 * 4 * ROWS;

    /// Address of a row's correction.
    #[inline(always)]
    fn at(&self, row: u32) -> u32 {
        self.base + 4 * row
    }

    /// Corrections of the lane's rows, `row` and eight further, which three other lanes have too.
    ///
    /// # Safety
    /// Nobody reads them.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn put_correction(&self, row: u32, correction: [f32; 2]) {
        if isa::thread_x().is_multiple_of(4) {
            for (r, x) in correction.into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { isa::st_shared_1(self.at(row + 8 * r as u32), [x.to_bits()]) };
            }
        }
    }

    /// States of the lane's rows, as [`Told::put_correction`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn put_state(&self, row: u32, state: &State) {
        if isa::thread_x().is_multiple_of(4) {
            for r in 0..2 {
                let at = self.state_at(row + 8 * r as u32);
                // SAFETY: the caller's promise.
                unsafe { isa::st_shared_2(at, [state.m[r].to_bits(), state.l[r].to_bits()]) };
            }
        }
    }

    /// Address of a row's state, two words.
    #[inline(always)]
    fn state_at(&self, row: u32) -> u32 {
        self.base + 4 * ROWS + 8 * row
    }

    /// Corrections of rows `row` and eight further.
    ///
    /// # Safety
    /// They have been told.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn correction(&self, row: u32) -> [f32; 2] {
        // SAFETY: the caller's promise.
        [0, 8].map(|r| f32::from_bits(unsafe { isa::ld_shared_1(self.at(row + r)) }[0]))
    }

    /// States of rows `row` and eight further.
    ///
    /// # Safety
    /// As [`Told::correction`].
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn state(&self, row: u32) -> State {
        // SAFETY: the caller's promise.
        let [[m0, l0], [m1, l1]] =
            [0, 8].map(|r| unsafe { isa::ld_shared_2(self.state_at(row + r)) }.map(f32::from_bits));
        State { m: [m0, m1], l: [l0, l1] }
    }
}
