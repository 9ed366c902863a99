//! One generic body, several instruction sets: [`Simd`] is a vector of f32 lanes, a [`Task`] is written
//! once over it, and [`SimdLevel::run`] compiles the task for each set and picks one at run time.
//!
//! Per-lane arithmetic is the same on every set that has FMA, so results differ between sets only
//! where lanes are reduced.
#![allow(unsafe_op_in_unsafe_fn)] // every function here is an intrinsic behind the contract of `Simd`

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use ferroflash_kernels::abi::INT4_SHIFTS;
pub use portable::Portable;

/// An instruction set that this build can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimdLevel {
    /// Portable Rust, whatever the compiler makes of it.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// NEON.
    Neon,
}

impl SimdLevel {
    /// The best set of this machine.
    pub fn detect() -> Self {
        static LEVEL: OnceLock<SimdLevel> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            [SimdLevel::Avx512, SimdLevel::Avx2, SimdLevel::Neon]
                .into_iter()
                .find(|level| level.is_available())
                .unwrap_or(SimdLevel::Portable)
        })
    }

    /// Whether this machine has the set.
    pub fn is_available(self) -> bool {
        match self {
            SimdLevel::Portable => true,
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            SimdLevel::Avx512 => {
                SimdLevel::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "aarch64")]
            SimdLevel::Neon => true,
            #[allow(unreachable_patterns)] // the sets of the other architectures
            _ => false,
        }
    }

    /// Runs a task compiled for this set; the portable one where the machine lacks it.
    #[inline]
    pub fn run<T: Task>(self, task: T) -> T::Out {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the machine has the features that the function is compiled for.
            SimdLevel::Avx512 if self.is_available() => unsafe { x86::run_avx512(task) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            SimdLevel::Avx2 if self.is_available() => unsafe { x86::run_avx2(task) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is part of every aarch64 target.
            SimdLevel::Neon => unsafe { task.run::<neon::Neon>() },
            // SAFETY: the portable set needs nothing.
            _ => unsafe { task.run::<Portable>() },
        }
    }
}

/// Work written once over [`Simd`].
pub trait Task {
    /// What it gives.
    type Out;

    /// Does the work. Implementations are `#[inline(always)]`, and so is all that they call, so that
    /// the intrinsics are compiled into a function that has their features.
    ///
    /// # Safety
    /// The machine has the instruction set of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// A vector of f32 lanes and what the kernels do with it.
///
/// # Safety
/// Every method needs the machine to have the set; loads and stores need `LANES` valid elements at the
/// pointer (any alignment).
pub unsafe trait Simd: Copy + 'static {
    /// The vector.
    type V: Copy;
    /// As many vectors as lanes.
    type Square: Copy + AsRef<[Self::V]>;
    /// f32 lanes.
    const LANES: usize;
    /// Vectors in a row of a matrix tile: with [`Simd::TILE_ROWS`] rows they fit in the registers.
    const TILE_VECS: usize;
    /// Rows of a matrix tile.
    const TILE_ROWS: usize = 6;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    /// Rounds to nearest even.
    unsafe fn store_f16(p: *mut u16, v: Self::V);
    /// Rounds to nearest even, NaN stays NaN.
    unsafe fn store_bf16(p: *mut u16, v: Self::V);
    /// Bytes as numbers from -128 to 127.
    unsafe fn load_i8(p: *const i8) -> Self::V;
    /// `2 * LANES` nibbles of `LANES` bytes as numbers 0 to 15: the low ones, then the high ones.
    unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V);
    /// int4 codes of channels `at..at + LANES` as numbers 0 to 15, from words of eight in [`INT4_SHIFTS`]' order; `at` is a
    /// multiple of `LANES`.
    unsafe fn load_int4(words: *const u32, at: usize) -> Self::V;
    /// e4m3 as numbers.
    unsafe fn load_fp8(p: *const u8) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the set has FMA.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where one is NaN on x86.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` of integers from -127 (gives 0) to 127.
    unsafe fn pow2i(n: Self::V) -> Self::V;
    unsafe fn reduce_add(a: Self::V) -> f32;
    unsafe fn reduce_max(a: Self::V) -> f32;
    /// Lanes of two f16 each: the low halves and the high halves as f32.
    unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V);
    /// Lanes of two bf16 each: the low halves and the high halves as f32.
    unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V);
    /// Rows to columns; only moves bits.
    unsafe fn transpose(square: Self::Square) -> Self::Square;
    /// A square of vectors.
    unsafe fn square(row: impl FnMut(usize) -> Self::V) -> Self::Square;

    /// Asks for the cache line of `p`, which need not be valid.
    #[inline(always)]
    fn prefetch(p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch of any address is harmless, and SSE is part of x86-64.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast())
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }

    /// `2^x` with a relative error below 2^-23; 0 below -126.5, also for `-inf`; NaN stays NaN.
    #[inline(always)]
    unsafe fn exp2(x: Self::V) -> Self::V {
        let x = Self::min(Self::splat(127.0), Self::max(Self::splat(-127.0), x));
        let n = Self::round(x);
        let f = Self::sub(x, n);
        // Minimax for 2^f on [-0.5, 0.5], relative error 2e-9 before rounding; 2^0 is exactly 1.
        let mut p = Self::splat(1.535_336_2e-4);
        for c in [1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0] {
            p = Self::fma(p, f, Self::splat(c));
        }
        Self::mul(p, Self::pow2i(n))
    }

    /// `tanh(x)`.
    #[inline(always)]
    unsafe fn tanh(x: Self::V) -> Self::V {
        // 1 - 2 / (e^2x + 1), whose absolute error near 0 is 6e-8; scores are compared absolutely.
        let e = Self::exp2(Self::mul(x, Self::splat(2.0 * std::f32::consts::LOG2_E)));
        let two = Self::splat(2.0);
        Self::sub(Self::splat(1.0), Self::div(two, Self::add(e, Self::splat(1.0))))
    }
}

#[cfg(test)]
mod tests {
    use ferroflash_kernels::abi::codec::fp8_value;

    use super::*;

    /// All codes of fp8, and four bits of these bytes.
    struct Codes;

    impl Task for Codes {
        type Out = (Vec<f32>, Vec<f32>);

        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> Self::Out {
            let bytes: [u8; 256] = std::array::from_fn(|i| i as u8);
            let (mut fp8, mut int4) = (vec![0.0; 256], vec![0.0; 512]);
            for i in (0..256).step_by(S::LANES) {
                S::store(fp8.as_mut_ptr().add(i), S::load_fp8(bytes.as_ptr().add(i)));
            }
            for i in (0..512).step_by(S::LANES) {
                S::store(int4.as_mut_ptr().add(i), S::load_int4(bytes.as_ptr().cast(), i));
            }
            (fp8, int4)
        }
    }

    #[test]
    fn every_set_reads_codes_alike() {
        for level in [SimdLevel::Portable, SimdLevel::Avx2, SimdLevel::Avx512, SimdLevel::Neon] {
            if !level.is_available() {
                continue;
            }
            let (fp8, int4) = level.run(Codes);
            for (code, x) in fp8.iter().enumerate() {
                assert_eq!(x.to_bits(), fp8_value(code as u32).to_bits(), "{code:#x} {level:?}");
            }
            for (channel, x) in int4.iter().enumerate() {
                let word = u32::from_le_bytes(std::array::from_fn(|i| (channel / 8 * 4 + i) as u8));
                assert_eq!(*x, (word >> INT4_SHIFTS[channel % 8] & 15) as f32, "{channel} {level:?}");
            }
        }
    }
}
