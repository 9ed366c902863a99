//! One PTX instruction, one function, nothing else. On `nvptx64` the function is the instruction; on the
//! host it is a model of it, run by the simulator. Source of all: the PTX ISA reference.

mod cluster;
mod cp_async;
mod math;
mod mbarrier;
mod memory;
mod mma;
mod thread;
mod tma;
mod warp;
mod wgmma;

pub use cluster::*;
pub use cp_async::{cp_async_4, cp_async_16, cp_async_commit, cp_async_wait};
pub use math::{
    F16x2, bf16x2_to_f32, div_rem, div_rem_u64, ex2, f16x2_to_f32, fma, fma_f16x2, lg2, max_nan, mul_f16x2,
    opaque, opaque_address, pack_bf16x2, pack_f16x2, prmt, rcp, rsqrt, settle, sub_f16x2,
};
pub use mbarrier::*;
pub use memory::*;
pub use mma::{ldmatrix_x4, ldmatrix_x4_trans, mma_bf16, mma_f16, stmatrix_x4};
pub use thread::*;
pub use tma::*;
pub use warp::{agreed, ballot, elect, shfl_bfly, shfl_idx, shfl_up, warp_sync};
pub use wgmma::{wgmma, wgmma_commit, wgmma_fence, wgmma_first, wgmma_registers, wgmma_wait};

#[cfg(target_arch = "nvptx64")]
macro_rules! ptx {
    ($($t:tt)*) => {
        // SAFETY: register arithmetic, no memory.
        unsafe { core::arch::asm!($($t)*, options(pure, nomem, nostack)) }
    };
}
#[cfg(target_arch = "nvptx64")]
use ptx;
