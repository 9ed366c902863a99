//! Quantised pages: writing what comes, int4 groups of K that an append completes, tails, and reading pages back. The formats
//! are the host's `QuantPages`, the arithmetic `abi::codec`'s.

use crate::abi::codec::{
    F16Bits, INT4_K_MAX, INT4_V_MAX, fp8_code, fp8_value, int4_code, int4_scale, int4_v_params, int4_v_range,
    int8_code, int8_scale, to_f16,
};
use crate::abi::{
    AppendQuantParams, DequantParams, INT4_GROUP, INT4_SHIFTS, Int4Group, Int4TailToken, QuantRows,
    RopeParams, SKIP_SLOT, element, format,
};
use crate::attn::rows::read_struct;
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::elements::{load, store};

const THREADS: u32 = 32 * WARPS;
const GROUP: u32 = INT4_GROUP as u32;
const MAX_DIM: u32 = 256;

/// The device's conversions.
struct Device;

impl F16Bits for Device {
    #[inline(always)]
    fn bits(x: f32) -> u32 {
        isa::pack_f16x2(x, 0.0)
    }
    #[inline(always)]
    fn value(bits: u32) -> f32 {
        isa::f16x2_to_f32(bits).0
    }
}

/// By how much the channel's code is shifted in its word of eight.
#[inline(always)]
fn shift_of(channel: u32) -> u32 {
    // As `INT4_SHIFTS`, without a table.
    4 * (channel % 8 / 2) + 16 * (channel % 2)
}

const _: () = {
    let mut i = 0;
    while i < 8 {
        assert!(INT4_SHIFTS[i as usize] == 4 * (i % 8 / 2) + 16 * (i % 2));
        i += 1;
    }
};

/// Shared memory of `append`: a row of f32 for each warp.
pub(super) struct AppendConfig;

impl super::Config for AppendConfig {
    const THREADS: u32 = THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = WARPS * 4 * MAX_DIM;
}

/// Shared memory of `quantize_keys`: the group's K `[32, 256]`, minima and scales `[256]`, all f32.
struct Plan;

impl Plan {
    const PARAMS: u32 = 4 * GROUP * MAX_DIM;
    const BYTES: u32 = Self::PARAMS + 8 * MAX_DIM;
}

/// A CTA a group: it is rare, every 32nd token.
pub(super) struct QuantizeConfig;

impl super::Config for QuantizeConfig {
    const THREADS: u32 = THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = Plan::BYTES;
}

/// A warp's largest, or with `-x` least, of all lanes.
#[inline(always)]
#[track_caller]
fn warp_max(mut x: f32) -> f32 {
    for mask in [1, 2, 4, 8, 16] {
        let other = f32::from_bits(isa::shfl_bfly(x.to_bits(), mask));
        x = if other > x { other } else { x };
    }
    x
}

/// The codes of a word's channels, of as many neighbouring lanes, in all of these.
#[inline(always)]
#[track_caller]
fn gather_word(mut bits: u32, lanes: u32) -> u32 {
    let mut mask = 1;
    while mask < lanes {
        bits |= isa::shfl_bfly(bits, mask);
        mask *= 2;
    }
    bits
}

