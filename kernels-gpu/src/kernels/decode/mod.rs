//! Attention of at most 16 packed rows (a query group, or a few speculated tokens): bound by reading KV.
//!
//! A CTA stays and walks a range of work items; its warps take turns at their blocks. A warp has a ring of its own and
//! computes `S`, softmax and `O` of its blocks alone. Warps meet at the end of an item only, and their rings go on loading the
//! next one meanwhile. Where an item is a part of its row's KV, the CTA that comes last to the row merges all parts, in the
//! order of KV: the bits do not depend on who that is.
//!
//! How keys and values are kept, and so multiplied, is [`BlockKv`]'s: [`HalfKv`] in 16 bits, in the order of the prefill
//! kernel, so that a row's bits under a fixed split do not depend on which of the two computes it; [`CodeKv`] in fewer.

mod code_kv;
mod half_kv;

use core::marker::PhantomData;

pub(super) use code_kv::CodeKv;
pub(super) use half_kv::HalfKv;

use crate::abi::{AttentionParams, DECODE_ROWS, DECODE_WARPS, KV_BLOCK, RangeParams, Sequence, WorkItem};
use crate::attn::mask;
use crate::attn::merge::{WholeCta, merge_if_last};
use crate::attn::output::{Accumulator, Output};
use crate::attn::rows::{Place, copy_q, load_item};
use crate::attn::softmax::{self, Logits, Scores, State, rescale};
use crate::isa;
use crate::sched::{Units, range};
use crate::tile::{Half, SharedTile};

const WARPS: u32 = DECODE_WARPS as u32;

/// Keys and values of a warp's blocks, as they come, and what is computed of them. `TILES`: accumulators of 16 rows by 8
/// channels.
pub(super) trait BlockKv<'a, const CHUNKS: u32, const TILES: usize>: Sized {
    /// What the kernel is given.
    type Params: 'a;
    /// Type of the products, in which Q is.
    type Product: Half;
    /// A warp's shared bytes.
    const BYTES: u32;
    /// Whether fixed splits come here.
    const SECTIONS: bool;

    fn attention(p: &Self::Params) -> &AttentionParams;
    fn ranges(p: &Self::Params) -> &RangeParams;

    /// Sets out with the warp's blocks in items `first..last`.
    ///
    /// # Safety
    /// `at` is [`BlockKv::BYTES`] of shared memory that nothing else uses; the items' KV is readable.
    unsafe fn start(p: &'a Self::Params, first: u32, last: u32, at: u32) -> Self;

    /// The next blocks are of this item.
    fn begin(&mut self, item: &WorkItem, seq: &Sequence);

    /// Products of Q with the keys of the next block, from token `at`, where the item has `left` tokens more.
    fn scores(&mut self, q: SharedTile<CHUNKS>, at: u32, left: u32) -> Scores<8>;

    /// Adds the block's values by their weights.
    fn accumulate(&mut self, o: &mut Accumulator<TILES>, weights: &Scores<8>, left: u32);

    /// What is accumulated becomes unnormalised O, 8 channels a tile.
    fn finish(&self, o: &mut Accumulator<TILES>);

    /// See [`Output`].
    fn fold(&self) -> u32;
}

/// A kernel's sizes.
pub(super) struct Config<K, const CHUNKS: u32, const TILES: usize>(PhantomData<K>);

impl<K: BlockKv<'static, CHUNKS, TILES>, const CHUNKS: u32, const TILES: usize> super::Config
    for Config<K, CHUNKS, TILES>
{
    const THREADS: u32 = 32 * WARPS;
    const MIN_CTAS: u32 = 2;
    const SHARED_BYTES: u32 = Plan::<CHUNKS, TILES>::RINGS + WARPS * K::BYTES;
}

/// Shared memory: Q `[16, head_dim]` or, when it is not needed any more, a warp's state on its way to another; the place,
/// whether the CTA has come last, units of the items before; the rings.
struct Plan<const CHUNKS: u32, const TILES: usize>;

impl<const CHUNKS: u32, const TILES: usize> Plan<CHUNKS, TILES> {
    const PLACE: u32 = {
        let (q, state) = (SharedTile::<CHUNKS>::bytes(DECODE_ROWS as u32), 512 * (TILES as u32 + 1));
        assert!(q <= state);
        state
    };
    const LAST: u32 = Self::PLACE + Place::BYTES;
    const TURN: u32 = Self::LAST + 4;
    const RINGS: u32 = (Self::TURN + 4).next_multiple_of(128);
}

/// The kernel, for queries and outputs of type `Io`.
#[inline(always)]
pub(super) unsafe fn body<
    'a,
    Io: Half,
    K: BlockKv<'a, CHUNKS, TILES>,
    const CHUNKS: u32,
    const TILES: usize,
