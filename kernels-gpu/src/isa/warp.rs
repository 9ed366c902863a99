//! Exchanges inside a warp; all 32 lanes take part.

#[cfg(not(target_arch = "nvptx64"))]
use crate::sim;

/// `bar.warp.sync`: orders the memory accesses of a warp's lanes.
#[inline(always)]
#[track_caller]
pub fn warp_sync() {
    #[cfg(target_arch = "nvptx64")]
    // SAFETY: a barrier.
    unsafe {
        core::arch::asm!("bar.warp.sync 0xffffffff;", options(nostack))
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::warp_sync();
}

/// `shfl.sync.bfly.b32`: the value of lane `lane ^ mask`.
#[inline(always)]
#[track_caller]
pub fn shfl_bfly(x: u32, mask: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: registers only; not `pure`, for all lanes must execute it.
        unsafe {
            core::arch::asm!("shfl.sync.bfly.b32 {d}, {x}, {m}, 31, 0xffffffff;",
                d = out(reg32) d, x = in(reg32) x, m = in(reg32) mask, options(nomem, nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::collective("shfl.bfly", &[x, mask], |w| {
        w.each(|w, i| [w.args[i ^ w.args[i][1] as usize & 31][0], 0, 0, 0])
    })[0]
}

/// `shfl.sync.idx.b32`: the value of lane `from`.
#[inline(always)]
#[track_caller]
pub fn shfl_idx(x: u32, from: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: as `shfl_bfly`.
        unsafe {
            core::arch::asm!("shfl.sync.idx.b32 {d}, {x}, {m}, 31, 0xffffffff;",
                d = out(reg32) d, x = in(reg32) x, m = in(reg32) from, options(nomem, nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::collective("shfl.idx", &[x, from], |w| {
        w.each(|w, i| [w.args[w.args[i][1] as usize & 31][0], 0, 0, 0])
    })[0]
}

/// `shfl.sync.up.b32`: the value of lane `lane - by`, its own where there is none.
#[inline(always)]
#[track_caller]
pub fn shfl_up(x: u32, by: u32) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: as `shfl_bfly`.
        unsafe {
            core::arch::asm!("shfl.sync.up.b32 {d}, {x}, {m}, 0, 0xffffffff;",
                d = out(reg32) d, x = in(reg32) x, m = in(reg32) by, options(nomem, nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::collective("shfl.up", &[x, by], |w| {
        w.each(|w, i| [w.args[i.checked_sub(w.args[i][1] as usize).unwrap_or(i)][0], 0, 0, 0])
    })[0]
}

/// `vote.sync.ballot.b32`: bit `i` says whether lane `i` holds.
#[inline(always)]
#[track_caller]
pub fn ballot(holds: bool) -> u32 {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: as `shfl_bfly`.
        unsafe {
            core::arch::asm!("{{.reg .pred p; setp.ne.u32 p, {x}, 0; vote.sync.ballot.b32 {d}, p, 0xffffffff;}}",
                d = out(reg32) d, x = in(reg32) holds as u32, options(nomem, nostack))
        }
        d
    }
    #[cfg(not(target_arch = "nvptx64"))]
    sim::collective("vote.ballot", &[holds as u32], |w| {
        let all = (0..32).fold(0, |all, i| all | (w.args[i][0] & 1) << i);
        w.each(|_, _| [all, 0, 0, 0]);
    })[0]
}

/// A condition that is the same in all lanes, by a vote: the assembler then knows it, and keeps the warp together without
/// instructions for lanes that part.
#[inline(always)]
#[track_caller]
pub fn agreed(holds: bool) -> bool {
    ballot(holds) != 0
}

/// `elect.sync`: true in one lane of the warp, always the same.
#[inline(always)]
#[track_caller]
pub fn elect() -> bool {
    #[cfg(target_arch = "nvptx64")]
    {
        let d: u32;
        // SAFETY: as `shfl_bfly`.
        unsafe {
            core::arch::asm!("{{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 {d}, 1, 0, p;}}", d = out(reg32) d, options(nomem, nostack))
        }
        d != 0
    }
    #[cfg(not(target_arch = "nvptx64"))]
    {
        sim::collective("elect", &[], |w| {
            let leader = w.elected();
            w.each(|_, i| [(i == leader) as u32, 0, 0, 0]);
        })[0]
            != 0
    }
}
