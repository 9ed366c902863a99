//! Selection by radix: the largest keys by a CTA, in 8-bit rounds over a shared histogram. All sums are of
//! integers, so that neither result nor ties depend on the order of lanes.

use crate::isa;

/// Lanes of the CTA: a bin each.
pub(crate) const THREADS: u32 = 256;

/// Shared bytes: 256 bins of 8 bytes, then four words of results, then a word for each warp's count.
pub(crate) const BYTES: u32 = FOUND + 32 + 2 * 4 * WARPS;

const FOUND: u32 = 8 * 256;
const COUNTS: u32 = FOUND + 32;
const WARPS: u32 = THREADS / 32;

/// f32 bits as an integer of the same order (`f32::total_cmp`).
#[inline(always)]
pub(crate) fn ordered(bits: u32) -> u32 {
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// The smallest key that is taken.
#[derive(Clone, Copy)]
pub(crate) struct Threshold {
    pub(crate) key: u32,
    /// Weight that entries of just this key have to bring.
    pub(crate) equal: u64,
}

/// Finds the key at which the weights of `0..n`, taken from the largest key down, reach `target`; at least 1,
/// at most their sum.
///
/// # Safety
/// [`BYTES`] of shared memory at `at`, this call's own; all lanes call it.
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn threshold(
    at: u32,
    n: u32,
    key: impl Fn(u32) -> u32,
    weight: impl Fn(u32) -> u64,
    target: u64,
) -> Threshold {
    let thread = isa::thread_x();
    let (mut prefix, mut left) = (0u32, target);
    for round in 0..4 {
        let shift = 24 - 8 * round;
        // SAFETY: a bin per lane; barriers between clearing, adding and reading.
        unsafe {
            isa::st_shared_2(at + 8 * thread, [0, 0]);
            isa::bar_sync();
            let mut i = thread;
            while i < n {
                let k = key(i);
                if round == 0 || k >> (shift + 8) == prefix >> (shift + 8) {
                    isa::atom_add_shared_u64(at + 8 * (k >> shift & 255), weight(i));
                }
                i += THREADS;
            }
            isa::bar_sync();
            if thread == 0 {
                let (mut bin, mut before) = (255, 0u64);
                loop {
                    let [low, high] = isa::ld_shared_2(at + 8 * bin);
                    let here = low as u64 | (high as u64) << 32;
                    if before + here >= left || bin == 0 {
                        break;
                    }
                    before += here;
                    bin -= 1;
                }
                left -= before;
                isa::st_shared_4(at + FOUND, [bin, left as u32, (left >> 32) as u32, 0]);
            }
            isa::bar_sync();
            let [bin, low, high, _] = isa::ld_shared_4(at + FOUND);
            (prefix, left) = (prefix | bin << shift, low as u64 | (high as u64) << 32);
        }
    }
    Threshold { key: prefix, equal: left }
}

/// Calls `put(place, i)` for the entries of `0..n` with keys above `threshold`, and for the first `equal` with
/// just that key, in order.
///
/// # Safety
/// As [`threshold`].
#[inline(always)]
#[track_caller]
pub(crate) unsafe fn collect(
    at: u32,
    n: u32,
    key: impl Fn(u32) -> u32,
    threshold: u32,
    equal: u32,
    put: impl Fn(u32, u32),
) {
    let (warp, lane) = (isa::thread_x() / 32, isa::thread_x() % 32);
    let below = (1u32 << lane) - 1;
    let (mut placed, mut equals) = (0, 0);
    let mut start = 0;
    while start < n {
        let i = start + isa::thread_x();
        let k = if i < n { key(i) } else { 0 };
        // Two scans: how many of the threshold's key come before, and then how many are taken before.
        let same = isa::ballot(i < n && k == threshold);
        // SAFETY: a word per warp; a barrier before and after reading.
        let (same_before, same_all) = unsafe { scan(at, warp, same.count_ones()) };
        let rank = equals + same_before + (same & below).count_ones();
        let take = i < n && (k > threshold || k == threshold && rank < equal);
        let taken = isa::ballot(take);
        // SAFETY: as above.
        let (taken_before, taken_all) = unsafe { scan(at, warp, taken.count_ones()) };
        if take {
            put(placed + taken_before + (taken & below).count_ones(), i);
        }
        (placed, equals) = (placed + taken_all, equals + same_all);
        start += THREADS;
    }
}

/// The sum of `x` over the warps before this one, and over all.
#[inline(always)]
#[track_caller]
unsafe fn scan(at: u32, warp: u32, x: u32) -> (u32, u32) {
    // SAFETY: the caller's promise.
    unsafe {
        if isa::thread_x().is_multiple_of(32) {
            isa::st_shared_1(at + COUNTS + 4 * warp, [x]);
        }
        isa::bar_sync();
        let (mut before, mut all) = (0, 0);
        for w in 0..WARPS {
            let [count] = isa::ld_shared_1(at + COUNTS + 4 * w);
            before += if w < warp { count } else { 0 };
            all += count;
        }
        isa::bar_sync();
        (before, all)
    }
}
