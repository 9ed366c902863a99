//! Decoding over int4 pages: as `decode`, a CTA stays and walks a range of work items, but its four warps share each block,
//! for the codes are unpacked into a tile that all of them use: warp `w` computes `S` of tokens `16 w..16 w + 16`, S goes
//! through shared memory, every warp computes the same softmax of all 64 columns, and accumulates its quarter of O's
//! channels. So every sum has the same order as in the prefill kernel, and a row's bits do not depend on which of the two
//! computes it.

use core::marker::PhantomData;

use crate::abi::{DECODE_ROWS, DECODE_WARPS, DecodeInt4Params, KV_BLOCK};
use crate::attn::mask;
use crate::attn::merge::merge_if_last;
use crate::attn::output::{Accumulator, Output};
use crate::attn::rows::{Place, copy_q, load_item};
use crate::attn::shared_scores::SharedScores;
use crate::attn::softmax::{Logits, State, rescale};
use crate::isa;
use crate::sched::{Int4Ring, Source, range, section_end};
use crate::tile::fragment::c_to_a;
use crate::tile::{F16, Half, SharedTile};

/// `CHUNKS` of 8 channels: four stages, of which three are on their way.
pub(super) struct Config<const CHUNKS: u32>(PhantomData<()>);

type Ring<'a, const CHUNKS: u32> = Int4Ring<'a, CHUNKS, { 32 * DECODE_WARPS as u32 }, 4>;

impl<const CHUNKS: u32> super::Config for Config<CHUNKS> {
    const THREADS: u32 = 32 * DECODE_WARPS as u32;
    const MIN_CTAS: u32 = 2;
    const SHARED_BYTES: u32 = Plan::<CHUNKS>::TILES + Ring::<CHUNKS>::BYTES;
}

/// Shared memory: Q `[16, head_dim]`, S `[16, 64]` f32, the place, whether the CTA has come last; the codes and the tile.
struct Plan<const CHUNKS: u32>;

impl<const CHUNKS: u32> Plan<CHUNKS> {
    const S: u32 = SharedTile::<CHUNKS>::bytes(DECODE_ROWS as u32);
    const PLACE: u32 = Self::S + SharedScores::BYTES;
    const LAST: u32 = Self::PLACE + Place::BYTES;
    const TILES: u32 = (Self::LAST + 4).next_multiple_of(128);
}

/// The kernel, for queries and outputs of type `Io`; products are of f16. `TILES` is the number of 8-channel tiles of O in a
/// warp, `CHUNKS / 4`.
#[inline(always)]
pub(super) unsafe fn body<Io: Half, const CHUNKS: u32, const TILES: usize>(params: &DecodeInt4Params) {
    let p = &params.int4.attention;
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let base = isa::shared_base();
    let q = SharedTile::<CHUNKS>::new(base);
    let place = Place::new(p, base + Plan::<CHUNKS>::PLACE);
    let rows = place.rows(0);
    let logits = Logits::new(&p.score, p.alibi_slopes != 0);
    let channel = 8 * TILES as u32 * warp;
    let output = Output { p, channel, leads: warp == 0 };
    let scores = SharedScores::new(base + Plan::<CHUNKS>::S);

    let mut index = range(&params.ranges, 0);
    while isa::agreed(index < range(&params.ranges, 1)) {
        let (item, seq) = load_item(p, index);
        copy_q::<Io, F16, CHUNKS, true>(p, &seq, &item, q, DECODE_ROWS as u32, 32 * DECODE_WARPS as u32);
        // SAFETY: the plan gives the tiles the rest; the host has checked the item's KV.
        let mut ring =
            unsafe { Ring::<CHUNKS>::start(&params.int4, &seq, &item, base + Plan::<CHUNKS>::TILES) };
        if isa::thread_x() == 0 {
            // SAFETY: the plan has room for it.
            unsafe { place.write(index, &item, &seq) };
        }
        if item.kv_start == item.kv_end {
            // Nothing is taken, with whose barrier the place would be there.
            isa::bar_sync();
        }
        let (mut at, mut part) = (item.kv_start, 0);
        loop {
            let end = section_end(p, &item, at);
            let mut state = State::EMPTY;
            let mut o: Accumulator<TILES> = [[0.0; 4]; TILES];
            while at < end {
                let k = ring.take_k(at);
                // Opaque: the loops' many shared addresses are computed where they are used.
                let lane = isa::opaque(lane);
                let mut part = [[0.0f32; 4]; 2];
                for step in 0..CHUNKS / 2 {
                    // SAFETY: Q and K are visible since `take`.
                    unsafe {
                        let a = q.a(lane, 0, 2 * step);
                        let b = k.b_from_columns(lane, 16 * warp, 2 * step);
                        F16::mma(&mut part[0], a, b[0]);
                        F16::mma(&mut part[1], a, b[1]);
                    }
                }
                scores.put(warp, &part);
                let v = ring.take_v(at);
                let lane = isa::opaque(lane);
                let mut s = scores.take();
                logits.apply(&mut s, &rows, at);
                mask::hide::<true, 8>(&rows, at, &mut s);
                let correction = state.step(&mut s, logits.factor);
                rescale(&mut o, correction);
                for step in 0..2 {
                    let a =
                        [0, 1].map(|half| c_to_a::<F16>(s[4 * step + 2 * half], s[4 * step + 2 * half + 1]));
                    for (j, o) in o.iter_mut().enumerate() {
                        // SAFETY: V is visible since `take`.
                        let b = unsafe { v.b_from_rows(lane, 32 * step as u32, channel / 8 + j as u32) };
                        F16::mma(o, a[0], b[0]);
                        F16::mma(o, a[1], b[1]);
                    }
                }
                at += KV_BLOCK as u32;
            }
            output.end_part::<Io, TILES>(&rows, part, state.reduced(), &o);
            part += 1;
            if end == item.kv_end {
                break;
            }
        }
        let (item, seq) = place.item();
        index = place.index() + 1;
        // All have used Q, the place and the tile, and written their states.
        isa::bar_sync();
        merge_if_last::<Io, false>(p, &params.ranges, &item, &seq, base + Plan::<CHUNKS>::LAST);
    }
}
