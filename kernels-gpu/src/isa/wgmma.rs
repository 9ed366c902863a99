//! `wgmma`: products of a warpgroup (four warps that begin at a multiple of four), `D[64, N] += A[64, 16] B[16, N]`, with
//! B, and A too unless it stands in registers, read from shared memory by the async proxy while the lanes go on.
//!
//! A lane's accumulators are the C fragments of its warp's 16 rows, `T = N / 8` times eight columns; four registers
//! of A are an `mma.sync` A fragment. Until [`wgmma_wait`] has given accumulators back, their registers hold
//! nothing that may be looked at (`tile::wgmma::Pending` makes a type of that).
//!
//! # Safety
//! Of every product: all lanes of the warpgroup come here with the same descriptors; what they describe is written,
//! visible to the async proxy, and not overwritten before the product is waited for.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// `wgmma.fence`: before the first product, and before one whose registers anything else has written since.
#[inline(always)]
#[track_caller]
pub fn wgmma_fence() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("wgmma.fence.sync.aligned;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::wgmma_fence();
}

/// `wgmma.commit_group`: the products since the last one are a group.
#[inline(always)]
#[track_caller]
pub fn wgmma_commit() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("wgmma.commit_group.sync.aligned;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::wgmma_commit();
}

/// A name for the registers of `d`: `T` as the length that a shape's arm has.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn registers<const T: usize, const N: usize>(d: &mut [[f32; 4]; T]) -> &mut [[f32; 4]; N] {
    if T != N {
        // The arms of other shapes are never taken.
        unreachable();
    }
    // SAFETY: T is N.
    unsafe { &mut *core::ptr::from_mut(d).cast() }
}

/// Where a shape is not among those of this file.
#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn unreachable() -> ! {
    // SAFETY: callers are behind a test of constants that fails.
    unsafe { core::hint::unreachable_unchecked() }
}

macro_rules! shapes {
    ($($n:literal $t:literal [$($i:literal)*];)*) => {
        /// Whether there is a product with `8 t` columns.
        const fn is_shape(t: usize) -> bool {
            matches!(t, $($t)|*)
        }

        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn from_shared<const T: usize, const BF16: bool, const TRANS_A: u32, const TRANS_B: u32>(d: &mut [[f32; 4]; T], a: u64, b: u64) {
            // SAFETY: the caller's promise.
            unsafe {
                match (T, BF16) {
                    $(
                        ($t, false) => shapes!(@ss "f16", $n, registers::<T, $t>(d), a, b, TRANS_A, TRANS_B, [$($i)*]),
                        ($t, true) => shapes!(@ss "bf16", $n, registers::<T, $t>(d), a, b, TRANS_A, TRANS_B, [$($i)*]),
                    )*
                    _ => unreachable(),
                }
            }
        }

        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn first_from_shared<const T: usize, const BF16: bool, const TRANS_A: u32, const TRANS_B: u32>(a: u64, b: u64) -> [[f32; 4]; T] {
            let mut out = core::mem::MaybeUninit::<[[f32; 4]; T]>::uninit();
            // SAFETY: the caller's promise; the arm writes all of it.
            unsafe {
                match (T, BF16) {
                    $(
                        ($t, false) => *out.as_mut_ptr().cast::<[[f32; 4]; $t]>() = shapes!(@first "f16", $n, a, b, TRANS_A, TRANS_B, [$($i)*]),
                        ($t, true) => *out.as_mut_ptr().cast::<[[f32; 4]; $t]>() = shapes!(@first "bf16", $n, a, b, TRANS_A, TRANS_B, [$($i)*]),
                    )*
                    _ => unreachable(),
                }
                out.assume_init()
            }
        }

        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        unsafe fn from_registers<const T: usize, const BF16: bool, const TRANS_B: u32>(d: &mut [[f32; 4]; T], a: [u32; 4], b: u64) {
            // SAFETY: the caller's promise.
            unsafe {
                match (T, BF16) {
                    $(
                        ($t, false) => shapes!(@rs "f16", $n, registers::<T, $t>(d), a, b, TRANS_B, [$($i)*]),
                        ($t, true) => shapes!(@rs "bf16", $n, registers::<T, $t>(d), a, b, TRANS_B, [$($i)*]),
                    )*
                    _ => unreachable(),
                }
            }
        }

        #[cfg(target_arch = "nvptx64")]
        #[inline(always)]
        fn wait<const T: usize, const PENDING: u32>(d: &mut [[f32; 4]; T]) {
            match T {
                $($t => shapes!(@wait registers::<T, $t>(d), PENDING, [$($i)*]),)*
                _ => unreachable(),
            }
        }
    };
    (@ss $ty:literal, $n:literal, $d:expr, $a:expr, $b:expr, $ta:expr, $tb:expr, [$($i:literal)*]) => {{
        let d = $d;
        core::arch::asm!(
            concat!("{{.reg .pred p; setp.ne.u32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $ty, ".", $ty, " {{{0}", $(", {", $i, "}",)* "}}, {a}, {b}, p, 1, 1, {ta}, {tb};}}"),
            inout(reg32) d[0][0], $(inout(reg32) d[$i / 4][$i % 4],)*
            a = in(reg64) $a, b = in(reg64) $b, ta = const $ta, tb = const $tb, options(nostack))
    }};
    (@first $ty:literal, $n:literal, $a:expr, $b:expr, $ta:expr, $tb:expr, [$($i:literal)*]) => {{
        let mut d = [[0f32; 4]; $n / 8];
        core::arch::asm!(
            concat!("{{.reg .pred p; setp.ne.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $ty, ".", $ty, " {{{0}", $(", {", $i, "}",)* "}}, {a}, {b}, p, 1, 1, {ta}, {tb};}}"),
            out(reg32) d[0][0], $(out(reg32) d[$i / 4][$i % 4],)*
            a = in(reg64) $a, b = in(reg64) $b, ta = const $ta, tb = const $tb, options(nostack));
        d
    }};
    (@rs $ty:literal, $n:literal, $d:expr, $a:expr, $b:expr, $tb:expr, [$($i:literal)*]) => {{
        let d = $d;
        core::arch::asm!(
            concat!("{{.reg .pred p; setp.ne.u32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n", $n, "k16.f32.", $ty, ".", $ty, " {{{0}", $(", {", $i, "}",)* "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, p, 1, 1, {tb};}}"),
            inout(reg32) d[0][0], $(inout(reg32) d[$i / 4][$i % 4],)*
            a0 = in(reg32) $a[0], a1 = in(reg32) $a[1], a2 = in(reg32) $a[2], a3 = in(reg32) $a[3],
            b = in(reg64) $b, tb = const $tb, options(nostack))
    }};
    (@wait $d:expr, $pending:expr, [$($i:literal)*]) => {{
        let d = $d;
        // SAFETY: registers only; they are named so that nothing that uses them moves before the wait.
        unsafe {
            core::arch::asm!(
                concat!("wgmma.wait_group.sync.aligned {n}; /* {0}", $(" {", $i, "}",)* " */"),
                inout(reg32) d[0][0], $(inout(reg32) d[$i / 4][$i % 4],)* n = const $pending, options(nostack))
        }
    }};
}

