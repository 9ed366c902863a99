//! Attention of at most 16 packed rows (a query group, or a few speculated tokens): bound by reading KV.
//!
//! A CTA stays and walks a range of work items; its warps take turns at their blocks. A warp has a ring of its own and
//! computes `S`, softmax and `O` of its blocks alone, in the order of the prefill kernel, so that a row's bits under a
//! fixed split do not depend on which of the two computes it. Warps meet at the end of an item only, and their rings go on
//! loading the next one meanwhile. Where an item is a part of its row's KV, the CTA that comes last to the row merges all
//! parts, in the order of KV: the bits do not depend on who that is.

use core::marker::PhantomData;

use crate::abi::{DECODE_ROWS, DECODE_WARPS, DecodeParams, KV_BLOCK, WorkItem};
use crate::attn::mask;
use crate::attn::merge::merge_if_last;
use crate::attn::output::{Accumulator, Output};
use crate::attn::rows::{Place, copy_q, load_item};
use crate::attn::softmax::{self, Logits, Scores, State, rescale};
use crate::isa;
use crate::sched::{BlockRing, STAGE, Units, range, stages};
use crate::tile::fragment::c_to_a;
use crate::tile::{Half, SharedTile};

const WARPS: u32 = DECODE_WARPS as u32;
const STAGES: u32 = KV_BLOCK as u32 / STAGE;

/// `CHUNKS` of 8 channels, `SLOTS` stages of 16 tokens in a warp's ring.
///
/// | head_dim | slots | bytes on their way in a CTA |
/// |---|---|---|
/// | 64 | 8 | 56 KiB |
/// | 96 | 6 | 60 KiB |
/// | 128 | 4 | 48 KiB |
/// | 192 | 3 | 48 KiB |
/// | 256 | 2 | 32 KiB |
///
/// An H200 reads 4.8 TB/s with 132 SMs: for a latency of 1 us an SM needs 36 KiB on their way, and two CTAs have 64 at
/// least. Two fit in the 164 KiB of an A100's SM (but for 192 and 256 channels), one where shared memory ends at 99 KiB.
pub(super) struct Config<const CHUNKS: u32, const TILES: usize, const SLOTS: u32>(PhantomData<()>);

impl<const CHUNKS: u32, const TILES: usize, const SLOTS: u32> super::Config for Config<CHUNKS, TILES, SLOTS> {
    const THREADS: u32 = 32 * WARPS;
    const MIN_CTAS: u32 = 2;
    const SHARED_BYTES: u32 = Plan::<CHUNKS, TILES, SLOTS>::BYTES;
}

/// Shared memory: Q `[16, head_dim]` or, when it is not needed any more, a warp's state on its way to another; the place,
/// whether the CTA has come last, units of the items before; the rings.
struct Plan<const CHUNKS: u32, const TILES: usize, const SLOTS: u32>;

impl<const CHUNKS: u32, const TILES: usize, const SLOTS: u32> Plan<CHUNKS, TILES, SLOTS> {
    const PLACE: u32 = {
        let (q, state) = (SharedTile::<CHUNKS>::bytes(DECODE_ROWS as u32), 512 * (TILES as u32 + 1));
        assert!(q <= state);
        state
    };
    const LAST: u32 = Self::PLACE + Place::BYTES;
    const TURN: u32 = Self::LAST + 4;
    const RINGS: u32 = (Self::TURN + 4).next_multiple_of(128);
    const BYTES: u32 = Self::RINGS + WARPS * BlockRing::<WARPS, CHUNKS, SLOTS>::BYTES;
}

