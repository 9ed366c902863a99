//! The producer: brings Q and KV of the CTA's items to shared memory ahead of the consumers.

use super::layout::{LOWER, Layout, SLOTS, UPPER};
use super::{BARRIERS, WARPGROUP};
use crate::abi::{DECODE_MLA_SM90_ROWS, DecodeMlaSm90Params, KV_BLOCK, Sequence, WorkItem};
use crate::attn::rows::{copy_q, load_item};
use crate::isa;
use crate::sched::{Columns, Cursor, ItemKv, KvTiles, range};
use crate::tile::Half;

/// All lanes of the producer.
#[inline(always)]
pub(super) fn run<T: Half>(params: &DecodeMlaSm90Params, map: u64, shared: Layout) {
    let p = &params.attention;
    let (q, lower, upper) = (shared.q_stages(), shared.lower_stages(), shared.upper_stages());
    let mut tiles = KvTiles::new(p, BARRIERS[0]);
    let mut q_at = Cursor::<1>::START;
    let mut block_at = Cursor::<SLOTS>::START;
    let mut index = range(&params.ranges, 0);
    while isa::agreed(index < range(&params.ranges, 1)) {
        let (item, seq) = load_item(p, index);
        tiles.wait_empty(q, q_at);
        let place = |row, chunk| shared.q_chunk(row, chunk);
        let rows = DECODE_MLA_SM90_ROWS as u32;
        copy_q::<T, T, { LOWER + UPPER }, true>(p, &seq, &item, place, rows, WARPGROUP);
        tiles.told_later(q.full(0));
        let (end, item) = (item.kv_end, Item { item, seq });
        let mut at = item.item.kv_start;
        loop {
            let columns = |first: u32, most: u32| {
                let there = p.head_dim.saturating_sub(first);
                let channels = if there < most { there } else { most };
                Columns { rows: &p.k, map, first, channels }
            };
            // In the order in which the scorer takes them.
            let slot = block_at.slot();
            let (first, channels) = (8 * LOWER, 8 * UPPER);
            tiles.load(
                &item,
                (at, end),
                columns(first, channels),
                params.box_rows,
                (upper, block_at),
                shared.upper(slot),
            );
            tiles.load(
                &item,
                (at, end),
                columns(0, first),
                params.box_rows,
                (lower, block_at),
                shared.lower(slot),
            );
            block_at.advance();
            at += KV_BLOCK as u32;
            if at >= end {
                break;
            }
        }
        // The consumers wait for all of the item before they give Q back.
        tiles.flush();
        q_at.advance();
        index += 1;
    }
}

struct Item {
    item: WorkItem,
    seq: Sequence,
}

impl ItemKv for Item {
    #[inline(always)]
    fn item(&self) -> (WorkItem, Sequence) {
        (self.item, self.seq)
    }

    #[inline(always)]
    fn boxes(&self) -> (u32, u32, u64) {
        (self.item.kv_head, self.seq.kv_start as u32, self.item.pages)
    }
}
