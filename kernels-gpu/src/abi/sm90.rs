//! What Hopper's kernels are given besides.

use super::attention::{AttentionParams, RangeParams};
use super::plain;

/// How the copy engine finds boxes of a tensor: opaque, made by the driver (`cuTensorMapEncodeTiled`) or, for the
/// simulator, by `sim::encode`. Kernels are given it by value and use its address.
///
/// It must stand at a multiple of 64 bytes: parameters that have some begin with them, and the PTX's parameter is aligned
/// so where it is written out (Rust's calling convention for kernels ends at 16).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

/// A tensor of 16-bit elements and a box of it, before they become a [`TensorMap`]. The innermost dimension comes first and
/// has no stride; dimensions from `rank` on are 1. Outside the tensor there are zeros.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Device address, a multiple of 16.
    pub base: u64,
    /// Dimensions, 2 to 5.
    pub rank: u32,
    /// 32, 64 or 128: chunk `c` of row `r` of the box (of this many bytes) stands at `c ^ r`, see the PTX ISA; 0: as it is.
    pub swizzle_bytes: u32,
    /// Elements in each dimension.
    pub dims: [u64; 5],
    /// Bytes from entry to entry of dimensions 1 to 4, multiples of 16.
    pub strides: [u64; 4],
    /// Elements of a box in each dimension, at most 256.
    pub box_dims: [u32; 5],
}

#[cfg(not(target_arch = "nvptx64"))]
impl TensorMapSpec {
    /// What `cuTensorMapEncodeTiled` asks for.
    ///
    /// # Errors
    /// Says what is asked for and what came.
    pub fn check(&self) -> Result<(), &'static str> {
        let rank = self.rank as usize;
        if !(2..=5).contains(&rank) {
            return Err("a tensor map has 2 to 5 dimensions");
        }
        if self.base == 0 || !self.base.is_multiple_of(16) {
            return Err("a tensor map's address is a multiple of 16");
        }
        if self.dims.iter().any(|&d| d == 0 || d > 1 << 32) || self.dims[rank..].iter().any(|&d| d != 1) {
            return Err("dimensions of a tensor map are 1 to 2^32");
        }
        if self.strides[..rank - 1].iter().any(|s| !s.is_multiple_of(16) || *s >= 1 << 40) {
            return Err("strides of a tensor map are multiples of 16 bytes below 2^40");
        }
        if self.box_dims.iter().any(|&d| d == 0 || d > 256) || self.box_dims[rank..].iter().any(|&d| d != 1) {
            return Err("boxes of a tensor map have 1 to 256 elements in each dimension");
        }
        let row = 2 * self.box_dims[0];
        if !matches!(self.swizzle_bytes, 0 | 32 | 64 | 128)
            || !row.is_multiple_of(16)
            || self.swizzle_bytes != 0 && row > self.swizzle_bytes
        {
            return Err(
                "rows of a box are multiples of 16 bytes, and no longer than the swizzle's 32, 64 or 128",
            );
        }
        Ok(())
    }
}

/// Registers of a lane of the producer and of each of two consumers, after `setmaxnreg`: together the launch's.
pub const SM90_REGISTERS: (u32, u32) = (56, 224);

/// Channels of a panel of `wgmma`'s shared tiles: 64, or 32 where a row is no multiple of 64.
pub const fn panel_channels(channels: usize) -> usize {
    if channels.is_multiple_of(64) { 64 } else { 32 }
}

