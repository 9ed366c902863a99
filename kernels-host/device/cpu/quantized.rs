//! Quantised KV: writing rows, quantising a full group of int4 keys, reading rows back. The forms are [`QuantPages`]'s, the
//! arithmetic `abi::codec`'s.
#![allow(unsafe_op_in_unsafe_fn)]

use ferroflash_kernels::abi::codec::{
    F16Bits, INT4_K_MAX, INT4_V_MAX, fp8_code, fp8_value, int4_code, int4_scale, int4_v_params, int4_v_range,
    int8_code, int8_scale, to_f16,
};
use ferroflash_kernels::abi::{INT4_GROUP, INT4_SHIFTS, Sequence};
use half::f16;

use super::Cpu;
use super::convert::load_row;
use super::kv_rows::Rows;
use super::simd::{Simd, Task};
use crate::device::DequantCall;
use crate::kv::{Host, QuantPages};
use crate::tensor::View;

/// Where one side's parts are.
#[derive(Clone, Copy)]
pub(super) enum QuantRows {
    F16(Rows),
    Fp8 { codes: Rows, scales: *const f32 },
    Int8 { codes: Rows, scales: Rows },
    Int4Keys { codes: Rows, params: Rows, tail: Rows },
    Int4Values { codes: Rows, params: Rows },
}

impl QuantRows {
    pub(super) fn new(pages: &QuantPages<View<'_>>) -> Self {
        match pages {
            QuantPages::F16(pages) => QuantRows::F16(Rows::paged(pages)),
            QuantPages::Fp8 { codes, scales } => {
                QuantRows::Fp8 { codes: Rows::paged(codes), scales: scales.ptr().cast() }
            }
            QuantPages::Int8 { codes, scales } => {
                QuantRows::Int8 { codes: Rows::paged(codes), scales: Rows::paged(scales) }
            }
            QuantPages::Int4Keys { codes, params, tail } => {
                let [codes, params, tail] = [codes, params, tail].map(Rows::paged);
                QuantRows::Int4Keys { codes, params, tail }
            }
            QuantPages::Int4Values { codes, params } => {
                QuantRows::Int4Values { codes: Rows::paged(codes), params: Rows::paged(params) }
            }
        }
    }

    /// One row as f32, from its page or, of the newest int4 keys, from the sequence's tail.
    ///
    /// # Safety
    /// The machine has `S`; all indices are within the pages; `to` takes `dim` f32.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(
        &self,
        seq: &Sequence,
        head: usize,
        token: usize,
        (page, offset): (usize, usize),
        to: *mut f32,
        dim: usize,
    ) {
        match self {
            QuantRows::Int4Keys { tail, .. } if token >= seq.kv_len as usize / INT4_GROUP * INT4_GROUP => {
                let row = tail.at(seq.tail_slot as usize, head, token % INT4_GROUP);
                load_row::<S, f16>(row.cast(), to, dim);
            }
            _ => self.load_page::<S>(page, head, offset, to, dim),
        }
    }

    #[inline(always)]
    unsafe fn load_page<S: Simd>(&self, page: usize, head: usize, offset: usize, to: *mut f32, dim: usize) {
        match self {
            QuantRows::F16(rows) => load_row::<S, f16>(rows.at(page, head, offset).cast(), to, dim),
            QuantRows::Fp8 { codes, scales } => {
                let (row, scale) = (codes.at(page, head, offset), *scales.add(head));
                for i in 0..dim {
                    *to.add(i) = fp8_value(*row.add(i) as u32) * scale;
                }
            }
            QuantRows::Int8 { codes, scales } => {
                let row = codes.at(page, head, offset).cast::<i8>();
                let scale = (*scales.at(page, head, offset).cast::<f16>()).to_f32();
                for i in 0..dim {
                    *to.add(i) = *row.add(i) as f32 * scale;
                }
            }
            QuantRows::Int4Keys { codes, params, .. } => {
                let row = codes.at(page, head, offset).cast::<u32>();
                let min: *const f16 = params.at(page, head, offset / INT4_GROUP).cast();
                for i in (0..dim).step_by(8) {
                    let (min, scale) = (min.add(i), min.add(dim + i));
                    let word = row.add(i / 8).read_unaligned();
                    for (j, shift) in INT4_SHIFTS.into_iter().enumerate() {
                        let code = (word >> shift & 15) as f32;
                        *to.add(i + j) = code * (*scale.add(j)).to_f32() + (*min.add(j)).to_f32();
                    }
                }
            }
            QuantRows::Int4Values { codes, params } => {
                let row = codes.at(page, head, offset).cast::<u32>();
                for i in (0..dim).step_by(8) {
                    let at = params.at(page, head, i / INT4_GROUP).cast::<u16>().add(offset);
                    let (min, scale) = int4_v_range::<Host>(*at as u32);
                    let word = row.add(i / 8).read_unaligned();
                    for (j, shift) in INT4_SHIFTS.into_iter().enumerate() {
                        *to.add(i + j) = (word >> shift & 15) as f32 * scale + min;
                    }
                }
            }
        }
    }

    /// Writes a token's row; of int4 keys into the tail, and the group into its page when it is full.
    ///
    /// # Safety
    /// All indices are within the pages; no other thread touches this token, group or tail.
    pub(super) unsafe fn store(
        &self,
        (page, head, offset): (usize, usize, usize),
        (tail_slot, position): (usize, usize),
        row: &[f32],
    ) {
        match self {
            QuantRows::F16(rows) => {
                let to = rows.at(page, head, offset).cast::<f16>().cast_mut();
                row.iter().enumerate().for_each(|(i, &x)| *to.add(i) = f16::from_f32(x));
            }
            QuantRows::Fp8 { codes, scales } => {
                let (to, scale) = (codes.at(page, head, offset).cast_mut(), *scales.add(head));
                row.iter().enumerate().for_each(|(i, &x)| *to.add(i) = fp8_code(x / scale) as u8);
            }
            QuantRows::Int8 { codes, scales } => {
                let max = row.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
                let bits = int8_scale::<Host>(max);
                *scales.at(page, head, offset).cast::<u16>().cast_mut() = bits as u16;
                let (to, scale) = (codes.at(page, head, offset).cast_mut(), Host::value(bits));
                row.iter().enumerate().for_each(|(i, &x)| *to.add(i) = int8_code(x, scale) as u8);
            }
            QuantRows::Int4Keys { codes, params, tail } => {
                let in_group = position % INT4_GROUP;
                let to = tail.at(tail_slot, head, in_group).cast::<f16>().cast_mut();
                for (i, &x) in row.iter().enumerate() {
                    *to.add(i) = f16::from_f32(to_f16::<Host>(x, INT4_K_MAX));
                }
                if in_group == INT4_GROUP - 1 {
                    let first = offset - in_group;
                    let params = params.at(page, head, first / INT4_GROUP).cast::<f16>().cast_mut();
                    let rows = |token| tail.at(tail_slot, head, token).cast::<f16>();
                    flush(rows, row.len(), params, |token| codes.at(page, head, first + token).cast_mut());
                }
            }
            QuantRows::Int4Values { codes, params } => {
                let to = codes.at(page, head, offset).cast_mut();
                for (group, values) in row.chunks_exact(INT4_GROUP).enumerate() {
                    let values: [f32; INT4_GROUP] =
                        std::array::from_fn(|i| to_f16::<Host>(values[i], INT4_V_MAX));
                    let (min, max) = range(values.into_iter());
                    let bits = int4_v_params::<Host>(min, max);
                    *params.at(page, head, group).cast::<u16>().cast_mut().add(offset) = bits as u16;
                    let (min, scale) = int4_v_range::<Host>(bits);
                    pack(to.add(group * INT4_GROUP / 2), INT4_GROUP, |i| int4_code(values[i], min, scale));
                }
            }
        }
    }
}

