//! int4 pages: quantising groups that an append completes, tails, and reading pages back. The layout is the
//! host's `Int4Pages`.

use crate::abi::{INT4_GROUP, Int4AppendParams, Int4DequantParams, Int4Group, Int4TailToken, element};
use crate::attn::rows::read_struct;
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::elements::{load, store};

const THREADS: u32 = 32 * WARPS;
const GROUP: u32 = INT4_GROUP as u32;
const MAX_DIM: u32 = 256;

/// Shared memory of `quantize`: the group's K and V `[32, 256]`, then K's `[256]` minima and scales and V's
/// `[32, 32]`, all f32.
struct Plan;

impl Plan {
    const V: u32 = 4 * GROUP * MAX_DIM;
    const K_PARAMS: u32 = 2 * Self::V;
    const V_PARAMS: u32 = Self::K_PARAMS + 8 * MAX_DIM;
    const BYTES: u32 = Self::V_PARAMS + 8 * GROUP * GROUP;
}

/// A CTA a group: it fits twice on an SM, and is rare: every 32nd token.
pub(super) struct QuantizeConfig;

impl super::Config for QuantizeConfig {
    const THREADS: u32 = THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = Plan::BYTES;
}

/// The value as a tail holds it: f16, clamped to its range.
#[inline(always)]
fn as_tail(x: f32) -> f32 {
    let x = if x > 65504.0 { 65504.0 } else { x };
    let x = if x < -65504.0 { -65504.0 } else { x };
    isa::f16x2_to_f32(isa::pack_f16x2(x, 0.0)).0
}

/// `min + scale * code` over a group's range: the minimum is exact in f16, the scale is rounded up to it, so
/// that code 15 reaches the maximum.
#[inline(always)]
fn scale_of(min: f32, max: f32) -> f32 {
    let exact = (max - min) / 15.0;
    let bits = isa::pack_f16x2(exact, 0.0);
    let rounded = isa::f16x2_to_f32(bits).0;
    if rounded < exact { isa::f16x2_to_f32(bits + 1).0 } else { rounded }
}

/// Minimum and scale of `n` values.
#[inline(always)]
fn range(n: u32, value: impl Fn(u32) -> f32) -> (f32, f32) {
    let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
    for i in 0..n {
        let x = value(i);
        min = if x < min { x } else { min };
        max = if x > max { x } else { max };
    }
    (min, scale_of(min, max))
}

#[inline(always)]
fn code_of(x: f32, min: f32, scale: f32) -> u32 {
    if scale > 0.0 {
        let code = (x - min) / scale + 0.5;
        if code < 15.0 { code as u32 } else { 15 }
    } else {
        0
    }
}

#[inline(always)]
pub(super) unsafe fn append_tail(p: &Int4AppendParams) {
    let index = isa::block_x() * WARPS + isa::thread_x() / 32;
    if index >= p.num_tail_tokens * p.num_kv_heads {
        return;
    }
    let (i, head) = isa::div_rem(index, p.num_kv_heads);
    // SAFETY: `num_tail_tokens` of them.
    let t: Int4TailToken =
        unsafe { read_struct(p.tail_tokens + size_of::<Int4TailToken>() as u64 * i as u64) };
    let (k, v) = (p.k.at(t.token, head), p.v.at(t.token, head));
    let (k_to, v_to) =
        (p.pages.k_tail.at(t.tail, head, t.in_group), p.pages.v_tail.at(t.tail, head, t.in_group));
    // SAFETY: the host has checked rows and tails; a tail's token is one warp's.
    let get = |i| unsafe { load(k, p.k.dtype, i) };
    // SAFETY: as above.
    p.rope.rotated(t.token, p.head_dim, get, |i, x| unsafe { store(k_to, element::F16, i, as_tail(x)) });
    let mut i = isa::thread_x() % 32;
    while i < p.head_dim {
        // SAFETY: as above.
        unsafe { store(v_to, element::F16, i, as_tail(load(v, p.v.dtype, i))) };
        i += 32;
    }
}

