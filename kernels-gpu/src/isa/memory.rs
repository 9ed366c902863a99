//! Loads, stores and atomics. Shared addresses are 32-bit offsets in the shared space, global ones 64-bit.
//!
//! # Safety
//! Of every function here: the address is aligned to the access and names memory of its kind that is alive
//! (shared: of this CTA) and, for a load, written; no other lane writes it without order.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

macro_rules! load {
    ($(#[$doc:meta])* $name:ident, $text:literal, $addr:ty, $areg:ident, $read:path, [$($r:ident),+]) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// See the module.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn $name(at: $addr) -> [u32; [$(stringify!($r)),+].len()] {
            #[cfg(target_arch = "nvptx64")]
            {
                $(let $r: u32;)+
                // SAFETY: the caller's promise.
                unsafe { core::arch::asm!($text, $($r = out(reg32) $r,)+ at = in($areg) at, options(nostack, readonly)) }
                [$($r),+]
            }
            #[cfg(not(target_arch = "nvptx64"))]
            $read(at)
        }
    };
}

macro_rules! store {
    ($(#[$doc:meta])* $name:ident, $text:literal, $addr:ty, $areg:ident, $write:path, [$($r:ident),+]) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// See the module.
        #[inline(always)]
        #[track_caller]
        pub unsafe fn $name(at: $addr, x: [u32; [$(stringify!($r)),+].len()]) {
            #[cfg(target_arch = "nvptx64")]
            {
                let [$($r),+] = x;
                // SAFETY: the caller's promise.
                unsafe { core::arch::asm!($text, at = in($areg) at, $($r = in(reg32) $r,)+ options(nostack)) }
            }
            #[cfg(not(target_arch = "nvptx64"))]
            $write(at, x);
        }
    };
}

load!(/// `ld.shared.b32`
    ld_shared_1, "ld.shared.b32 {a}, [{at}];", u32, reg32, sim::read_shared, [a]);
load!(/// `ld.shared.v2.b32`
    ld_shared_2, "ld.shared.v2.b32 {{{a}, {b}}}, [{at}];", u32, reg32, sim::read_shared, [a, b]);
load!(/// `ld.shared.v4.b32`
    ld_shared_4, "ld.shared.v4.b32 {{{a}, {b}, {c}, {d}}}, [{at}];", u32, reg32, sim::read_shared, [a, b, c, d]);
store!(/// `st.shared.b32`
    st_shared_1, "st.shared.b32 [{at}], {a};", u32, reg32, sim::write_shared, [a]);
store!(/// `st.shared.v2.b32`
    st_shared_2, "st.shared.v2.b32 [{at}], {{{a}, {b}}};", u32, reg32, sim::write_shared, [a, b]);
store!(/// `st.shared.v4.b32`
    st_shared_4, "st.shared.v4.b32 [{at}], {{{a}, {b}, {c}, {d}}};", u32, reg32, sim::write_shared, [a, b, c, d]);
load!(/// `ld.global.b32`
    ld_global_1, "ld.global.b32 {a}, [{at}];", u64, reg64, sim::read_global, [a]);
load!(/// `ld.global.v2.b32`
    ld_global_2, "ld.global.v2.b32 {{{a}, {b}}}, [{at}];", u64, reg64, sim::read_global, [a, b]);
load!(/// `ld.global.v4.b32`
    ld_global_4, "ld.global.v4.b32 {{{a}, {b}, {c}, {d}}}, [{at}];", u64, reg64, sim::read_global, [a, b, c, d]);
store!(/// `st.global.b32`
    st_global_1, "st.global.b32 [{at}], {a};", u64, reg64, sim::write_global, [a]);
store!(/// `st.global.v2.b32`
    st_global_2, "st.global.v2.b32 [{at}], {{{a}, {b}}};", u64, reg64, sim::write_global, [a, b]);
store!(/// `st.global.v4.b32`
    st_global_4, "st.global.v4.b32 [{at}], {{{a}, {b}, {c}, {d}}};", u64, reg64, sim::write_global, [a, b, c, d]);

/// `ld.global.nc.v2.b32`: what no launch writes while it runs. The compiler may leave it out, or do it again.
///
/// # Safety
/// See the module; nobody writes it before the launch ends.
#[inline(always)]
#[track_caller]
pub unsafe fn ld_constant_2(at: u64) -> [u32; 2] {
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b): (u32, u32);
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("ld.global.nc.v2.b32 {{{a}, {b}}}, [{at}];",
                a = out(reg32) a, b = out(reg32) b, at = in(reg64) at, options(pure, nomem, nostack))
        }
        [a, b]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::read_global(at)
}