#[inline(always)]
pub(super) unsafe fn append(p: &AppendQuantParams) {
    let token = isa::block_x();
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let head = isa::block_y() * WARPS + warp;
    if head >= 2 * p.num_kv_heads {
        return;
    }
    // SAFETY: the host gives a slot per token.
    let [low, high] = unsafe { isa::ld_global_2(p.slots + 8 * token as u64) };
    let slot = low as u64 | (high as u64) << 32;
    let is_v = head >= p.num_kv_heads;
    // Copies: a choice between parameters by reference would bring them to local memory.
    let (side, rows) = if is_v { (p.v_pages, p.v) } else { (p.k_pages, p.k) };
    if slot == SKIP_SLOT || !is_v && side.format == format::INT4 {
        return;
    }
    let head = if is_v { head - p.num_kv_heads } else { head };
    let rope = if is_v { RopeParams { rotary_dim: 0, ..p.rope } } else { p.rope };
    let (page, offset) = isa::div_rem_u64(slot, p.page_size as u64);
    let (page, offset) = (page as u32, offset as u32);
    let (from, to) = (rows.at(token, head), side.codes.at(page, head, offset));
    let at = isa::shared_base() + warp * 4 * MAX_DIM;
    // SAFETY: the host has checked the rows; the warp's row of shared memory has every channel.
    unsafe {
        rope.rotated(
            token,
            p.head_dim,
            |i| load(from, rows.dtype, i),
            |i, x| isa::st_shared_1(at + 4 * i, [x.to_bits()]),
        );
    }
    isa::warp_sync();
    // SAFETY: written before the barrier.
    let value = |i: u32| f32::from_bits(unsafe { isa::ld_shared_1(at + 4 * i) }[0]);
    let mut scale = 1.0;
    match side.format {
        format::F16 => {
            let mut i = lane;
            while i < p.head_dim {
                // SAFETY: the host has checked pages and slots; no slot comes twice.
                unsafe { store(to, element::F16, i, value(i)) };
                i += 32;
            }
            return;
        }
        // SAFETY: the host gives one per KV head.
        format::FP8 => unsafe { scale = load(side.params.base, element::F32, head) },
        format::INT8 => {
            let (mut max, mut i) = (0.0, lane);
            while i < p.head_dim {
                let size = f32::from_bits(value(i).to_bits() & 0x7fff_ffff);
                max = if size > max { size } else { max };
                i += 32;
            }
            let bits = int8_scale::<Device>(warp_max(max));
            scale = Device::value(bits);
            if lane == 0 {
                // SAFETY: the token's own.
                unsafe { isa::st_global_u16(side.params.at(page, head, 0) + 2 * offset as u64, bits) };
            }
        }
        _ => {}
    }
    // A lane a channel.
    let mut first = 0;
    while first < p.head_dim {
        let channel = first + lane;
        let there = channel < p.head_dim;
        let x = value(if there { channel } else { 0 });
        let (word, lanes) = match side.format {
            format::INT4 => {
                let x = to_f16::<Device>(x, INT4_V_MAX);
                let (min, max) = (-warp_max(-x), warp_max(x));
                let params = int4_v_params::<Device>(min, max);
                if lane == 0 {
                    let row = side.params.at(page, head, first / GROUP);
                    // SAFETY: the token's own.
                    unsafe { isa::st_global_u16(row + 2 * offset as u64, params) };
                }
                let (min, scale) = int4_v_range::<Device>(params);
                (gather_word(int4_code(x, min, scale) << shift_of(channel), 8), 8)
            }
            format::FP8 => (gather_word(fp8_code(x / scale) << (8 * (lane % 4)), 4), 4),
            _ => (gather_word(int8_code(x, scale) << (8 * (lane % 4)), 4), 4),
        };
        if there && lane.is_multiple_of(lanes) {
            // SAFETY: the token's own codes; rows are checked to begin at multiples of 16.
            unsafe { isa::st_global_1(to + (channel / lanes * 4) as u64, [word]) };
        }
        first += 32;
    }
}

#[inline(always)]
pub(super) unsafe fn append_tail(p: &AppendQuantParams) {
    let index = isa::block_x() * WARPS + isa::thread_x() / 32;
    if index >= p.num_tail_tokens * p.num_kv_heads {
        return;
    }
    let (i, head) = isa::div_rem(index, p.num_kv_heads);
    // SAFETY: `num_tail_tokens` of them.
    let t: Int4TailToken =
        unsafe { read_struct(p.tail_tokens + size_of::<Int4TailToken>() as u64 * i as u64) };
    let (from, to) = (p.k.at(t.token, head), p.k_pages.tail.at(t.tail, head, t.in_group));
    // SAFETY: the host has checked rows and tails; a tail's token is one warp's.
    let get = |i| unsafe { load(from, p.k.dtype, i) };
    // SAFETY: as above.
    let put = |i, x| unsafe { store(to, element::F16, i, to_f16::<Device>(x, INT4_K_MAX)) };
    p.rope.rotated(t.token, p.head_dim, get, put);
}