>(
    params: &'a K::Params,
) {
    let (p, ranges) = (K::attention(params), K::ranges(params));
    let (first, last) = (range(ranges, 0), range(ranges, 1));
    if isa::agreed(first == last) {
        return;
    }
    let warp = isa::thread_x() / 32;
    let base = isa::shared_base();
    let q = SharedTile::<CHUNKS>::new(base);
    let place = Place::new(p, base + Plan::<CHUNKS, TILES>::PLACE);
    let ring = base + Plan::<CHUNKS, TILES>::RINGS + warp * K::BYTES;
    // SAFETY: the plan gives each warp its ring; the host has checked the items' KV.
    let mut kv = unsafe { K::start(params, first, last, ring) };
    let rows = place.rows(0);
    let logits = Logits::new(&p.score, p.alibi_slopes != 0);
    let output = Output { p, channel: 0, leads: true, fold: kv.fold() };

    let section = if K::SECTIONS { p.section } else { 0 };
    let turn_at = base + Plan::<CHUNKS, TILES>::TURN;
    // What is needed once an item stands in shared memory, or is loaded or computed again.
    let (mut index, mut turn) = (first, 0);
    while isa::agreed(index < range(ranges, 1)) {
        let (item, seq) = load_item(p, index);
        kv.begin(&item, &seq);
        let at = |row, chunk| q.at(row, chunk);
        copy_q::<Io, K::Product, CHUNKS, false>(p, &seq, &item, at, DECODE_ROWS as u32, 32 * WARPS);
        if isa::thread_x() == 0 {
            // SAFETY: the plan has room for both.
            unsafe {
                place.write(index, &item, &seq);
                isa::st_shared_1(turn_at, [turn]);
            }
        }
        isa::bar_sync();
        let units_of = |item: &WorkItem| {
            // SAFETY: written before the barrier.
            let [turn] = unsafe { isa::ld_shared_1(turn_at) };
            Units::<WARPS>::new(section, item, turn, isa::opaque(isa::thread_x()) / 32)
        };
        let mut units = units_of(&item);
        let mut unit = units.next();
        loop {
            // A part: all of the warp's blocks, or one section.
            let mut state = State::EMPTY;
            let mut o: Accumulator<TILES> = [[0.0; 4]; TILES];
            let mut at = unit.at;
            while isa::agreed(at < unit.end) {
                let left = unit.end - at;
                let mut s = kv.scores(q, at, left);
                logits.apply(&mut s, &rows, at);
                mask::hide::<true, 8>(&rows, at, &mut s);
                let correction = state.step(&mut s, logits.factor);
                rescale(&mut o, correction);
                kv.accumulate(&mut o, &s, left);
                at += KV_BLOCK as u32;
                if section == 0 {
                    // A unit is a block.
                    unit = units.next();
                    at = unit.at;
                }
            }
            let mut state = state.reduced();
            // What the part is of the item, and whether this warp has it.
            let (mut part, mut writes) = (units.index(unit.at), unit.at < unit.end);
            if section == 0 {
                let all = units_of(&place.item().0);
                let others = if all.count() < WARPS { all.count() } else { WARPS };
                state = gather_states(base, all.place(), others, state, &mut o);
                (part, writes) = (0, all.place() == 0);
            }
            if isa::agreed(writes) {
                kv.finish(&mut o);
                output.end_part::<Io, TILES>(&rows, part, state, &o);
            }
            if section != 0 {
                unit = units.next();
            }
            if isa::agreed(unit.at >= unit.end) {
                break;
            }
        }
        // Loaded again, and not kept in registers over the blocks.
        let (item, seq) = place.item();
        index = place.index() + 1;
        // SAFETY: written before the barrier.
        turn = unsafe { isa::ld_shared_1(turn_at) }[0] + units_of(&item).count();
        // All have used Q and the place, and written their states.
        isa::bar_sync();
        merge_if_last::<WholeCta, Io, false>(p, ranges, &item, &seq, base + Plan::<CHUNKS, TILES>::LAST);
    }
}

/// The warp at place 0 of the item's turns gets the merged state of the first `others` warps, in the order of their
/// first blocks, through one state's room in shared memory, lane by lane.
#[inline(always)]
#[track_caller]
fn gather_states<const TILES: usize>(
    at: u32,
    own: u32,
    others: u32,
    mut state: State,
    o: &mut Accumulator<TILES>,
) -> State {
    let at = at + 16 * (isa::opaque(isa::thread_x()) % 32);
    if isa::agreed(others > 1) {
        // All have used Q, whose room it is.
        isa::bar_sync();
    }
    let mut from = 1;
    while isa::agreed(from < others) {
        if isa::agreed(own == from) {
            // SAFETY: the plan's room, free since the last barrier; each lane has words of its own.
            unsafe {
                isa::st_shared_4(at, [state.m[0], state.m[1], state.l[0], state.l[1]].map(f32::to_bits));
                for j in 0..TILES {
                    isa::st_shared_4(at + 512 * (j as u32 + 1), o[j].map(f32::to_bits));
                }
            }
        }
        isa::bar_sync();
        if isa::agreed(own == 0) {
            // SAFETY: written before the barrier.
            let [m0, m1, l0, l1] = unsafe { isa::ld_shared_4(at) }.map(f32::from_bits);
            let mut factors = [[0.0; 2]; 2];
            for (r, (m, l)) in [(m0, l0), (m1, l1)].into_iter().enumerate() {
                (state.m[r], state.l[r], factors[r]) = softmax::merge([state.m[r], m], [state.l[r], l]);
            }
            for j in 0..TILES {
                // SAFETY: as above.
                let x = unsafe { isa::ld_shared_4(at + 512 * (j as u32 + 1)) }.map(f32::from_bits);
                for i in 0..4 {
                    o[j][i] = isa::fma(o[j][i], factors[i / 2][0], x[i] * factors[i / 2][1]);
                }
            }
        }
        isa::bar_sync();
        from += 1;
    }
    state
}
