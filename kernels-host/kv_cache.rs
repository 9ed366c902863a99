//! Where keys and values live: views of ragged or paged KV, and [`KvCache`], which owns one layer's pages.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor, View, ViewMut};

/// Tokens that share one K scale in int4 pages, and the length of a sequence's 16-bit tail.
pub const INT4_GROUP: usize = ferroflash_kernels::abi::INT4_GROUP;

/// Channels that share one V scale of a token in int4 pages.
pub(crate) fn int4_v_group(head_dim: usize) -> usize {
    [32, 16, 8].into_iter().find(|g| head_dim.is_multiple_of(*g)).unwrap_or(head_dim)
}

/// Keys and values that attention reads.
#[derive(Clone, Copy, Debug)]
#[allow(clippy::large_enum_variant)] // borrowed views: boxing would allocate in every layer's run
pub enum Kv<'a> {
    /// `[total_kv, num_kv_heads, head_dim]`, sequences side by side.
    Ragged {
        /// Keys.
        k: View<'a>,
        /// Values.
        v: View<'a>,
    },
    /// `[num_pages, num_kv_heads, page_size, head_dim]` (HND). NHD memory is passed with
    /// `view.permute(&[0, 2, 1, 3])`.
    Paged {
        /// Keys.
        k: View<'a>,
        /// Values.
        v: View<'a>,
    },
    /// Quantised pages.
    Int4(Int4Pages<'a>),
}

/// Keys and values that an append writes; the shapes are [`Kv`]'s.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // as `Kv`
pub enum KvMut<'a> {
    /// `[num_pages, num_kv_heads, page_size, head_dim]`.
    Paged {
        /// Keys.
        k: ViewMut<'a>,
        /// Values.
        v: ViewMut<'a>,
        /// Channelwise minimum and maximum of each page's keys, of their type or f32
        /// `[num_pages, num_kv_heads, 2, head_dim]`.
        summaries: Option<ViewMut<'a>>,
    },
    /// Quantised pages.
    Int4(Int4PagesMut<'a>),
}

/// int4 KV pages (after KIVI, arXiv:2402.02750): `x = min + scale * code`, codes 0 to 15.
///
/// K has one `(min, scale)` per channel and group of [`INT4_GROUP`] tokens of a page; V has one per
/// token and group of channels (32, or 16 or 8 where `head_dim` is no multiple of it). The newest
/// `kv_len % INT4_GROUP` tokens of a sequence stand unquantised in its tail.
#[derive(Clone, Copy, Debug)]
pub struct Int4Pages<'a> {
    /// u8 `[num_pages, num_kv_heads, page_size, head_dim / 2]`; channel `i` in the
    /// low nibble of byte `i`, channel `i + head_dim / 2` in its high nibble.
    pub k_codes: View<'a>,
    /// f16 `[num_pages, num_kv_heads, page_size / INT4_GROUP, 2, head_dim]`: minima, then scales.
    pub k_params: View<'a>,
    /// u8, as `k_codes`.
    pub v_codes: View<'a>,
    /// f16 `[num_pages, num_kv_heads, page_size, 2, head_dim / v_group]`: minima, then scales.
    pub v_params: View<'a>,
    /// f16 `[num_tails, num_kv_heads, INT4_GROUP, head_dim]`.
    pub k_tail: View<'a>,
    /// f16, as `k_tail`.
    pub v_tail: View<'a>,
}

/// [`Int4Pages`], for writing.
#[derive(Debug)]
pub struct Int4PagesMut<'a> {
    /// As [`Int4Pages::k_codes`].
    pub k_codes: ViewMut<'a>,
    /// As [`Int4Pages::k_params`].
    pub k_params: ViewMut<'a>,
    /// As [`Int4Pages::v_codes`].
    pub v_codes: ViewMut<'a>,
    /// As [`Int4Pages::v_params`].
    pub v_params: ViewMut<'a>,
    /// As [`Int4Pages::k_tail`].
    pub k_tail: ViewMut<'a>,
    /// As [`Int4Pages::v_tail`].
    pub v_tail: ViewMut<'a>,
}

