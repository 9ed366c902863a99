//! Bulk copies between global and shared memory by the copy engine (TMA): whole boxes of tensors that a
//! [`TensorMap`](crate::abi::TensorMap) describes, or runs of bytes. They belong to the async proxy.
//!
//! # Safety
//! Of every function here: `shared` is aligned to 128 bytes (boxes swizzled by 128 bytes: 1024) or, for runs, to 16,
//! and holds what is copied; nobody else uses it until the copy is waited for; `map` is the address of a tensor
//! map in parameter, constant or global memory; `barrier` holds an initialised mbarrier of this CTA, visible to the
//! async proxy.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// How long a copy's lines should stay in L2: a policy as `createpolicy.fractional` makes it, for all of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Keep(u64);

impl Keep {
    /// What is read once.
    pub const FIRST_OUT: Keep = Keep(0x12f0_0000_0000_0000);
    /// What other CTAs will read too.
    pub const LAST_OUT: Keep = Keep(0x14f0_0000_0000_0000);
}

/// `cp.async.bulk.tensor.Dd.shared::cluster.global`: the box at `at` (innermost coordinate first), zeros where it lies
/// outside the tensor; all its bytes count at `barrier`.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn tma_load<const D: usize>(shared: u32, map: u64, at: [i32; D], barrier: u32, keep: Keep) {
    const { assert!(D >= 2 && D <= 5) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            2 => {
                core::arch::asm!("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{to}], [{map}, {{{c0}, {c1}}}], [{bar}], {keep};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], bar = in(reg32) barrier, keep = in(reg64) keep.0, options(nostack))
            }
            3 => {
                core::arch::asm!("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{to}], [{map}, {{{c0}, {c1}, {c2}}}], [{bar}], {keep};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], bar = in(reg32) barrier, keep = in(reg64) keep.0, options(nostack))
            }
            4 => {
                core::arch::asm!("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{to}], [{map}, {{{c0}, {c1}, {c2}, {c3}}}], [{bar}], {keep};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], c3 = in(reg32) at[3], bar = in(reg32) barrier, keep = in(reg64) keep.0, options(nostack))
            }
            _ => {
                core::arch::asm!("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{to}], [{map}, {{{c0}, {c1}, {c2}, {c3}, {c4}}}], [{bar}], {keep};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], c3 = in(reg32) at[3], c4 = in(reg32) at[4], bar = in(reg32) barrier, keep = in(reg64) keep.0, options(nostack))
            }
        }
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        let _ = keep;
        sim::tma_load(shared, map, &at, barrier, None);
    }
}

/// [`tma_load`] into the same place of every CTA of the cluster whose bit is set in `ctas`, and its bytes count at the
/// barrier there.
///
/// # Safety
/// See the module, for each of these CTAs.
#[inline(always)]
#[track_caller]
pub unsafe fn tma_load_multicast<const D: usize>(
    shared: u32,
    map: u64,
    at: [i32; D],
    barrier: u32,
    ctas: u16,
) {
    const { assert!(D >= 2 && D <= 5) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            2 => {
                core::arch::asm!("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [{to}], [{map}, {{{c0}, {c1}}}], [{bar}], {ctas};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], bar = in(reg32) barrier, ctas = in(reg16) ctas, options(nostack))
            }
            3 => {
                core::arch::asm!("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [{to}], [{map}, {{{c0}, {c1}, {c2}}}], [{bar}], {ctas};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], bar = in(reg32) barrier, ctas = in(reg16) ctas, options(nostack))
            }
            4 => {
                core::arch::asm!("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [{to}], [{map}, {{{c0}, {c1}, {c2}, {c3}}}], [{bar}], {ctas};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], c3 = in(reg32) at[3], bar = in(reg32) barrier, ctas = in(reg16) ctas, options(nostack))
            }
            _ => {
                core::arch::asm!("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [{to}], [{map}, {{{c0}, {c1}, {c2}, {c3}, {c4}}}], [{bar}], {ctas};", to = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], c3 = in(reg32) at[3], c4 = in(reg32) at[4], bar = in(reg32) barrier, ctas = in(reg16) ctas, options(nostack))
            }
        }
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::tma_load(shared, map, &at, barrier, Some(ctas));
}

/// `cp.async.bulk.tensor.Dd.global.shared::cta`: writes the box at `at`, as far as it lies in the tensor; part of the
/// lane's open bulk group.
///
/// # Safety
/// See the module; what ordinary stores wrote there is fenced.
#[inline(always)]
#[track_caller]
pub unsafe fn tma_store<const D: usize>(map: u64, at: [i32; D], shared: u32) {
    const { assert!(D >= 2 && D <= 5) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        match D {
            2 => {
                core::arch::asm!("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [{map}, {{{c0}, {c1}}}], [{from}];", from = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], options(nostack))
            }
            3 => {
                core::arch::asm!("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [{map}, {{{c0}, {c1}, {c2}}}], [{from}];", from = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], options(nostack))
            }
            4 => {
                core::arch::asm!("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [{map}, {{{c0}, {c1}, {c2}, {c3}}}], [{from}];", from = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], c3 = in(reg32) at[3], options(nostack))
            }
            _ => {
                core::arch::asm!("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [{map}, {{{c0}, {c1}, {c2}, {c3}, {c4}}}], [{from}];", from = in(reg32) shared, map = in(reg64) map, c0 = in(reg32) at[0], c1 = in(reg32) at[1], c2 = in(reg32) at[2], c3 = in(reg32) at[3], c4 = in(reg32) at[4], options(nostack))
            }
        }
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::tma_store(map, &at, shared);
}

/// `cp.async.bulk.shared::cluster.global`: `bytes` bytes, a multiple of 16, which count at `barrier`.
///
/// # Safety
/// See the module; `from` is readable and 16-byte aligned.
#[inline(always)]
#[track_caller]
pub unsafe fn bulk_load(shared: u32, from: u64, bytes: u32, barrier: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], {n}, [{bar}];",
            to = in(reg32) shared, from = in(reg64) from, n = in(reg32) bytes, bar = in(reg32) barrier, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bulk_load(shared, from, bytes, barrier);
}

/// `cp.async.bulk.global.shared::cta`: `bytes` bytes, a multiple of 16; part of the lane's open bulk group.
///
/// # Safety
/// See the module; `to` is 16-byte aligned and nobody else touches it; ordinary stores to `shared` are fenced.
#[inline(always)]
#[track_caller]
pub unsafe fn bulk_store(to: u64, shared: u32, bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("cp.async.bulk.global.shared::cta.bulk_group [{to}], [{from}], {n};",
            to = in(reg64) to, from = in(reg32) shared, n = in(reg32) bytes, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bulk_store(to, shared, bytes);
}

/// `cp.async.bulk.commit_group`: the lane's bulk stores since the last one are a group.
#[inline(always)]
pub fn bulk_commit() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("cp.async.bulk.commit_group;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bulk_commit();
}

/// `cp.async.bulk.wait_group.read PENDING`: shared memory of all but the lane's newest `PENDING` groups has been read.
#[inline(always)]
pub fn bulk_wait_read<const PENDING: u32>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands but a constant.
    unsafe {
        core::arch::asm!("cp.async.bulk.wait_group.read {n};", n = const PENDING, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bulk_wait(PENDING, true);
}

/// `cp.async.bulk.wait_group PENDING`: all but the lane's newest `PENDING` groups are written.
#[inline(always)]
pub fn bulk_wait<const PENDING: u32>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands but a constant.
    unsafe {
        core::arch::asm!("cp.async.bulk.wait_group {n};", n = const PENDING, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bulk_wait(PENDING, false);
}

/// `prefetch.tensormap`: the map is about to be used.
///
/// # Safety
/// See the module.
#[inline(always)]
pub unsafe fn prefetch_tensor_map(map: u64) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("prefetch.tensormap [{map}];", map = in(reg64) map, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    let _ = map;
}
