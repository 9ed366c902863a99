//! Where a block's K and V rows are, and how they come into f32 scratch.
#![allow(unsafe_op_in_unsafe_fn)]

use ferroflash_kernels::abi::{KV_BLOCK, Sequence};
use half::{bf16, f16};

use super::convert::{Float, load_row};
use super::matmul::matmul;
use super::quantized::QuantRows;
use super::simd::Simd;
use crate::kv::Kv;
use crate::tensor::{DType, View};

/// What stands in for the rows after a sequence's end, so that unused slots are never read.
static ZEROS: [f32; 256] = [0.0; 256];

/// The second halves of a block's V rows, asked for while Q K^T is computed: memory must not idle then.
pub(super) struct Ahead {
    rows: [*const u8; KV_BLOCK],
    from: usize,
    lines: usize,
    per_step: usize,
}

impl Ahead {
    /// Asks for the lines of one of `head_dim` steps.
    #[inline(always)]
    pub(super) fn prefetch<S: Simd>(&self, step: usize) {
        for i in step * self.per_step..(step + 1) * self.per_step {
            let (row, line) = (i % KV_BLOCK, i / KV_BLOCK);
            if line < self.lines {
                S::prefetch(self.rows[row].wrapping_add(self.from + 64 * line));
            }
        }
    }
}

/// Whose KV: an item's.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) seq: &'a Sequence,
    pub(super) head: usize,
    /// First entry of its page list.
    pub(super) list: usize,
    /// One past its last token, counted along the list.
    pub(super) end: usize,
}

/// The KV of one call.
pub(super) struct KvRows<'a> {
    /// Tokens per page; 0: ragged.
    page_size: usize,
    pages: &'a [u32],
    head_dim: usize,
    v_head_dim: usize,
    source: Source,
}

enum Source {
    Float { dtype: DType, k: Rows, v: Rows },
    Quantized { k: QuantRows, v: QuantRows },
}

/// Rows of one tensor; strides in bytes.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) ptr: *const u8,
    pub(super) page: usize,
    pub(super) head: usize,
    pub(super) token: usize,
}

impl Rows {
    pub(super) fn paged(view: &View<'_>) -> Self {
        let (s, size) = (view.strides(), view.dtype().size());
        Rows { ptr: view.ptr(), page: s[0] * size, head: s[1] * size, token: s[2] * size }
    }

    /// One page that holds everything.
    fn ragged(view: &View<'_>) -> Self {
        let (s, size) = (view.strides(), view.dtype().size());
        Rows { ptr: view.ptr(), page: 0, head: s[1] * size, token: s[0] * size }
    }

    #[inline(always)]
    pub(super) fn at(&self, page: usize, head: usize, token: usize) -> *const u8 {
        self.ptr.wrapping_add(page * self.page + head * self.head + token * self.token)
    }
}

impl<'a> KvRows<'a> {
    /// `head_dims`: channels of K, of V.
    pub(super) fn new(kv: &Kv<'_>, page_size: usize, pages: &'a [u32], head_dims: (usize, usize)) -> Self {
        let (head_dim, v_head_dim) = head_dims;
        let source = match kv {
            Kv::Ragged { k, v } => Source::Float { dtype: k.dtype(), k: Rows::ragged(k), v: Rows::ragged(v) },
            Kv::Paged { k, v } => Source::Float { dtype: k.dtype(), k: Rows::paged(k), v: Rows::paged(v) },
            Kv::Quantized { k, v } => Source::Quantized { k: QuantRows::new(k), v: QuantRows::new(v) },
        };
        KvRows { page_size, pages, head_dim, v_head_dim, source }
    }

    /// Page and offset of a sequence's token.
    #[inline(always)]
    pub(super) fn locate(&self, place: Place<'_>, token: usize) -> (usize, usize) {
        let page_size = self.page_size;
        if page_size == 0 {
            return (0, place.seq.kv_start as usize + token);
        }
        (self.pages[place.list + token / page_size] as usize, token % page_size)
    }

