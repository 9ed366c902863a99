//! Quantised K and V on their way through shared memory: as they are in the pages, then 16-bit tiles.

use super::ring::{Source, wait_for_next};
use crate::abi::{
    AttentionParams, AttentionQuantParams, INT4_GROUP, KV_BLOCK, PageRows, QuantRows, Sequence, WorkItem,
    format,
};
use crate::attn::kv::PageList;
use crate::isa;
use crate::tile::codes::{fp8_numbers, int4_numbers, int8_numbers, minima, spans};
use crate::tile::{F16, Half, SharedTile};

const GROUP: u32 = INT4_GROUP as u32;
const BLOCK: u32 = KV_BLOCK as u32;

/// A ring of `STAGES` stages of codes with what they are scaled by, and one f16 tile into which the stage in use is unpacked,
/// in registers. f16 rows and tails come from global memory when it is their turn.
pub(crate) struct QuantizedRing<'a, const CHUNKS: u32, const THREADS: u32, const STAGES: u32> {
    p: &'a AttentionQuantParams,
    base: u32,
    pages: PageList,
    kv_head: u32,
    tail_slot: u32,
    /// First token of K in the tail, and one past the last that may be looked at.
    tail_start: u32,
    end: u32,
    put: u32,
    take: u32,
}

/// Bytes of a row of codes, of each format.
#[inline(always)]
pub(crate) fn row_bytes(format: u32, head_dim: u32) -> u32 {
    match format {
        format::F16 => 2 * head_dim,
        format::INT4 => head_dim / 2,
        _ => head_dim,
    }
}

