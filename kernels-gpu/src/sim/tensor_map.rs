//! The simulator's tensor maps: what `cuTensorMapEncodeTiled` describes (CUDA driver API, "Tensor Map Object
//! Managment"), in a form of its own, and where a box's bytes are.

use std::format;
use std::string::String;

use crate::abi::{TensorMap, TensorMapSpec};

/// First word of a map, so that anything else is found out.
const MAGIC: u64 = 0x7e45_0a4d_a900_0001;

/// A map for the simulator.
///
/// # Errors
/// What the driver would refuse too.
pub fn encode(spec: &TensorMapSpec) -> Result<TensorMap, String> {
    spec.check().map_err(String::from)?;
    let mut words = [0u64; 16];
    words[0] = MAGIC;
    words[1] = spec.base;
    words[2] = spec.rank as u64 | (spec.swizzle_bytes as u64) << 32;
    for d in 0..5 {
        words[3 + d] = (spec.dims[d] - 1) | (spec.box_dims[d] as u64) << 32;
    }
    words[8..12].copy_from_slice(&spec.strides);
    Ok(TensorMap(words))
}

/// A map as it was described.
pub(super) fn decode(words: [u64; 16]) -> Result<TensorMapSpec, String> {
    if words[0] != MAGIC {
        return Err(format!("no tensor map: it begins with {:#x}", words[0]));
    }
    Ok(TensorMapSpec {
        base: words[1],
        rank: words[2] as u32,
        swizzle_bytes: (words[2] >> 32) as u32,
        dims: core::array::from_fn(|d| (words[3 + d] & 0xffff_ffff) + 1),
        box_dims: core::array::from_fn(|d| (words[3 + d] >> 32) as u32),
        strides: core::array::from_fn(|d| words[8 + d]),
    })
}

/// Where 16 bytes of a box are: in global memory (`None`: outside the tensor, zeros), and in the box.
pub(super) struct Piece {
    pub(super) global: Option<u64>,
    pub(super) shared: u32,
}

/// All pieces of the box at `at`, whose first byte stands at shared address `base`. Coordinates are signed; a piece is in
/// the tensor or not as a whole, for rows are multiples of 16 bytes.
pub(super) fn pieces(
    spec: &TensorMapSpec,
    at: &[i32],
    base: u32,
) -> Result<impl Iterator<Item = Piece>, String> {
    if at.len() != spec.rank as usize {
        return Err(format!("{} coordinates for a tensor of rank {}", at.len(), spec.rank));
    }
    let align = 8 * spec.swizzle_bytes.max(16);
    if !base.is_multiple_of(align) {
        return Err(format!("a box at shared address {base:#x}: with this swizzle at a multiple of {align}"));
    }
    let mut start = [0i64; 5];
    start.iter_mut().zip(at).for_each(|(s, &x)| *s = x as i64);
    if !(2 * start[0]).unsigned_abs().is_multiple_of(16) {
        return Err(format!("a box from element {}: the simulator takes multiples of 8", start[0]));
    }
    let spec = *spec;
    let row_chunks = spec.box_dims[0] / 8;
    let total = spec.box_dims.iter().skip(1).product::<u32>() * row_chunks;
    Ok((0..total).map(move |index| {
        let (chunk, mut rest) = (index % row_chunks, index / row_chunks);
        let mut inside = true;
        let mut global = spec.base as i64;
        for d in 0..5 {
            let step = if d == 0 { 8 * chunk } else { rest % spec.box_dims[d] };
            if d > 0 {
                rest /= spec.box_dims[d];
            }
            let x = start[d] + step as i64;
            inside &= x >= 0 && (x as u64) < spec.dims[d];
            global += x * if d == 0 { 2 } else { spec.strides[d - 1] as i64 };
        }
        // A box is laid out row after row; the swizzle is one of addresses.
        let linear = base + index * 16;
        let mask = (spec.swizzle_bytes / 16).max(1) - 1;
        let shared = linear ^ (linear >> 7 & mask) << 4;
        Piece { global: inside.then_some(global as u64), shared }
    }))
}
