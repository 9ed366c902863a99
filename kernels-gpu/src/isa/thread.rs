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