impl<'a, const CHUNKS: u32, const THREADS: u32, const STAGES: u32>
    QuantizedRing<'a, CHUNKS, THREADS, STAGES>
{
    /// A stage: 64 rows of bytes and an f16 for each, or 64 rows of int4 codes and, of K, two groups of minima and scales
    /// of `head_dim` f16 (of V, two bytes for each token and 32 channels: less).
    const INT4_PARAMS: u32 = BLOCK * CHUNKS * 4;
    const INT8_PARAMS: u32 = BLOCK * CHUNKS * 8;
    const STAGE: u32 = Self::INT8_PARAMS + 128;
    const TILE: u32 = STAGES * Self::STAGE;

    #[inline(always)]
    fn stage(&self, slot: u32) -> u32 {
        self.base + slot * Self::STAGE
    }

    #[inline(always)]
    fn side(&self, is_v: bool) -> &'a QuantRows {
        if is_v { &self.p.v } else { &self.p.k }
    }

    /// Sets out with codes and parameters from token `at`; past the end, with an empty group.
    #[inline(always)]
    #[track_caller]
    fn put(&mut self, is_v: bool, at: u32) {
        let side = self.side(is_v);
        let last = if !is_v && self.tail_start < self.end { self.tail_start } else { self.end };
        if at < last && side.format != format::F16 {
            let count = if last - at < BLOCK { last - at } else { BLOCK };
            let (stage, dim) = (self.stage(self.put), self.p.attention.head_dim);
            self.copy(stage, &side.codes, at, count, row_bytes(side.format, dim) / 16, 1);
            match side.format {
                // A block begins at a group, and a group is in one page.
                format::INT4 if !is_v => self.copy(
                    stage + Self::INT4_PARAMS,
                    &side.params,
                    at,
                    count.div_ceil(GROUP),
                    dim / 4,
                    GROUP,
                ),
                format::INT4 => self.copy_by_token(stage + Self::INT4_PARAMS, side, at, count, dim / GROUP),
                format::INT8 => self.copy_by_token(stage + Self::INT8_PARAMS, side, at, count, 1),
                _ => {}
            }
        }
        isa::cp_async_commit();
        self.put = if self.put + 1 == STAGES { 0 } else { self.put + 1 };
    }

    /// Sets out to copy `count` rows of `chunks` chunks of 16 bytes side by side to `to`: those of every `step`-th token from
    /// `at`.
    #[inline(always)]
    #[track_caller]
    fn copy(&self, to: u32, rows: &PageRows, at: u32, count: u32, chunks: u32, step: u32) {
        let mut index = isa::thread_x();
        while index < isa::opaque(count) * chunks {
            let (row, chunk) = isa::div_rem(index, chunks);
            // SAFETY: the token is below the sequence's end; its row is inside the pages, and the stage is free
            // since the last barrier.
            unsafe {
                let (page, offset) = self.pages.locate(at + row * step);
                let from = rows.at(page, self.kv_head, offset / step) + 16 * chunk as u64;
                isa::cp_async_16(to + 16 * index, from, 16);
            }
            index += THREADS;
        }
    }

    /// Sets out to copy two bytes for each of `count` tokens from `at`, of `rows` rows: to 64 tokens' room each.
    #[inline(always)]
    #[track_caller]
    fn copy_by_token(&self, to: u32, side: &QuantRows, at: u32, count: u32, rows: u32) {
        let mut index = isa::thread_x();
        while index < rows * (BLOCK / 8) {
            let (row, first) = (index / (BLOCK / 8), index % (BLOCK / 8) * 8);
            if first < count {
                // SAFETY: as in `copy`; eight tokens from a multiple of 8 are in one page.
                unsafe {
                    let (page, offset) = self.pages.locate(at + first);
                    let from = side.params.at(page, self.kv_head, row) + 2 * offset as u64;
                    isa::cp_async_16(to + 2 * (row * BLOCK + first), from, 16);
                }
            }
            index += THREADS;
        }
    }

    /// Fills the tile: eight channels of a token at a time.
    #[inline(always)]
    #[track_caller]
    fn unpack(&self, is_v: bool, at: u32, tile: SharedTile<CHUNKS>) {
        let (side, head_dim) = (self.side(is_v), self.p.attention.head_dim);
        let stage = self.stage(self.take);
        let mut scale = 1.0;
        if side.format == format::FP8 {
            // SAFETY: the host gives one per KV head.
            scale =
                f32::from_bits(unsafe { isa::ld_global_1(side.params.base + 4 * self.kv_head as u64) }[0]);
        }
        let mut index = isa::thread_x();
        while index < isa::opaque(BLOCK) * CHUNKS {
            let (row, chunk) = (index / CHUNKS, index % CHUNKS);
            let token = at + row;
            let mut pairs = [0; 4];
            if 8 * chunk < head_dim && token < self.end {
                pairs = if side.format == format::F16 || !is_v && token >= self.tail_start {
                    self.half(side, token, chunk)
                } else {
                    self.numbers(side, is_v, stage, row, chunk, scale)
                };
            }
            // SAFETY: the tile is free, and the place this lane's own.
            unsafe { isa::st_shared_4(tile.at(row, chunk), pairs) };
            index += THREADS;
        }
    }

    /// Channels `8 chunk..` of a token that is kept in f16, in its page or in the tail.
    #[inline(always)]
    #[track_caller]
    fn half(&self, side: &QuantRows, token: u32, chunk: u32) -> [u32; 4] {
        // SAFETY: the host has checked pages and tails; a token before the end has been written there.
        unsafe {
            let row = if side.format == format::F16 {
                let (page, offset) = self.pages.locate(token);
                side.codes.at(page, self.kv_head, offset)
            } else {
                side.tail.at(self.tail_slot, self.kv_head, token % GROUP)
            };
            isa::ld_global_4(row + 16 * chunk as u64)
        }
    }

    /// Channels `8 chunk..` of row `row` of the stage, in f16.
    #[inline(always)]
    #[track_caller]
    fn numbers(
        &self,
        side: &QuantRows,
        is_v: bool,
        stage: u32,
        row: u32,
        chunk: u32,
        scale: f32,
    ) -> [u32; 4] {
        let head_dim = self.p.attention.head_dim;
        // SAFETY: the stage has arrived.
        unsafe {
            if side.format == format::INT4 {
                let codes = int4_numbers(isa::ld_shared_1(stage + row * (head_dim / 2) + 4 * chunk)[0]);
                let params = stage + Self::INT4_PARAMS;
                let (min, scale) = if is_v {
                    let both = self.by_token(params + 2 * (chunk / 4 * BLOCK + row));
                    // A scale is a sixteenth of a span.
                    ([minima(both); 4], [isa::mul_f16x2(spans(both), 0x2c00_2c00); 4])
                } else {
                    let group = params + row / GROUP * (4 * head_dim) + 16 * chunk;
                    (isa::ld_shared_4(group), isa::ld_shared_4(group + 2 * head_dim))
                };
                return [0, 1, 2, 3].map(|i| isa::fma_f16x2(codes[i], scale[i], min[i]));
            }
            let words = isa::ld_shared_2(stage + row * head_dim + 8 * chunk);
            let ([a, b], factor) = if side.format == format::FP8 {
                (words.map(fp8_numbers::<true>), 256.0 * scale)
            } else {
                let scale = self.by_token(stage + Self::INT8_PARAMS + 2 * row);
                (words.map(int8_numbers::<true>), 128.0 * isa::f16x2_to_f32(scale).0)
            };
            [a[0], a[1], b[0], b[1]].map(|pair| {
                let (low, high) = F16::unpack(pair);
                F16::pack(low * factor, high * factor)
            })
        }
    }

    /// The 16 bits at a shared address, in both halves.
    ///
    /// # Safety
    /// They have been written, and are visible.
    #[inline(always)]
    #[track_caller]
    unsafe fn by_token(&self, at: u32) -> u32 {
        // SAFETY: the caller's promise; others' bits beside them have been copied in the same 16 bytes.
        let x = unsafe { isa::ld_shared_1(at & !3) }[0] >> (8 * (at & 2)) & 0xffff;
        x | x << 16
    }
}

impl<'a, const CHUNKS: u32, const THREADS: u32, const STAGES: u32> Source<'a, CHUNKS>
    for QuantizedRing<'a, CHUNKS, THREADS, STAGES>
{
    const BYTES: u32 = Self::TILE + SharedTile::<CHUNKS>::bytes(BLOCK);
    type Params = AttentionQuantParams;

    #[inline(always)]
    #[track_caller]
    unsafe fn start(p: &'a AttentionQuantParams, seq: &Sequence, item: &WorkItem, base: u32) -> Self {
        const { assert!(Self::STAGE.is_multiple_of(128) && 2 * 32 * CHUNKS <= BLOCK * CHUNKS * 4 + 128) };
        let a = &p.attention;
        let mut ring = QuantizedRing {
            p,
            base,
            pages: PageList::new(a.pages, a.page_size, item),
            kv_head: item.kv_head,
            tail_slot: seq.tail_slot,
            tail_start: if p.k.format == format::INT4 { seq.kv_len / GROUP * GROUP } else { u32::MAX },
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
    fn attention(p: &AttentionQuantParams) -> &AttentionParams {
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
