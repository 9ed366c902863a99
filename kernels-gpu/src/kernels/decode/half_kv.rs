//! Keys and values of 16 bits.

use super::{BlockKv, WARPS};
use crate::abi::{AttentionParams, DecodeParams, KV_BLOCK, RangeParams, Sequence, WorkItem};
use crate::attn::output::Accumulator;
use crate::attn::softmax::Scores;
use crate::isa;
use crate::sched::{BlockRing, STAGE, stages};
use crate::tile::fragment::c_to_a;
use crate::tile::{Half, SharedTile};

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
pub(crate) struct HalfKv<'a, T, const CHUNKS: u32, const SLOTS: u32> {
    p: &'a AttentionParams,
    ring: BlockRing<'a, WARPS, CHUNKS, SLOTS>,
    product: core::marker::PhantomData<T>,
}

impl<'a, T: Half, const CHUNKS: u32, const TILES: usize, const SLOTS: u32> BlockKv<'a, CHUNKS, TILES>
    for HalfKv<'a, T, CHUNKS, SLOTS>
{
    type Params = DecodeParams;
    type Product = T;
    const BYTES: u32 = BlockRing::<WARPS, CHUNKS, SLOTS>::BYTES;
    const SECTIONS: bool = true;

    #[inline(always)]
    fn attention(p: &DecodeParams) -> &AttentionParams {
        &p.attention
    }

    #[inline(always)]
    fn ranges(p: &DecodeParams) -> &RangeParams {
        &p.ranges
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn start(p: &'a DecodeParams, first: u32, last: u32, at: u32) -> Self {
        let p = &p.attention;
        // SAFETY: the caller's promise.
        let ring = unsafe { BlockRing::start(p, first, last, at) };
        HalfKv { p, ring, product: core::marker::PhantomData }
    }

    #[inline(always)]
    fn begin(&mut self, _: &WorkItem, _: &Sequence) {}

    #[inline(always)]
    #[track_caller]
    fn scores(&mut self, q: SharedTile<CHUNKS>, _: u32, left: u32) -> Scores<8> {
        let mut s: Scores<8> = [[0.0; 4]; 8];
        let stages = stages(left);
        // Loops over stages, kept so: unrolled they would be the ring's code eight times. Registers move on.
        let mut stage = 0;
        while stage < isa::opaque(STAGES) {
            let mut part = [[0.0; 4]; 2];
            if isa::agreed(stage < stages) {
                let k = self.ring.take();
                // Opaque: the loops' many shared addresses are computed where they are used.
                let lane = isa::opaque(isa::thread_x() % 32);
                // Channels past head_dim are zeros and left out.
                let mut chunk = 0;
                while chunk < self.p.head_dim / 8 {
                    for chunk in [chunk, chunk + 2] {
                        // SAFETY: Q is visible since the barrier, K since `take`.
                        let (a, b) = unsafe { (q.a(lane, 0, chunk), k.b_from_columns(lane, 0, chunk)) };
                        T::mma(&mut part[0], a, b[0]);
                        T::mma(&mut part[1], a, b[1]);
                    }
                    chunk += 4;
                }
            }
            s = [s[2], s[3], s[4], s[5], s[6], s[7], part[0], part[1]];
            stage += 1;
        }
        s
    }

    #[inline(always)]
    #[track_caller]
    fn accumulate(&mut self, o: &mut Accumulator<TILES>, s: &Scores<8>, left: u32) {
        let mut weights: [[u32; 4]; STAGES as usize] =
            core::array::from_fn(|stage| c_to_a::<T>(s[2 * stage], s[2 * stage + 1]));
        let mut stage = 0;
        while isa::agreed(stage < stages(left)) {
            let v = self.ring.take();
            let lane = isa::opaque(isa::thread_x() % 32);
            for j in (0..TILES).step_by(2) {
                // SAFETY: V is visible since `take`.
                let b = unsafe { v.b_pair_from_rows(lane, 0, j as u32) };
                T::mma(&mut o[j], weights[0], b[0]);
                T::mma(&mut o[j + 1], weights[0], b[1]);
            }
            weights = [weights[1], weights[2], weights[3], weights[3]];
            stage += 1;
        }
    }

    #[inline(always)]
    fn finish(&self, _: &mut Accumulator<TILES>) {}

    #[inline(always)]
    fn fold(&self) -> u32 {
        0
    }
}
