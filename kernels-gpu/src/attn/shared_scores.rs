//! Scores that the warps of a CTA have computed for each other.

use crate::abi::DECODE_ROWS;
use crate::attn::softmax::Scores;
use crate::isa;

/// Scores of 16 rows against 64 columns in shared memory, f32: each of four warps brings 16 columns, all take all.
pub(crate) struct SharedScores {
    /// The lane's place, as a C fragment.
    at: u32,
}

impl SharedScores {
    /// Words from row to row: 64, and 8 so that four rows of a half-warp's stores meet 32 banks.
    const STRIDE: u32 = 72;

    /// Shared bytes.
    pub(crate) const BYTES: u32 = 4 * Self::STRIDE * DECODE_ROWS as u32;

    /// Scores at `base`, [`SharedScores::BYTES`] that nothing else uses.
    #[inline(always)]
    pub(crate) fn new(base: u32) -> Self {
        let lane = isa::thread_x() % 32;
        SharedScores { at: base + 4 * (lane / 4 * Self::STRIDE + 2 * (lane % 4)) }
    }

    /// Columns `16 warp..16 warp + 16`, after a barrier since all have taken the block before.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn put(&self, warp: u32, part: &Scores<2>) {
        for (j, x) in part.iter().enumerate() {
            let to = self.at + 4 * (16 * warp + 8 * j as u32);
            // SAFETY: the lane's own words; `new` says that there is room.
            unsafe {
                isa::st_shared_2(to, [x[0].to_bits(), x[1].to_bits()]);
                isa::st_shared_2(to + 4 * 8 * Self::STRIDE, [x[2].to_bits(), x[3].to_bits()]);
            }
        }
    }

    /// All columns, after a barrier since every warp has put its own.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn take(&self) -> Scores<8> {
        let mut s: Scores<8> = [[0.0; 4]; 8];
        for (j, x) in s.iter_mut().enumerate() {
            let from = self.at + 4 * 8 * j as u32;
            // SAFETY: written before the barrier.
            unsafe {
                [x[0], x[1]] = isa::ld_shared_2(from).map(f32::from_bits);
                [x[2], x[3]] = isa::ld_shared_2(from + 4 * 8 * Self::STRIDE).map(f32::from_bits);
            }
        }
        s
    }
}