shapes! {
    64 8 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31];
    80 10 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39];
    96 12 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47];
    112 14 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55];
    128 16 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63];
    144 18 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71];
    160 20 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79];
    176 22 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87];
    192 24 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95];
    256 32 [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64 65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95 96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119 120 121 122 123 124 125 126 127];
}

/// `wgmma.mma_async`: `D += A B` from shared memory. `TRANS_A`, `TRANS_B`: 0 where the operand's rows (A) or columns (B)
/// run along k in memory, 1 where they run along m or n.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma<const T: usize, const BF16: bool, const TRANS_A: u32, const TRANS_B: u32>(
    d: &mut [[f32; 4]; T],
    a: u64,
    b: u64,
) {
    const { assert!(is_shape(T)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        from_shared::<T, BF16, TRANS_A, TRANS_B>(d, a, b)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::wgmma(true, d, sim::A::Shared(a, TRANS_A), (b, TRANS_B), BF16);
}

/// [`wgmma`] with `D = A B`: accumulators need not be set to zero before.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_first<const T: usize, const BF16: bool, const TRANS_A: u32, const TRANS_B: u32>(
    a: u64,
    b: u64,
) -> [[f32; 4]; T] {
    const { assert!(is_shape(T)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        first_from_shared::<T, BF16, TRANS_A, TRANS_B>(a, b)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let mut d = [[0.0; 4]; T];
        sim::wgmma(false, &mut d, sim::A::Shared(a, TRANS_A), (b, TRANS_B), BF16);
        d
    }
}

/// [`wgmma`] with A in registers.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_registers<const T: usize, const BF16: bool, const TRANS_B: u32>(
    d: &mut [[f32; 4]; T],
    a: [u32; 4],
    b: u64,
) {
    const { assert!(is_shape(T)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        from_registers::<T, BF16, TRANS_B>(d, a, b)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::wgmma(true, d, sim::A::Registers(a), (b, TRANS_B), BF16);
}

/// `wgmma.wait_group PENDING`: all but the newest `PENDING` groups are complete; `d`, of such a group, holds results.
#[inline(always)]
#[track_caller]
pub fn wgmma_wait<const T: usize, const PENDING: u32>(d: &mut [[f32; 4]; T]) {
    const { assert!(is_shape(T)) };
    #[cfg(target_arch = "nvptx64")]
    wait::<T, PENDING>(d);
    #[cfg(not(target_arch = "nvptx64"))]
    sim::wgmma_wait(d, PENDING);
}
