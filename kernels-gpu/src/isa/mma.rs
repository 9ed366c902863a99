//! Tensor-core products and the loads that feed them. Which lane holds which element is in `tile::fragment`.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

macro_rules! mma {
    ($(#[$doc:meta])* $name:ident, $text:literal, $value:path) => {
        $(#[$doc])*
        #[inline(always)]
        #[track_caller]
        pub fn $name(d: &mut [f32; 4], a: [u32; 4], b: [u32; 2]) {
            #[cfg(target_arch = "nvptx64")]
            // SAFETY: registers only.
            unsafe {
                core::arch::asm!(
                    concat!("mma.sync.aligned.m16n8k16.row.col.f32.", $text, ".", $text, ".f32 {{{d0}, {d1}, {d2}, {d3}}}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, {{{d0}, {d1}, {d2}, {d3}}};"),
                    d0 = inout(reg32) d[0], d1 = inout(reg32) d[1], d2 = inout(reg32) d[2], d3 = inout(reg32) d[3],
                    a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                    b0 = in(reg32) b[0], b1 = in(reg32) b[1], options(pure, nomem, nostack))
            }
            #[cfg(not(target_arch = "nvptx64"))]
            {
                let c = d.map(f32::to_bits);
                let args = [a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3]];
                *d = sim::collective(concat!("mma.", $text), &args, |w| sim::mma_m16n8k16(w, $value)).map(f32::from_bits);
            }
        }
    };
}

mma!(
    /// `mma.sync.m16n8k16.f32.f16`: `D[16, 8] += A[16, 16] B[16, 8]`.
    mma_f16, "f16", sim::f16_value
);
mma!(
    /// `mma.sync.m16n8k16.f32.bf16`: as [`mma_f16`].
    mma_bf16, "bf16", sim::bf16_value
);

/// `ldmatrix.x4.m8n8.b16`: four 8x8 matrices of 16-bit elements. Lane `8 i + r` names row `r` of matrix `i`
/// (16 bytes); each lane gets elements `2 (lane % 4)`, `+ 1` of row `lane / 4` of each.
///
/// # Safety
/// `row` is 16 written, aligned bytes of shared memory.
#[inline(always)]
#[track_caller]
pub unsafe fn ldmatrix_x4(row: u32) -> [u32; 4] {
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{a}, {b}, {c}, {d}}}, [{row}];",
                a = out(reg32) a, b = out(reg32) b, c = out(reg32) c, d = out(reg32) d, row = in(reg32) row,
                options(nostack, readonly))
        }
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::collective("ldmatrix.x4", &[row], |w| sim::ldmatrix_x4(w, false))
}

/// `ldmatrix.x4.trans`: as [`ldmatrix_x4`], each matrix transposed: a lane gets elements `lane / 4` of rows
/// `2 (lane % 4)` and `+ 1`.
///
/// # Safety
/// As [`ldmatrix_x4`].
#[inline(always)]
#[track_caller]
pub unsafe fn ldmatrix_x4_trans(row: u32) -> [u32; 4] {
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b, c, d): (u32, u32, u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{a}, {b}, {c}, {d}}}, [{row}];",
                a = out(reg32) a, b = out(reg32) b, c = out(reg32) c, d = out(reg32) d, row = in(reg32) row,
                options(nostack, readonly))
        }
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::collective("ldmatrix.x4.trans", &[row], |w| sim::ldmatrix_x4(w, true))
}

/// `stmatrix.x4.m8n8.b16`: [`ldmatrix_x4`] the other way: lane `8 i + r` names row `r` of matrix `i`.
///
/// # Safety
/// `row` is 16 aligned bytes of shared memory that nobody else touches.
#[inline(always)]
#[track_caller]
pub unsafe fn stmatrix_x4(row: u32, x: [u32; 4]) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("stmatrix.sync.aligned.m8n8.x4.shared.b16 [{row}], {{{a}, {b}, {c}, {d}}};",
            row = in(reg32) row, a = in(reg32) x[0], b = in(reg32) x[1], c = in(reg32) x[2], d = in(reg32) x[3],
            options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        sim::collective("stmatrix.x4", &[row, x[0], x[1], x[2], x[3]], sim::stmatrix_x4);
    }
}