impl Int4PagesMut<'_> {
    pub(crate) fn as_view(&self) -> Int4Pages<'_> {
        Int4Pages {
            k_codes: self.k_codes.as_view(),
            k_params: self.k_params.as_view(),
            v_codes: self.v_codes.as_view(),
            v_params: self.v_params.as_view(),
            k_tail: self.k_tail.as_view(),
            v_tail: self.v_tail.as_view(),
        }
    }
}

/// Sizes of the pages behind a [`Kv`], found and checked at an operation's door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageDims {
    pub(crate) num_pages: usize,
    pub(crate) page_size: usize,
    pub(crate) num_tails: usize,
}

fn expect_shape(op: &'static str, what: &'static str, view: &View<'_>, expected: &[usize]) -> Result<()> {
    if view.shape() != expected {
        return Err(Error::shape(op, what, format_args!("{expected:?}"), view.shape()));
    }
    expect_unit_stride(op, what, view)
}

pub(crate) fn expect_unit_stride(op: &'static str, what: &'static str, view: &View<'_>) -> Result<()> {
    let rank = view.shape().len();
    if rank > 0 && view.shape()[rank - 1] > 1 && view.strides()[rank - 1] != 1 {
        return Err(Error::shape(op, what, "stride 1 in the last dimension", view.strides()));
    }
    Ok(())
}

fn expect_dtype(op: &'static str, what: &'static str, view: &View<'_>, expected: DType) -> Result<()> {
    if view.dtype() != expected {
        return Err(Error::dtype(op, what, expected, view.dtype()));
    }
    Ok(())
}

impl<'a> Kv<'a> {
    /// The parts, with their names.
    pub(crate) fn views(&self) -> impl Iterator<Item = (&'static str, View<'a>)> {
        let parts = match *self {
            Kv::Ragged { k, v } | Kv::Paged { k, v } => {
                [Some(("k", k)), Some(("v", v)), None, None, None, None]
            }
            Kv::Int4(p) => [
                Some(("k_codes", p.k_codes)),
                Some(("k_params", p.k_params)),
                Some(("v_codes", p.v_codes)),
                Some(("v_params", p.v_params)),
                Some(("k_tail", p.k_tail)),
                Some(("v_tail", p.v_tail)),
            ],
        };
        parts.into_iter().flatten()
    }

    /// Checks shapes and types against the heads and channels (of K, of V); ragged KV counts as one page of `total_kv`
    /// tokens.
    pub(crate) fn check(
        &self,
        op: &'static str,
        num_kv_heads: usize,
        (head_dim, v_head_dim): (usize, usize),
    ) -> Result<PageDims> {
        match self {
            Kv::Ragged { k, v } => {
                let total = k.shape().first().copied().unwrap_or(0);
                check_pair(op, k, v, &[total, num_kv_heads, head_dim], v_head_dim)?;
                Ok(PageDims { num_pages: 1, page_size: total, num_tails: 0 })
            }
            Kv::Paged { k, v } => {
                let (num_pages, page_size) = page_dims(op, k)?;
                check_pair(op, k, v, &[num_pages, num_kv_heads, page_size, head_dim], v_head_dim)?;
                Ok(PageDims { num_pages, page_size, num_tails: 0 })
            }
            Kv::Int4(_) if head_dim > 256 => {
                Err(Error::value(op, "head_dim of int4 KV", "at most 256", head_dim))
            }
            Kv::Int4(_) if head_dim != v_head_dim => Err(Error::value(
                op,
                "v_head_dim of int4 KV",
                format_args!("head_dim, {head_dim}"),
                v_head_dim,
            )),
            Kv::Int4(p) => p.check(op, num_kv_heads, head_dim),
        }
    }
}

fn page_dims(op: &'static str, k: &View<'_>) -> Result<(usize, usize)> {
    match k.shape() {
        &[num_pages, _, page_size, _] if page_size > 0 => Ok((num_pages, page_size)),
        other => {
            let expected = "[num_pages, num_kv_heads, page_size, head_dim] with page_size of at least 1";
            Err(Error::shape(op, "k", expected, other))
        }
    }
}

