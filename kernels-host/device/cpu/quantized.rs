//! Quantised KV: writing rows, quantising a full group of int4 keys, reading rows back. The forms are [`QuantPages`]'s, the
//! arithmetic `abi::codec`'s.
#![allow(unsafe_op_in_unsafe_fn)]

use ferroflash_kernels::abi::codec::{
    F16Bits, INT4_K_MAX, INT4_V_MAX, clamped, fp8_code, int4_code, int4_scale, int4_v_params, int4_v_range,
    int8_code, int8_scale,
};
use ferroflash_kernels::abi::{INT4_GROUP, INT4_SHIFTS, Sequence};
use half::f16;

use super::Cpu;
use super::append::MAX_DIM;
use super::convert::{load_row, store_row};
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

    // Rows are whole vectors, as quantised KV has multiples of 16 channels. Vectors stay out of closures, which are not always
    // inlined.
    #[inline(always)]
    unsafe fn load_page<S: Simd>(&self, page: usize, head: usize, offset: usize, to: *mut f32, dim: usize) {
        match self {
            QuantRows::F16(rows) => load_row::<S, f16>(rows.at(page, head, offset).cast(), to, dim),
            QuantRows::Fp8 { codes, scales } => {
                let (row, scale) = (codes.at(page, head, offset), S::splat(*scales.add(head)));
                for i in (0..dim).step_by(S::LANES) {
                    S::store(to.add(i), S::mul(S::load_fp8(row.add(i)), scale));
                }
            }
            QuantRows::Int8 { codes, scales } => {
                let row = codes.at(page, head, offset).cast::<i8>();
                let scale = S::splat((*scales.at(page, head, offset).cast::<f16>()).to_f32());
                for i in (0..dim).step_by(S::LANES) {
                    S::store(to.add(i), S::mul(S::load_i8(row.add(i)), scale));
                }
            }
            QuantRows::Int4Keys { codes, params, .. } => {
                let row = codes.at(page, head, offset).cast();
                let min: *const u16 = params.at(page, head, offset / INT4_GROUP).cast();
                let scale = min.add(dim);
                for i in (0..dim).step_by(S::LANES) {
                    let (scale, min) = (S::load_f16(scale.add(i)), S::load_f16(min.add(i)));
                    S::store(to.add(i), S::fma(S::load_int4(row, i), scale, min));
                }
            }
            QuantRows::Int4Values { codes, params } => {
                let row = codes.at(page, head, offset).cast();
                for group in 0..dim / INT4_GROUP {
                    let at = params.at(page, head, group).cast::<u16>().add(offset);
                    let (min, scale) = int4_v_range::<Host>(*at as u32);
                    let (min, scale) = (S::splat(min), S::splat(scale));
                    for i in (group * INT4_GROUP..(group + 1) * INT4_GROUP).step_by(S::LANES) {
                        S::store(to.add(i), S::fma(S::load_int4(row, i), scale, min));
                    }
                }
            }
        }
    }

    /// Writes a token's row; of int4 keys into the tail, and the group into its page when it is full.
    ///
    /// # Safety
    /// The machine has `S`; all indices are within the pages; no other thread touches this token, group or tail.
    #[inline(always)]
    pub(super) unsafe fn store<S: Simd>(
        &self,
        (page, head, offset): (usize, usize, usize),
        (tail_slot, position): (usize, usize),
        row: &[f32],
    ) {
        match self {
            QuantRows::F16(rows) => {
                let to = rows.at(page, head, offset).cast_mut();
                store_row::<S, f16>(row.as_ptr(), to.cast(), row.len());
            }
            QuantRows::Fp8 { codes, scales } => {
                let (to, scale) = (codes.at(page, head, offset).cast_mut(), *scales.add(head));
                row.iter().enumerate().for_each(|(i, &x)| *to.add(i) = fp8_code(x / scale) as u8);
            }
            QuantRows::Int8 { codes, scales } => {
                let (min, max) = range(row);
                let bits = int8_scale::<Host>(max.max(-min).max(0.0));
                *scales.at(page, head, offset).cast::<u16>().cast_mut() = bits as u16;
                let (to, scale) = (codes.at(page, head, offset).cast_mut(), Host::value(bits));
                row.iter().enumerate().for_each(|(i, &x)| *to.add(i) = int8_code(x, scale) as u8);
            }
            QuantRows::Int4Keys { codes, params, tail } => {
                let in_group = position % INT4_GROUP;
                let to_tail = |token| tail.at(tail_slot, head, token).cast::<f16>().cast_mut();
                store_clamped::<S>(row, INT4_K_MAX, to_tail(in_group));
                if in_group == INT4_GROUP - 1 {
                    let first = offset - in_group;
                    let params = params.at(page, head, first / INT4_GROUP).cast::<f16>().cast_mut();
                    let to = |token| codes.at(page, head, first + token).cast_mut();
                    flush::<S>(|token| to_tail(token).cast_const(), row.len(), params, to);
                }
            }
            QuantRows::Int4Values { codes, params } => {
                let to = codes.at(page, head, offset).cast_mut();
                let (mut rounded, mut values) = ([f16::ZERO; INT4_GROUP], [0f32; INT4_GROUP]);
                for (group, row) in row.chunks_exact(INT4_GROUP).enumerate() {
                    store_clamped::<S>(row, INT4_V_MAX, rounded.as_mut_ptr());
                    load_row::<S, f16>(rounded.as_ptr(), values.as_mut_ptr(), INT4_GROUP);
                    let (min, max) = range(&values);
                    let bits = int4_v_params::<Host>(min, max);
                    *params.at(page, head, group).cast::<u16>().cast_mut().add(offset) = bits as u16;
                    let (min, scale) = int4_v_range::<Host>(bits);
                    let mut code = [0; INT4_GROUP];
                    for (code, &x) in code.iter_mut().zip(&values) {
                        *code = int4_code(x, min, scale);
                    }
                    pack(to.add(group * INT4_GROUP / 2), &code);
                }
            }
        }
    }
}

