//! Register arithmetic. Approximate instructions are modelled by exact ones; the reference's error bounds
//! are beside them.

#[cfg(target_arch = "nvptx64")]
use super::ptx;
#[cfg(not(target_arch = "nvptx64"))]
use half::{bf16, f16};

/// Two f16 in one register, the first in the low half.
pub type F16x2 = u32;

macro_rules! unary {
    ($(#[$doc:meta])* $name:ident, $text:literal, $model:expr) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(x: f32) -> f32 {
            #[cfg(target_arch = "nvptx64")]
            {
                let d: f32;
                ptx!(concat!($text, " {d}, {x};"), d = out(reg32) d, x = in(reg32) x);
                d
            }
            #[cfg(not(target_arch = "nvptx64"))]
            ($model)(x)
        }
    };
}

unary!(
    /// `ex2.approx.ftz.f32`: `2^x` within 2 ulp.
    ex2, "ex2.approx.ftz.f32", f32::exp2
);
unary!(
    /// `lg2.approx.f32`: `log2 x`, absolute error below 2^-22 for `x` in 0.5 to 2, else 2 ulp.
    lg2, "lg2.approx.f32", f32::log2
);
unary!(
    /// `rcp.approx.ftz.f32`: `1 / x` within 1 ulp.
    rcp, "rcp.approx.ftz.f32", |x: f32| 1.0 / x
);
unary!(
    /// `rsqrt.approx.f32`: `1 / sqrt(x)`, relative error below 2^-22.
    rsqrt, "rsqrt.approx.f32", |x: f32| 1.0 / x.sqrt()
);

/// The same number, of which the compiler knows nothing: what follows from it is computed where it is used, and
/// not kept in registers across a loop. No instruction.
#[inline(always)]
pub fn opaque(x: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let mut d = x;
        // SAFETY: nothing; not `pure`, so that it is not moved.
        unsafe { core::arch::asm!("/* {d} */", d = inout(reg32) d, options(nomem, nostack)) }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    x
}

/// As [`opaque`], of an address.
#[inline(always)]
pub fn opaque_address(x: u64) -> u64 {
    #[cfg(target_arch = "nvptx64")]
    {
        let mut d = x;
        // SAFETY: as in `opaque`.
        unsafe { core::arch::asm!("/* {d} */", d = inout(reg64) d, options(nomem, nostack)) }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    x
}

/// Holds what follows (volatile instructions, such as waits) back until `x`, which is never negative, is computed: the
/// assembler moves a wait up before arithmetic that was to run meanwhile, but not across a branch that depends on it.
#[inline(always)]
pub fn settle(x: f32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the branch is not taken.
    unsafe {
        core::arch::asm!("{{.reg .pred p; setp.lt.f32 p, {x}, 0f00000000; @p nanosleep.u32 1;}}", x = in(reg32) x, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    let _ = x;
}

/// `fma.rn.f32`
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: f32;
        ptx!("fma.rn.f32 {d}, {a}, {b}, {c};", d = out(reg32) d, a = in(reg32) a, b = in(reg32) b, c = in(reg32) c);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    a.mul_add(b, c)
}

/// `max.NaN.f32`: NaN where either is.
#[inline(always)]
pub fn max_nan(a: f32, b: f32) -> f32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: f32;
        ptx!("max.NaN.f32 {d}, {a}, {b};", d = out(reg32) d, a = in(reg32) a, b = in(reg32) b);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    if a.is_nan() || b.is_nan() { f32::NAN } else { a.max(b) }
}

/// `div.u32` and `rem.u32`; 0 and `a` for a divisor of 0, for a panic is not to be had.
#[inline(always)]
pub fn div_rem(a: u32, b: u32) -> (u32, u32) {
    let quotient = a.checked_div(b).unwrap_or(0);
    (quotient, a - quotient * b)
}

/// `div.u64` and `rem.u64`, as [`div_rem`].
#[inline(always)]
pub fn div_rem_u64(a: u64, b: u64) -> (u64, u64) {
    let quotient = a.checked_div(b).unwrap_or(0);
    (quotient, a - quotient * b)
}

/// `cvt.rn.f16x2.f32`: two f32 to f16, nearest even, `low` in the low half.
#[inline(always)]
pub fn pack_f16x2(low: f32, high: f32) -> F16x2 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        ptx!("cvt.rn.f16x2.f32 {d}, {h}, {l};", d = out(reg32) d, h = in(reg32) high, l = in(reg32) low);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    (f16::from_f32(low).to_bits() as u32 | (f16::from_f32(high).to_bits() as u32) << 16)
}

