//! Plain Rust, whatever the compiler makes of it.
#![allow(unsafe_op_in_unsafe_fn)]

use ferroflash_kernels::abi::codec::fp8_value;

use super::{INT4_SHIFTS, Simd};

/// Eight lanes of plain Rust.
#[derive(Clone, Copy)]
pub struct Portable;

// SAFETY: no instruction set is needed; pointers are read and written for `LANES` elements only.
unsafe impl Simd for Portable {
    type V = [f32; 8];
    type Square = [[f32; 8]; 8];
    const LANES: usize = 8;
    const TILE_VECS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        p.cast::<[f32; 8]>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        p.cast::<[f32; 8]>().write_unaligned(v)
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::V {
        p.cast::<[u16; 8]>().read_unaligned().map(|x| half::f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Self::V {
        p.cast::<[u16; 8]>().read_unaligned().map(|x| f32::from_bits((x as u32) << 16))
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: Self::V) {
        p.cast::<[u16; 8]>().write_unaligned(v.map(|x| half::f16::from_f32(x).to_bits()))
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, v: Self::V) {
        p.cast::<[u16; 8]>().write_unaligned(v.map(|x| half::bf16::from_f32(x).to_bits()))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::V {
        p.cast::<[i8; 8]>().read_unaligned().map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn load_nibbles(p: *const u8) -> (Self::V, Self::V) {
        let bytes = p.cast::<[u8; 8]>().read_unaligned();
        (bytes.map(|x| (x & 15) as f32), bytes.map(|x| (x >> 4) as f32))
    }
    #[inline(always)]
    unsafe fn load_int4(words: *const u32, at: usize) -> Self::V {
        let word = words.add(at / 8).read_unaligned();
        INT4_SHIFTS.map(|shift| (word >> shift & 15) as f32)
    }
    #[inline(always)]
    unsafe fn load_fp8(p: *const u8) -> Self::V {
        p.cast::<[u8; 8]>().read_unaligned().map(|code| fp8_value(code as u32))
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn pow2i(n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (b[0] + b[2]) + (b[1] + b[3])
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn split_f16(pairs: Self::V) -> (Self::V, Self::V) {
        let half = |shift: u32| pairs.map(|x| half::f16::from_bits((x.to_bits() >> shift) as u16).to_f32());
        (half(0), half(16))
    }
    #[inline(always)]
    unsafe fn split_bf16(pairs: Self::V) -> (Self::V, Self::V) {
        let low = pairs.map(|x| f32::from_bits(x.to_bits() << 16));
        (low, pairs.map(|x| f32::from_bits(x.to_bits() & 0xffff_0000)))
    }
    #[inline(always)]
    unsafe fn transpose(square: Self::Square) -> Self::Square {
        std::array::from_fn(|i| std::array::from_fn(|j| square[j][i]))
    }
    #[inline(always)]
    unsafe fn square(row: impl FnMut(usize) -> Self::V) -> Self::Square {
        std::array::from_fn(row)
    }
}