/// Sizes of a prefill kernel for Hopper: what it is compiled for, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefillTile {
    /// End of the entries' names.
    pub name: &'static str,
    /// Entries for f16 and bf16, each without and with extras: soft cap, ALiBi, scales that are not positive, lists of
    /// pages. Empty: there is none.
    pub entries: [[&'static str; 2]; 2],
    /// Most channels of Q and K.
    pub head_dim: usize,
    /// Most channels of V and O.
    pub v_head_dim: usize,
    /// Packed query rows: 64 for each consumer warpgroup.
    pub rows: usize,
    /// KV tokens of a block.
    pub block: usize,
    /// Why not another block. All have two consumers: with three, each lane has 152 registers, and O, S and P of the
    /// smallest head take 128 of them for blocks of 128. A consumer's lane has 224, of which some 40 hold
    /// addresses, maxima and temporaries, the producer's 56, of which a gather takes 45: together what an SM has.
    pub why: &'static str,
}

#[cfg(not(target_arch = "nvptx64"))]
macro_rules! entries {
    ($name:literal) => {
        [
            [concat!("prefill_sm90_f16_", $name), concat!("prefill_sm90_f16_", $name, "_extras")],
            [concat!("prefill_sm90_bf16_", $name), concat!("prefill_sm90_bf16_", $name, "_extras")],
        ]
    };
}

/// The prefill kernels for Hopper, smallest first. In 227 KiB of shared memory: Q, and two slots each for K and V.
#[cfg(not(target_arch = "nvptx64"))]
pub const PREFILL_SM90: [PrefillTile; 6] = [
    PrefillTile {
        name: "d64",
        entries: entries!("d64"),
        head_dim: 64,
        v_head_dim: 64,
        rows: 128,
        block: 160,
        why: "O 32 + S 80 + P 40 registers; a longer block shares the step's fixed instructions",
    },
    PrefillTile {
        name: "d96",
        entries: entries!("d96"),
        head_dim: 96,
        v_head_dim: 96,
        rows: 128,
        block: 128,
        why: "O 48 + S 64 + P 32 registers; pages of 32, 64 and 128 tokens are whole boxes",
    },
    PrefillTile {
        name: "d128",
        entries: entries!("d128"),
        head_dim: 128,
        v_head_dim: 128,
        rows: 128,
        block: 128,
        why: "O 64 + S 64 + P 32 registers; 176 tokens would take 196 and the producer could not gather",
    },
    PrefillTile {
        name: "d192_128",
        entries: entries!("d192_128"),
        head_dim: 192,
        v_head_dim: 128,
        rows: 128,
        block: 128,
        why: "O 64 + S 64 + P 32 registers, 208 KiB of shared memory",
    },
    PrefillTile {
        name: "d192",
        entries: entries!("d192"),
        head_dim: 192,
        v_head_dim: 192,
        rows: 128,
        block: 96,
        why: "O 96 + S 48 + P 24 registers; 112 tokens spill",
    },
    PrefillTile {
        name: "d256",
        entries: entries!("d256"),
        head_dim: 256,
        v_head_dim: 256,
        rows: 128,
        block: 64,
        why: "O 128 + S 32 + P 16 registers; 80 tokens spill",
    },
];

/// Tokens of a box of K and V: the longest run that divides the block and the page (0: ragged, one page), in whole
/// groups of eight rows, as the swizzle wants; `None` where there is none, and rows are gathered.
#[cfg(not(target_arch = "nvptx64"))]
pub fn box_rows(block: usize, page_size: usize) -> Option<usize> {
    let divides = |rows: &usize| block.is_multiple_of(*rows) && page_size.is_multiple_of(*rows);
    (8..=block).rev().filter(|r| r.is_multiple_of(8)).find(divides)
}

#[cfg(not(target_arch = "nvptx64"))]
impl PrefillTile {
    /// The smallest kernel that holds these channels.
    pub fn choose(head_dim: usize, v_head_dim: usize) -> Option<Self> {
        PREFILL_SM90.into_iter().find(|t| t.holds(head_dim, v_head_dim))
    }

    /// Whether the kernel has room for these channels.
    pub fn holds(&self, head_dim: usize, v_head_dim: usize) -> bool {
        self.head_dim >= head_dim && self.v_head_dim >= v_head_dim
    }

    /// Packed rows of a work item: whole query tokens, so that a box of Q is what one load brings; `None` where a token
    /// has more rows than the tile.
    pub fn q_rows(&self, group: usize) -> Option<usize> {
        (group <= self.rows).then(|| self.rows / group * group)
    }

    /// Tokens of a box of K and V, see [`box_rows`].
    pub fn box_rows(&self, page_size: usize) -> Option<usize> {
        box_rows(self.block, page_size)
    }
}

#[cfg(not(target_arch = "nvptx64"))]
impl core::fmt::Display for PrefillTile {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let PrefillTile { head_dim, v_head_dim, rows, block, why, .. } = self;
        write!(f, "{rows} rows x {block} tokens, {head_dim} channels of K, {v_head_dim} of V: {why}")
    }
}

/// Attention of many rows by `wgmma` and the copy engine.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrefillSm90Params {
    /// Q as `[token, kv_head, query head of the group, channel]`; boxes of `q_rows` packed rows and a panel.
    pub q_map: TensorMap,
    /// K as `[page, kv_head, token of the page, channel]`; boxes of `box_rows` tokens and a panel. Ragged K is a page.
    pub k_map: TensorMap,
    /// V, as K.
    pub v_map: TensorMap,
    /// What every attention kernel is given.
    pub attention: AttentionParams,
    /// A u32, 0 between launches: CTAs count themselves their items with it.
    pub next_item: u64,
    /// Items of the launch.
    pub num_items: u32,
    /// Packed rows of an item: a multiple of the group, at most the kernel's tile.
    pub q_rows: u32,
    /// Tokens of a box, a divisor of the kernel's block and of the page size; 0: rows are gathered one by one.
    pub box_rows: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

/// Packed rows of an item of latent attention on Hopper: a warpgroup's.
pub const DECODE_MLA_SM90_ROWS: usize = 64;

/// Latent attention by `wgmma` and the copy engine.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecodeMlaSm90Params {
    /// The latent rows, as [`PrefillSm90Params::k_map`]: boxes of `box_rows` tokens and 64 channels.
    pub map: TensorMap,
    /// What every attention kernel is given.
    pub attention: AttentionParams,
    /// Who takes which items.
    pub ranges: RangeParams,
    /// Tokens of a box, as [`PrefillSm90Params::box_rows`], of blocks of [`KV_BLOCK`](super::KV_BLOCK).
    pub box_rows: u32,
    /// Keeps the size a multiple of 8.
    pub reserved: u32,
}

plain! {
    TensorMap: 128,
    DecodeMlaSm90Params: 424,
    PrefillSm90Params: 664,
}