/// The kernel. `TILES` is `CHUNKS`, as a length.
#[inline(always)]
pub(super) unsafe fn body<T: Half, const CHUNKS: u32, const TILES: usize, const SLOTS: u32>(
    params: &DecodeParams,
) {
    let p = &params.attention;
    let (first, last) = (range(&params.ranges, 0), range(&params.ranges, 1));
    if isa::agreed(first == last) {
        return;
    }
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let base = isa::shared_base();
    let q = SharedTile::<CHUNKS>::new(base);
    let place = Place::new(p, base + Plan::<CHUNKS, TILES, SLOTS>::PLACE);
    let ring = base + Plan::<CHUNKS, TILES, SLOTS>::RINGS + warp * BlockRing::<WARPS, CHUNKS, SLOTS>::BYTES;
    // SAFETY: the plan gives each warp its ring; the host has checked the items' KV.
    let mut ring = unsafe { BlockRing::<WARPS, CHUNKS, SLOTS>::start(p, first, last, ring) };
    let rows = place.rows(0);
    let logits = Logits::new(&p.score, p.alibi_slopes != 0);
    let output = Output { p, channel: 0, leads: true };

    let turn_at = base + Plan::<CHUNKS, TILES, SLOTS>::TURN;
    // What is needed once an item stands in shared memory, or is loaded or computed again.
    let (mut index, mut turn) = (first, 0);
    while isa::agreed(index < range(&params.ranges, 1)) {
        let (item, seq) = load_item(p, index);
        copy_q::<T, T, CHUNKS, false>(p, &seq, &item, q, DECODE_ROWS as u32, 32 * WARPS);
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
            Units::<WARPS>::new(p, item, turn, isa::opaque(isa::thread_x()) / 32)
        };
        let mut units = units_of(&item);
        let mut unit = units.next();
        loop {
            // A part: all of the warp's blocks, or one section.
            let mut state = State::EMPTY;
            let mut o: Accumulator<TILES> = [[0.0; 4]; TILES];
            let mut at = unit.at;
            while isa::agreed(at < unit.end) {
                let mut s: Scores<8> = [[0.0; 4]; 8];
                let stages = stages(unit.end - at);
                // Loops over stages, kept so: unrolled they would be the ring's code eight times. Registers move on.
                let mut stage = 0;
                while stage < isa::opaque(STAGES) {
                    let mut part = [[0.0; 4]; 2];
                    if isa::agreed(stage < stages) {
                        let k = ring.take();
                        // Opaque: the loops' many shared addresses are computed where they are used.
                        let lane = isa::opaque(lane);
                        // Channels past head_dim are zeros and left out.
                        let mut chunk = 0;
                        while chunk < p.head_dim / 8 {
                            for chunk in [chunk, chunk + 2] {
                                // SAFETY: Q is visible since the barrier, K since `take`.
                                let (a, b) =
                                    unsafe { (q.a(lane, 0, chunk), k.b_from_columns(lane, 0, chunk)) };
                                T::mma(&mut part[0], a, b[0]);
                                T::mma(&mut part[1], a, b[1]);
                            }
                            chunk += 4;
                        }
                    }
                    s = [s[2], s[3], s[4], s[5], s[6], s[7], part[0], part[1]];
                    stage += 1;
                }
                logits.apply(&mut s, &rows, at);
                mask::hide::<true, 8>(&rows, at, &mut s);
                let correction = state.step(&mut s, logits.factor);
                let mut weights: [[u32; 4]; STAGES as usize] =
                    core::array::from_fn(|stage| c_to_a::<T>(s[2 * stage], s[2 * stage + 1]));
                rescale(&mut o, correction);
                let mut stage = 0;
                while isa::agreed(stage < stages) {
                    let v = ring.take();
                    let lane = isa::opaque(lane);
                    for j in (0..TILES).step_by(2) {
                        // SAFETY: V is visible since `take`.
                        let b = unsafe { v.b_pair_from_rows(lane, 0, j as u32) };
                        T::mma(&mut o[j], weights[0], b[0]);
                        T::mma(&mut o[j + 1], weights[0], b[1]);
                    }
                    weights = [weights[1], weights[2], weights[3], weights[3]];
                    stage += 1;
                }
                at += KV_BLOCK as u32;
                if p.section == 0 {
                    // A unit is a block.
                    unit = units.next();
                    at = unit.at;
                }
            }
            let mut state = state.reduced();
            // What the part is of the item, and whether this warp has it.
            let (mut part, mut writes) = (units.index(unit.at), unit.at < unit.end);
            if p.section == 0 {
                let all = units_of(&place.item().0);
                let others = if all.count() < WARPS { all.count() } else { WARPS };
                state = gather_states(base, all.place(), others, state, &mut o);
                (part, writes) = (0, all.place() == 0);
            }
            if isa::agreed(writes) {
                output.end_part::<T, TILES>(&rows, part, state, &o);
            }
            if p.section != 0 {
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
        merge_if_last::<T, false>(p, &params.ranges, &item, &seq, base + Plan::<CHUNKS, TILES, SLOTS>::LAST);
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
