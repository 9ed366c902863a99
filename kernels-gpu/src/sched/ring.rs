//! Tiles of K and V on their way through shared memory.

use crate::abi::{AttentionParams, KV_BLOCK, Sequence, WorkItem};
use crate::attn::kv::{KvRows, PageList};
use crate::isa;
use crate::tile::SharedTile;

/// K and V of an item's blocks, one tile after the other, as 16-bit elements in shared memory.
pub(crate) trait Source<'a, const CHUNKS: u32>: Sized {
    /// Shared bytes.
    const BYTES: u32;
    /// What the kernel is given.
    type Params: 'a;

    /// Sets out with the first tiles. Copies that the caller has issued before, and not committed, belong to
    /// the first tile's group.
    ///
    /// # Safety
    /// `base` is [`Source::BYTES`] of shared memory that nothing else uses; the item's KV is readable.
    unsafe fn start(p: &'a Self::Params, seq: &Sequence, item: &WorkItem, base: u32) -> Self;

    fn attention(p: &Self::Params) -> &AttentionParams;

    /// K or V of the block from token `at`, whose turn it is: visible to all lanes, and the tile before is given up
    /// by all of them.
    fn take(&mut self, is_v: bool, at: u32) -> SharedTile<CHUNKS>;

    /// K of the block.
    #[inline(always)]
    #[track_caller]
    fn take_k(&mut self, at: u32) -> SharedTile<CHUNKS> {
        self.take(false, at)
    }

    /// V of the block.
    #[inline(always)]
    #[track_caller]
    fn take_v(&mut self, at: u32) -> SharedTile<CHUNKS> {
        self.take(true, at)
    }
}

/// Waits for all of a lane's copies but the newest `tiles - 2` groups: of a ring of `tiles`, the one that is
/// taken next has arrived.
#[inline(always)]
#[track_caller]
pub(crate) fn wait_for_next<const TILES: u32>() {
    const { assert!(matches!(TILES, 2 | 3 | 4 | 6 | 8)) };
    match TILES {
        2 => isa::cp_async_wait::<0>(),
        3 => isa::cp_async_wait::<1>(),
        4 => isa::cp_async_wait::<2>(),
        6 => isa::cp_async_wait::<4>(),
        _ => isa::cp_async_wait::<6>(),
    }
}

/// A ring of `TILES` shared tiles through which K and V of an item's blocks pass in turn: K of the first
/// block, V of it, K of the second... While one is used, up to `TILES - 1` are on their way.
pub(crate) struct Ring<'a, const CHUNKS: u32, const THREADS: u32, const TILES: u32> {
    base: u32,
    k: KvRows<'a>,
    v: KvRows<'a>,
    pages: PageList,
    head_dims: [u32; 2],
    /// One past the last token.
    end: u32,
    /// Slots of the next copy and the next use.
    put: u32,
    take: u32,
}

impl<'a, const CHUNKS: u32, const THREADS: u32, const TILES: u32> Ring<'a, CHUNKS, THREADS, TILES> {
    #[inline(always)]
    fn tile(&self, slot: u32) -> SharedTile<CHUNKS> {
        SharedTile::new(self.base + slot * SharedTile::<CHUNKS>::bytes(KV_BLOCK as u32))
    }

    /// Sets out with the next tile, from token `at`; past the end, with an empty group, so that groups count
    /// tiles.
    #[inline(always)]
    #[track_caller]
    fn put(&mut self, is_v: bool, at: u32) {
        if at < self.end {
            let rows = if is_v { &self.v } else { &self.k };
            let (tile, tokens) = (self.tile(self.put), (at, self.end));
            // SAFETY: the slot was used before the last barrier; the rest is promised at `start`.
            unsafe {
                rows.copy_block::<CHUNKS, THREADS>(&self.pages, tile, tokens, self.head_dims[is_v as usize])
            };
        }
        isa::cp_async_commit();
        self.put = if self.put + 1 == TILES { 0 } else { self.put + 1 };
    }
}

impl<'a, const CHUNKS: u32, const THREADS: u32, const TILES: u32> Source<'a, CHUNKS>
    for Ring<'a, CHUNKS, THREADS, TILES>
{
    const BYTES: u32 = TILES * SharedTile::<CHUNKS>::bytes(KV_BLOCK as u32);
    type Params = AttentionParams;

    #[inline(always)]
    #[track_caller]
    unsafe fn start(p: &'a AttentionParams, seq: &Sequence, item: &WorkItem, base: u32) -> Self {
        let mut ring = Ring {
            base,
            k: KvRows::new(&p.k, seq, item),
            v: KvRows::new(&p.v, seq, item),
            pages: PageList::new(p.pages, p.page_size, item),
            head_dims: [p.head_dim, p.v_head_dim],
            end: item.kv_end,
            put: 0,
            take: 0,
        };
        for i in 0..TILES - 1 {
            ring.put(i % 2 == 1, item.kv_start + i / 2 * KV_BLOCK as u32);
        }
        ring
    }

    #[inline(always)]
    fn attention(p: &AttentionParams) -> &AttentionParams {
        p
    }

    #[inline(always)]
    #[track_caller]
    fn take(&mut self, is_v: bool, at: u32) -> SharedTile<CHUNKS> {
        wait_for_next::<TILES>();
        isa::bar_sync();
        // In the order K 0, V 0, K 1..., the tile `TILES - 1` after this one is the next to set out.
        let ahead = is_v as u32 + TILES - 1;
        self.put(ahead % 2 == 1, at + ahead / 2 * KV_BLOCK as u32);
        let tile = self.tile(self.take);
        self.take = if self.take + 1 == TILES { 0 } else { self.take + 1 };
        tile
    }
}

/// Where the section of a fixed split ends that has token `at`, or the item, if that comes first.
#[inline(always)]
pub(crate) fn section_end(p: &AttentionParams, item: &WorkItem, at: u32) -> u32 {
    if p.section == 0 {
        return item.kv_end;
    }
    let end = (at / p.section * p.section).saturating_add(p.section);
    if end < item.kv_end { end } else { item.kv_end }
}