fn range(values: impl Iterator<Item = f32>) -> (f32, f32) {
    values.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
}

/// Quantises a group of keys.
unsafe fn flush(
    rows: impl Fn(usize) -> *const f16,
    dim: usize,
    params: *mut f16,
    codes: impl Fn(usize) -> *mut u8,
) {
    let value = |token: usize, d: usize| (*rows(token).add(d)).to_f32();
    for d in 0..dim {
        let (min, max) = range((0..INT4_GROUP).map(|token| value(token, d)));
        *params.add(d) = f16::from_f32(min); // exact: tails hold f16
        *params.add(dim + d) = f16::from_f32(int4_scale::<Host>(min, max));
    }
    for token in 0..INT4_GROUP {
        let range = |d: usize| ((*params.add(d)).to_f32(), (*params.add(dim + d)).to_f32());
        pack(codes(token), dim, |d| int4_code(value(token, d), range(d).0, range(d).1));
    }
}

unsafe fn pack(to: *mut u8, dim: usize, code: impl Fn(usize) -> u32) {
    for i in (0..dim).step_by(8) {
        let word = (0..8).fold(0, |word, j| word | code(i + j) << INT4_SHIFTS[j]);
        to.add(i / 2).cast::<u32>().write_unaligned(word.to_le());
    }
}

pub(super) fn dequantize(cpu: &Cpu, call: DequantCall<'_>) {
    let DequantCall { pages, k, v } = call;
    let &[num_pages, num_kv_heads, page_size, dim] = k.shape() else { return };
    let [keys, values] = pages.each_ref().map(QuantRows::new);
    let sides = [(keys, Rows::paged(&k.as_view())), (values, Rows::paged(&v.as_view()))];
    let job = Dequantize { sides, page_size, dim };
    cpu.for_each(num_pages * num_kv_heads, |i| {
        cpu.level.run(Page { job: &job, page: i / num_kv_heads, head: i % num_kv_heads });
    });
}

struct Dequantize {
    sides: [(QuantRows, Rows); 2],
    page_size: usize,
    dim: usize,
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
        for (from, to) in job.sides {
            for token in 0..job.page_size {
                let to = to.at(page, head, token).cast_mut().cast();
                from.load_page::<S>(page, head, token, to, job.dim);
            }
        }
    }
}