/// `cvt.rn.bf16x2.f32`: as [`pack_f16x2`].
#[inline(always)]
pub fn pack_bf16x2(low: f32, high: f32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        ptx!("cvt.rn.bf16x2.f32 {d}, {h}, {l};", d = out(reg32) d, h = in(reg32) high, l = in(reg32) low);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    (bf16::from_f32(low).to_bits() as u32 | (bf16::from_f32(high).to_bits() as u32) << 16)
}

/// `cvt.f32.f16` of both halves.
#[inline(always)]
pub fn f16x2_to_f32(x: F16x2) -> (f32, f32) {
    #[cfg(target_arch = "nvptx64")]
    {
        let (l, h): (f32, f32);
        ptx!("{{.reg .b16 a, b; mov.b32 {{a, b}}, {x}; cvt.f32.f16 {l}, a; cvt.f32.f16 {h}, b;}}",
            l = out(reg32) l, h = out(reg32) h, x = in(reg32) x);
        (l, h)
    }
    #[cfg(not(target_arch = "nvptx64"))]
    (f16::from_bits(x as u16).to_f32(), f16::from_bits((x >> 16) as u16).to_f32())
}

/// Both halves as f32: a bf16 is the upper half of one.
#[inline(always)]
pub fn bf16x2_to_f32(x: u32) -> (f32, f32) {
    (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000))
}

/// `fma.rn.f16x2`
#[inline(always)]
pub fn fma_f16x2(a: F16x2, b: F16x2, c: F16x2) -> F16x2 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        ptx!("fma.rn.f16x2 {d}, {a}, {b}, {c};", d = out(reg32) d, a = in(reg32) a, b = in(reg32) b, c = in(reg32) c);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    halves(|s| {
        // Exact in f64: 11-bit factors, and a sum of 41 bits at most.
        let [a, b, c] = [a, b, c].map(|x| f16::from_bits((x >> s) as u16).to_f64());
        f16::from_f64(a * b + c)
    })
}

/// `sub.rn.f16x2`
#[inline(always)]
pub fn sub_f16x2(a: F16x2, b: F16x2) -> F16x2 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        ptx!("sub.rn.f16x2 {d}, {a}, {b};", d = out(reg32) d, a = in(reg32) a, b = in(reg32) b);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    halves(|s| {
        let [a, b] = [a, b].map(|x| f16::from_bits((x >> s) as u16).to_f64());
        f16::from_f64(a - b)
    })
}

/// `mul.rn.f16x2`
#[inline(always)]
pub fn mul_f16x2(a: F16x2, b: F16x2) -> F16x2 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        ptx!("mul.rn.f16x2 {d}, {a}, {b};", d = out(reg32) d, a = in(reg32) a, b = in(reg32) b);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    halves(|s| {
        let [a, b] = [a, b].map(|x| f16::from_bits((x >> s) as u16).to_f64());
        f16::from_f64(a * b)
    })
}

/// `prmt.b32`: byte `i` is the one of `a` (0 to 3) or `b` (4 to 7) that nibble `i` of `selector`, below 8, names.
#[inline(always)]
pub fn prmt(a: u32, b: u32, selector: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        ptx!("prmt.b32 {d}, {a}, {b}, {s};", d = out(reg32) d, a = in(reg32) a, b = in(reg32) b, s = in(reg32) selector);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let bytes = (a as u64 | (b as u64) << 32).to_le_bytes();
        u32::from_le_bytes(core::array::from_fn(|i| bytes[(selector >> (4 * i) & 7) as usize]))
    }
}

#[cfg(not(target_arch = "nvptx64"))]
fn halves(f: impl Fn(u32) -> f16) -> F16x2 {
    f(0).to_bits() as u32 | (f(16).to_bits() as u32) << 16
}
