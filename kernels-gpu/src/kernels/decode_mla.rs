//! Decoding of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): one KV head, whose rows of up to 576 channels are
//! keys and, with their first channels up to 512, values: read once for both.
//!
//! As `decode`, a CTA stays and walks a range of items. Its warps share each block: warp `w` computes `S` of the block's
//! stage `w`, S goes through shared memory, every warp computes the same softmax, and accumulates its quarter of O's
//! channels. A stage is given up as soon as it has been a value.

use core::marker::PhantomData;

use crate::abi::{DECODE_ROWS, DECODE_WARPS, DecodeParams, KV_BLOCK};
use crate::attn::mask;
use crate::attn::merge::{WholeCta, merge_if_last};
use crate::attn::output::{Accumulator, Output};
use crate::attn::rows::{Place, copy_q, load_item};
use crate::attn::shared_scores::SharedScores;
use crate::attn::softmax::{Logits, State, rescale};
use crate::isa;
use crate::sched::{BlockRing, Units, range, stages};
use crate::tile::fragment::c_to_a;
use crate::tile::{Half, SharedTile};

/// Chunks of 8 channels of a row.
const CHUNKS: u32 = 72;

/// Tiles of 8 channels of O in a warp: of four, 512.
const TILES: usize = 16;

/// `SLOTS` stages of 16 tokens, 18 KiB each: four, a block, where shared memory ends at 99 KiB; seven where it ends at 163,
/// so that at least three are on their way.
pub(super) struct Config<const SLOTS: u32>(PhantomData<()>);

impl<const SLOTS: u32> super::Config for Config<SLOTS> {
    const THREADS: u32 = 32 * DECODE_WARPS as u32;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = Plan::<SLOTS>::RING + Ring::<SLOTS>::BYTES;
}

type Ring<'a, const SLOTS: u32> = BlockRing<'a, 1, CHUNKS, SLOTS>;

/// Shared memory: Q `[16, 576]`, S `[16, 64]` f32, the place, whether the CTA has come last; the ring.
struct Plan<const SLOTS: u32>;

impl<const SLOTS: u32> Plan<SLOTS> {
    const S: u32 = SharedTile::<CHUNKS>::bytes(DECODE_ROWS as u32);
    const PLACE: u32 = Self::S + SharedScores::BYTES;
    const LAST: u32 = Self::PLACE + Place::BYTES;
    const RING: u32 = (Self::LAST + 4).next_multiple_of(128);
}

/// The kernel.
#[inline(always)]
pub(super) unsafe fn body<T: Half, const SLOTS: u32>(params: &DecodeParams) {
    let p = &params.attention;
    let (first, last) = (range(&params.ranges, 0), range(&params.ranges, 1));
    if isa::agreed(first == last) {
        return;
    }
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let base = isa::shared_base();
    let q = SharedTile::<CHUNKS>::new(base);
    let place = Place::new(p, base + Plan::<SLOTS>::PLACE);
    // SAFETY: the plan gives the ring the rest; the host has checked the items' KV.
    let mut ring = unsafe { Ring::<SLOTS>::start(p, first, last, base + Plan::<SLOTS>::RING) };
    let rows = place.rows(0);
    let logits = Logits::new(&p.score, p.alibi_slopes != 0);
    let output = Output { p, channel: 8 * TILES as u32 * warp, leads: warp == 0, fold: 0 };
    let scores = SharedScores::new(base + Plan::<SLOTS>::S);

    let mut index = first;
    while isa::agreed(index < range(&params.ranges, 1)) {
        let (item, seq) = load_item(p, index);
        let at = |row, chunk| q.at(row, chunk);
        copy_q::<T, T, CHUNKS, false>(p, &seq, &item, at, DECODE_ROWS as u32, 32 * DECODE_WARPS as u32);
        if isa::thread_x() == 0 {
            // SAFETY: the plan has room for it.
            unsafe { place.write(index, &item, &seq) };
        }
        isa::bar_sync();
        let mut units = Units::<1>::new(p.section, &item, 0, 0);
        let mut unit = units.next();
        loop {
            // A part: all blocks, or one section.
            let mut state = State::EMPTY;
            let mut o: Accumulator<TILES> = [[0.0; 4]; TILES];
            let mut at = unit.at;
            while isa::agreed(at < unit.end) {
                ring.wait_block();
                let stages = stages(unit.end - at);
                let mut part = [[0.0f32; 4]; 2];
                if isa::agreed(warp < stages) {
                    let k = ring.stage(warp);
                    // Opaque: the loops' many shared addresses are computed where they are used.
                    let lane = isa::opaque(lane);
                    let mut chunk = 0;
                    // Channels past head_dim are zeros and left out.
                    while chunk < p.head_dim / 8 {
                        for chunk in [chunk, chunk + 2] {
                            // SAFETY: Q is visible since the barrier, K since `wait_block`.
                            let (a, b) = unsafe { (q.a(lane, 0, chunk), k.b_from_columns(lane, 0, chunk)) };
                            T::mma(&mut part[0], a, b[0]);
                            T::mma(&mut part[1], a, b[1]);
                        }
                        chunk += 4;
                    }
                }
                scores.put(warp, &part);
                isa::bar_sync();
                let mut s = scores.take();
                logits.apply(&mut s, &rows, at);
                mask::hide::<true, 8>(&rows, at, &mut s);
                let correction = state.step(&mut s, logits.factor);
                let mut weights: [[u32; 4]; 4] =
                    core::array::from_fn(|stage| c_to_a::<T>(s[2 * stage], s[2 * stage + 1]));
                rescale(&mut o, correction);
                let mut stage = 0;
                while isa::agreed(stage < stages) {
                    let v = ring.stage(0);
                    let lane = isa::opaque(lane);
                    for j in (0..TILES).step_by(2) {
                        let chunk = TILES as u32 * warp + j as u32;
                        // SAFETY: V is visible since `wait_block`.
                        let b = unsafe { v.b_pair_from_rows(lane, 0, chunk) };
                        T::mma(&mut o[j], weights[0], b[0]);
                        T::mma(&mut o[j + 1], weights[0], b[1]);
                    }
                    weights = [weights[1], weights[2], weights[3], weights[3]];
                    ring.release();
                    stage += 1;
                }
                at += KV_BLOCK as u32;
                if p.section == 0 {
                    // A unit is a block.
                    unit = units.next();
                    at = unit.at;
                }
            }
            let part = if p.section == 0 { 0 } else { units.index(unit.at) };
            output.end_part::<T, TILES>(&rows, part, state.reduced(), &o);
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
        // All have used Q and the place, and written their states.
        isa::bar_sync();
        merge_if_last::<WholeCta, T, true>(p, &params.ranges, &item, &seq, base + Plan::<SLOTS>::LAST);
    }
}
