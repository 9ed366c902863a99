//! Decoding of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) on Hopper, for as many query heads as make it
//! bound by arithmetic: 64 packed rows against blocks of 64 latent rows, which are keys and, with their first 512
//! channels, values.
//!
//! As `decode`, a CTA stays and walks a range of items. One warpgroup, the producer, brings Q and KV to shared memory. O is
//! `[64, 512]`, more than a warpgroup's registers hold: the other two, scorer and helper, have a half of its channels each.
//!
//! ```text
//! scorer                              helper
//! S = Q K^T
//! P = softmax S                       O' += P' V', of the block before
//! O += P V                            .
//! S' = Q K'^T                         .
//! P' = softmax S'                     O' += P V
//! ```
//!
//! So the tensor cores have the helper's product to do while the scorer computes its softmax. Channels are loaded and
//! given up in two parts, each as soon as its last reader is done with it: those of the scorer's values when it has
//! accumulated them, those of the helper's while the next softmax runs. Of each part one slot is in use, one on its way.

mod consumers;
mod layout;
mod producer;

use self::layout::Layout;
use crate::abi::{DecodeMlaSm90Params, SM90_REGISTERS as REGISTERS};
use crate::isa;
use crate::sched::range;
use crate::tile::Half;

/// Lanes of a warpgroup.
const WARPGROUP: u32 = 128;

/// Tiles of 8 channels of a half of O.
const TILES: usize = 32;

/// Named barriers: the lanes of each warpgroup, by its number; the consumers'; that P, its corrections and, after an item's
/// last block, the states stand in shared memory and it is the helper's turn; that the helper is done with them.
const BARRIERS: [u32; 3] = [1, 2, 3];
const CONSUMERS_BARRIER: u32 = 4;
const TURN_BARRIER: u32 = 5;
const DONE_BARRIER: u32 = 6;

pub(super) struct Config;

impl super::Config for Config {
    const THREADS: u32 = 3 * WARPGROUP;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = Layout::BYTES;
}

/// The kernel, with its parameters' address.
#[inline(always)]
pub(super) unsafe fn body<T: Half>(p: &DecodeMlaSm90Params, at: u64) {
    if isa::agreed(range(&p.ranges, 0) == range(&p.ranges, 1)) {
        return;
    }
    let shared = Layout::new();
    // SAFETY: nothing else uses the shared memory yet.
    unsafe { shared.prepare() };
    // The same in all lanes of a warp, and known to be.
    let warpgroup = isa::shfl_idx(isa::thread_x() / WARPGROUP, 0);
    if warpgroup == 0 {
        isa::registers_down::<{ REGISTERS.0 }>();
        producer::run::<T>(p, at, shared);
    } else {
        isa::registers_up::<{ REGISTERS.1 }>();
        if warpgroup == 1 {
            consumers::score::<T>(p, shared);
        } else {
            consumers::help::<T>(p, shared);
        }
    }
}
