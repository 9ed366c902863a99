//! Quantised K and V of one warp's blocks on their way through shared memory, without a break from item to item.

use crate::abi::{AttentionQuantParams, DECODE_WARPS, INT4_GROUP, KV_BLOCK, PageRows, format};
use crate::attn::kv::PageList;
use crate::isa;
use crate::sched::progress::Progress;
use crate::sched::ring::wait_for_next;
use crate::tile::SharedTile;

const BLOCK: u32 = KV_BLOCK as u32;
const GROUP: u32 = INT4_GROUP as u32;

/// Tokens of a block for each lane: `lane` and `lane + 32`.
const PER_LANE: usize = KV_BLOCK / 32;

/// No block.
const NONE: u32 = u32::MAX;

/// Tokens of a stage of a format: as many as fill about the bytes of 16 tokens of 16 bits.
#[inline(always)]
const fn stage_tokens(format: u32) -> u32 {
    match format {
        format::F16 => 16,
        format::INT4 => 64,
        _ => 32,
    }
}

/// Stages of a side of a block of `tokens` tokens, of which the first `coded` are int4 K, if that is the format, and the rest
/// 16 bits in the tail. One of zeros where there are no tokens.
#[inline(always)]
fn stages(format: u32, is_v: bool, tokens: u32, coded: u32) -> u32 {
    let n = if format == format::INT4 && !is_v {
        (coded > 0) as u32 + (tokens - coded).div_ceil(16)
    } else {
        tokens.div_ceil(stage_tokens(format))
    };
    if n > 0 { n } else { 1 }
}

/// Of a block from token `at` the tokens of int4 K before the tail.
#[inline(always)]
pub(crate) fn coded(tail_start: u32, at: u32, tokens: u32) -> u32 {
    let before = tail_start.saturating_sub(at);
    if before < tokens { before } else { tokens }
}

/// As [`BlockRing`](super::BlockRing), of one warp of four: of every block all stages of K, then all of V. What a stage's codes
/// are scaled by is in the stage. `C16`, `C8`, `C4`: chunks of 16 bytes of a row of 16, 8 and 4 bits a channel.
pub(crate) struct CodeRing<'a, const C16: u32, const C8: u32, const C4: u32, const SLOTS: u32> {
    p: &'a AttentionQuantParams,
    /// Slots; then the page of each token of the block that copies set out for; its head, tail slot, coded tokens, first token
    /// and tokens; two numbers of the item in use; then [`Progress`].
    base: u32,
    /// Slot of the next copy; when that has set out, of the stage that is used next.
    put: u32,
    /// Stages of K and V that are left of the block that copies set out for.
    left: u32,
    /// Tokens of the next block, or [`NONE`], and pages of the lane's, which are being looked up.
    next: u32,
    found: [u32; PER_LANE],
}

impl<'a, const C16: u32, const C8: u32, const C4: u32, const SLOTS: u32> CodeRing<'a, C16, C8, C4, SLOTS> {
    /// 64 tokens of int4 K with two groups of minima and scales; others are smaller.
    const SLOT: u32 = 64 * C16 * 4 + 2 * 2 * 16 * C16;
    const PAGES: u32 = SLOTS * Self::SLOT;
    const OF_BLOCK: u32 = Self::PAGES + 4 * BLOCK;
    const OF_ITEM: u32 = Self::OF_BLOCK + 32;
    const PROGRESS: u32 = Self::OF_ITEM + 16;

    /// Shared bytes.
    pub(crate) const BYTES: u32 =
        (Self::PROGRESS + Progress::<{ DECODE_WARPS as u32 }>::BYTES).next_multiple_of(128);

    /// Where in a stage the params of int4 and of int8 are.
    pub(crate) const INT4_PARAMS: u32 = 64 * C16 * 4;
    pub(crate) const INT8_PARAMS: u32 = 32 * C16 * 8;