#[inline(always)]
pub(super) unsafe fn quantize_keys(p: &AppendQuantParams) {
    // SAFETY: one group per CTA in x.
    let group: Int4Group =
        unsafe { read_struct(p.groups + size_of::<Int4Group>() as u64 * isa::block_x() as u64) };
    let head = isa::block_y();
    let base = isa::shared_base();
    let value_at = |token: u32, channel: u32| base + 4 * (token * MAX_DIM + channel);
    // SAFETY: the plan's words; each is written once before the barrier and read after it.
    let put = |at: u32, x: f32| unsafe { isa::st_shared_1(at, [x.to_bits()]) };
    // SAFETY: as above.
    let get = |at: u32| f32::from_bits(unsafe { isa::ld_shared_1(at) }[0]);

    let mut token = isa::thread_x() / 32;
    while token < GROUP {
        let old = GROUP - group.new_tokens;
        if token < old {
            let row = p.k_pages.tail.at(group.tail, head, token);
            let mut i = isa::thread_x() % 32;
            while i < p.head_dim {
                // SAFETY: the host has checked the tails.
                put(value_at(token, i), unsafe { load(row, element::F16, i) });
                i += 32;
            }
        } else {
            let in_batch = group.last_token + 1 + token - GROUP;
            let k = p.k.at(in_batch, head);
            // SAFETY: the host has checked the rows.
            let from = |i| unsafe { load(k, p.k.dtype, i) };
            p.rope.rotated(in_batch, p.head_dim, from, |i, x| {
                put(value_at(token, i), to_f16::<Device>(x, INT4_K_MAX));
            });
        }
        token += WARPS;
    }
    isa::bar_sync();

    let (page, offset) = isa::div_rem_u64(group.slot, p.page_size as u64);
    let (page, offset) = (page as u32, offset as u32);
    let params = p.k_pages.params.at(page, head, offset / GROUP);
    let mut channel = isa::thread_x();
    while channel < p.head_dim {
        let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
        for token in 0..GROUP {
            let x = get(value_at(token, channel));
            min = if x < min { x } else { min };
            max = if x > max { x } else { max };
        }
        let scale = int4_scale::<Device>(min, max);
        put(base + Plan::PARAMS + 8 * channel, min);
        put(base + Plan::PARAMS + 8 * channel + 4, scale);
        // SAFETY: the group's own params.
        unsafe {
            store(params, element::F16, channel, min);
            store(params, element::F16, p.head_dim + channel, scale);
        }
        channel += THREADS;
    }
    isa::bar_sync();

    let words = p.head_dim / 8;
    let mut i = isa::thread_x();
    while i < GROUP * words {
        let (token, word) = isa::div_rem(i, words);
        let mut packed = 0;
        for channel in 8 * word..8 * word + 8 {
            let params = base + Plan::PARAMS + 8 * channel;
            packed |=
                int4_code(get(value_at(token, channel)), get(params), get(params + 4)) << shift_of(channel);
        }
        let row = p.k_pages.codes.at(page, head, offset + token);
        // SAFETY: the token's own codes; rows are checked to begin at multiples of 16.
        unsafe { isa::st_global_1(row + 4 * word as u64, [packed]) };
        i += THREADS;
    }
}

#[inline(always)]
pub(super) unsafe fn dequantize(p: &DequantParams) {
    let index = isa::block_x() * WARPS + isa::thread_x() / 32;
    if index >= p.num_pages * p.page_size {
        return;
    }
    let ((page, offset), head) = (isa::div_rem(index, p.page_size), isa::block_y());
    for (side, to, is_v) in [(&p.k_pages, &p.k, false), (&p.v_pages, &p.v, true)] {
        let (row, to) = (side.codes.at(page, head, offset), to.at(page, head, offset));
        let mut channel = isa::thread_x() % 32;
        while channel < p.head_dim {
            // SAFETY: the host has checked pages and outputs; a row is one warp's.
            unsafe {
                store(
                    to,
                    element::F32,
                    channel,
                    read(side, is_v, (page, head, offset), row, channel, p.head_dim),
                )
            };
            channel += 32;
        }
    }
}

/// A channel of a token's row.
///
/// # Safety
/// The pages have it.
#[inline(always)]
#[track_caller]
unsafe fn read(
    side: &QuantRows,
    is_v: bool,
    (page, head, offset): (u32, u32, u32),
    row: u64,
    channel: u32,
    head_dim: u32,
) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let byte = || isa::ld_global_1(row + (channel & !3) as u64)[0] >> (8 * (channel % 4)) & 0xff;
        match side.format {
            format::F16 => load(row, element::F16, channel),
            format::FP8 => fp8_value(byte()) * load(side.params.base, element::F32, head),
            format::INT8 => {
                let scale = load(side.params.at(page, head, 0), element::F16, offset);
                (byte() as i32 ^ 0x80).wrapping_sub(0x80) as f32 * scale
            }
            _ => {
                let word = isa::ld_global_1(row + (channel / 8 * 4) as u64)[0];
                let code = (word >> shift_of(channel) & 15) as f32;
                let (min, scale) = if is_v {
                    let params =
                        isa::ld_global_u16(side.params.at(page, head, channel / GROUP) + 2 * offset as u64);
                    int4_v_range::<Device>(params)
                } else {
                    let params = side.params.at(page, head, offset / GROUP);
                    (load(params, element::F16, channel), load(params, element::F16, head_dim + channel))
                };
                isa::fma(code, scale, min)
            }
        }
    }
}
