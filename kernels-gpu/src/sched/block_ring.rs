//! K and V of one worker's blocks on their way through shared memory, without a break from item to item.

use crate::abi::{AttentionParams, KV_BLOCK};
use crate::attn::kv::PageList;
use crate::isa;
use crate::sched::progress::{LANES, Progress, join, split};
use crate::sched::ring::wait_for_next;
use crate::tile::SharedTile;

/// Tokens of a stage.
pub(crate) const STAGE: u32 = 16;

const BLOCK: u32 = KV_BLOCK as u32;

/// Most tokens of a block for each lane: `lane` and, of a warp's, `lane + 32`.
const PER_LANE: usize = KV_BLOCK / 32;

/// A ring of `SLOTS` stages, each 16 tokens of K or V: of every block all of K, then all of V; with one of `WORKERS = 1`, K
/// alone, whose first channels are V. It is one worker's, a warp's (of four) or the CTA's: there is no barrier but the
/// worker's own. While one stage is used up to `SLOTS - 1` are on their way, of the next items too; the pages of a block
/// are looked up, once for K and V, while the block before it sets out.
///
/// What is needed once a block stands in shared memory: registers are what limits the kernel.
pub(crate) struct BlockRing<'a, const WORKERS: u32, const CHUNKS: u32, const SLOTS: u32> {
    p: &'a AttentionParams,
    /// Slots; then the rows' addresses, of K and V, for each token of the block that copies set out for; then [`Progress`].
    base: u32,
    /// Slot of the next copy; when that has set out, of the stage that is used next.
    put: u32,
    /// Tokens of the block that copies set out for, and its stages of K and V that are left.
    tokens: u32,
    left: u32,
    /// Tokens of the next block, or [`NONE`], and page and offset of the lane's, which are being looked up.
    next: u32,
    found: [(u32, u32); PER_LANE],
}

/// No block.
const NONE: u32 = u32::MAX;

/// Stages of K, and of V, of a block from which on there are so many tokens; one of zeros where there are none.
#[inline(always)]
pub(crate) fn stages(left: u32) -> u32 {
    if left >= BLOCK {
        BLOCK / STAGE
    } else if left > 0 {
        left.div_ceil(STAGE)
    } else {
        1
    }
}

impl<'a, const WORKERS: u32, const CHUNKS: u32, const SLOTS: u32> BlockRing<'a, WORKERS, CHUNKS, SLOTS> {
    /// Lanes of the worker.
    const LANES: u32 = LANES / WORKERS;
    /// Whether K's rows are V's too.
    const LATENT: bool = WORKERS == 1;
    const ROWS: u32 = SLOTS * SharedTile::<CHUNKS>::bytes(STAGE);
    const PROGRESS: u32 = Self::ROWS + 16 * BLOCK;

    /// Shared bytes.
    pub(crate) const BYTES: u32 = (Self::PROGRESS + Progress::<WORKERS>::BYTES).next_multiple_of(128);