fn check_pair<const N: usize>(
    op: &'static str,
    k: &View<'_>,
    v: &View<'_>,
    shape: &[usize; N],
    v_head_dim: usize,
) -> Result<()> {
    expect_shape(op, "k", k, shape)?;
    let mut v_shape = *shape;
    v_shape[N - 1] = v_head_dim;
    expect_shape(op, "v", v, &v_shape)?;
    if !k.dtype().is_float() {
        return Err(Error::dtype(op, "k", "f32, f16 or bf16", k.dtype()));
    }
    expect_dtype(op, "v", v, k.dtype())
}

impl Int4Pages<'_> {
    pub(crate) fn check(&self, op: &'static str, num_kv_heads: usize, head_dim: usize) -> Result<PageDims> {
        let (num_pages, page_size) = page_dims(op, &self.k_codes)?;
        if !page_size.is_multiple_of(INT4_GROUP) {
            return Err(Error::value(
                op,
                "page_size of int4 KV",
                format_args!("a multiple of {INT4_GROUP}"),
                page_size,
            ));
        }
        let codes = [num_pages, num_kv_heads, page_size, head_dim / 2];
        let k_params = [num_pages, num_kv_heads, page_size / INT4_GROUP, 2, head_dim];
        let v_params = [num_pages, num_kv_heads, page_size, 2, head_dim / int4_v_group(head_dim)];
        let num_tails = self.k_tail.shape().first().copied().unwrap_or(0);
        let tail = [num_tails, num_kv_heads, INT4_GROUP, head_dim];
        let all: [(&'static str, &View<'_>, &[usize], DType); 6] = [
            ("k_codes", &self.k_codes, &codes, DType::U8),
            ("k_params", &self.k_params, &k_params, DType::F16),
            ("v_codes", &self.v_codes, &codes, DType::U8),
            ("v_params", &self.v_params, &v_params, DType::F16),
            ("k_tail", &self.k_tail, &tail, DType::F16),
            ("v_tail", &self.v_tail, &tail, DType::F16),
        ];
        for (what, view, shape, dtype) in all {
            expect_shape(op, what, view, shape)?;
            expect_dtype(op, what, view, dtype)?;
        }
        // Two params rows of a page are read as one run of `2 * n` values.
        for (what, view) in [("k_params", &self.k_params), ("v_params", &self.v_params)] {
            if view.strides()[3] != view.shape()[4] {
                return Err(Error::shape(op, what, "minima and scales side by side", view.strides()));
            }
        }
        Ok(PageDims { num_pages, page_size, num_tails })
    }
}

/// How a cache keeps its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// f32, f16 or bf16 pages.
    Float(DType),
    /// int4 pages with a 16-bit tail per sequence, see [`Int4Pages`].
    Int4 {
        /// Tails: the most sequences that may be in the cache at once.
        num_tails: usize,
    },
}

/// Sizes of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheSpec {
    /// Pages in the pool.
    pub num_pages: usize,
    /// Tokens per page, from 1; a multiple of [`INT4_GROUP`] for int4.
    pub page_size: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Element format.
    pub format: KvFormat,
    /// Whether to keep page minima and maxima for sparse top-k attention (float formats).
    pub summaries: bool,
}

impl KvCacheSpec {
    /// Bytes that one page takes in one layer, tails and summaries left out.
    pub fn page_bytes(&self) -> usize {
        let tokens = self.num_kv_heads * self.page_size;
        match self.format {
            KvFormat::Float(dtype) => 2 * tokens * self.head_dim * dtype.size(),
            KvFormat::Int4 { .. } => {
                let k_params = 4 * tokens / INT4_GROUP * self.head_dim;
                let v_params = 4 * tokens * (self.head_dim / int4_v_group(self.head_dim));
                tokens * self.head_dim + k_params + v_params
            }
        }
    }
}