/// Of no values.
const NO_RANGE: (f32, f32) = (f32::INFINITY, f32::NEG_INFINITY);

/// Least and largest, NaN left out, of a multiple of 16 values: in lanes, as the order of one fold would bind the compiler.
#[inline(always)]
fn range(values: &[f32]) -> (f32, f32) {
    let (mut min, mut max) = ([NO_RANGE.0; 16], [NO_RANGE.1; 16]);
    for values in values.as_chunks().0 {
        widen(&mut min, &mut max, values);
    }
    (min.into_iter().fold(NO_RANGE.0, f32::min), max.into_iter().fold(NO_RANGE.1, f32::max))
}

/// Takes values into ranges, NaN left out. Not by `f32::min`, which costs three instructions.
#[inline(always)]
fn widen<const N: usize>(min: &mut [f32; N], max: &mut [f32; N], values: &[f32; N]) {
    for i in 0..N {
        min[i] = if values[i] < min[i] { values[i] } else { min[i] };
        max[i] = if values[i] > max[i] { values[i] } else { max[i] };
    }
}

/// Writes a row, a multiple of [`INT4_GROUP`], as f16 of size `max` at most; NaN as 0.
#[inline(always)]
unsafe fn store_clamped<S: Simd>(row: &[f32], max: f32, to: *mut f16) {
    for (i, values) in row.as_chunks::<INT4_GROUP>().0.iter().enumerate() {
        let mut within = *values;
        for x in &mut within {
            *x = clamped(*x, max);
        }
        store_row::<S, f16>(within.as_ptr(), to.add(i * INT4_GROUP), INT4_GROUP);
    }
}

/// Quantises a group of keys.
#[inline(always)]
unsafe fn flush<S: Simd>(
    rows: impl Fn(usize) -> *const f16,
    dim: usize,
    params: *mut f16,
    codes: impl Fn(usize) -> *mut u8,
) {
    let (mut row, mut scale, mut code) = ([0f32; MAX_DIM], [0f32; MAX_DIM], [0; MAX_DIM]);
    let (mut min, mut max) = ([NO_RANGE.0; MAX_DIM], [NO_RANGE.1; MAX_DIM]);
    for token in 0..INT4_GROUP {
        load_row::<S, f16>(rows(token), row.as_mut_ptr(), dim);
        widen(&mut min, &mut max, &row);
    }
    for d in 0..dim {
        scale[d] = int4_scale::<Host>(min[d], max[d]);
    }
    store_row::<S, f16>(min.as_ptr(), params, dim); // exact, as of the scales: f16 both
    store_row::<S, f16>(scale.as_ptr(), params.add(dim), dim);
    for token in 0..INT4_GROUP {
        load_row::<S, f16>(rows(token), row.as_mut_ptr(), dim);
        for d in 0..dim {
            code[d] = int4_code(row[d], min[d], scale[d]);
        }
        pack(codes(token), &code[..dim]);
    }
}

/// Writes codes of four bits, eight a word.
#[inline(always)]
unsafe fn pack(to: *mut u8, codes: &[u32]) {
    for (i, codes) in codes.as_chunks::<8>().0.iter().enumerate() {
        let word = (0..8).fold(0, |word, j| word | codes[j] << INT4_SHIFTS[j]);
        to.add(4 * i).cast::<u32>().write_unaligned(word.to_le());
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
