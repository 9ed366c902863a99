//! Attention of many packed rows on Hopper: FlashAttention-3 (arXiv:2407.08608) on `wgmma` and the copy engine.
//!
//! CTAs stay and take items, longest first, from a counter. One warpgroup, the producer, brings Q, K and V to shared
//! memory; each of the others, the consumers, computes 64 rows:
//!
//! ```text
//! S = Q K^T of the item's last block; P = softmax S
//! for each block before it:
//!     S' = Q K'^T and O += P V set out together      tensor cores
//!     P' = softmax S'                                 while O += P V runs, and another consumer's products
//!     O is scaled, where some row's maximum has grown
//! O += P V of the first block
//! ```
//!
//! A baton goes round the consumers, so that one computes products while another computes its softmax. What the
//! producer has loaded, and what consumers are done with, is told by mbarriers (`sched::Stages`).

mod consumer;
mod layout;
mod producer;

use crate::abi::{PrefillSm90Params, SM90_REGISTERS as REGISTERS};
use crate::isa;
use crate::tile::Half;

pub(super) use layout::Layout;

/// Lanes of a warpgroup.
const WARPGROUP: u32 = 128;

/// Named barriers: of the producer's lanes, and from the second on, each consumer's baton.
const PRODUCER_BARRIER: u32 = 1;
const BATON_BARRIER: u32 = 2;

/// The kernel for tiles of `M` rows and blocks of `N` tokens, of `CHUNKS` of 8 channels of Q and K and `V_CHUNKS` of V
/// and O. `S_TILES`, `STEPS`: `N / 8`, `N / 16`; `O_TILES`: `V_CHUNKS`, as lengths. `EXTRAS`: with soft cap, ALiBi,
/// scales that are not positive, and lists of pages; without, they cost nothing.
#[inline(always)]
pub(super) unsafe fn body<
    T: Half,
    const EXTRAS: bool,
    const M: u32,
    const N: u32,
    const CHUNKS: u32,
    const V_CHUNKS: u32,
    const S_TILES: usize,
    const STEPS: usize,
    const O_TILES: usize,
>(
    p: &PrefillSm90Params,
    at: u64,
) {
    let shared = Layout::<M, N, CHUNKS, V_CHUNKS>::new();
    // SAFETY: nothing else uses the shared memory yet.
    unsafe { shared.prepare(p.q_rows) };
    // The same in all lanes of a warp, and known to be.
    let warpgroup = isa::shfl_idx(isa::thread_x() / WARPGROUP, 0);
    // Registers move from the producer to the consumers: what they have together is the launch's.
    if warpgroup == 0 {
        isa::registers_down::<{ REGISTERS.0 }>();
        producer::run(p, at, shared);
    } else {
        if M == 128 {
            isa::registers_up::<{ REGISTERS.1 }>();
        } else {
            // Of three consumers.
            isa::registers_up::<152>();
        }
        let consumer = warpgroup - 1;
        consumer::run::<T, EXTRAS, M, N, CHUNKS, V_CHUNKS, S_TILES, STEPS, O_TILES>(p, shared, consumer);
    }
}
