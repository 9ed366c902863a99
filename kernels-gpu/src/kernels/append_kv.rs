//! Rotation of Q and K, writing of K and V into pages, and the pages' summaries.

use crate::abi::{AppendParams, PageRows, RopeParams, Rows, SKIP_SLOT, SummaryParams, TouchedPage, element};
use crate::attn::rows::read_struct;
use crate::isa;
use crate::kernels::WARPS;
use crate::tile::elements::{load, store};

impl RopeParams {
    /// The two channels of rotated pair `i`.
    #[inline(always)]
    fn pair(&self, i: u32) -> (u32, u32) {
        if self.interleaved != 0 { (2 * i, 2 * i + 1) } else { (i, i + self.rotary_dim / 2) }
    }

    /// Calls `put(channel, value)` for every channel of a row, rotated, from one lane each. A lane reads both
    /// channels of a pair before it puts either.
    #[inline(always)]
    #[track_caller]
    pub(super) fn rotated(
        &self,
        token: u32,
        head_dim: u32,
        get: impl Fn(u32) -> f32,
        mut put: impl FnMut(u32, f32),
    ) {
        let half = self.rotary_dim / 2;
        let mut i = isa::thread_x() % 32;
        while i < half {
            let at = 4 * (token as u64 * half as u64 + i as u64);
            // SAFETY: the host gives an angle per token and pair.
            let (cos, sin) =
                unsafe { (load(self.cos + at, element::F32, 0), load(self.sin + at, element::F32, 0)) };
            let (first, second) = self.pair(i);
            let (a, b) = (get(first), get(second));
            put(first, a * cos - b * sin);
            put(second, b * cos + a * sin);
            i += 32;
        }
        let mut i = self.rotary_dim + isa::thread_x() % 32;
        while i < head_dim {
            put(i, get(i));
            i += 32;
        }
    }
}

#[inline(always)]
pub(super) unsafe fn append(p: &AppendParams) {
    let token = isa::block_x();
    let head = isa::block_y() * WARPS + isa::thread_x() / 32;
    let heads = p.num_q_heads + 2 * p.num_kv_heads;
    if head >= heads {
        return;
    }
    if head < p.num_q_heads {
        let row = p.q.at(token, head);
        let rotary_dim = p.rope.rotary_dim;
        // SAFETY: the host has checked the rows; a row is one warp's, a pair one lane's.
        let get = |i| unsafe { load(row, p.q.dtype, i) };
        // SAFETY: as above. Only the rotated channels change.
        return p.rope.rotated(token, rotary_dim, get, |i, x| unsafe { store(row, p.q.dtype, i, x) });
    }
    // SAFETY: the host gives a slot per token.
    let [low, high] = unsafe { isa::ld_global_2(p.slots + 8 * token as u64) };
    let slot = low as u64 | (high as u64) << 32;
    if slot == SKIP_SLOT || p.k_pages.base == 0 {
        return;
    }
    let (page, offset) = isa::div_rem_u64(slot, p.page_size as u64);
    let (page, offset) = (page as u32, offset as u32);
    let head = head - p.num_q_heads;
    let write = |rows: &Rows, pages: &PageRows, head: u32, rope: &RopeParams| {
        let (from, to) = (rows.at(token, head), pages.at(page, head, offset));
        // SAFETY: the host has checked rows and slots; no slot comes twice.
        let get = |i| unsafe { load(from, rows.dtype, i) };
        // SAFETY: as above.
        rope.rotated(token, p.head_dim, get, |i, x| unsafe { store(to, p.kv_dtype, i, x) });
    };
    if head < p.num_kv_heads {
        write(&p.k, &p.k_pages, head, &p.rope);
    } else {
        write(&p.v, &p.v_pages, head - p.num_kv_heads, &RopeParams { rotary_dim: 0, ..p.rope });
    }
}

/// Minimum and maximum of each channel over a page's tokens, as they are stored.
#[inline(always)]
pub(super) unsafe fn summaries(p: &SummaryParams) {
    // SAFETY: one touched page per CTA in x.
    let touched: TouchedPage = unsafe { read_struct(p.touched + 8 * isa::block_x() as u64) };
    let head = isa::block_y();
    let mut channel = isa::thread_x();
    while channel < p.head_dim {
        let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
        for token in 0..touched.tokens {
            let row = p.k_pages.at(touched.page, head, token);
            // SAFETY: the page is inside the pool, and has this many tokens.
            let x = unsafe { load(row, p.kv_dtype, channel) };
            min = if x < min { x } else { min };
            max = if x > max { x } else { max };
        }
        // SAFETY: the host has checked the summaries; a page is touched once.
        unsafe {
            store(p.summaries.at(touched.page, head, 0), p.summary_dtype, channel, min);
            store(p.summaries.at(touched.page, head, 1), p.summary_dtype, channel, max);
        }
        channel += 32 * WARPS;
    }
}
