//! A matrix of 16-bit elements in shared memory, swizzled so that neither the copies in nor `ldmatrix` out
//! meet a bank twice.

use crate::isa;

/// Rows of `CHUNKS` chunks of 16 bytes (8 elements).
///
/// Chunk `c` of row `r` stands at place `c ^ s(r)` of its row. Eight rows of one chunk, which is what
/// `ldmatrix` reads at once, then cover all 32 banks: for rows of a multiple of 128 bytes `s(r) = r % 8`; for
/// an odd multiple of 64 bytes neighbouring rows already alternate halves of the banks, and
/// `s(r) = r / 2 % 4`; four rows of 32 bytes cover them but for a chunk's neighbour, and `s(r) = r / 4 % 2`.
#[derive(Clone, Copy)]
pub struct SharedTile<const CHUNKS: u32> {
    base: u32,
}

impl<const CHUNKS: u32> SharedTile<CHUNKS> {
    /// The tile at a shared address that is a multiple of 128.
    #[inline(always)]
    pub fn new(base: u32) -> Self {
        const { assert!(CHUNKS.is_multiple_of(4) || CHUNKS == 2) };
        SharedTile { base }
    }

    /// Bytes of `rows` rows.
    pub const fn bytes(rows: u32) -> u32 {
        rows * CHUNKS * 16
    }

    /// Address of a chunk.
    #[inline(always)]
    pub fn at(self, row: u32, chunk: u32) -> u32 {
        let s = match CHUNKS {
            2 => row >> 2 & 1,
            _ if CHUNKS.is_multiple_of(8) => row & 7,
            _ => row >> 1 & 3,
        };
        self.base + row * (CHUNKS * 16) + ((chunk ^ s) << 4)
    }

    /// A fragment of `[16, 16]` at (`row`, `8 * chunk`).
    ///
    /// # Safety
    /// The tile holds these rows, and they are written and visible.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn a(self, lane: u32, row: u32, chunk: u32) -> [u32; 4] {
        // SAFETY: the caller's promise.
        unsafe { isa::ldmatrix_x4(self.at(row + (lane & 15), chunk + (lane >> 4))) }
    }

    /// B fragments of two neighbouring columns of tiles, where the tile holds B transposed (K: a row per
    /// column of B): k from `8 * chunk`, columns `row` to `row + 15`.
    ///
    /// # Safety
    /// As [`SharedTile::a`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn b_from_columns(self, lane: u32, row: u32, chunk: u32) -> [[u32; 2]; 2] {
        // SAFETY: the caller's promise.
        let r = unsafe {
            isa::ldmatrix_x4(self.at(row + (lane & 7) + (lane >> 4 << 3), chunk + (lane >> 3 & 1)))
        };
        [[r[0], r[1]], [r[2], r[3]]]
    }

    /// B fragments of two neighbouring columns of tiles, where the tile holds B as it is (V): k from `row`, 16
    /// of them, columns from `8 * chunk`.
    ///
    /// # Safety
    /// As [`SharedTile::a`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn b_pair_from_rows(self, lane: u32, row: u32, chunk: u32) -> [[u32; 2]; 2] {
        // SAFETY: the caller's promise.
        let r = unsafe { isa::ldmatrix_x4_trans(self.at(row + (lane & 15), chunk + (lane >> 4))) };
        [[r[0], r[1]], [r[2], r[3]]]
    }

    /// B fragments of two successive k steps of one column of tiles, where the tile holds B as it is (V):
    /// k from `row`, 32 of them, columns from `8 * chunk`.
    ///
    /// # Safety
    /// As [`SharedTile::a`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn b_from_rows(self, lane: u32, row: u32, chunk: u32) -> [[u32; 2]; 2] {
        // SAFETY: the caller's promise.
        let r = unsafe { isa::ldmatrix_x4_trans(self.at(row + lane, chunk)) };
        [[r[0], r[1]], [r[2], r[3]]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const CHUNKS: u32>() {
        let tile = SharedTile::<CHUNKS>::new(0);
        let mut seen = std::vec![false; (64 * CHUNKS) as usize];
        for row in 0..64 {
            for chunk in 0..CHUNKS {
                let at = tile.at(row, chunk);
                assert!(!core::mem::replace(&mut seen[at as usize / 16], true));
                assert_eq!(at / (CHUNKS * 16), row);
            }
        }
        // Eight successive rows of a chunk lie in eight different groups of four banks.
        for (row, chunk) in (0..57).flat_map(|r| (0..CHUNKS).map(move |c| (r, c))) {
            let banks = (row..row + 8).fold(0u32, |all, r| all | 1 << (tile.at(r, chunk) / 16 % 8));
            assert_eq!(banks, 0xff, "{CHUNKS} {row} {chunk}");
        }
    }

    #[test]
    fn swizzle_is_a_bijection_without_bank_conflicts() {
        check::<2>();
        check::<4>();
        check::<8>();
        check::<12>();
        check::<16>();
        check::<24>();
        check::<32>();
    }
}