/// The pages of one layer, owned.
#[derive(Debug)]
pub struct KvCache {
    spec: KvCacheSpec,
    pages: Pages,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one per layer of a model
enum Pages {
    Float {
        k: Tensor,
        v: Tensor,
        summaries: Option<Tensor>,
    },
    Int4 {
        k_codes: Tensor,
        k_params: Tensor,
        v_codes: Tensor,
        v_params: Tensor,
        k_tail: Tensor,
        v_tail: Tensor,
    },
}

impl KvCache {
    /// Allocates the pool, zeroed.
    pub fn new(device: &Device, spec: KvCacheSpec) -> Result<Self> {
        const OP: &str = "kv_cache";
        let KvCacheSpec { num_pages, page_size, num_kv_heads, head_dim, .. } = spec;
        if page_size == 0 {
            return Err(Error::value(OP, "page_size", "at least 1", page_size));
        }
        let zeros = |dtype, shape: &[usize]| Tensor::zeros(device, dtype, shape);
        let pages = match spec.format {
            KvFormat::Float(dtype) => {
                if !dtype.is_float() {
                    return Err(Error::dtype(OP, "format", "f32, f16 or bf16", dtype));
                }
                let shape = [num_pages, num_kv_heads, page_size, head_dim];
                let summaries = [num_pages, num_kv_heads, 2, head_dim];
                Pages::Float {
                    k: zeros(dtype, &shape)?,
                    v: zeros(dtype, &shape)?,
                    summaries: if spec.summaries { Some(zeros(dtype, &summaries)?) } else { None },
                }
            }
            KvFormat::Int4 { num_tails } => {
                if spec.summaries {
                    return Err(Error::value(OP, "summaries", "a float format", "int4"));
                }
                if !page_size.is_multiple_of(INT4_GROUP) {
                    let expected = format_args!("a multiple of {INT4_GROUP} for int4").to_string();
                    return Err(Error::value(OP, "page_size", expected, page_size));
                }
                let codes = [num_pages, num_kv_heads, page_size, head_dim / 2];
                let k_params = [num_pages, num_kv_heads, page_size / INT4_GROUP, 2, head_dim];
                let v_params =
                    [num_pages, num_kv_heads, page_size, 2, head_dim / int4_v_group(head_dim).max(1)];
                let tail = [num_tails, num_kv_heads, INT4_GROUP, head_dim];
                Pages::Int4 {
                    k_codes: zeros(DType::U8, &codes)?,
                    k_params: zeros(DType::F16, &k_params)?,
                    v_codes: zeros(DType::U8, &codes)?,
                    v_params: zeros(DType::F16, &v_params)?,
                    k_tail: zeros(DType::F16, &tail)?,
                    v_tail: zeros(DType::F16, &tail)?,
                }
            }
        };
        Ok(KvCache { spec, pages })
    }

    /// The sizes.
    pub fn spec(&self) -> &KvCacheSpec {
        &self.spec
    }

    /// For attention.
    pub fn view(&self) -> Kv<'_> {
        match &self.pages {
            Pages::Float { k, v, .. } => Kv::Paged { k: k.view(), v: v.view() },
            Pages::Int4 { k_codes, k_params, v_codes, v_params, k_tail, v_tail } => Kv::Int4(Int4Pages {
                k_codes: k_codes.view(),
                k_params: k_params.view(),
                v_codes: v_codes.view(),
                v_params: v_params.view(),
                k_tail: k_tail.view(),
                v_tail: v_tail.view(),
            }),
        }
    }

    /// For appending.
    pub fn view_mut(&mut self) -> KvMut<'_> {
        match &mut self.pages {
            Pages::Float { k, v, summaries } => KvMut::Paged {
                k: k.view_mut(),
                v: v.view_mut(),
                summaries: summaries.as_mut().map(Tensor::view_mut),
            },
            Pages::Int4 { k_codes, k_params, v_codes, v_params, k_tail, v_tail } => {
                KvMut::Int4(Int4PagesMut {
                    k_codes: k_codes.view_mut(),
                    k_params: k_params.view_mut(),
                    v_codes: v_codes.view_mut(),
                    v_params: v_params.view_mut(),
                    k_tail: k_tail.view_mut(),
                    v_tail: v_tail.view_mut(),
                })
            }
        }
    }

    /// Page minima and maxima, of the keys' type, where the cache keeps them.
    pub fn summaries(&self) -> Option<View<'_>> {
        match &self.pages {
            Pages::Float { summaries, .. } => summaries.as_ref().map(Tensor::view),
            Pages::Int4 { .. } => None,
        }
    }
}
