//! int4 KV: quantising a full group, reading rows back. The layout is [`Int4Pages`]'s.
#![allow(unsafe_op_in_unsafe_fn)]

use ferroflash_kernels::abi::{INT4_GROUP, Sequence};
use half::f16;

use super::Cpu;
use super::convert::load_row;
use super::kv_rows::Rows;
use super::simd::{Simd, Task};
use crate::device::DequantCall;
use crate::kv_cache::{Int4Pages, int4_v_group};

/// Where the parts of int4 pages are.
#[derive(Clone, Copy)]
pub(super) struct Int4Rows {
    head_dim: usize,
    v_group: usize,
    k_codes: Rows,
    k_params: Rows,
    v_codes: Rows,
    v_params: Rows,
    k_tail: Rows,
    v_tail: Rows,
}

impl Int4Rows {
    pub(super) fn new(pages: &Int4Pages<'_>, head_dim: usize) -> Self {
        Int4Rows {
            head_dim,
            v_group: int4_v_group(head_dim),
            k_codes: Rows::paged(&pages.k_codes),
            k_params: Rows::paged(&pages.k_params),
            v_codes: Rows::paged(&pages.v_codes),
            v_params: Rows::paged(&pages.v_params),
            k_tail: Rows::paged(&pages.k_tail),
            v_tail: Rows::paged(&pages.v_tail),
        }
    }

    /// One K row as f32.
    ///
    /// # Safety
    /// The machine has `S`; all indices are within the pages; `to` takes `head_dim` f32.
    #[inline(always)]
    pub(super) unsafe fn load_k<S: Simd>(
        &self,
        seq: &Sequence,
        head: usize,
        token: usize,
        (page, offset): (usize, usize),
        to: *mut f32,
    ) {
        if in_tail(seq, token) {
            return self.load_tail::<S>(&self.k_tail, seq, head, token, to);
        }
        self.unpack_k::<S>(page, head, offset, to);
    }

    /// One V row as f32.
    ///
    /// # Safety
    /// As [`Int4Rows::load_k`].
    #[inline(always)]
    pub(super) unsafe fn load_v<S: Simd>(
        &self,
        seq: &Sequence,
        head: usize,
        token: usize,
        (page, offset): (usize, usize),
        to: *mut f32,
    ) {
        if in_tail(seq, token) {
            return self.load_tail::<S>(&self.v_tail, seq, head, token, to);
        }
        self.unpack_v::<S>(page, head, offset, to);
    }

    #[inline(always)]
    unsafe fn load_tail<S: Simd>(
        &self,
        tail: &Rows,
        seq: &Sequence,
        head: usize,
        token: usize,
        to: *mut f32,
    ) {
        let row = tail.at(seq.tail_slot as usize, head, token % INT4_GROUP);
        load_row::<S, f16>(row.cast(), to, self.head_dim);
    }

    #[inline(always)]
    unsafe fn unpack_k<S: Simd>(&self, page: usize, head: usize, offset: usize, to: *mut f32) {
        let codes = self.k_codes.at(page, head, offset);
        let min: *const f16 = self.k_params.at(page, head, offset / INT4_GROUP).cast();
        let scale = min.add(self.head_dim);
        let half = self.head_dim / 2;
        let mut i = 0;
        while i + S::LANES <= half {
            let (low, high) = S::load_nibbles(codes.add(i));
            for (code, d) in [(low, i), (high, half + i)] {
                let (min, scale) = (S::load_f16(min.add(d).cast()), S::load_f16(scale.add(d).cast()));
                S::store(to.add(d), S::fma(code, scale, min));
            }
            i += S::LANES;
        }
        while i < half {
            let byte = *codes.add(i);
            for (code, d) in [(byte & 15, i), (byte >> 4, half + i)] {
                *to.add(d) = code as f32 * (*scale.add(d)).to_f32() + (*min.add(d)).to_f32();
            }
            i += 1;
        }
    }

    #[inline(always)]
    unsafe fn unpack_v<S: Simd>(&self, page: usize, head: usize, offset: usize, to: *mut f32) {
        let codes = self.v_codes.at(page, head, offset);
        let min: *const f16 = self.v_params.at(page, head, offset).cast();
        let scale = min.add(self.head_dim / self.v_group);
        let half = self.head_dim / 2;
        // A vector must stay inside one group of channels, in both halves of the row.
        let vectors = self.v_group.is_multiple_of(S::LANES) && half.is_multiple_of(S::LANES);
        for i in (0..half).step_by(if vectors { S::LANES } else { 1 }) {
            if vectors {
                let (low, high) = S::load_nibbles(codes.add(i));
                for (code, d) in [(low, i), (high, half + i)] {
                    let group = d / self.v_group;
                    let (min, scale) = ((*min.add(group)).to_f32(), (*scale.add(group)).to_f32());
                    S::store(to.add(d), S::fma(code, S::splat(scale), S::splat(min)));
                }
            } else {
                let byte = *codes.add(i);
                for (code, d) in [(byte & 15, i), (byte >> 4, half + i)] {
                    let group = d / self.v_group;
                    *to.add(d) = code as f32 * (*scale.add(group)).to_f32() + (*min.add(group)).to_f32();
                }
            }
        }
    }