    /// Sets out with the first stages of the warp's blocks in items `first..last`.
    ///
    /// # Safety
    /// `base` is [`CodeRing::BYTES`] of shared memory that nothing else uses; the items' KV is readable.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn start(p: &'a AttentionQuantParams, first: u32, last: u32, base: u32) -> Self {
        const { assert!(Self::SLOT.is_multiple_of(128) && Self::INT8_PARAMS + 64 <= Self::SLOT) };
        if isa::thread_x().is_multiple_of(32) {
            Progress::<{ DECODE_WARPS as u32 }>::before(first, last).store(base + Self::PROGRESS);
        }
        isa::bar_sync();
        let mut ring = CodeRing { p, base, put: 0, left: 0, next: NONE, found: [0; PER_LANE] };
        ring.advance();
        ring.advance();
        for _ in 0..SLOTS - 1 {
            ring.put();
        }
        ring
    }

    /// Keeps two numbers of the item in use, in shared memory. A barrier of the warp comes before and after.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn keep(&self, numbers: [u32; 2]) {
        if isa::thread_x().is_multiple_of(32) {
            // SAFETY: the ring's room for it.
            unsafe { isa::st_shared_2(self.base + Self::OF_ITEM, numbers) };
        }
    }

    /// What [`CodeRing::keep`] was given.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn kept(&self) -> [u32; 2] {
        // SAFETY: written before a barrier.
        unsafe { isa::ld_shared_2(self.base + Self::OF_ITEM) }
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> u32 {
        self.base + slot * Self::SLOT
    }

    /// The next block becomes the one that copies set out for, and the pages of the one after it are looked up.
    #[inline(always)]
    #[track_caller]
    fn advance(&mut self) {
        let p = self.p;
        let (pages_at, progress_at) = (self.base + Self::PAGES, self.base + Self::PROGRESS);
        // Opaque: what follows from it is not computed ahead of the kernel's loops.
        let lane = isa::opaque(isa::thread_x()) % 32;
        let mut progress = Progress::<{ DECODE_WARPS as u32 }>::load(progress_at);
        // All have loaded it, and used the pages of the last block.
        isa::warp_sync();
        let tokens = self.next;
        self.left = 0;
        if tokens != NONE {
            let [head_and_tail, tail_start] = progress.of_item;
            let coded = coded(tail_start as u32, progress.at - BLOCK, tokens);
            self.left = stages(p.k.format, false, tokens, coded) + stages(p.v.format, true, tokens, 0);
            for (i, page) in self.found.into_iter().enumerate() {
                // SAFETY: the ring's room for it, each token's by one lane.
                unsafe { isa::st_shared_1(pages_at + 4 * (lane + 32 * i as u32), [page]) };
            }
            if lane == 0 {
                let words = [head_and_tail as u32, (head_and_tail >> 32) as u32, coded, progress.at - BLOCK];
                // SAFETY: as above.
                unsafe {
                    isa::st_shared_4(self.base + Self::OF_BLOCK, words);
                    isa::st_shared_1(self.base + Self::OF_BLOCK + 16, [tokens]);
                }
            }
        }
        self.next = NONE;
        let int4 = p.k.format == format::INT4;
        let next = progress.step(&p.attention, 0, |seq, item| {
            let tail_start = if int4 { seq.kv_len / GROUP * GROUP } else { 0 };
            [item.kv_head as u64 | (seq.tail_slot as u64) << 32, tail_start as u64]
        });
        if let Some(at) = next {
            let left = progress.kv_end.saturating_sub(at);
            self.next = if left < BLOCK { left } else { BLOCK };
            let pages = PageList::from_entry(progress.pages, p.attention.page_size, 0);
            for i in 0..PER_LANE {
                let token = lane + 32 * i as u32;
                if token < left && token < BLOCK {
                    // SAFETY: the token is below the item's end.
                    self.found[i] = unsafe { pages.locate(at + token) }.0;
                }
            }
        }
        if lane == 0 {
            progress.store(progress_at);
        }
        isa::warp_sync();
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

    /// The block's next stage: zeros for tokens and channels that are not there.
    #[inline(always)]
    #[track_caller]
    fn copy(&self) {
        // SAFETY: written by `advance`.
        let [head, tail_slot, coded, at] = unsafe { isa::ld_shared_4(self.base + Self::OF_BLOCK) };
        let tokens = self.tokens();
        let of_v = stages(self.p.v.format, true, tokens, 0);
        let is_v = self.left <= of_v;
        let side = if is_v { self.p.v } else { self.p.k };
        let index = if is_v {
            of_v - self.left
        } else {
            of_v + stages(side.format, false, tokens, coded) - self.left
        };
        let to = self.slot(self.put);
        let rows = side.codes;
        let coded_row = |token: u32| {
            let (page, offset) = self.page_of(at, token);
            rows.at(page, head, offset)
        };
        let params = |row: u32, token: u32| {
            let (page, offset) = self.page_of(at, token);
            side.params.at(page, head, row) + 2 * offset as u64
        };
        match side.format {
            format::INT4 if is_v => {
                self.copy_rows::<C4>(to, 64, 0, tokens, coded_row);
                self.copy_by_token(to + Self::INT4_PARAMS, C4, 64, 0, params);
            }
            format::INT4 if coded > 0 && index == 0 => {
                self.copy_rows::<C4>(to, 64, 0, coded, coded_row);
                self.copy_groups(to + Self::INT4_PARAMS, side.params, head, (at, coded));
            }
            format::INT4 => {
                let first = coded + 16 * (index - (coded > 0) as u32);
                self.copy_rows::<C16>(to, 16, first, tokens, |token| {
                    side.tail.at(tail_slot, head, token % GROUP)
                });
            }
            format::F16 => self.copy_rows::<C16>(to, 16, 16 * index, tokens, coded_row),
            _ => {
                self.copy_rows::<C8>(to, 32, 32 * index, tokens, coded_row);
                if side.format == format::INT8 {
                    self.copy_by_token(to + Self::INT8_PARAMS, 1, 32, 32 * index, params);
                }
            }
        }
    }

    /// Tokens of the block that copies set out for.
    #[inline(always)]
    #[track_caller]
    fn tokens(&self) -> u32 {
        // SAFETY: written by `advance`.
        let [tokens] = unsafe { isa::ld_shared_1(self.base + Self::OF_BLOCK + 16) };
        tokens
    }

    /// Page and offset of a token of the block, from token `at`, that copies set out for.
    #[inline(always)]
    #[track_caller]
    fn page_of(&self, at: u32, token: u32) -> (u32, u32) {
        // SAFETY: written by `advance`; what stands there for tokens past the end is not used.
        let [page] = unsafe { isa::ld_shared_1(self.base + Self::PAGES + 4 * token) };
        (page, self.p.attention.page_size.div_rem(at + token).1)
    }

    /// Sets out to copy rows of `C` chunks, of which there are as many as `head_dim` has, for `tokens` tokens from `first`.
    #[inline(always)]
    #[track_caller]
    fn copy_rows<const C: u32>(
        &self,
        to: u32,
        tokens: u32,
        first: u32,
        end: u32,
        row_at: impl Fn(u32) -> u64,
    ) {
        let tile = SharedTile::<C>::new(to);
        let chunks = self.p.attention.head_dim / 8 / (C16 / C);
        let mut index = isa::thread_x() % 32;
        while index < isa::opaque(tokens) * C {
            let (row, chunk) = (index / C, index % C);
            let there = first + row < end && chunk < chunks;
            let from = if there { row_at(first + row) + 16 * chunk as u64 } else { self.p.attention.q.base };
            // SAFETY: the slot was used before the warp's last barrier; rows below the end are promised at `start`.
            unsafe { isa::cp_async_16(tile.at(row, chunk), from, if there { 16 } else { 0 }) };
            index += 32;
        }
    }

    /// Sets out to copy two bytes for each of `tokens` tokens from `first`, of `rows` rows; zeros past the channels. Of eight
    /// tokens, which are in one page, all or none are copied: what stands there for tokens past the end is not used.
    #[inline(always)]
    #[track_caller]
    fn copy_by_token(&self, to: u32, rows: u32, tokens: u32, first: u32, at: impl Fn(u32, u32) -> u64) {
        let mut index = isa::thread_x() % 32;
        while index < isa::opaque(rows) * (tokens / 8) {
            let (row, eight) = (index / (tokens / 8), 8 * (index % (tokens / 8)));
            let there = first + eight < self.tokens() && row * GROUP < self.p.attention.head_dim;
            let from = if there { at(row, first + eight) } else { self.p.attention.q.base };
            // SAFETY: as in `copy_rows`.
            unsafe { isa::cp_async_16(to + 16 * index, from, if there { 16 } else { 0 }) };
            index += 32;
        }
    }

    /// Sets out to copy the minima and scales of the two groups of K in `coded` tokens.
    #[inline(always)]
    #[track_caller]
    fn copy_groups(&self, to: u32, params: PageRows, head: u32, (at, coded): (u32, u32)) {
        let chunks = self.p.attention.head_dim / 8;
        let mut index = isa::thread_x() % 32;
        while index < isa::opaque(4) * C16 {
            let (group, chunk) = (index / (2 * C16), index % C16);
            let there = group * GROUP < coded && chunk < chunks;
            let mut from = self.p.attention.q.base;
            if there {
                let (page, offset) = self.page_of(at, group * GROUP);
                let part = index / C16 % 2 * chunks;
                from = params.at(page, head, offset / GROUP) + 16 * (part + chunk) as u64;
            }
            // SAFETY: as in `copy_rows`.
            unsafe { isa::cp_async_16(to + 16 * index, from, if there { 16 } else { 0 }) };
            index += 32;
        }
    }

    /// The next stage, at a shared address: visible to the warp, and the one before is given up by all of it.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn take(&mut self) -> u32 {
        wait_for_next::<SLOTS>();
        isa::warp_sync();
        self.put();
        self.taken()
    }

    /// The stage that was taken last.
    #[inline(always)]
    pub(crate) fn taken(&self) -> u32 {
        // Opaque: what is at a constant distance is addressed by it, and not computed ahead of the kernel's loops.
        isa::opaque(self.slot(self.put))
    }
}
