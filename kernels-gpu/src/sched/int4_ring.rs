//! int4 K and V on their way through shared memory: packed as they are in the pages, then 16-bit tiles.

use super::ring::{Source, wait_for_next};
use crate::abi::{AttentionInt4Params, AttentionParams, INT4_GROUP, KV_BLOCK, PageRows, Sequence, WorkItem};
use crate::attn::kv::PageList;
use crate::isa;
use crate::tile::{SharedTile, int4};

const GROUP: u32 = INT4_GROUP as u32;
const BLOCK: u32 = KV_BLOCK as u32;

/// Most groups of V channels: 256 channels by 32.
const V_GROUPS: u32 = 8;

/// A ring of `STAGES` stages of codes with their minima and scales, and one f16 tile into which the stage in use
/// is unpacked, in registers. The newest tokens come from the sequence's f16 tail.
pub(crate) struct Int4Ring<'a, const CHUNKS: u32, const THREADS: u32, const STAGES: u32> {
    p: &'a AttentionInt4Params,
    base: u32,
    pages: PageList,
    kv_head: u32,
    tail_slot: u32,
    /// First token in the tail, and one past the last that may be looked at.
    tail_start: u32,
    end: u32,
    put: u32,
    take: u32,
}

impl<'a, const CHUNKS: u32, const THREADS: u32, const STAGES: u32> Int4Ring<'a, CHUNKS, THREADS, STAGES> {
    /// A stage: 64 rows of codes; then, of K, two groups of minima and scales of `head_dim` f16, or, of V, the same
    /// of up to eight groups for each token.
    const PARAMS: u32 = BLOCK * CHUNKS * 4;
    const STAGE: u32 = Self::PARAMS + {
        let (k, v) = (2 * 2 * CHUNKS * 16, BLOCK * V_GROUPS * 4);
        if k > v { k } else { v }
    };
    const TILE: u32 = STAGES * Self::STAGE;

    #[inline(always)]
    fn stage(&self, slot: u32) -> u32 {
        self.base + slot * Self::STAGE
    }

    /// Sets out with codes and parameters from token `at`; past the end, with an empty group.
    #[inline(always)]
    #[track_caller]
    fn put(&mut self, is_v: bool, at: u32) {
        let last = if self.end < self.tail_start { self.end } else { self.tail_start };
        if at < last {
            let count = if last - at < BLOCK { last - at } else { BLOCK };
            let stage = self.stage(self.put);
            let pages = &self.p.pages;
            let (codes, params) =
                if is_v { (&pages.v_codes, &pages.v_params) } else { (&pages.k_codes, &pages.k_params) };
            self.copy(stage, codes, at, count, self.p.attention.head_dim / 8, 1);
            if is_v {
                self.copy(stage + Self::PARAMS, params, at, count, self.p.v_groups, 1);
            } else {
                // A block begins at a group, and a group is in one page.
                let (groups, words) = (count.div_ceil(GROUP), self.p.attention.head_dim);
                self.copy(stage + Self::PARAMS, params, at, groups, words, GROUP);
            }
        }
        isa::cp_async_commit();
        self.put = if self.put + 1 == STAGES { 0 } else { self.put + 1 };
    }

    /// Sets out to copy `count` rows of `words` words side by side to `to`: those of every `step`-th token from
    /// `at`.
    #[inline(always)]
    #[track_caller]
    fn copy(&self, to: u32, rows: &PageRows, at: u32, count: u32, words: u32, step: u32) {
        // 16 bytes at a time where rows are multiples of them and so begin at such.
        let wide =
            words.is_multiple_of(4) && (rows.base | rows.page | rows.head | rows.token).is_multiple_of(16);
        let (unit, shift) = if wide { (words / 4, 4) } else { (words, 2) };
        let mut index = isa::thread_x();
        while index < isa::opaque(count) * unit {
            let (row, word) = isa::div_rem(index, unit);
            // SAFETY: the token is below the sequence's end; its row is inside the pages, and the stage is free
            // since the last barrier.
            unsafe {
                let (page, offset) = self.pages.locate(at + row * step);
                let from = rows.at(page, self.kv_head, offset / step) + ((word as u64) << shift);
                let to = to + (index << shift);
                if wide { isa::cp_async_16(to, from, 16) } else { isa::cp_async_4(to, from, 4) }
            }
            index += THREADS;
        }
    }

    /// Fills the tile: eight channels of a token at a time, four from each half of its channels.
    #[inline(always)]
    #[track_caller]
    fn unpack(&self, is_v: bool, at: u32, tile: SharedTile<CHUNKS>) {
        let head_dim = self.p.attention.head_dim;
        let stage = self.stage(self.take);
        let mut index = isa::thread_x();
        while index < isa::opaque(BLOCK) * CHUNKS {
            let (row, word) = (index / CHUNKS, index % CHUNKS);
            let token = at + row;
            let mut pairs = [0; 4];
            let (low, high) = (4 * word, 4 * word + head_dim / 2);
            let there = 8 * word < head_dim;
            if there && token < self.end {
                pairs = if token >= self.tail_start {
                    self.tail(is_v, token, low, high)
                } else {
                    self.dequantize(stage, is_v, row, word)
                };
            }
            // Past the row's channels the tile is zeros: `word` counts chunks there.
            // SAFETY: the tile is free, and the place this lane's own.
            unsafe {
                if there {
                    isa::st_shared_2(tile.at(row, low / 8) + low % 8 * 2, [pairs[0], pairs[1]]);
                    isa::st_shared_2(tile.at(row, high / 8) + high % 8 * 2, [pairs[2], pairs[3]]);
                } else {
                    isa::st_shared_4(tile.at(row, word), [0; 4]);
                }
            }
            index += THREADS;
        }
    }

