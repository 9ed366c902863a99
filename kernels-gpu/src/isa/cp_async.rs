//! `cp.async`: copies from global to shared memory that the lane does not wait for.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// `cp.async.cg.shared.global [to], [from], 16, bytes`: 16 bytes, of which those past `bytes` (0 or 16) are
/// zeros. With 0 bytes `from` is not read.
///
/// # Safety
/// `to` is 16 bytes of the CTA's shared memory, `from` (where read) is readable; both 16-byte aligned.
#[inline(always)]
#[track_caller]
pub unsafe fn cp_async_16(to: u32, from: u64, bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("cp.async.cg.shared.global [{to}], [{from}], 16, {n};",
            to = in(reg32) to, from = in(reg64) from, n = in(reg32) bytes, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::cp_async::<4>(to, from, bytes);
}

/// `cp.async.ca.shared.global [to], [from], 4, bytes`: as [`cp_async_16`], for 4 bytes.
///
/// # Safety
/// As [`cp_async_16`], 4-byte aligned.
#[inline(always)]
#[track_caller]
pub unsafe fn cp_async_4(to: u32, from: u64, bytes: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: the caller's promise.
    unsafe {
        core::arch::asm!("cp.async.ca.shared.global [{to}], [{from}], 4, {n};",
            to = in(reg32) to, from = in(reg64) from, n = in(reg32) bytes, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::cp_async::<1>(to, from, bytes);
}

/// `cp.async.commit_group`: the copies since the last one are a group.
#[inline(always)]
pub fn cp_async_commit() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("cp.async.commit_group;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::cp_async_commit();
}

/// `cp.async.wait_group PENDING`: all but the newest `PENDING` groups of this lane have arrived, for this
/// lane; a barrier makes them visible to others.
#[inline(always)]
pub fn cp_async_wait<const PENDING: usize>() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands but a constant.
    unsafe {
        core::arch::asm!("cp.async.wait_group {n};", n = const PENDING, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::cp_async_wait(PENDING);
}
