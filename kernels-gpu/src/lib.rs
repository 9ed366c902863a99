//! The GPU floor of `ferroflash`: kernels written once in Rust, compiled to PTX for the device and, with the
//! feature `sim`, run lane by lane on the host.
//!
//! | module | what it holds |
//! |---|---|
//! | `kernels` | one file per kernel: its config, its shared-memory plan, its body; and the table of entries |
//! | `attn` | what is computed: online softmax, masks, where a KV row lives, what becomes of a row's state |
//! | `sched` | how it is scheduled: the ring of shared tiles |
//! | `tile` | fragments and swizzled shared tiles, codes of quantised KV in registers |
//! | `isa` | one PTX instruction, one function, and its host model |
//! | `sim` | host only: the lane simulator |
//! | [`abi`] | `#[repr(C)]` structs shared by host and device |
#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, stdarch_nvptx))]
#![warn(unsafe_op_in_unsafe_fn)]

#[cfg(all(feature = "sim", not(target_arch = "nvptx64")))]
extern crate std;

pub mod abi;
#[cfg(any(feature = "sim", target_arch = "nvptx64"))]
mod attn;
#[cfg(any(feature = "sim", target_arch = "nvptx64"))]
pub mod isa;
#[cfg(any(feature = "sim", target_arch = "nvptx64"))]
pub mod kernels;
#[cfg(any(feature = "sim", target_arch = "nvptx64"))]
mod sched;
#[cfg(all(feature = "sim", not(target_arch = "nvptx64")))]
pub mod sim;
#[cfg(any(feature = "sim", target_arch = "nvptx64"))]
pub mod tile;
