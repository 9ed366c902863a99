//! The producer: takes items, and brings their Q, K and V to shared memory ahead of the consumers.

use super::PRODUCER_BARRIER;
use super::layout::{ITEMS, Layout, STAGES};
use crate::abi::{PrefillSm90Params, Sequence, TensorMap, WorkItem};
use crate::attn::rows::{Place, load_item};
use crate::isa;
use crate::sched::{Columns, Cursor, Full, ItemKv, KvTiles, Stages, Walk};
use crate::tile::Panels;

/// All lanes of the producer.
#[inline(always)]
pub(super) fn run<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32>(
    p: &PrefillSm90Params,
    maps: u64,
    shared: Layout<M, N, CHUNKS, V_CHUNKS>,
) {
    let (q, k, v) = (shared.q_stages(), shared.k_stages(), shared.v_stages());
    let [q_map, k_map, v_map] = [0, 1, 2].map(|i| maps + i * size_of::<TensorMap>() as u64);
    let mut item_at = Cursor::<ITEMS>::START;
    let mut block_at = Cursor::<STAGES>::START;
    let mut tiles = KvTiles::new(&p.attention, PRODUCER_BARRIER);
    while let Some(item) = next_item(p, shared, item_at) {
        let source = Source { p, shared, slot: item.slot() };
        if isa::thread_x() == 0 {
            q.wait_empty(item_at.of());
            // SAFETY: the slot is empty; the host has described Q with boxes of `q_rows` rows.
            unsafe { source.load_q(q_map, q.full(0)) };
        }
        // SAFETY: the slot is full until all who read it give it back.
        let (Walk { steps, .. }, _) = unsafe { shared.walk(source.slot) };
        // K of a block, then V of the block before it.
        let mut step = steps;
        loop {
            if step > 0 {
                let tile = shared.k(block_at.slot());
                let (rows, channels) = (&p.attention.k, p.attention.head_dim);
                let columns = Columns { rows, map: k_map, first: 0, channels };
                source.load((k, block_at), columns, tile, step - 1, &mut tiles);
            }
            if step < steps {
                let v_at = block_at.previous();
                let (rows, channels) = (&p.attention.v, p.attention.v_head_dim);
                let columns = Columns { rows, map: v_map, first: 0, channels };
                source.load((v, v_at), columns, shared.v(v_at.slot()), step, &mut tiles);
            }
            if step == 0 {
                break;
            }
            step -= 1;
            block_at.advance();
        }
        tiles.flush();
        shared.items().release(item);
        item_at.advance();
    }
}

/// Takes the next item and shows it to the consumers; `None` where there is none, and they are told so.
#[inline(always)]
fn next_item<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32>(
    p: &PrefillSm90Params,
    shared: Layout<M, N, CHUNKS, V_CHUNKS>,
    cursor: Cursor<ITEMS>,
) -> Option<Full<ITEMS>> {
    let items = shared.items();
    let place = Place::new(&p.attention, shared.place(cursor.slot()));
    if isa::thread_x() == 0 {
        items.wait_empty(cursor);
        // Every CTA takes one number past the items, the last of which sets the counter back to 0.
        // SAFETY: the host gives the counter; the slot is empty, and its barrier initialised.
        unsafe {
            let index = isa::atom_inc_global(p.next_item, isa::opaque(p.num_items) + isa::grid_x() - 1);
            if index < p.num_items {
                let (item, seq) = load_item(&p.attention, index);
                let walk = if p.attention.logical_pages == 0 {
                    Walk::new(&p.attention.score, p.attention.group, &item, &seq, N)
                } else {
                    Walk::listed(&item, N)
                };
                let q_token = seq.q_start as u32 + p.attention.group.div_rem(item.row_start).0;
                shared.write_item(cursor.slot(), walk, &item, &seq, q_token);
                place.write(index, &item, &seq);
            } else {
                place.write_none();
            }
            isa::mbarrier_arrive(items.full(cursor.slot()));
        }
    }
    // The producer's other lanes wait for it as the consumers do.
    let item = items.wait_full(cursor);
    if place.is_none() { None } else { Some(item) }
}

/// Where an item's tiles come from.
struct Source<'a, const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> {
    p: &'a PrefillSm90Params,
    shared: Layout<M, N, CHUNKS, V_CHUNKS>,
    /// The item's.
    slot: u32,
}

impl<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> Source<'_, M, N, CHUNKS, V_CHUNKS> {
    /// Q of the item, by one lane.
    ///
    /// # Safety
    /// Its slot is empty; `map` describes Q with boxes of `q_rows` rows.
    #[inline(always)]
    unsafe fn load_q(&self, map: u64, full: u32) {
        // SAFETY: the item's slot is full; the rest is the caller's promise.
        unsafe {
            let (kv_head, ..) = self.shared.boxes(self.slot);
            let (_, [.., q_token]) = self.shared.walk(self.slot);
            isa::mbarrier_arrive_expect_tx(full, self.p.q_rows * CHUNKS * 16);
            for panel in 0..Panels::<M, CHUNKS>::COUNT {
                let channel = (panel * Panels::<M, CHUNKS>::WIDTH * 8) as i32;
                let box_at = [channel, 0, kv_head as i32, q_token as i32];
                isa::tma_load(self.shared.q().row(panel, 0), map, box_at, full, isa::Keep::FIRST_OUT);
            }
        }
    }

    /// Sets out with K or V of a step's block.
    #[inline(always)]
    fn load<const C: u32>(
        &self,
        stages: (Stages<STAGES>, Cursor<STAGES>),
        columns: Columns<'_>,
        tile: Panels<N, C>,
        step: u32,
        tiles: &mut KvTiles<'_>,
    ) {
        // SAFETY: the item's slot is full.
        let (walk, [kv_start, kv_end, _]) = unsafe { self.shared.walk(self.slot) };
        let at = kv_start + N * walk.block(step);
        tiles.load(self, (at, kv_end), columns, self.p.box_rows, stages, tile);
    }
}

impl<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> ItemKv
    for Source<'_, M, N, CHUNKS, V_CHUNKS>
{
    #[inline(always)]
    fn item(&self) -> (WorkItem, Sequence) {
        Place::new(&self.p.attention, self.shared.place(self.slot)).item()
    }

    #[inline(always)]
    fn boxes(&self) -> (u32, u32, u64) {
        // SAFETY: the item's slot is full.
        unsafe { self.shared.boxes(self.slot) }
    }
}