#[inline(always)]
pub(super) unsafe fn quantize(p: &Int4AppendParams) {
    // SAFETY: one group per CTA in x.
    let group: Int4Group =
        unsafe { read_struct(p.groups + size_of::<Int4Group>() as u64 * isa::block_x() as u64) };
    let head = isa::block_y();
    let base = isa::shared_base();
    let value_at = |which: u32, token: u32, channel: u32| base + which + 4 * (token * MAX_DIM + channel);
    // SAFETY: the plan's words; each is written once before the barrier and read after it.
    let put = |at: u32, x: f32| unsafe { isa::st_shared_1(at, [x.to_bits()]) };
    // SAFETY: as above.
    let get = |at: u32| f32::from_bits(unsafe { isa::ld_shared_1(at) }[0]);

    let mut token = isa::thread_x() / 32;
    while token < GROUP {
        let old = GROUP - group.new_tokens;
        if token < old {
            let rows = [(&p.pages.k_tail, 0), (&p.pages.v_tail, Plan::V)];
            for (tail, which) in rows {
                let row = tail.at(group.tail, head, token);
                let mut i = isa::thread_x() % 32;
                while i < p.head_dim {
                    // SAFETY: the host has checked the tails.
                    put(value_at(which, token, i), unsafe { load(row, element::F16, i) });
                    i += 32;
                }
            }
        } else {
            let in_batch = group.last_token + 1 + token - GROUP;
            let (k, v) = (p.k.at(in_batch, head), p.v.at(in_batch, head));
            // SAFETY: the host has checked the rows.
            let from = |i| unsafe { load(k, p.k.dtype, i) };
            p.rope.rotated(in_batch, p.head_dim, from, |i, x| put(value_at(0, token, i), as_tail(x)));
            let mut i = isa::thread_x() % 32;
            while i < p.head_dim {
                // SAFETY: as above.
                put(value_at(Plan::V, token, i), as_tail(unsafe { load(v, p.v.dtype, i) }));
                i += 32;
            }
        }
        token += WARPS;
    }
    isa::bar_sync();

    let (page, offset) = isa::div_rem_u64(group.slot, p.page_size as u64);
    let (page, offset) = (page as u32, offset as u32);
    let k_params = p.pages.k_params.at(page, head, offset / GROUP);
    let mut channel = isa::thread_x();
    while channel < p.head_dim {
        let (min, scale) = range(GROUP, |token| get(value_at(0, token, channel)));
        put(base + Plan::K_PARAMS + 8 * channel, min);
        put(base + Plan::K_PARAMS + 8 * channel + 4, scale);
        // SAFETY: the group's own params.
        unsafe {
            store(k_params, element::F16, channel, min);
            store(k_params, element::F16, p.head_dim + channel, scale);
        }
        channel += THREADS;
    }
    let v_groups = isa::div_rem(p.head_dim, p.v_group).0;
    let mut i = isa::thread_x();
    while i < GROUP * v_groups {
        let (token, g) = isa::div_rem(i, v_groups);
        let (min, scale) = range(p.v_group, |c| get(value_at(Plan::V, token, g * p.v_group + c)));
        put(base + Plan::V_PARAMS + 8 * (token * GROUP + g), min);
        put(base + Plan::V_PARAMS + 8 * (token * GROUP + g) + 4, scale);
        let v_params = p.pages.v_params.at(page, head, offset + token);
        // SAFETY: the token's own params.
        unsafe {
            store(v_params, element::F16, g, min);
            store(v_params, element::F16, v_groups + g, scale);
        }
        i += THREADS;
    }
    isa::bar_sync();

    // Four bytes of codes at a time: channels `4 w..4 w + 4` and those half a row further.
    let (words, half) = (p.head_dim / 8, p.head_dim / 2);
    let mut i = isa::thread_x();
    while i < 2 * GROUP * words {
        let (row, word) = isa::div_rem(i, words);
        let (is_v, token) = (row / GROUP, row % GROUP);
        let mut packed = 0;
        for nibble in 0..8 {
            let channel = 4 * word + nibble / 2 + nibble % 2 * half;
            let (which, params) = if is_v == 1 {
                (Plan::V, Plan::V_PARAMS + 8 * (token * GROUP + isa::div_rem(channel, p.v_group).0))
            } else {
                (0, Plan::K_PARAMS + 8 * channel)
            };
            let (min, scale) = (get(base + params), get(base + params + 4));
            packed |= code_of(get(value_at(which, token, channel)), min, scale) << (4 * nibble);
        }
        let codes = if is_v == 1 { &p.pages.v_codes } else { &p.pages.k_codes };
        // SAFETY: the token's own codes; rows are checked to begin at multiples of 4.
        unsafe { isa::st_global_1(codes.at(page, head, offset + token) + 4 * word as u64, [packed]) };
        i += THREADS;
    }
}

#[inline(always)]
pub(super) unsafe fn dequantize(p: &Int4DequantParams) {
    let index = isa::block_x() * WARPS + isa::thread_x() / 32;
    if index >= p.num_pages * p.page_size {
        return;
    }
    let ((page, offset), head) = (isa::div_rem(index, p.page_size), isa::block_y());
    let half = p.head_dim / 2;
    let k_params = p.pages.k_params.at(page, head, offset / GROUP);
    let v_params = p.pages.v_params.at(page, head, offset);
    let mut word = isa::thread_x() % 32;
    while word < p.head_dim / 8 {
        // SAFETY: the host has checked pages and outputs; a row is one warp's.
        unsafe {
            let [k] = isa::ld_global_1(p.pages.k_codes.at(page, head, offset) + 4 * word as u64);
            let [v] = isa::ld_global_1(p.pages.v_codes.at(page, head, offset) + 4 * word as u64);
            for nibble in 0..8 {
                let channel = 4 * word + nibble / 2 + nibble % 2 * half;
                let param = |row, i| load(row, element::F16, i);
                let (min, scale) = (param(k_params, channel), param(k_params, p.head_dim + channel));
                let x = isa::fma((k >> (4 * nibble) & 15) as f32, scale, min);
                store(p.k.at(page, head, offset), element::F32, channel, x);
                let (g, groups) = (isa::div_rem(channel, p.v_group).0, isa::div_rem(p.head_dim, p.v_group).0);
                let (min, scale) = (param(v_params, g), param(v_params, groups + g));
                let x = isa::fma((v >> (4 * nibble) & 15) as f32, scale, min);
                store(p.v.at(page, head, offset), element::F32, channel, x);
            }
        }
        word += 32;
    }
}
