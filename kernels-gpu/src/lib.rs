//! The GPU floor of `ferroflash`.
//!
//! Today this crate holds [`abi`]: what the host's plan hands to a kernel, whatever device runs it.
//! The kernels themselves are not written yet. Their place, from the top floor down:
//!
//! | module | what it holds |
//! |---|---|
//! | `kernels` | one file per kernel: its config, its shared-memory plan, its body |
//! | `attn` | what is computed: online softmax, masks, where a KV row lives |
//! | `sched` | how it is scheduled: stage ring, work iterator, split-KV walk |
//! | `tile` | fragments, swizzled shared tiles, int4 unpacking |
//! | `isa` | one PTX instruction, one function, and its host model |
//! | `sim` | host only: the lane simulator |
//! | [`abi`] | `#[repr(C)]` structs shared by host and device |
#![no_std]

pub mod abi;
