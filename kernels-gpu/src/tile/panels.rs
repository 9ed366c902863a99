//! Matrices of 16-bit elements in shared memory as `wgmma` and the copy engine want them.

use crate::abi::panel_channels;
use crate::isa;
use crate::tile::Half;

/// `ROWS` rows of `CHUNKS` chunks of 16 bytes, cut into panels of columns that stand one after the other: 64 elements
/// (128 bytes) wide and swizzled by 128 bytes, or 32 elements and 64 bytes where the row is no multiple of 64.
///
/// Chunk `c` of a panel's row `r` stands at place `c ^ s(r)` of the row: `s(r) = r % 8` for 128 bytes, `r / 2 % 4` for
/// 64 (PTX ISA, "Swizzling modes"). So eight rows of one chunk lie in all 32 banks.
#[derive(Clone, Copy)]
pub struct Panels<const ROWS: u32, const CHUNKS: u32> {
    base: u32,
}

impl<const ROWS: u32, const CHUNKS: u32> Panels<ROWS, CHUNKS> {
    /// Chunks of a panel's row.
    pub const WIDTH: u32 = panel_channels(8 * CHUNKS as usize) as u32 / 8;
    /// Panels side by side.
    pub const COUNT: u32 = CHUNKS / Self::WIDTH;
    /// Bytes of the matrix.
    pub const BYTES: u32 = ROWS * CHUNKS * 16;
    /// Bytes from row to row of a panel.
    const ROW: u32 = Self::WIDTH * 16;
    /// Bytes from panel to panel.
    const PANEL: u32 = ROWS * Self::ROW;
    /// The descriptor's constant fields, bytes in units of 16: eight rows further (stride), one panel further (leading),
    /// the swizzle (1: 128 bytes, 2: 64 bytes).
    const FIELDS: u64 = {
        assert!(ROWS.is_multiple_of(8) && CHUNKS.is_multiple_of(Self::WIDTH) && Self::PANEL < 1 << 18);
        let swizzle = if Self::WIDTH == 8 { 1u64 } else { 2 };
        swizzle << 62 | (Self::ROW as u64 / 2) << 32 | (Self::PANEL as u64 / 16) << 16
    };

    /// The matrix at a shared address that is a multiple of 1024.
    #[inline(always)]
    pub fn new(base: u32) -> Self {
        Panels { base }
    }

    /// Address of a chunk.
    #[inline(always)]
    pub fn chunk(self, row: u32, chunk: u32) -> u32 {
        let s = if Self::WIDTH == 8 { row & 7 } else { row >> 1 & 3 };
        self.row(chunk / Self::WIDTH, row) + (((chunk % Self::WIDTH) ^ s) << 4)
    }

    /// Address of a panel's row, a multiple of 8: where a box of the copy engine goes.
    #[inline(always)]
    pub fn row(self, panel: u32, row: u32) -> u32 {
        self.base + panel * Self::PANEL + row * Self::ROW
    }

    /// Descriptor of the matrix `offset` bytes further on. Addresses, below 2^18, are in units of 16 too: 14 bits, so that
    /// a sum of them touches no other field, and steps differ by one addition.
    #[inline(always)]
    fn descriptor(self, offset: u32) -> u64 {
        let low = Self::FIELDS as u32 + (self.base >> 4) + (offset >> 4);
        Self::FIELDS >> 32 << 32 | low as u64
    }

    /// Rows from `row` (a multiple of 8), channels `16 step..16 step + 16`: an operand whose rows (A) or columns (B) run
    /// along k.
    #[inline(always)]
    pub fn along_k(self, row: u32, step: u32) -> u64 {
        let at = Self { base: self.base + row * Self::ROW };
        let chunk = 2 * step;
        at.descriptor(chunk / Self::WIDTH * Self::PANEL + chunk % Self::WIDTH * 16)
    }

    /// Rows `16 step..16 step + 16`, all channels: B with its rows along n.
    #[inline(always)]
    pub fn along_n(self, step: u32) -> u64 {
        self.descriptor(16 * step * Self::ROW)
    }
}

/// Accumulators of products on their way: nobody looks at them before [`Pending::wait`].
#[must_use]
pub struct Pending<const TILES: usize>([[f32; 4]; TILES]);

impl<const TILES: usize> Pending<TILES> {
    /// `A B^T`: 64 rows of `a` from `row` against all rows of `b`, over all channels; a group of its own.
    ///
    /// # Safety
    /// Both are written and visible to the async proxy, and stay so until the wait; all lanes of a warpgroup come here.
    #[inline(always)]
    #[track_caller]
    pub unsafe fn a_bt<T: Half, const M: u32, const N: u32, const CHUNKS: u32>(
        a: Panels<M, CHUNKS>,
        row: u32,
        b: Panels<N, CHUNKS>,
    ) -> Self {
        // Opaque: descriptors are made where they are used, one addition each, and not kept.
        let row = isa::opaque(row);
        isa::wgmma_fence();
        // SAFETY: the caller's promise.
        let d = unsafe { T::wgmma_first::<TILES>(a.along_k(row, 0), b.along_k(0, 0)) };
        // SAFETY: as above.
        unsafe { Pending(d).steps::<T, M, N, CHUNKS>(a, row, b, 1) }
    }

