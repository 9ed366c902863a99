//! Shared memory of a CTA: what stands where, and the barriers that tell who may use it.

use super::WARPGROUP;
use crate::abi::{Sequence, WorkItem};
use crate::attn::rows::Place;
use crate::isa;
use crate::kernels::Config;
use crate::sched::{Full, Stages, Walk};
use crate::tile::Panels;

/// Slots for K, and as many for V: one in use, one on its way. More do not fit beside the tiles.
pub(super) const STAGES: u32 = 2;

/// Slots for items: the producer is at most one item ahead.
pub(super) const ITEMS: u32 = 2;

/// Bytes of an item's slot: its [`Place`], its [`Walk`], its ends, where its boxes are.
const ITEM_BYTES: u32 = 64;

/// Q `[M, 8 CHUNKS]`; slots of K `[N, 8 CHUNKS]` and of V `[N, 8 V_CHUNKS]`; items; barriers. A consumer has 64 rows.
#[derive(Clone, Copy)]
pub(crate) struct Layout<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> {
    base: u32,
}

impl<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> Layout<M, N, CHUNKS, V_CHUNKS> {
    pub(super) const CONSUMERS: u32 = M / 64;
    const K: u32 = Panels::<M, CHUNKS>::BYTES;
    const V: u32 = Self::K + STAGES * Panels::<N, CHUNKS>::BYTES;
    const ITEM: u32 = Self::V + STAGES * Panels::<N, V_CHUNKS>::BYTES;
    const ITEM_BARRIERS: u32 = Self::ITEM + ITEMS * ITEM_BYTES;
    const Q_BARRIERS: u32 = Self::ITEM_BARRIERS + Stages::<ITEMS>::BYTES;
    const K_BARRIERS: u32 = Self::Q_BARRIERS + Stages::<1>::BYTES;
    const V_BARRIERS: u32 = Self::K_BARRIERS + Stages::<STAGES>::BYTES;
    const END: u32 = Self::V_BARRIERS + Stages::<STAGES>::BYTES;

    #[inline(always)]
    pub(super) fn new() -> Self {
        Layout { base: isa::shared_base() }
    }

    /// Q, for the producer.
    #[inline(always)]
    pub(super) fn q(&self) -> Panels<M, CHUNKS> {
        Panels::new(self.base)
    }

    /// Q, once it is there.
    #[inline(always)]
    pub(super) fn full_q(&self, _: &Full<1>) -> Panels<M, CHUNKS> {
        self.q()
    }

    /// K of a block, once it is there.
    #[inline(always)]
    pub(super) fn full_k(&self, full: &Full<STAGES>) -> Panels<N, CHUNKS> {
        self.k(full.slot())
    }

    /// V of a block, once it is there.
    #[inline(always)]
    pub(super) fn full_v(&self, full: &Full<STAGES>) -> Panels<N, V_CHUNKS> {
        self.v(full.slot())
    }

    /// A slot of K, for the producer.
    #[inline(always)]
    pub(super) fn k(&self, slot: u32) -> Panels<N, CHUNKS> {
        Panels::new(self.base + Self::K + slot * Panels::<N, CHUNKS>::BYTES)
    }

    /// A slot of V, for the producer.
    #[inline(always)]
    pub(super) fn v(&self, slot: u32) -> Panels<N, V_CHUNKS> {
        Panels::new(self.base + Self::V + slot * Panels::<N, V_CHUNKS>::BYTES)
    }

    #[inline(always)]
    fn item(&self, slot: u32) -> u32 {
        self.base + Self::ITEM + slot * ITEM_BYTES
    }

    /// Items are there; filled by the producer, read by all consumers.
    #[inline(always)]
    pub(super) fn items(&self) -> Stages<ITEMS> {
        Stages::new(self.base + Self::ITEM_BARRIERS)
    }

    /// Q is there.
    #[inline(always)]
    pub(super) fn q_stages(&self) -> Stages<1> {
        Stages::new(self.base + Self::Q_BARRIERS)
    }

    /// K of a block is there.
    #[inline(always)]
    pub(super) fn k_stages(&self) -> Stages<STAGES> {
        Stages::new(self.base + Self::K_BARRIERS)
    }

    /// V of a block is there.
    #[inline(always)]
    pub(super) fn v_stages(&self) -> Stages<STAGES> {
        Stages::new(self.base + Self::V_BARRIERS)
    }

    /// Initialises the barriers; rows of Q that no item has are zeros for ever. By all lanes, which may go on to use
    /// everything.
    ///
    /// # Safety
    /// Nothing uses the shared memory yet.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn prepare(&self, q_rows: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            if isa::thread_x() == 0 {
                // A lane of each consumer's warp gives a slot back; of items, which the producer reads too, of all warps.
                let warps = 4 * Self::CONSUMERS;
                self.items().init(warps + 4);
                self.q_stages().init(warps);
                self.k_stages().init(warps);
                self.v_stages().init(warps);
                isa::fence_mbarrier_init();
            }
            let mut index = q_rows * CHUNKS + isa::thread_x();
            while index < M * CHUNKS {
                isa::st_shared_4(self.q().chunk(index / CHUNKS, index % CHUNKS), [0; 4]);
                index += Self::THREADS;
            }
        }
        isa::fence_proxy_async();
        isa::bar_sync();
    }

    /// Writes what an item's slot has besides its [`Place`], by one lane.
    ///
    /// # Safety
    /// The slot is empty.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn write_item(
        &self,
        slot: u32,
        walk: Walk,
        item: &WorkItem,
        seq: &Sequence,
        q_token: u32,
    ) {
        let at = self.item(slot);
        let (words, left) = walk.to_words();
        // SAFETY: the caller's promise.
        unsafe {
            isa::st_shared_4(at + 16, words);
            isa::st_shared_4(at + 32, [left, item.kv_start, item.kv_end, q_token]);
            let pages = [item.pages as u32, (item.pages >> 32) as u32];
            isa::st_shared_4(at + 48, [item.kv_head, seq.kv_start as u32, pages[0], pages[1]]);
        }
    }

    /// Address of an item's [`Place`].
    #[inline(always)]
    pub(super) fn place(&self, slot: u32) -> u32 {
        self.item(slot)
    }

    /// An item's walk; its first token, one past its last, and its first query token in the batch.
    ///
    /// # Safety
    /// The slot is full.
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn walk(&self, slot: u32) -> (Walk, [u32; 3]) {
        let at = self.item(slot);
        // SAFETY: the caller's promise.
        let (words, [left, ends @ ..]) = unsafe { (isa::ld_shared_4(at + 16), isa::ld_shared_4(at + 32)) };
        (Walk::from_words(words, left), ends)
    }

    /// Where an item's boxes are: its KV head, the sequence's first token in ragged KV, its first page.
    ///
    /// # Safety
    /// As [`Layout::walk`].
    #[inline(always)]
    #[track_caller]
    pub(super) unsafe fn boxes(&self, slot: u32) -> (u32, u32, u64) {
        // SAFETY: the caller's promise.
        let [kv_head, start, low, high] = unsafe { isa::ld_shared_4(self.item(slot) + 48) };
        (kv_head, start, low as u64 | (high as u64) << 32)
    }
}

impl<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> Config
    for Layout<M, N, CHUNKS, V_CHUNKS>
{
    const THREADS: u32 = WARPGROUP * (Self::CONSUMERS + 1);
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = {
        assert!(Place::BYTES == 16);
        Self::END
    };
}