/// `ld.global.u16`
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn ld_global_u16(at: u64) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("ld.global.u16 {d}, [{at}];", d = out(reg32) d, at = in(reg64) at, options(nostack, readonly))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::read_global_u16(at)
}

/// `st.global.u16`: the low half of `x`.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn st_global_u16(at: u64, x: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("st.global.u16 [{at}], {x};", at = in(reg64) at, x = in(reg32) x, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::write_global_u16(at, x);
}

/// `atom.shared.add.u32`: gives the old value.
///
/// # Safety
/// See the module; other lanes may add too.
#[inline(always)]
#[track_caller]
pub unsafe fn atom_add_shared(at: u32, x: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("atom.shared.add.u32 {d}, [{at}], {x};", d = out(reg32) d, at = in(reg32) at, x = in(reg32) x, options(nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::atom_add_shared(at, x)
}

/// `atom.shared.add.u64`, the old value left.
///
/// # Safety
/// As [`atom_add_shared`].
#[inline(always)]
#[track_caller]
pub unsafe fn atom_add_shared_u64(at: u32, x: u64) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("{{.reg .b64 d; atom.shared.add.u64 d, [{at}], {x};}}", at = in(reg32) at, x = in(reg64) x, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::atom_add_shared_u64(at, x);
}

/// `atom.global.add.u32`: gives the old value.
///
/// # Safety
/// See the module; other lanes and CTAs may add too.
#[inline(always)]
#[track_caller]
pub unsafe fn atom_add_global(at: u64, x: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("atom.global.add.u32 {d}, [{at}], {x};", d = out(reg32) d, at = in(reg64) at, x = in(reg32) x, options(nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::atom_global(at, |old| old.wrapping_add(x))
}

/// `atom.global.inc.u32`: gives the old value, which becomes 0 if it is `most` or more, else one more.
///
/// # Safety
/// As [`atom_add_global`].
#[inline(always)]
#[track_caller]
pub unsafe fn atom_inc_global(at: u64, most: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("atom.global.inc.u32 {d}, [{at}], {x};", d = out(reg32) d, at = in(reg64) at, x = in(reg32) most, options(nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::atom_global(at, |old| if old >= most { 0 } else { old + 1 })
}

/// `atom.acq_rel.gpu.global.inc.u32`: as [`atom_inc_global`]; what the CTA did before a barrier before it has happened for
/// those who come to the word later, after a barrier of their own.
///
/// # Safety
/// As [`atom_add_global`].
#[inline(always)]
#[track_caller]
pub unsafe fn atom_inc_global_acq_rel(at: u64, most: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!("atom.acq_rel.gpu.global.inc.u32 {d}, [{at}], {x};", d = out(reg32) d, at = in(reg64) at, x = in(reg32) most, options(nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::atom_global_acq_rel(at, |old| if old >= most { 0 } else { old + 1 })
}

/// The first address of the CTA's dynamic shared memory, a multiple of 1024.
#[inline(always)]
pub fn shared_base() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        super::ptx!("mov.u32 {d}, dynsmem;", d = out(reg32) d);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::SHARED_BASE
}

#[cfg(target_arch = "nvptx64")]
core::arch::global_asm!(".extern .shared .align 1024 .b8 dynsmem[];");
