//! Tiles of K and V on their way to `wgmma`, brought by a warpgroup of their own, the producer.

use crate::abi::{AttentionParams, PageRows, Sequence, WorkItem};
use crate::attn::kv::{KvRows, PageList};
use crate::isa;
use crate::sched::{Cursor, Stages};
use crate::tile::Panels;

/// Lanes of the producer, the CTA's first.
const LANES: u32 = 128;

/// Whose KV it is. Asked where it is needed: registers are what limits the producer.
pub(crate) trait ItemKv {
    /// The item and its sequence.
    fn item(&self) -> (WorkItem, Sequence);
    /// Where its boxes are: its KV head, the sequence's first token in ragged KV, its first page.
    fn boxes(&self) -> (u32, u32, u64);
}

/// Columns of K or V.
pub(crate) struct Columns<'a> {
    pub(crate) rows: &'a PageRows,
    /// Address of the tensor map.
    pub(crate) map: u64,
    /// First of the row's channels.
    pub(crate) first: u32,
    /// Channels of a row from there on; where a tile has more, they are zeros.
    pub(crate) channels: u32,
}

/// The producer's tiles. One that it gathers is told to be full later, when the next one has set out: two are on their way.
pub(crate) struct KvTiles<'a> {
    p: &'a AttentionParams,
    /// Named barrier of the producer's lanes.
    barrier: u32,
    /// Full barrier of the gathered tile that is not yet told; 0: none.
    late: u32,
}

impl<'a> KvTiles<'a> {
    #[inline(always)]
    pub(crate) fn new(p: &'a AttentionParams, barrier: u32) -> Self {
        KvTiles { p, barrier, late: 0 }
    }

    /// Waits for a slot that all lanes fill: who waits must be neither ahead nor behind by a round, whose parities are the
    /// same, so all of them meet before.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn wait_empty<const SLOTS: u32>(&self, stages: Stages<SLOTS>, cursor: Cursor<SLOTS>) {
        isa::bar_sync_named(self.barrier, LANES);
        stages.wait_empty(cursor);
    }

    /// Sets out with a tile of the tokens from `at`, where the item ends at `end`. Blocks that the end cuts, and all where
    /// `box_rows` is 0, are gathered row by row, with zeros past the end: what stands there in memory may be anything, and 0
    /// times it NaN. Boxes are the first warp's; the others go on.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn load<const SLOTS: u32, const N: u32, const CHUNKS: u32>(
        &mut self,
        item: &impl ItemKv,
        (at, end): (u32, u32),
        columns: Columns<'_>,
        box_rows: u32,
        (stages, cursor): (Stages<SLOTS>, Cursor<SLOTS>),
        tile: Panels<N, CHUNKS>,
    ) {
        let p = self.p;
        let full = stages.full(cursor.slot());
        if box_rows == 0 || at + N > end {
            self.wait_empty(stages, cursor);
            let (item, seq) = item.item();
            let pages = PageList::new(p.pages, p.page_size, &item);
            let rows = KvRows::new(columns.rows, &seq, &item).skip_channels(columns.first);
            // SAFETY: the tile is empty; the rows are the item's.
            unsafe { rows.gather(&pages, tile, (at, end), columns.channels) };
            return self.told_later(full);
        }
        self.flush();
        if isa::thread_x() >= 32 {
            return;
        }
        stages.wait_empty(cursor);
        if isa::thread_x() == 0 {
            // SAFETY: initialised.
            unsafe { isa::mbarrier_arrive_expect_tx(full, Panels::<N, CHUNKS>::BYTES) };
        }
        isa::warp_sync();
        let (kv_head, start, first_page) = item.boxes();
        let pages = PageList::from_entry(p.pages, p.page_size, first_page);
        // A lane a box. Opaque: computed here and not kept.
        let mut index = isa::opaque(isa::thread_x());
        loop {
            let box_rows = isa::opaque(box_rows);
            let (row, panel) =
                (index / Panels::<N, CHUNKS>::COUNT * box_rows, index % Panels::<N, CHUNKS>::COUNT);
            if row >= N {
                return;
            }
            // SAFETY: the token is below the item's end.
            let (page, offset) = unsafe { pages.locate(at + row) };
            let channel = columns.first + panel * Panels::<N, CHUNKS>::WIDTH * 8;
            let box_at = [channel as i32, (start + offset) as i32, kv_head as i32, page as i32];
            // SAFETY: the tile is empty; the host has described the tensor with boxes of `box_rows` tokens.
            unsafe { isa::tma_load(tile.row(panel, row), columns.map, box_at, full, isa::Keep::LAST_OUT) };
            index += 32;
        }
    }

    /// All lanes have set out with copies to a tile, which are the lanes' newest group now.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn told_later(&mut self, full: u32) {
        isa::cp_async_commit();
        if self.late != 0 {
            isa::cp_async_wait::<1>();
            self.tell();
        }
        self.late = full;
    }

    /// Tells of all gathered tiles.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn flush(&mut self) {
        if self.late != 0 {
            isa::cp_async_wait::<0>();
            self.tell();
            self.late = 0;
        }
    }

    #[inline(always)]
    #[track_caller]
    fn tell(&self) {
        isa::fence_proxy_async();
        isa::bar_sync_named(self.barrier, LANES);
        if isa::thread_x() == 0 {
            // SAFETY: initialised.
            unsafe { isa::mbarrier_arrive(self.late) };
        }
    }
}
