//! Rows of any float type, element by element; and what a CTA reduces over its warps.

use crate::abi::{PageRows, Rows, element};
use crate::isa;

/// Element `i` of a row, as f32.
///
/// # Safety
/// The row has it, and nobody writes it meanwhile.
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn load(row: u64, dtype: u32, i: u32) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            element::F32 => f32::from_bits(isa::ld_global_1(row + 4 * i as u64)[0]),
            element::F16 => isa::f16x2_to_f32(isa::ld_global_u16(row + 2 * i as u64)).0,
            _ => f32::from_bits(isa::ld_global_u16(row + 2 * i as u64) << 16),
        }
    }
}

/// Elements `i..i + 8` of a row, 16 bytes at a time.
///
/// # Safety
/// The row has them, begins at a multiple of 16 bytes, as `i` is one of 8 elements, and nobody writes it meanwhile.
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn load_8(row: u64, dtype: u32, i: u32) -> [f32; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        if dtype == element::F32 {
            let [a, b] = [0, 16].map(|offset| isa::ld_global_4(row + 4 * i as u64 + offset));
            return [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]].map(f32::from_bits);
        }
        let words = isa::ld_global_4(row + 2 * i as u64);
        let pairs =
            words.map(|x| if dtype == element::F16 { isa::f16x2_to_f32(x) } else { isa::bf16x2_to_f32(x) });
        let [(a, b), (c, d), (e, f), (g, h)] = pairs;
        [a, b, c, d, e, f, g, h]
    }
}

/// Writes element `i` of a row, rounded to nearest even.
///
/// # Safety
/// The row has it, and nobody else touches it meanwhile.
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn store(row: u64, dtype: u32, i: u32, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            element::F32 => isa::st_global_1(row + 4 * i as u64, [x.to_bits()]),
            element::F16 => isa::st_global_u16(row + 2 * i as u64, isa::pack_f16x2(x, 0.0)),
            _ => isa::st_global_u16(row + 2 * i as u64, isa::pack_bf16x2(x, 0.0)),
        }
    }
}

impl Rows {
    /// Address of a row.
    #[inline(always)]
    pub(crate) fn at(&self, outer: u32, inner: u32) -> u64 {
        self.base + outer as u64 * self.outer + inner as u64 * self.inner
    }

    /// Address of row `i`, counted over both indices.
    #[inline(always)]
    pub(crate) fn flat(&self, i: u32) -> u64 {
        let (outer, inner) = if self.num_inner == 1 { (i, 0) } else { isa::div_rem(i, self.num_inner) };
        self.at(outer, inner)
    }
}

impl PageRows {
    /// Address of a row.
    #[inline(always)]
    pub(crate) fn at(&self, page: u32, head: u32, token: u32) -> u64 {
        self.base + page as u64 * self.page + head as u64 * self.head + token as u64 * self.token
    }
}

/// The sum over a half-warp, in all of its lanes.
#[inline(always)]
#[track_caller]
pub(crate) fn half_warp_sum(mut x: f32) -> f32 {
    for mask in [1, 2, 4, 8] {
        x += f32::from_bits(isa::shfl_bfly(x.to_bits(), mask));
    }
    x
}

/// `op` over all lanes of a CTA of at most 1024, in all of them. `at`: a word of shared memory per warp.
///
/// # Safety
/// The words are this call's own until the CTA's next barrier.
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn cta_reduce(mut x: u32, threads: u32, at: u32, op: impl Fn(u32, u32) -> u32) -> u32 {
    for mask in [1, 2, 4, 8, 16] {
        x = op(x, isa::shfl_bfly(x, mask));
    }
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    // SAFETY: the caller's promise.
    unsafe {
        if lane == 0 {
            isa::st_shared_1(at + 4 * warp, [x]);
        }
        isa::bar_sync();
        let mut all = isa::ld_shared_1(at)[0];
        for w in 1..threads / 32 {
            all = op(all, isa::ld_shared_1(at + 4 * w)[0]);
        }
        isa::bar_sync();
        all
    }
}
