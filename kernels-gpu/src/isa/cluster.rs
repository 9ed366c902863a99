//! Clusters: CTAs that run together and reach each other's shared memory; and grids that depend on each other.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// `%cluster_ctarank`
#[inline(always)]
pub fn cluster_rank() -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        super::ptx!("mov.u32 {d}, %cluster_ctarank;", d = out(reg32) d);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::here().rank
}

/// `mapa.shared::cluster`: the address, in the cluster's shared window, of `at` in CTA `rank`.
#[inline(always)]
pub fn map_shared(at: u32, rank: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        super::ptx!("mapa.shared::cluster.u32 {d}, {at}, {r};", d = out(reg32) d, at = in(reg32) at, r = in(reg32) rank);
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::map_shared(at, rank)
}

/// `barrier.cluster.arrive.release` and `barrier.cluster.wait.acquire`: all lanes of the cluster's CTAs.
#[inline(always)]
#[track_caller]
pub fn cluster_sync() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier.
    unsafe {
        core::arch::asm!(
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;",
            options(nostack)
        )
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::cluster_sync();
}

/// `griddepcontrol.launch_dependents`: grids launched to depend on this one may begin.
#[inline(always)]
pub fn launch_dependents() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("griddepcontrol.launch_dependents;", options(nostack))
    }
    // The simulator runs one grid after the other.
}

/// `griddepcontrol.wait`: the grids that this one depends on are complete, their writes visible.
#[inline(always)]
pub fn wait_for_prerequisites() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: no operands.
    unsafe {
        core::arch::asm!("griddepcontrol.wait;", options(nostack))
    }
    // The simulator runs one grid after the other.
}