    /// Sets out with the first stages of the worker's blocks in items `first..last`.
    ///
    /// # Safety
    /// `base` is [`BlockRing::BYTES`] of shared memory that nothing else uses; the items' KV is readable.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn start(p: &'a AttentionParams, first: u32, last: u32, base: u32) -> Self {
        let progress = Progress::<WORKERS>::before(first, last);
        if isa::thread_x().is_multiple_of(Self::LANES) {
            progress.store(base + Self::PROGRESS);
        }
        isa::bar_sync();
        let mut ring =
            BlockRing { p, base, put: 0, tokens: 0, left: 0, next: NONE, found: [(0, 0); PER_LANE] };
        ring.advance();
        ring.advance();
        // With whole blocks in use there is a slot more to fill.
        for _ in 0..if Self::LATENT { SLOTS } else { SLOTS - 1 } {
            ring.put();
        }
        ring
    }

    /// A barrier of the worker's lanes.
    #[inline(always)]
    #[track_caller]
    fn sync(&self) {
        if WORKERS == 1 { isa::bar_sync() } else { isa::warp_sync() }
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> SharedTile<CHUNKS> {
        SharedTile::new(self.base + slot * SharedTile::<CHUNKS>::bytes(STAGE))
    }

    /// The next block becomes the one that copies set out for, and the pages of the one after it are looked up.
    #[inline(always)]
    #[track_caller]
    fn advance(&mut self) {
        let p = self.p;
        let (rows, progress_at) = (self.base + Self::ROWS, self.base + Self::PROGRESS);
        // Opaque: what follows from it is not computed ahead of the kernel's loops.
        let lane = isa::opaque(isa::thread_x()) % Self::LANES;
        let mut progress = Progress::<WORKERS>::load(progress_at);
        // All have loaded it, and read the rows of the last block.
        self.sync();
        for i in 0..PER_LANE {
            let ((page, offset), row) = (self.found[i], lane + Self::LANES * i as u32);
            if Self::LATENT && row >= BLOCK {
                continue;
            }
            let [k0, k1] = split(progress.of_item[0] + page as u64 * p.k.page + offset as u64 * p.k.token);
            let [v0, v1] = split(progress.of_item[1] + page as u64 * p.v.page + offset as u64 * p.v.token);
            // SAFETY: the ring's room for it, each token's by one lane.
            unsafe { isa::st_shared_4(rows + 16 * row, [k0, k1, v0, v1]) };
        }
        let of_stage = if Self::LATENT { 1 } else { 2 };
        (self.tokens, self.left) =
            (self.next, if self.next == NONE { 0 } else { of_stage * stages(self.next) });
        self.next = NONE;
        if let Some(at) =
            progress.step(p, p.section, |seq, item| [p.k.head_base(seq, item), p.v.head_base(seq, item)])
        {
            let left = progress.kv_end.saturating_sub(at);
            self.next = if left < BLOCK { left } else { BLOCK };
            let pages = PageList::from_entry(progress.pages, p.page_size, 0);
            for i in 0..PER_LANE {
                let token = lane + Self::LANES * i as u32;
                if token < left && token < BLOCK {
                    // SAFETY: the token is below the item's end.
                    self.found[i] = unsafe { pages.locate(at + token) };
                }
            }
        }
        if lane == 0 {
            progress.store(progress_at);
        }
        self.sync();
    }

    /// Sets out with the next stage; with an empty group where there is none, so that groups count stages.
    #[inline(always)]
    #[track_caller]
    fn put(&mut self) {
        if isa::agreed(self.left > 0) {
            self.copy();
            self.left -= 1;
            if isa::agreed(self.left == 0) {
                self.advance();
            }
        }
        isa::cp_async_commit();
        self.put = if self.put + 1 == SLOTS { 0 } else { self.put + 1 };
    }

    /// The block's next stage: zeros for tokens and channels that are not there, so that unused slots are never read.
    #[inline(always)]
    #[track_caller]
    fn copy(&self) {
        let stages = stages(self.tokens);
        let is_v = !Self::LATENT && self.left <= stages;
        let first = STAGE * if is_v || Self::LATENT { stages - self.left } else { 2 * stages - self.left };
        let head_dim = if is_v { self.p.v_head_dim } else { self.p.head_dim };
        let rows = self.base + Self::ROWS + 16 * first + 8 * is_v as u32;
        let tile = self.slot(self.put);
        let mut first_index = 0;
        // Kept a loop: unrolled, its addresses would push accumulators out of the registers.
        while first_index < isa::opaque(STAGE * CHUNKS) {
            let index = first_index + isa::thread_x() % Self::LANES;
            let (row, chunk) = (index / CHUNKS, index % CHUNKS);
            let there = first + row < self.tokens && chunk * 8 < head_dim;
            // SAFETY: the rows are written; the slot was used before the worker's last barrier; rows below the end are
            // promised at `start`.
            unsafe {
                let from = join(isa::ld_shared_2(rows + 16 * row)) + chunk as u64 * 16;
                isa::cp_async_16(tile.at(row, chunk), from, if there { 16 } else { 0 });
            }
            first_index += Self::LANES;
        }
    }

    /// The next stage: visible to the worker, and the one before is given up by all of it.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn take(&mut self) -> SharedTile<CHUNKS> {
        wait_for_next::<SLOTS>();
        self.sync();
        self.put();
        self.slot(self.put)
    }

    /// Waits for the next block's stages, four at most, and stays with the first of them.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn wait_block(&mut self) {
        const { assert!(Self::LATENT && matches!(SLOTS, 4 | 7)) };
        match SLOTS {
            4 => isa::cp_async_wait::<0>(),
            _ => isa::cp_async_wait::<3>(),
        }
        isa::bar_sync();
    }

    /// Stage `i` of the block that has been waited for.
    #[inline(always)]
    pub(crate) fn stage(&self, i: u32) -> SharedTile<CHUNKS> {
        let slot = self.put + i;
        self.slot(if slot >= SLOTS { slot - SLOTS } else { slot })
    }

    /// Gives the block's first stage up, when all lanes are done with it.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn release(&mut self) {
        isa::bar_sync();
        self.put();
    }
}
