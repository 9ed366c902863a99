//! Attention of many packed rows: FlashAttention-2 (arXiv:2307.08691) on `mma.sync`.
//!
//! A CTA takes one work item, 128 rows at most. For each block of 64 KV tokens: `S = Q K^T` while V is on
//! its way, masks and online softmax, `O += P V` while the next K is on its way. P never leaves its lane's
//! registers.

use core::marker::PhantomData;

use crate::abi::{KV_BLOCK, prefill_rows};
use crate::attn::mask;
use crate::attn::output::{Accumulator, Output};
use crate::attn::rows::{Place, copy_q, load_item};
use crate::attn::softmax::{Logits, Scores, State, rescale};
use crate::isa;
use crate::sched::{Source, section_end};
use crate::tile::fragment::c_to_a;
use crate::tile::{Half, SharedTile};

const fn q_rows(chunks: u32) -> u32 {
    prefill_rows(8 * chunks as usize) as u32
}

/// `CHUNKS` of 8 channels; `WARPS` of `M` m16 tiles.
///
/// | head_dim | M x warps | why |
/// |---|---|---|
/// | 64 to 128 | 2 x 4 | each K or V fragment from shared memory feeds two products: with one it is shared memory that limits |
/// | 192 | 1 x 8 | O of 32 rows would take 192 of 255 registers |
/// | 256 | 1 x 4 | as 192, and 64 rows, see `prefill_rows` |
///
/// One K and one V tile, as one computes while the other loads; a second CTA on the SM hides the rest.
pub(super) struct Config<S, const CHUNKS: u32, const M: u32, const WARPS: u32>(PhantomData<S>);

impl<S: Source<'static, CHUNKS>, const CHUNKS: u32, const M: u32, const WARPS: u32> super::Config
    for Config<S, CHUNKS, M, WARPS>
{
    const THREADS: u32 = 32 * WARPS;
    const MIN_CTAS: u32 = if WARPS == 4 { 2 } else { 1 };
    const SHARED_BYTES: u32 = {
        assert!(16 * M * WARPS == q_rows(CHUNKS));
        // Q, the tiles of K and V, the place.
        SharedTile::<CHUNKS>::bytes(q_rows(CHUNKS)) + S::BYTES + Place::BYTES
    };
}

/// The kernel, for queries and outputs of type `Io` and products of type `T`. `TILES` is `CHUNKS`, as a length.
#[inline(always)]
pub(super) unsafe fn body<
    'a,
    Io: Half,
    T: Half,
    S: Source<'a, CHUNKS>,
    const CHUNKS: u32,
    const TILES: usize,
    const M: usize,
    const WARPS: u32,
>(
    params: &'a S::Params,
) {
    let p = S::attention(params);
    let (item, seq) = load_item(p, isa::block_x());
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let q = SharedTile::<CHUNKS>::new(isa::shared_base());
    copy_q::<Io, T, CHUNKS, true>(p, &seq, &item, |r, c| q.at(r, c), q_rows(CHUNKS), 32 * WARPS);
    let ring_base = isa::shared_base() + SharedTile::<CHUNKS>::bytes(q_rows(CHUNKS));
    // SAFETY: the shared-memory plan gives the ring the rest; the host has checked the item's KV.
    let mut ring = unsafe { S::start(params, &seq, &item, ring_base) };

    let first_row = warp * 16 * M as u32;
    // The shared-memory plan ends with it.
    let place = Place::new(p, ring_base + S::BYTES);
    if isa::thread_x() == 0 {
        // SAFETY: the plan has room for it.
        unsafe { place.write(isa::block_x(), &item, &seq) };
    }
    let kv_end = item.kv_end;
    let rows = |m: usize| place.rows(first_row + 16 * m as u32);
    let logits = Logits::new(&p.score, p.alibi_slopes != 0);
    let output = Output { p, channel: 0, leads: true, fold: 0 };

    if item.kv_start == item.kv_end {
        // Nothing is taken, with whose barrier the place would be there.
        isa::bar_sync();
    }
    let mut at = item.kv_start;
    loop {
        let end = section_end(p, &item, at);
        let mut state = [State::EMPTY; M];
        let mut o: [Accumulator<TILES>; M] = [[[0.0; 4]; TILES]; M];
        while at < end {
            let k = ring.take_k(at);
            // Opaque: the loops' many shared addresses are computed where they are used.
            let lane = isa::opaque(lane);
            let mut s: [Scores<8>; M] = [[[0.0; 4]; 8]; M];
            // Loops of few steps, kept so: unrolled whole, the assembler loads fragments ahead until it is out of
            // registers. Channels past head_dim are zeros and left out.
            let mut chunk = 0;
            while chunk < p.head_dim / 8 {
                // Two steps at once where there are registers to load ahead.
                for chunk in [chunk, chunk + 2].into_iter().take(if M == 1 { 2 } else { 1 }) {
                    // SAFETY: Q and K are visible since `take_k`.
                    let a: [[u32; 4]; M] =
                        core::array::from_fn(|m| unsafe { q.a(lane, first_row + 16 * m as u32, chunk) });
                    for j in 0..4 {
                        // SAFETY: as above.
                        let b = unsafe { k.b_from_columns(lane, 16 * j as u32, chunk) };
                        for m in 0..M {
                            T::mma(&mut s[m][2 * j], a[m], b[0]);
                            T::mma(&mut s[m][2 * j + 1], a[m], b[1]);
                        }
                    }
                }
                chunk += if M == 1 { 4 } else { 2 };
            }
            let v = ring.take_v(at);
            let lane = isa::opaque(lane);
            // S becomes P at once, in half the registers.
            let mut weights = [[[0u32; 4]; 4]; M];
            for m in 0..M {
                logits.apply(&mut s[m], &rows(m), at);
                mask::hide::<true, 8>(&rows(m), at, &mut s[m]);
                let correction = state[m].step(&mut s[m], logits.factor);
                for step in 0..4 {
                    weights[m][step] = c_to_a::<T>(s[m][2 * step], s[m][2 * step + 1]);
                }
                rescale(&mut o[m], correction);
            }
            // Tokens past the end have weight 0 and are left out.
            let mut token = 0;
            while token < end - at && token < KV_BLOCK as u32 {
                for j in 0..TILES / 2 {
                    // SAFETY: V is visible since `take_v`.
                    let b = unsafe { v.b_pair_from_rows(lane, token, 2 * j as u32) };
                    for m in 0..M {
                        T::mma(&mut o[m][2 * j], weights[m][0], b[0]);
                        T::mma(&mut o[m][2 * j + 1], weights[m][0], b[1]);
                    }
                }
                for w in &mut weights {
                    *w = [w[1], w[2], w[3], w[3]];
                }
                token += 16;
            }
            at += KV_BLOCK as u32;
        }
        let last = end == kv_end;
        for m in 0..M {
            output.end_section::<Io, TILES>(end, &rows(m), state[m].reduced(), &mut o[m]);
        }
        if last {
            return;
        }
    }
}
