//! Where a KV row lives.

use crate::abi::{Divisor, KV_BLOCK, PageRows, Sequence, WorkItem};
use crate::isa;
use crate::tile::{Panels, SharedTile};

/// A head's page list.
#[derive(Clone, Copy)]
pub(crate) struct PageList {
    /// Address of the first page number.
    at: u64,
    page_size: Divisor,
}

impl PageList {
    #[inline(always)]
    pub(crate) fn new(pages: u64, page_size: Divisor, item: &WorkItem) -> Self {
        Self::from_entry(pages, page_size, item.pages)
    }

    /// The list from entry `first` of `pages` on.
    #[inline(always)]
    pub(crate) fn from_entry(pages: u64, page_size: Divisor, first: u64) -> Self {
        PageList { at: pages + 4 * first, page_size }
    }

    /// Page and offset of a token. Ragged KV is one page.
    ///
    /// # Safety
    /// The token is below the item's end, so that the list has its page.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn locate(&self, token: u32) -> (u32, u32) {
        if self.page_size.value == 0 {
            return (0, token);
        }
        let (index, offset) = self.page_size.div_rem(token);
        // SAFETY: the caller's promise.
        let [page] = unsafe { isa::ld_global_1(self.at + 4 * index as u64) };
        (page, offset)
    }

    /// Position in the sequence of a token of the list, where `at` holds logical pages.
    ///
    /// # Safety
    /// As [`PageList::locate`].
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn position(&self, token: u32) -> u32 {
        // SAFETY: the caller's promise.
        let (page, offset) = unsafe { self.locate(token) };
        page * self.page_size.value + offset
    }
}

/// K or V of one sequence and KV head.
#[derive(Clone, Copy)]
pub(crate) struct KvRows<'a> {
    rows: &'a PageRows,
    /// Address of the head's token 0 of page 0.
    base: u64,
}

impl PageRows {
    /// Address of token 0 of page 0 of the item's head. Where KV is paged, `kv_start` is 0.
    #[inline(always)]
    pub(crate) fn head_base(&self, seq: &Sequence, item: &WorkItem) -> u64 {
        self.base + item.kv_head as u64 * self.head + seq.kv_start * self.token
    }
}

impl<'a> KvRows<'a> {
    #[inline(always)]
    pub(crate) fn new(rows: &'a PageRows, seq: &Sequence, item: &WorkItem) -> Self {
        KvRows { rows, base: rows.head_base(seq, item) }
    }

    /// The rows without their channels before `first`.
    #[inline(always)]
    pub(crate) fn skip_channels(self, first: u32) -> Self {
        KvRows { base: self.base + 2 * first as u64, ..self }
    }

    /// Address of a row.
    #[inline(always)]
    pub(crate) fn at(&self, page: u32, offset: u32) -> u64 {
        self.base + page as u64 * self.rows.page + offset as u64 * self.rows.token
    }

    /// Sets out to copy the rows of a block from token `at` into `tile`, by all `THREADS` lanes; zeros from
    /// token `end` on and past the row's channels, so that unused slots are never read.
    ///
    /// # Safety
    /// The tile has `KV_BLOCK` rows, nobody reads it, and the rows below `end` are readable.
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn copy_block<const CHUNKS: u32, const THREADS: u32>(
        &self,
        pages: &PageList,
        tile: SharedTile<CHUNKS>,
        (at, end): (u32, u32),
        head_dim: u32,
    ) {
        let thread = isa::thread_x();
        const { assert!((KV_BLOCK as u32 * CHUNKS).is_multiple_of(THREADS)) };
        // Kept a loop: unrolled, its addresses would push accumulators out of the registers.
        let mut index = thread;
        while index < isa::opaque(KV_BLOCK as u32 * CHUNKS) {
            let (row, chunk) = (index / CHUNKS, index % CHUNKS);
            let there = at + row < end && chunk * 8 < head_dim;
            let mut from = self.base;
            if there {
                // SAFETY: the token is below the end.
                let (page, offset) = unsafe { pages.locate(at + row) };
                from = self.at(page, offset) + chunk as u64 * 16;
            }
            // SAFETY: the caller's promise.
            unsafe { isa::cp_async_16(tile.at(row, chunk), from, if there { 16 } else { 0 }) };
            index += THREADS;
        }
    }

    /// As [`KvRows::copy_block`], by a warpgroup into `N` rows: each lane finds a row for its warp.
    ///
    /// # Safety
    /// As [`KvRows::copy_block`].
    #[inline(always)]
    #[track_caller]
    pub(crate) unsafe fn gather<const N: u32, const CHUNKS: u32>(
        &self,
        pages: &PageList,
        tile: Panels<N, CHUNKS>,
        (at, end): (u32, u32),
        head_dim: u32,
    ) {
        let (warp, lane) = (isa::thread_x() % 128 / 32, isa::thread_x() % 32);
        let mut first = 32 * warp;
        while first < N {
            let mut from = 0;
            if first + lane < N && at + first + lane < end {
                // SAFETY: the token is below the end.
                let (page, offset) = unsafe { pages.locate(at + first + lane) };
                from = self.at(page, offset);
            }
            let mut index = lane;
            while index < isa::opaque(32 * CHUNKS) {
                let (row, chunk) = (index / CHUNKS, index % CHUNKS);
                let [low, high] = [from as u32, (from >> 32) as u32].map(|x| isa::shfl_idx(x, row));
                let row_at = low as u64 | (high as u64) << 32;
                let there = row_at != 0 && chunk * 8 < head_dim;
                let from = if there { row_at + chunk as u64 * 16 } else { self.base };
                if first + row < N {
                    // SAFETY: the caller's promise.
                    unsafe {
                        isa::cp_async_16(tile.chunk(first + row, chunk), from, if there { 16 } else { 0 })
                    };
                }
                index += 32;
            }
            first += 128;
        }
    }
}
