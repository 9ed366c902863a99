//! The consumers: the scorer computes scores, softmax and the upper half of O, the helper the lower half.

use super::layout::{Layout, SLOTS};
use super::{BARRIERS, CONSUMERS_BARRIER, DONE_BARRIER, TILES, TURN_BARRIER, WARPGROUP};
use crate::abi::{DecodeMlaSm90Params, KV_BLOCK, NO_MERGE};
use crate::attn::mask;
use crate::attn::merge::{Crew, merge_if_last};
use crate::attn::output::{Accumulator, Output};
use crate::attn::rows::{LaneRows, Place, load_item};
use crate::attn::softmax::{Logits, State, rescale};
use crate::isa;
use crate::sched::{Cursor, range};
use crate::tile::fragment::c_to_a;
use crate::tile::{Half, Panels, Pending};

/// First of the 16 rows of the lane's warp.
#[inline(always)]
fn first_row() -> u32 {
    isa::thread_x() % WARPGROUP / 32 * 16
}

/// The lane's first row: it has that and the one eight further.
#[inline(always)]
fn lane_row() -> u32 {
    first_row() + isa::thread_x() % 32 / 4
}

/// Blocks of an item; one without KV has one, of which nothing is seen.
#[inline(always)]
fn blocks(kv_start: u32, kv_end: u32) -> u32 {
    let blocks = kv_end.saturating_sub(kv_start).div_ceil(KV_BLOCK as u32);
    if blocks > 0 { blocks } else { 1 }
}

/// The next item, whose place the lanes of consumer `consumer` have in shared memory: its rows, first token and blocks.
#[inline(always)]
fn begin<'a>(
    params: &'a DecodeMlaSm90Params,
    shared: Layout,
    consumer: u32,
    index: u32,
) -> (LaneRows<'a>, u32, u32) {
    let p = &params.attention;
    let place = Place::new(p, shared.place(consumer));
    let barrier = BARRIERS[1 + consumer as usize];
    let (item, seq) = load_item(p, index);
    // All are done with the item before.
    isa::bar_sync_named(barrier, WARPGROUP);
    if isa::thread_x().is_multiple_of(WARPGROUP) {
        // SAFETY: the layout has room for it.
        unsafe { place.write(index, &item, &seq) };
    }
    isa::bar_sync_named(barrier, WARPGROUP);
    (place.rows(first_row()), item.kv_start, blocks(item.kv_start, item.kv_end))
}

/// The end of the item: its rows' half from `channel` on, and a merge by both consumers.
#[inline(always)]
fn end<T: Half>(
    params: &DecodeMlaSm90Params,
    shared: Layout,
    rows: &LaneRows<'_>,
    channel: u32,
    state: State,
    o: &Accumulator<TILES>,
) {
    let p = &params.attention;
    Output { p, channel, leads: channel == 0, fold: 0 }.end_item::<T, TILES>(rows, state, o);
    let (item, seq) = rows.place.item();
    if isa::agreed(item.merge != NO_MERGE) {
        Consumers::sync();
        merge_if_last::<Consumers, T, true>(p, &params.ranges, &item, &seq, shared.flag());
    }
}

/// Both consumers, as they merge.
struct Consumers;

impl Crew for Consumers {
    const WARPS: u32 = 8;

    #[inline(always)]
    fn thread() -> u32 {
        isa::thread_x() - WARPGROUP
    }

    #[inline(always)]
    #[track_caller]
    fn sync() {
        isa::bar_sync_named(CONSUMERS_BARRIER, 2 * WARPGROUP);
    }
}

