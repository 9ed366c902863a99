//! Sparse top-k (after Quest, arXiv:2406.10774): an upper bound of each page's scores, and the pages with the
//! largest. Both results are written on the device, where the decode kernel finds them.

use crate::abi::{SCORE_PAGES, SelectItem, SelectParams};
use crate::attn::rows::read_struct;
use crate::isa;
use crate::kernels::WARPS;
use crate::sched::radix;
use crate::tile::elements::{half_warp_sum, load_8};

/// A CTA a list, for it counts and scans in shared memory.
pub(super) struct TopKConfig;

impl super::Config for TopKConfig {
    const THREADS: u32 = radix::THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = radix::BYTES;
}

/// Pages that a half-warp takes together, so that their loads are under way together.
const TOGETHER: usize = 2;

/// `max over the group of sum_d max(q_d min_d, q_d max_d)`, for each page. A half-warp takes a page, a lane 16 bytes of
/// its minima and maxima at a time; `SCORE_PAGES` pages a warp.
#[inline(always)]
pub(super) unsafe fn score(p: &SelectParams) {
    let (item, part) = isa::div_rem(isa::block_x(), p.page_ctas);
    // SAFETY: `page_ctas` CTAs per item.
    let item: SelectItem = unsafe { read_struct(p.items + size_of::<SelectItem>() as u64 * item as u64) };
    if item.count == item.num_pages {
        return;
    }
    let (half, lane) = (isa::thread_x() % 32 / 16, isa::thread_x() % 16);
    let first = (part * WARPS + isa::thread_x() / 32) * SCORE_PAGES as u32;
    let mut at = first;
    while at < first + SCORE_PAGES as u32 && at < item.num_pages {
        let index = |i: usize| at + 2 * i as u32 + half;
        // Of each page minimum and maximum of the lane's channels: eight, and eight 128 further.
        let mut range = [[[[0.0; 8]; 2]; TOGETHER]; 2];
        for i in 0..TOGETHER {
            if index(i) < item.num_pages {
                // SAFETY: the item's list has the page.
                let [page] = unsafe { isa::ld_global_1(p.pages + 4 * (item.pages + index(i) as u64)) };
                for (step, range) in range.iter_mut().enumerate() {
                    let channel = 8 * (lane + 16 * step as u32);
                    if channel < p.head_dim {
                        // SAFETY: the host has checked summaries, their alignment and page numbers.
                        range[i] = [0, 1].map(|side| unsafe {
                            load_8(p.summaries.at(page, item.kv_head, side), p.summary_dtype, channel)
                        });
                    }
                }
            }
        }
        let mut best = [f32::NEG_INFINITY; TOGETHER];
        let mut g = 0;
        while g < p.group {
            let q = p.q.at(item.q_token, item.kv_head * p.group + g);
            let mut sum = [0.0; TOGETHER];
            for (step, range) in range.iter().enumerate() {
                let channel = 8 * (lane + 16 * step as u32);
                if channel >= p.head_dim {
                    continue;
                }
                // SAFETY: the host has checked queries, and their alignment.
                let q = unsafe { load_8(q, p.q.dtype, channel) };
                for (d, x) in q.into_iter().enumerate() {
                    let x = if p.negate != 0 { -x } else { x };
                    for i in 0..TOGETHER {
                        let (a, b) = (x * range[i][0][d], x * range[i][1][d]);
                        sum[i] += if a > b { a } else { b };
                    }
                }
            }
            for i in 0..TOGETHER {
                let sum = half_warp_sum(sum[i]);
                best[i] = if sum > best[i] { sum } else { best[i] };
            }
            g += 1;
        }
        for i in 0..TOGETHER {
            if lane == 0 && index(i) < item.num_pages {
                // SAFETY: a page's score is one half-warp's.
                unsafe {
                    isa::st_global_1(p.scores + 4 * (item.scores + index(i) as u64), [best[i].to_bits()])
                };
            }
        }
        at += 2 * TOGETHER as u32;
    }
}

/// The first `sinks` and last `recent` pages, and of the others the `count` in all with the largest scores, the
/// earlier of equal ones; in the order of their tokens.
#[inline(always)]
pub(super) unsafe fn top_k(p: &SelectParams) {
    // SAFETY: one item per CTA in x.
    let item: SelectItem =
        unsafe { read_struct(p.items + size_of::<SelectItem>() as u64 * isa::block_x() as u64) };
    let (n, count) = (item.num_pages, item.count);
    let recent = if p.recent < count { p.recent } else { count };
    let sinks = if p.sinks < count - recent { p.sinks } else { count - recent };
    // Forced pages have the largest key, for no score does.
    let key = |i: u32| {
        if i < sinks || i >= n - recent || count == n {
            return u32::MAX;
        }
        // SAFETY: `score` has written all of an item that does not keep every page.
        let [score] = unsafe { isa::ld_global_1(p.scores + 4 * (item.scores + i as u64)) };
        let key = radix::ordered(score);
        if key == u32::MAX { u32::MAX - 1 } else { key }
    };
    let put = |place: u32, i: u32| {
        // SAFETY: the item's lists hold `num_pages` and `count` entries.
        unsafe {
            let [page] = isa::ld_global_1(p.pages + 4 * (item.pages + i as u64));
            isa::st_global_1(p.chosen + 4 * (item.chosen + place as u64), [page]);
        }
    };
    // SAFETY: the kernel's only shared memory.
    unsafe {
        let threshold = radix::threshold(isa::shared_base(), n, key, |_| 1, count as u64);
        radix::collect(isa::shared_base(), n, key, threshold.key, threshold.equal as u32, put);
    }
}
