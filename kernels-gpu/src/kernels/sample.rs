//! Next tokens from logits. A CTA takes a row. Weights are integers of 32 bits after the point, so that every sum is
//! exact and no result depends on the order of lanes.

use core::f32::consts::LOG2_E;

use crate::abi::{SampleParams, SampleRow};
use crate::attn::rows::read_struct;
use crate::isa;
use crate::sched::radix::{self, Threshold};
use crate::tile::elements::{cta_reduce, load};

/// A lane a bin of the radix selection.
pub(super) struct Config;

impl super::Config for Config {
    const THREADS: u32 = radix::THREADS;
    const MIN_CTAS: u32 = 1;
    const SHARED_BYTES: u32 = radix::BYTES;
}

/// Entries with keys above `key`, and those with just this key up to index `last`.
#[derive(Clone, Copy)]
struct Kept {
    key: u32,
    last: u32,
}

impl Kept {
    #[inline(always)]
    fn has(&self, key: u32, i: u32) -> bool {
        key > self.key || key == self.key && i <= self.last
    }
}

#[inline(always)]
pub(super) unsafe fn body(p: &SampleParams) {
    let row = isa::block_x();
    // SAFETY: one per row.
    let how: SampleRow = unsafe { read_struct(p.rows + size_of::<SampleRow>() as u64 * row as u64) };
    let logits = p.logits.at(row, 0);
    let (n, thread, shared) = (p.vocab, isa::thread_x(), isa::shared_base());
    // SAFETY: the host has checked the logits.
    let logit = |i: u32| unsafe { load(logits, p.logits.dtype, i) };
    // NaN is never drawn: it comes last.
    let key = |i: u32| {
        let x = logit(i);
        if x.is_nan() { 0 } else { radix::ordered(x.to_bits()) }
    };
    let put = |id: u32| {
        if thread == 0 {
            // SAFETY: one id per row.
            unsafe { isa::st_global_1(p.ids + p.id_stride * row as u64, [id]) };
        }
    };

    let (mut largest, mut i) = (0, thread);
    while i < n {
        let k = key(i);
        largest = if k > largest { k } else { largest };
        i += radix::THREADS;
    }
    let max = |a: u32, b: u32| if a > b { a } else { b };
    // SAFETY: the kernel's shared memory, used by one helper after the other.
    let largest = unsafe { cta_reduce(largest, radix::THREADS, shared, max) };
    let (mut first, mut i) = (u32::MAX, thread);
    while i < n {
        if i < first && key(i) == largest {
            first = i;
        }
        i += radix::THREADS;
    }
    // SAFETY: as above.
    let best = unsafe { cta_reduce(first, radix::THREADS, shared, |a, b| if a < b { a } else { b }) };
    let top = logit(best);
    if how.temperature == 0.0 || !top.is_finite() {
        return put(best);
    }

    let sharpness = LOG2_E / how.temperature;
    let weight = |i: u32| {
        let x = logit(i);
        if x.is_nan() { 0 } else { (isa::ex2((x - top) * sharpness) * 4_294_967_296.0) as u64 }
    };
    let mut kept = Kept { key: 0, last: u32::MAX };
    if how.top_k > 0 && how.top_k < n {
        // SAFETY: as above.
        kept = unsafe {
            let t = radix::threshold(shared, n, key, |_| 1, how.top_k as u64);
            last_of(shared, n, key, t.key, t.equal as u32)
        };
    }
    if how.top_p < 1.0 {
        let all = kept;
        let key = |i: u32| {
            let k = key(i);
            if all.has(k, i) { k } else { 0 }
        };
        let weight = |i: u32| if all.has(key(i), i) { weight(i) } else { 0 };
        // SAFETY: as above.
        kept = unsafe {
            let total = sum(shared, n, weight);
            // 18 bits less keep the product within 64.
            let share = ((total >> 18) * (how.top_p * 4_294_967_296.0) as u64) >> 14;
            let Threshold { key: k, equal } =
                radix::threshold(shared, n, key, weight, if share > 0 { share } else { 1 });
            let one = equal_weight(shared, n, key, k, weight);
            let equals = if one > 0 { equal.div_ceil(one) as u32 } else { 1 };
            last_of(shared, n, key, k, equals)
        };
    }
    // The best token's weight is 1, so the threshold is `min_p` itself.
    let least = (how.min_p * 4_294_967_296.0) as u64;
    let weight = |i: u32| {
        let w = weight(i);
        if w >= least && kept.has(key(i), i) { w } else { 0 }
    };
    // SAFETY: as above.
    unsafe {
        let total = sum(shared, n, weight);
        let left = ((total as u128 * how.random as u128) >> 64) as u64;
        put(find(shared, n, weight, left));
    }
}