    /// Addresses of tokens `at..at + n`, then zeros.
    #[inline(always)]
    fn addresses(&self, rows: &Rows, place: Place<'_>, at: usize, n: usize) -> [*const u8; KV_BLOCK] {
        let mut addresses = [ZEROS.as_ptr().cast(); KV_BLOCK];
        let mut i = 0;
        while i < n {
            let (page, offset) = self.locate(place, at + i);
            let run = if self.page_size == 0 { n - i } else { (n - i).min(self.page_size - offset) };
            let first = rows.at(page, place.head, offset);
            for j in 0..run {
                addresses[i + j] = first.wrapping_add(j * rows.token);
            }
            i += run;
        }
        addresses
    }

    /// K of tokens `at..at + n` as f32 `[head_dim padded to vectors, KV_BLOCK]`; columns from `n` are zero.
    ///
    /// # Safety
    /// The machine has `S`; the plan's indices are within the call's KV; `to` and `spare` are block scratch.
    #[inline(always)]
    pub(super) unsafe fn load_k<S: Simd>(
        &self,
        place: Place<'_>,
        at: usize,
        n: usize,
        to: *mut f32,
        spare: *mut f32,
    ) -> Ahead {
        match &self.source {
            Source::Float { dtype, k, v } => {
                let rows = self.addresses(k, place, at, n);
                let ahead = self.addresses(v, place, at, n);
                match dtype {
                    DType::F16 => transpose::<S, f16>(&rows, &ahead, self.head_dim, to),
                    DType::BF16 => transpose::<S, bf16>(&rows, &ahead, self.head_dim, to),
                    _ => transpose::<S, f32>(&rows, &ahead, self.head_dim, to),
                }
                let bytes = self.v_head_dim * dtype.size();
                let (from, lines) = (bytes / 2, (bytes / 2).div_ceil(64));
                Ahead { rows: ahead, from, lines, per_step: (KV_BLOCK * lines).div_ceil(self.head_dim) }
            }
            Source::Quantized { k, .. } => {
                let mut rows: [*const u8; KV_BLOCK] = [ZEROS.as_ptr().cast(); KV_BLOCK];
                for (i, address) in rows.iter_mut().enumerate().take(n) {
                    let row = spare.add(i * self.head_dim);
                    let located = self.locate(place, at + i);
                    k.load::<S>(place.seq, place.head, at + i, located, row, self.head_dim);
                    *address = row.cast();
                }
                transpose::<S, f32>(&rows, &rows, self.head_dim, to);
                Ahead { rows, from: 0, lines: 0, per_step: 0 }
            }
        }
    }

    /// `o[m, v_head_dim] += p[m, n] * V` for V of tokens `at..at + n`; rows of `p` are `KV_BLOCK` apart,
    /// those of `o` the padded v_head_dim.
    ///
    /// # Safety
    /// As [`KvRows::load_k`]; `p` and `o` hold `m` rows.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // a place in the KV, and two matrices
    pub(super) unsafe fn add_pv<S: Simd>(
        &self,
        place: Place<'_>,
        at: usize,
        n: usize,
        p: *const f32,
        m: usize,
        o: *mut f32,
        spare: *mut f32,
    ) {
        let stride = self.v_head_dim.next_multiple_of(16);
        let vecs = stride / S::LANES;
        match &self.source {
            Source::Float { dtype, k, v } => {
                let rows = self.addresses(v, place, at, n);
                let next = (at + n).min(place.end);
                let next_n = (place.end - next).min(KV_BLOCK);
                let ahead = self.addresses(k, place, next, next_n);
                let lines = (self.head_dim * dtype.size()).div_ceil(64);
                // A few query rows read each V once: it is widened on the way into the product.
                if stride == self.v_head_dim && m <= S::TILE_ROWS {
                    let product = Product { rows: &rows, ahead: &ahead, m, n, vecs, p, o, stride };
                    return match dtype {
                        DType::F16 => product.run::<S, f16>(),
                        DType::BF16 => product.run::<S, bf16>(),
                        _ => product.run::<S, f32>(),
                    };
                }
                for (i, row) in rows.iter().take(n).enumerate() {
                    let to = spare.add(i * stride);
                    (0..lines).for_each(|line| S::prefetch(ahead[i].wrapping_add(64 * line)));
                    match dtype {
                        DType::F16 => load_row::<S, f16>(row.cast(), to, self.v_head_dim),
                        DType::BF16 => load_row::<S, bf16>(row.cast(), to, self.v_head_dim),
                        _ => load_row::<S, f32>(row.cast(), to, self.v_head_dim),
                    }
                }
            }
            Source::Quantized { v, .. } => {
                for i in 0..n {
                    let (located, to) = (self.locate(place, at + i), spare.add(i * stride));
                    v.load::<S>(place.seq, place.head, at + i, located, to, self.v_head_dim);
                }
            }
        }
        for i in 0..n {
            for d in self.v_head_dim..stride {
                *spare.add(i * stride + d) = 0.0;
            }
        }
        let rows = |i, j| spare.add(i * stride + j).cast_const();
        matmul::<S, f32, true>(m, n, vecs, p, KV_BLOCK, rows, o, stride);
    }
}