/// All lanes of the scorer.
#[inline(always)]
pub(super) fn score<T: Half>(params: &DecodeMlaSm90Params, shared: Layout) {
    let p = &params.attention;
    let (q, lower, upper) = (shared.q_stages(), shared.lower_stages(), shared.upper_stages());
    let mut q_at = Cursor::<1>::START;
    let mut block_at = Cursor::<SLOTS>::START;
    let mut index = range(&params.ranges, 0);
    while isa::agreed(index < range(&params.ranges, 1)) {
        let (rows, mut at, blocks) = begin(params, shared, 0, index);
        let mut left = blocks;
        let logits = Logits::new(&p.score, p.alibi_slopes != 0);
        let q_full = q.wait_full(q_at);
        let (q_lower, q_upper) = shared.full_q(&q_full);
        let mut state = State::EMPTY;
        let mut o: Accumulator<TILES> = [[0.0; 4]; TILES];
        loop {
            let upper_full = upper.wait_full(block_at);
            let kv = shared.upper(upper_full.slot());
            // SAFETY: Q and KV are full until they are released.
            let s = unsafe { Pending::a_bt::<T, _, _, _>(q_upper, 0, kv) };
            let lower_full = lower.wait_full(block_at);
            // SAFETY: as above.
            let s = unsafe { s.and_a_bt::<T, _, _, _>(q_lower, 0, shared.lower(lower_full.slot())) };
            let mut s = s.wait::<0>();
            lower.release(lower_full);
            if isa::agreed(left != blocks) {
                // The helper has the block before: its product runs beside this softmax.
                isa::bar_arrive_named(TURN_BARRIER, 2 * WARPGROUP);
            }
            logits.apply(&mut s, &rows, at);
            mask::hide::<true, 8>(&rows, at, &mut s);
            let correction = state.step(&mut s, logits.factor);
            let weights: [[u32; 4]; 4] = core::array::from_fn(|i| c_to_a::<T>(s[2 * i], s[2 * i + 1]));
            isa::bar_sync_named(DONE_BARRIER, 2 * WARPGROUP);
            // SAFETY: the helper is done with what was there.
            unsafe {
                put_weights(shared.p(), &weights);
                shared.told().put_correction(lane_row(), correction);
            }
            isa::fence_proxy_async();
            rescale(&mut o, correction);
            // SAFETY: as above.
            let sum = unsafe { Pending::plus_a_b::<T, _, _, 4>(o, &weights, kv) };
            o = sum.wait::<0>();
            upper.release(upper_full);
            block_at.advance();
            at += KV_BLOCK as u32;
            left -= 1;
            if isa::agreed(left == 0) {
                break;
            }
        }
        q.release(q_full);
        q_at.advance();
        let state = state.reduced();
        // SAFETY: the helper has read the states of the item before.
        unsafe { shared.told().put_state(lane_row(), &state) };
        isa::bar_arrive_named(TURN_BARRIER, 2 * WARPGROUP);
        end::<T>(params, shared, &rows, 8 * TILES as u32, state, &o);
        index += 1;
    }
}

/// The lane's weights, A fragments of 16 columns each, into P.
///
/// # Safety
/// Nobody reads P.
#[inline(always)]
#[track_caller]
unsafe fn put_weights(p: Panels<64, 8>, weights: &[[u32; 4]; 4]) {
    let row = lane_row();
    for (step, a) in weights.iter().enumerate() {
        for (i, &pair) in a.iter().enumerate() {
            let (r, chunk) = (i as u32 % 2, 2 * step as u32 + i as u32 / 2);
            let at = p.chunk(row + 8 * r, chunk) + isa::thread_x() % 4 * 4;
            // SAFETY: the caller's promise; the pair is the lane's alone.
            unsafe { isa::st_shared_1(at, [pair]) };
        }
    }
}

/// All lanes of the helper.
#[inline(always)]
pub(super) fn help<T: Half>(params: &DecodeMlaSm90Params, shared: Layout) {
    let lower = shared.lower_stages();
    let mut block_at = Cursor::<SLOTS>::START;
    let mut index = range(&params.ranges, 0);
    // There is nothing of P yet that the scorer has to leave alone.
    isa::bar_arrive_named(DONE_BARRIER, 2 * WARPGROUP);
    while isa::agreed(index < range(&params.ranges, 1)) {
        let (rows, _, mut left) = begin(params, shared, 1, index);
        let mut o: Accumulator<TILES> = [[0.0; 4]; TILES];
        let mut state = State::EMPTY;
        while isa::agreed(left > 0) {
            isa::bar_sync_named(TURN_BARRIER, 2 * WARPGROUP);
            // SAFETY: the scorer has told them.
            let correction = unsafe { shared.told().correction(lane_row()) };
            let lower_full = lower.wait_full(block_at);
            rescale(&mut o, correction);
            let kv = shared.lower(lower_full.slot());
            // SAFETY: P is the scorer's to write again after the barrier below; the slot is full until it is released.
            let sum = unsafe { Pending::plus_shared_a_b::<T, _, _, _>(o, shared.p(), kv) };
            o = sum.wait::<0>();
            lower.release(lower_full);
            block_at.advance();
            left -= 1;
            if isa::agreed(left == 0) {
                // SAFETY: after the last block the scorer has told the states.
                state = unsafe { shared.told().state(lane_row()) };
            }
            isa::bar_arrive_named(DONE_BARRIER, 2 * WARPGROUP);
        }
        end::<T>(params, shared, &rows, 0, state, &o);
        index += 1;
    }
}