    /// Channels `low..low + 4` and `high..high + 4` of a token in the tail.
    #[inline(always)]
    #[track_caller]
    fn tail(&self, is_v: bool, token: u32, low: u32, high: u32) -> [u32; 4] {
        let rows = if is_v { &self.p.pages.v_tail } else { &self.p.pages.k_tail };
        let row = rows.at(self.tail_slot, self.kv_head, token % GROUP);
        // SAFETY: the host has checked the tails; a token before the end has been written there.
        let [a, b] =
            unsafe { [isa::ld_global_2(row + 2 * low as u64), isa::ld_global_2(row + 2 * high as u64)] };
        [a[0], a[1], b[0], b[1]]
    }

    /// Word `word` of a row of the stage, as `min + scale * code` in f16.
    #[inline(always)]
    #[track_caller]
    fn dequantize(&self, stage: u32, is_v: bool, row: u32, word: u32) -> [u32; 4] {
        let head_dim = self.p.attention.head_dim;
        let params = stage + Self::PARAMS;
        let (low, high) = (4 * word, 4 * word + head_dim / 2);
        // SAFETY: the stage has arrived.
        unsafe {
            let codes = int4::unpack(isa::ld_shared_1(stage + 4 * (row * (head_dim / 8) + word))[0]);
            let (mut min, mut scale) = ([0; 4], [0; 4]);
            if is_v {
                let groups = self.p.v_groups;
                let both = |i: u32| {
                    let x =
                        isa::ld_shared_1(params + 4 * (row * groups + i / 2))[0] >> (16 * (i % 2)) & 0xffff;
                    x | x << 16
                };
                for (half, channel) in [low, high].into_iter().enumerate() {
                    // Four channels from a multiple of 4 are in one group.
                    let group = self.p.v_group.div_rem(channel).0;
                    let (m, s) = (both(group), both(groups + group));
                    (min[2 * half], min[2 * half + 1]) = (m, m);
                    (scale[2 * half], scale[2 * half + 1]) = (s, s);
                }
            } else {
                let group = params + row / GROUP * (4 * head_dim);
                for (half, channel) in [low, high].into_iter().enumerate() {
                    [min[2 * half], min[2 * half + 1]] = isa::ld_shared_2(group + 2 * channel);
                    [scale[2 * half], scale[2 * half + 1]] =
                        isa::ld_shared_2(group + 2 * (head_dim + channel));
                }
            }
            [0, 1, 2, 3].map(|i| isa::fma_f16x2(codes[i], scale[i], min[i]))
        }
    }
}

impl<'a, const CHUNKS: u32, const THREADS: u32, const STAGES: u32> Source<'a, CHUNKS>
    for Int4Ring<'a, CHUNKS, THREADS, STAGES>
{
    const BYTES: u32 = Self::TILE + SharedTile::<CHUNKS>::bytes(BLOCK);
    type Params = AttentionInt4Params;

    #[inline(always)]
    #[track_caller]
    unsafe fn start(p: &'a AttentionInt4Params, seq: &Sequence, item: &WorkItem, base: u32) -> Self {
        const { assert!(Self::STAGE.is_multiple_of(128)) };
        let a = &p.attention;
        let mut ring = Int4Ring {
            p,
            base,
            pages: PageList::new(a.pages, a.page_size, item),
            kv_head: item.kv_head,
            tail_slot: seq.tail_slot,
            tail_start: seq.kv_len / GROUP * GROUP,
            end: item.kv_end,
            put: 0,
            take: 0,
        };
        for i in 0..STAGES - 1 {
            ring.put(i % 2 == 1, item.kv_start + i / 2 * BLOCK);
        }
        ring
    }

    #[inline(always)]
    fn attention(p: &AttentionInt4Params) -> &AttentionParams {
        &p.attention
    }

    #[inline(always)]
    #[track_caller]
    fn take(&mut self, is_v: bool, at: u32) -> SharedTile<CHUNKS> {
        wait_for_next::<STAGES>();
        // The stage has arrived, and nobody uses the tile any more.
        isa::bar_sync();
        let ahead = is_v as u32 + STAGES - 1;
        self.put(ahead % 2 == 1, at + ahead / 2 * BLOCK);
        let tile = SharedTile::<CHUNKS>::new(self.base + Self::TILE);
        self.unpack(is_v, at, tile);
        self.take = if self.take + 1 == STAGES { 0 } else { self.take + 1 };
        isa::bar_sync();
        tile
    }
}