/// `o[m, vecs] += p[m, n] * rows`, asking for the rows `ahead` on the way.
struct Product<'a> {
    rows: &'a [*const u8; KV_BLOCK],
    ahead: &'a [*const u8; KV_BLOCK],
    m: usize,
    n: usize,
    vecs: usize,
    p: *const f32,
    o: *mut f32,
    stride: usize,
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, T: Float>(self) {
        let width = S::TILE_VECS * S::LANES * size_of::<T>();
        let rows = |i: usize, j: usize| {
            let ahead = self.ahead[i].cast::<T>().wrapping_add(j).cast::<u8>();
            (0..width).step_by(64).for_each(|line| S::prefetch(ahead.wrapping_add(line)));
            self.rows[i].cast::<T>().add(j)
        };
        matmul::<S, T, true>(self.m, self.n, self.vecs, self.p, KV_BLOCK, rows, self.o, self.stride);
    }
}

/// `KV_BLOCK` rows of `n` elements to f32 columns. On the way the first halves of the rows `ahead`, of the
/// same size, are asked for: page tables and head strides defeat the hardware's prefetcher, and decode would wait for
/// each row in turn.
#[inline(always)]
unsafe fn transpose<S: Simd, T: Float>(
    rows: &[*const u8; KV_BLOCK],
    ahead: &[*const u8; KV_BLOCK],
    n: usize,
    to: *mut f32,
) {
    // Pairs of 16-bit elements move as one lane: half the shuffles.
    let per_lane = if T::PAIRS { 2 } else { 1 };
    let step = S::LANES * per_lane;
    let whole = n - n % step;
    for token in (0..KV_BLOCK).step_by(S::LANES) {
        for d in (0..whole).step_by(step) {
            let square = S::square(
                #[inline(always)]
                |i| {
                    if d < n / 2 {
                        S::prefetch(ahead[token + i].cast::<T>().wrapping_add(d).cast());
                    }
                    let from = rows[token + i].cast::<T>().add(d);
                    if T::PAIRS { S::load(from.cast()) } else { T::load::<S>(from) }
                },
            );
            for (i, &column) in S::transpose(square).as_ref().iter().enumerate() {
                let to = to.add((d + i * per_lane) * KV_BLOCK + token);
                if T::PAIRS {
                    let (first, second) = T::split::<S>(column);
                    S::store(to, first);
                    S::store(to.add(KV_BLOCK), second);
                } else {
                    S::store(to, column);
                }
            }
        }
        for d in whole..n {
            for i in 0..S::LANES {
                *to.add(d * KV_BLOCK + token + i) = (*rows[token + i].cast::<T>().add(d)).to_f32();
            }
        }
    }
}