    /// Adds the product of further channels to [`Pending::a_bt`]'s, which may be on its way; a group of its own.
    ///
    /// # Safety
    /// As [`Pending::a_bt`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn and_a_bt<T: Half, const M: u32, const N: u32, const CHUNKS: u32>(
        self,
        a: Panels<M, CHUNKS>,
        row: u32,
        b: Panels<N, CHUNKS>,
    ) -> Self {
        // SAFETY: the caller's promise.
        unsafe { self.steps::<T, M, N, CHUNKS>(a, isa::opaque(row), b, 0) }
    }

    /// Adds the products of 16 channels each, from step `first` on.
    ///
    /// # Safety
    /// As [`Pending::a_bt`].
    #[inline(always)]
    #[track_caller]
    unsafe fn steps<T: Half, const M: u32, const N: u32, const CHUNKS: u32>(
        mut self,
        a: Panels<M, CHUNKS>,
        row: u32,
        b: Panels<N, CHUNKS>,
        first: u32,
    ) -> Self {
        const { assert!(8 * TILES as u32 == N) };
        for step in first..CHUNKS / 2 {
            // SAFETY: the caller's promise.
            unsafe { T::wgmma(&mut self.0, a.along_k(row, step), b.along_k(0, step)) };
        }
        isa::wgmma_commit();
        self
    }

    /// `d + A B` with A in registers, 16 columns to an entry, and of B its first `8 TILES` columns; a group of its own.
    ///
    /// # Safety
    /// As [`Pending::a_bt`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn plus_a_b<T: Half, const N: u32, const CHUNKS: u32, const STEPS: usize>(
        mut d: [[f32; 4]; TILES],
        a: &[[u32; 4]; STEPS],
        b: Panels<N, CHUNKS>,
    ) -> Self {
        const { assert!(TILES as u32 <= CHUNKS && 16 * STEPS as u32 == N) };
        isa::wgmma_fence();
        for step in 0..STEPS {
            // SAFETY: the caller's promise.
            unsafe { T::wgmma_registers(&mut d, a[step], b.along_n(step as u32)) };
        }
        isa::wgmma_commit();
        Pending(d)
    }

    /// `d + A B` with A, 64 rows, in shared memory, and of B its first `8 TILES` columns; a group of its own.
    ///
    /// # Safety
    /// As [`Pending::a_bt`].
    #[inline(always)]
    #[track_caller]
    pub unsafe fn plus_shared_a_b<T: Half, const N: u32, const A_CHUNKS: u32, const CHUNKS: u32>(
        mut d: [[f32; 4]; TILES],
        a: Panels<64, A_CHUNKS>,
        b: Panels<N, CHUNKS>,
    ) -> Self {
        const { assert!(TILES as u32 <= CHUNKS && 8 * A_CHUNKS == N) };
        isa::wgmma_fence();
        for step in 0..N / 16 {
            // SAFETY: the caller's promise.
            unsafe { T::wgmma_along_n(&mut d, a.along_k(0, step), b.along_n(step)) };
        }
        isa::wgmma_commit();
        Pending(d)
    }

    /// The accumulators, once all but the `NEWER` groups after theirs are complete.
    #[inline(always)]
    #[track_caller]
    pub fn wait<const NEWER: u32>(mut self) -> [[f32; 4]; TILES] {
        isa::wgmma_wait::<TILES, NEWER>(&mut self.0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const ROWS: u32, const CHUNKS: u32>() {
        type P<const R: u32, const C: u32> = Panels<R, C>;
        let m = P::<ROWS, CHUNKS>::new(0);
        let mut seen = std::vec![false; (P::<ROWS, CHUNKS>::BYTES / 16) as usize];
        for (row, chunk) in (0..ROWS).flat_map(|r| (0..CHUNKS).map(move |c| (r, c))) {
            assert!(!core::mem::replace(&mut seen[m.chunk(row, chunk) as usize / 16], true));
        }
        for (row, chunk) in (0..ROWS - 7).flat_map(|r| (0..CHUNKS).map(move |c| (r, c))) {
            let banks = (row..row + 8).fold(0u32, |all, r| all | 1 << (m.chunk(r, chunk) / 16 % 8));
            assert_eq!(banks, 0xff, "{CHUNKS} {row} {chunk}");
        }
    }

    #[test]
    fn swizzle_is_a_bijection_without_bank_conflicts() {
        check::<128, 8>();
        check::<192, 12>();
        check::<176, 16>();
        check::<112, 24>();
        check::<80, 32>();
    }
}
