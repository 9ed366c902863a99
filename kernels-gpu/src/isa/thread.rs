//! Where a lane is, and the CTA's barrier.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// `%tid.x`
#[inline(always)]
pub fn thread_x() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: reads a special register.
    return unsafe { core::arch::nvptx::_thread_idx_x() as u32 };
    #[cfg(not(target_arch = "nvptx64"))]
    sim::here().thread
}

/// `%ctaid.x`
#[inline(always)]
pub fn block_x() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: reads a special register.
    return unsafe { core::arch::nvptx::_block_idx_x() as u32 };
    #[cfg(not(target_arch = "nvptx64"))]
    sim::here().block[0]
}

/// `%ctaid.y`
#[inline(always)]
pub fn block_y() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: reads a special register.
    return unsafe { core::arch::nvptx::_block_idx_y() as u32 };
    #[cfg(not(target_arch = "nvptx64"))]
    sim::here().block[1]
}

/// `%nctaid.x`
#[inline(always)]
pub fn grid_x() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: reads a special register.
    return unsafe { core::arch::nvptx::_grid_dim_x() as u32 };
    #[cfg(not(target_arch = "nvptx64"))]
    sim::here().grid[0]
}

/// `bar.sync 0`: all lanes of the CTA; orders their memory accesses.
#[inline(always)]
#[track_caller]
pub fn bar_sync() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier; the clobber of memory keeps accesses on their side.
    unsafe {
        core::arch::asm!("bar.sync 0;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::barrier();
}

/// `bar.sync id, threads`: a barrier of whole warps, `threads` lanes in all, by its number (1 to 15).
#[inline(always)]
#[track_caller]
pub fn bar_sync_named(id: u32, threads: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier.
    unsafe {
        core::arch::asm!("bar.sync {id}, {n};", id = in(reg32) id, n = in(reg32) threads, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bar_named(id, threads, true);
}

/// `bar.arrive id, threads`: arrives at such a barrier and does not wait.
#[inline(always)]
#[track_caller]
pub fn bar_arrive_named(id: u32, threads: u32) {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier.
    unsafe {
        core::arch::asm!("bar.arrive {id}, {n};", id = in(reg32) id, n = in(reg32) threads, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::bar_named(id, threads, false);
}

/// `setmaxnreg.dec`: gives all but `N` registers of each lane back; all warps of a warpgroup.
#[inline(always)]
#[track_caller]
pub fn registers_down<const N: u32>() {
    const { assert!(N >= 24 && N <= 256 && N.is_multiple_of(8)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a hint to the hardware; ptxas keeps code within it.
    unsafe {
        core::arch::asm!("setmaxnreg.dec.sync.aligned.u32 {n};", n = const N, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::set_registers(N, false);
}

/// `setmaxnreg.inc`: waits until each lane can have `N` registers; all warps of a warpgroup.
#[inline(always)]
#[track_caller]
pub fn registers_up<const N: u32>() {
    const { assert!(N >= 24 && N <= 256 && N.is_multiple_of(8)) };
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: as `registers_down`.
    unsafe {
        core::arch::asm!("setmaxnreg.inc.sync.aligned.u32 {n};", n = const N, options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::set_registers(N, true);
}