    /// Quantises the full tail of a sequence into its group of tokens of a page.
    ///
    /// # Safety
    /// All indices are within the pages; no other thread touches this group or tail.
    pub(super) unsafe fn flush(&self, tail: usize, page: usize, head: usize, offset: usize) {
        let d_range = 0..self.head_dim;
        let k = |token: usize, d: usize| {
            (*self.k_tail.at(tail, head, token).cast::<f16>().wrapping_add(d)).to_f32()
        };
        let v = |token: usize, d: usize| {
            (*self.v_tail.at(tail, head, token).cast::<f16>().wrapping_add(d)).to_f32()
        };
        let params = self.k_params.at(page, head, offset / INT4_GROUP).cast::<f16>().cast_mut();
        let k_ranges: Vec<Range> =
            d_range.clone().map(|d| Range::of((0..INT4_GROUP).map(|token| k(token, d)))).collect();
        for (d, range) in k_ranges.iter().enumerate() {
            *params.add(d) = range.min;
            *params.add(self.head_dim + d) = range.scale;
        }
        let groups = self.head_dim / self.v_group;
        for token in 0..INT4_GROUP {
            let codes = self.k_codes.at(page, head, offset + token).cast_mut();
            pack(codes, self.head_dim, |d| k_ranges[d].code(k(token, d)));

            let params = self.v_params.at(page, head, offset + token).cast::<f16>().cast_mut();
            for group in 0..groups {
                let range =
                    Range::of((group * self.v_group..(group + 1) * self.v_group).map(|d| v(token, d)));
                *params.add(group) = range.min;
                *params.add(groups + group) = range.scale;
            }
            let codes = self.v_codes.at(page, head, offset + token).cast_mut();
            pack(codes, self.head_dim, |d| {
                let group = d / self.v_group;
                Range { min: *params.add(group), scale: *params.add(groups + group) }.code(v(token, d))
            });
        }
    }

    /// Where a tail's rows are.
    pub(super) fn tails(&self) -> (Rows, Rows) {
        (self.k_tail, self.v_tail)
    }
}

fn in_tail(seq: &Sequence, token: usize) -> bool {
    token >= seq.kv_len as usize / INT4_GROUP * INT4_GROUP
}

unsafe fn pack(codes: *mut u8, head_dim: usize, code: impl Fn(usize) -> u8) {
    let half = head_dim / 2;
    for i in 0..half {
        *codes.add(i) = code(i) | code(half + i) << 4;
    }
}

/// The 16 values `min + scale * code`. The minimum is rounded down and the scale up, so that they
/// reach every value of the group and none is off by more than half a scale.
struct Range {
    min: f16,
    scale: f16,
}

impl Range {
    fn of(values: impl Iterator<Item = f32>) -> Self {
        let (low, high) = values.fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
        let min = f16::from_f32(low); // exact: tails hold f16
        let exact = (high - min.to_f32()) / 15.0;
        let mut scale = f16::from_f32(exact);
        if scale.to_f32() < exact {
            scale = f16::from_bits(scale.to_bits() + 1); // exact >= 0: the next larger f16
        }
        Range { min, scale }
    }

    fn code(&self, x: f32) -> u8 {
        let scale = self.scale.to_f32();
        if scale > 0.0 { ((x - self.min.to_f32()) / scale).round().clamp(0.0, 15.0) as u8 } else { 0 }
    }
}

pub(super) fn dequantize(cpu: &Cpu, call: DequantCall<'_>) {
    let DequantCall { pages, k, v } = call;
    let &[num_pages, num_kv_heads, page_size, head_dim] = k.shape() else { return };
    let job = Dequantize {
        rows: Int4Rows::new(&pages, head_dim),
        k: Rows::paged(&k.as_view()),
        v: Rows::paged(&v.as_view()),
        page_size,
    };
    cpu.for_each(num_pages * num_kv_heads, |i| {
        cpu.level.run(Page { job: &job, page: i / num_kv_heads, head: i % num_kv_heads });
    });
}

struct Dequantize {
    rows: Int4Rows,
    k: Rows,
    v: Rows,
    page_size: usize,
}

// SAFETY: the pages are only read; each `Page` writes the f32 rows of its own page and head.
unsafe impl Sync for Dequantize {}

struct Page<'a> {
    job: &'a Dequantize,
    page: usize,
    head: usize,
}

impl Task for Page<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Page { job, page, head } = self;
        for token in 0..job.page_size {
            job.rows.unpack_k::<S>(page, head, token, job.k.at(page, head, token).cast_mut().cast());
            job.rows.unpack_v::<S>(page, head, token, job.v.at(page, head, token).cast_mut().cast());
        }
    }
}
