//! Sparse top-k (after Quest, arXiv:2406.10774): an upper bound of each page's scores, and the pages with the
//! largest. Both results are written on the device, where the decode kernel finds them.

use crate::abi::{SelectItem, SelectParams, element};
use crate::attn::rows::read_struct;
use crate::isa;
use crate::kernels::WARPS;
use crate::sched::radix;
use crate::tile::elements::{load, warp_sum};

/// A CTA a list, for it counts and scans in shared memory.
pub(super) struct TopKConfig;

impl super::Config for TopKConfig {
    const THREADS: u32 = radix::THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = radix::BYTES;
}

/// `max over the group of sum_d max(q_d min_d, q_d max_d)`, for each page.
#[inline(always)]
pub(super) unsafe fn score(p: &SelectParams) {
    let (item, part) = isa::div_rem(isa::block_x(), p.page_ctas);
    // SAFETY: `page_ctas` CTAs per item.
    let item: SelectItem = unsafe { read_struct(p.items + size_of::<SelectItem>() as u64 * item as u64) };
    let index = part * WARPS + isa::thread_x() / 32;
    if index >= item.num_pages || item.count == item.num_pages {
        return;
    }
    // SAFETY: the item's list has the page.
    let [page] = unsafe { isa::ld_global_1(p.pages + 4 * (item.pages + index as u64)) };
    let (min, max) = (p.summaries.at(page, item.kv_head, 0), p.summaries.at(page, item.kv_head, 1));
    let mut best = f32::NEG_INFINITY;
    for g in 0..p.group {
        let q = p.q.at(item.q_token, item.kv_head * p.group + g);
        let mut sum = 0.0;
        let mut d = isa::thread_x() % 32;
        while d < p.head_dim {
            // SAFETY: the host has checked queries, summaries and page numbers.
            unsafe {
                let x = load(q, p.q.dtype, d);
                let x = if p.negate != 0 { -x } else { x };
                let (a, b) = (x * load(min, element::F32, d), x * load(max, element::F32, d));
                sum += if a > b { a } else { b };
            }
            d += 32;
        }
        let sum = warp_sum(sum);
        best = if sum > best { sum } else { best };
    }
    if isa::thread_x().is_multiple_of(32) {
        // SAFETY: a page's score is one warp's.
        unsafe { isa::st_global_1(p.scores + 4 * (item.scores + index as u64), [best.to_bits()]) };
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
