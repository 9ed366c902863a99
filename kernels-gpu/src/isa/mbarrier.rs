//! `mbarrier`: a barrier in shared memory that counts arrivals of lanes and bytes of bulk copies.
//!
//! # Safety
//! Of every function here: `at` is 8 aligned bytes of the CTA's shared memory that hold a barrier (for
//! [`mbarrier_init`]: that nothing else uses), whose initialisation the lane has seen.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// `mbarrier.init`: phase 0, completed by `count` arrivals.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn mbarrier_init(at: u32, count: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("mbarrier.init.shared::cta.b64 [{at}], {n};", at = in(reg32) at, n = in(reg32) count, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::mbarrier_init(at, count);
}

/// `fence.mbarrier_init.release.cluster`: the lane's initialisations, for bulk copies and other CTAs.
#[inline(always)]
pub fn fence_mbarrier_init() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("fence.mbarrier_init.release.cluster;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::fence_proxy();
}

/// `fence.proxy.async.shared::cta`: what the lane has written to shared memory by ordinary stores, for the async
/// proxy: `wgmma` and bulk copies.
#[inline(always)]
pub fn fence_proxy_async() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::fence_proxy();
}

/// `mbarrier.arrive`: one arrival, which releases what the lane has done.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn mbarrier_arrive(at: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("mbarrier.arrive.shared::cta.b64 _, [{at}];", at = in(reg32) at, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::mbarrier_arrive(at, 0);
}

/// `mbarrier.arrive.expect_tx`: one arrival, and `bytes` more that the phase waits for.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn mbarrier_arrive_expect_tx(at: u32, bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{at}], {n};", at = in(reg32) at, n = in(reg32) bytes, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::mbarrier_arrive(at, bytes);
}

/// `mbarrier.arrive.release.cluster` on a barrier of any CTA of the cluster, by its address from
/// [`map_shared`](super::map_shared).
///
/// # Safety
/// See the module; the CTA has not ended.
#[inline(always)]
#[track_caller]
pub unsafe fn mbarrier_arrive_cluster(at: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{at}];", at = in(reg32) at, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::mbarrier_arrive(at, 0);
}

/// `mbarrier.try_wait.parity`: whether the phase of this parity is complete; waits a while for it, and acquires
/// what was released to it.
///
/// # Safety
/// See the module.
#[inline(always)]
#[track_caller]
pub unsafe fn mbarrier_try_wait(at: u32, parity: u32) -> bool {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!(
                "{{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [{at}], {parity}; selp.u32 {d}, 1, 0, p;}}",
                at = in(reg32) at, parity = in(reg32) parity, d = out(reg32) d, options(nostack))
        }
        d != 0
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::mbarrier_try_wait(at, parity)
}