/// The entries that `key` and a number of `equal` ones keep.
#[inline(always)]
unsafe fn last_of(shared: u32, n: u32, key: impl Fn(u32) -> u32, threshold: u32, equal: u32) -> Kept {
    let last = core::cell::Cell::new(0);
    let put = |_, i: u32| {
        if key(i) == threshold && i > last.get() {
            last.set(i);
        }
    };
    // SAFETY: the caller's promise.
    unsafe {
        radix::collect(shared, n, &key, threshold, equal, put);
        let last = cta_reduce(last.get(), radix::THREADS, shared, |a, b| if a > b { a } else { b });
        Kept { key: threshold, last }
    }
}

/// Weight of an entry with the key `k`.
#[inline(always)]
unsafe fn equal_weight(
    shared: u32,
    n: u32,
    key: impl Fn(u32) -> u32,
    k: u32,
    weight: impl Fn(u32) -> u64,
) -> u64 {
    let (mut first, mut i) = (u32::MAX, isa::thread_x());
    while i < n {
        if i < first && key(i) == k {
            first = i;
        }
        i += radix::THREADS;
    }
    // SAFETY: the caller's promise.
    let i = unsafe { cta_reduce(first, radix::THREADS, shared, |a, b| if a < b { a } else { b }) };
    if i < n { weight(i) } else { 0 }
}

/// The sum of all weights.
#[inline(always)]
unsafe fn sum(shared: u32, n: u32, weight: impl Fn(u32) -> u64) -> u64 {
    let (mut mine, mut i) = (0, isa::thread_x());
    while i < n {
        mine += weight(i);
        i += radix::THREADS;
    }
    // SAFETY: the caller's promise; a barrier before, between and after.
    unsafe {
        if isa::thread_x() == 0 {
            isa::st_shared_2(shared, [0, 0]);
        }
        isa::bar_sync();
        isa::atom_add_shared_u64(shared, mine);
        isa::bar_sync();
        let [low, high] = isa::ld_shared_2(shared);
        isa::bar_sync();
        low as u64 | (high as u64) << 32
    }
}

/// The entry at which the running sum of weights passes `left`: in rounds, each a 256th of the last.
#[inline(always)]
unsafe fn find(shared: u32, n: u32, weight: impl Fn(u32) -> u64, mut left: u64) -> u32 {
    let thread = isa::thread_x();
    let (mut start, mut len) = (0, n);
    loop {
        let chunk = len.div_ceil(radix::THREADS);
        let end = start + len;
        let (mut mine, mut i) = (0, start + thread * chunk);
        let stop = if i + chunk < end { i + chunk } else { end };
        while i < stop {
            mine += weight(i);
            i += 1;
        }
        // SAFETY: the caller's promise: 256 bins, then a word of results.
        unsafe {
            isa::st_shared_2(shared + 8 * thread, [mine as u32, (mine >> 32) as u32]);
            isa::bar_sync();
            let (mut bin, mut before, mut last) = (0, 0u64, 0);
            // Every lane walks the bins: a broadcast, and no second barrier to publish the result.
            while bin < radix::THREADS {
                let [low, high] = isa::ld_shared_2(shared + 8 * bin);
                let here = low as u64 | (high as u64) << 32;
                if here > 0 {
                    last = bin;
                    if before + here > left {
                        break;
                    }
                }
                before += here;
                bin += 1;
            }
            isa::bar_sync();
            let bin = if bin < radix::THREADS { bin } else { last };
            start += bin * chunk;
            left -= if before < left { before } else { left };
        }
        if chunk == 1 {
            return start;
        }
        len = if start + chunk < end { chunk } else { end - start };
    }
}
