//! Where keys and values live: views of ragged or paged KV.

use ferroflash_kernels::abi::codec;

use crate::error::{Error, Result};
use crate::tensor::{DType, View, ViewMut};

/// What shares a scale in int4 pages: tokens of a channel of K, channels of a token of V. Also the length of a sequence's 16-bit
/// tail of K.
pub const INT4_GROUP: usize = ferroflash_kernels::abi::INT4_GROUP;

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
    /// Quantised pages, for a spec with [`quantized_kv`](crate::AttentionSpec::quantized_kv).
    Quantized {
        /// Keys.
        k: QuantPages<View<'a>>,
        /// Values.
        v: QuantPages<View<'a>>,
    },
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
    Quantized {
        /// Keys.
        k: QuantPages<ViewMut<'a>>,
        /// Values.
        v: QuantPages<ViewMut<'a>>,
    },
}

impl KvMut<'_> {
    /// The same, for reading.
    pub(crate) fn as_view(&self) -> Kv<'_> {
        match self {
            KvMut::Paged { k, v, .. } => Kv::Paged { k: k.as_view(), v: v.as_view() },
            KvMut::Quantized { k, v } => {
                Kv::Quantized { k: k.as_ref().map(|k| k.as_view()), v: v.as_ref().map(|v| v.as_view()) }
            }
        }
    }
}

/// One side, keys or values, of quantised pages; each may have a form of its own. `T` is a [`View`], a [`ViewMut`] or a tensor.
/// Codes are u8 `[num_pages, num_kv_heads, page_size, ...]`; NaN is written as 0.
#[derive(Clone, Copy, Debug)]
pub enum QuantPages<T> {
    /// f16 `[num_pages, num_kv_heads, page_size, head_dim]`.
    F16(T),
    /// fp8 e4m3 (arXiv:2209.05433): `x = scale * code`, saturating at 448. `head_dim` is a multiple of 16.
    Fp8 {
        /// `[..., head_dim]`; the NaN codes read as 480 and -480.
        codes: T,
        /// f32 `[num_kv_heads]`, above 0. They are given, not found: from calibration, or 1.
        scales: T,
    },
    /// Signed bytes: `x = scale * code`, codes -127 to 127. `head_dim` is a multiple of 16, `page_size` of 8. Values are
    /// clamped to 64,897.
    Int8 {
        /// `[..., head_dim]`, two's complement.
        codes: T,
        /// f16 `[num_pages, num_kv_heads, page_size]`.
        scales: T,
    },
    /// Keys in four bits (after KIVI, arXiv:2402.02750): `x = min + scale * code` with one pair for each channel and
    /// [`INT4_GROUP`] tokens of a page. The newest `kv_len % INT4_GROUP` tokens of a sequence stand in f16 in its tail.
    /// `head_dim` and `page_size` are multiples of 32.
    Int4Keys {
        /// `[..., head_dim / 2]`: of each little-endian word of eight channels, channel `i` in the four bits from
        /// `4 * (i / 2) + 16 * (i % 2)`.
        codes: T,
        /// f16 `[num_pages, num_kv_heads, page_size / INT4_GROUP, 2, head_dim]`: minima, then scales.
        params: T,
        /// f16 `[num_tails, num_kv_heads, INT4_GROUP, head_dim]`.
        tail: T,
    },
    /// Values in four bits: `x = min + span / 16 * code`, with one pair for each token and [`INT4_GROUP`] channels. `head_dim`
    /// and `page_size` are multiples of 32. Values are clamped to 28,672.
    Int4Values {
        /// As those of keys.
        codes: T,
        /// u8 `[num_pages, num_kv_heads, head_dim / INT4_GROUP, page_size, 2]`: the span, which is the f16 with the bits
        /// `byte << 7`, and the minimum, which is that with the bits `byte << 8`.
        params: T,
    },
}

impl<T> QuantPages<T> {
    /// The parts, with their names.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (&'static str, &T)> {
        let parts: [Option<(&'static str, &T)>; 3] = match self {
            QuantPages::F16(pages) => [Some(("pages", pages)), None, None],
            QuantPages::Fp8 { codes, scales } | QuantPages::Int8 { codes, scales } => {
                [Some(("codes", codes)), Some(("scales", scales)), None]
            }
            QuantPages::Int4Keys { codes, params, tail } => {
                [Some(("codes", codes)), Some(("params", params)), Some(("tail", tail))]
            }
            QuantPages::Int4Values { codes, params } => {
                [Some(("codes", codes)), Some(("params", params)), None]
            }
        };
        parts.into_iter().flatten()
    }

    /// The same, of what `f` makes of each part.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> QuantPages<U> {
        match self {
            QuantPages::F16(pages) => QuantPages::F16(f(pages)),
            QuantPages::Fp8 { codes, scales } => QuantPages::Fp8 { codes: f(codes), scales: f(scales) },
            QuantPages::Int8 { codes, scales } => QuantPages::Int8 { codes: f(codes), scales: f(scales) },
            QuantPages::Int4Keys { codes, params, tail } => {
                QuantPages::Int4Keys { codes: f(codes), params: f(params), tail: f(tail) }
            }
            QuantPages::Int4Values { codes, params } => {
                QuantPages::Int4Values { codes: f(codes), params: f(params) }
            }
        }
    }

    /// Borrowed parts.
    pub fn as_ref(&self) -> QuantPages<&T> {
        match self {
            QuantPages::F16(pages) => QuantPages::F16(pages),
            QuantPages::Fp8 { codes, scales } => QuantPages::Fp8 { codes, scales },
            QuantPages::Int8 { codes, scales } => QuantPages::Int8 { codes, scales },
            QuantPages::Int4Keys { codes, params, tail } => QuantPages::Int4Keys { codes, params, tail },
            QuantPages::Int4Values { codes, params } => QuantPages::Int4Values { codes, params },
        }
    }

    /// Parts borrowed for writing.
    pub fn as_mut(&mut self) -> QuantPages<&mut T> {
        match self {
            QuantPages::F16(pages) => QuantPages::F16(pages),
            QuantPages::Fp8 { codes, scales } => QuantPages::Fp8 { codes, scales },
            QuantPages::Int8 { codes, scales } => QuantPages::Int8 { codes, scales },
            QuantPages::Int4Keys { codes, params, tail } => QuantPages::Int4Keys { codes, params, tail },
            QuantPages::Int4Values { codes, params } => QuantPages::Int4Values { codes, params },
        }
    }

    /// Whether sequences keep their newest tokens in tails.
    pub(crate) fn has_tails(&self) -> bool {
        matches!(self, QuantPages::Int4Keys { .. })
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
        let parts: Vec<(&'static str, View<'a>)> = match self {
            Kv::Ragged { k, v } | Kv::Paged { k, v } => vec![("k", *k), ("v", *v)],
            Kv::Quantized { k, v } => k.parts().chain(v.parts()).map(|(what, view)| (what, *view)).collect(),
        };
        parts.into_iter()
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
            Kv::Quantized { .. } if head_dim > 256 => {
                Err(Error::value(op, "head_dim of quantised KV", "at most 256", head_dim))
            }
            Kv::Quantized { .. } if head_dim != v_head_dim => Err(Error::value(
                op,
                "v_head_dim of quantised KV",
                format_args!("head_dim, {head_dim}"),
                v_head_dim,
            )),
            Kv::Quantized { k, v } => {
                let (keys, values) =
                    (k.check(op, "k", num_kv_heads, head_dim)?, v.check(op, "v", num_kv_heads, head_dim)?);
                if (keys.num_pages, keys.page_size) != (values.num_pages, values.page_size) {
                    let expected = format_args!("pages as k's, {} of {}", keys.num_pages, keys.page_size);
                    let got = format_args!("{} of {}", values.num_pages, values.page_size).to_string();
                    return Err(Error::shape(op, "v", expected.to_string(), got));
                }
                Ok(keys)
            }
        }
    }

    /// Whether sequences keep their newest tokens in tails.
    pub(crate) fn has_tails(&self) -> bool {
        matches!(self, Kv::Quantized { k, .. } if k.has_tails())
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

/// What page sizes and channels a form is for.
pub(crate) fn check_sizes<T>(
    op: &'static str,
    pages: &QuantPages<T>,
    page_size: usize,
    head_dim: usize,
) -> Result<()> {
    let (tokens, channels) = match pages {
        QuantPages::F16(_) => (1, 8),
        QuantPages::Fp8 { .. } => (1, 16),
        QuantPages::Int8 { .. } => (8, 16),
        QuantPages::Int4Keys { .. } | QuantPages::Int4Values { .. } => (INT4_GROUP, INT4_GROUP),
    };
    for (what, multiple, got) in [("page_size", tokens, page_size), ("head_dim", channels, head_dim)] {
        if got == 0 || !got.is_multiple_of(multiple) {
            let expected = format_args!("a multiple of {multiple}, of its quantised KV").to_string();
            return Err(Error::value(op, what, expected, got));
        }
    }
    Ok(())
}

impl QuantPages<View<'_>> {
    /// Checks one side, `k` or `v`.
    fn check(
        &self,
        op: &'static str,
        side: &'static str,
        num_kv_heads: usize,
        head_dim: usize,
    ) -> Result<PageDims> {
        if matches!((self, side), (QuantPages::Int4Keys { .. }, "v") | (QuantPages::Int4Values { .. }, "k")) {
            let expected = "Int4Keys as keys and Int4Values as values: they are grouped otherwise";
            return Err(Error::value(op, side, expected, "the other"));
        }
        let (QuantPages::F16(codes)
        | QuantPages::Fp8 { codes, .. }
        | QuantPages::Int8 { codes, .. }
        | QuantPages::Int4Keys { codes, .. }
        | QuantPages::Int4Values { codes, .. }) = self;
        let (num_pages, page_size) = page_dims(op, codes)?;
        check_sizes(op, self, page_size, head_dim)?;
        let rows = |width: usize| vec![num_pages, num_kv_heads, page_size, width];
        let expect = |what, view: &View<'_>, dtype, shape: &[usize]| {
            expect_shape(op, what, view, shape)?;
            expect_dtype(op, what, view, dtype)
        };
        let mut num_tails = 0;
        match self {
            QuantPages::F16(pages) => expect("pages", pages, DType::F16, &rows(head_dim))?,
            QuantPages::Fp8 { codes, scales } => {
                expect("codes", codes, DType::U8, &rows(head_dim))?;
                expect("scales", scales, DType::F32, &[num_kv_heads])?;
            }
            QuantPages::Int8 { codes, scales } => {
                expect("codes", codes, DType::U8, &rows(head_dim))?;
                expect("scales", scales, DType::F16, &[num_pages, num_kv_heads, page_size])?;
            }
            QuantPages::Int4Keys { codes, params, tail } => {
                expect("codes", codes, DType::U8, &rows(head_dim / 2))?;
                let groups = page_size / INT4_GROUP;
                expect("params", params, DType::F16, &[num_pages, num_kv_heads, groups, 2, head_dim])?;
                if params.strides()[3] != head_dim {
                    let expected = "minima and scales side by side";
                    return Err(Error::shape(op, "params", expected, params.strides()));
                }
                num_tails = tail.shape().first().copied().unwrap_or(0);
                expect("tail", tail, DType::F16, &[num_tails, num_kv_heads, INT4_GROUP, head_dim])?;
            }
            QuantPages::Int4Values { codes, params } => {
                expect("codes", codes, DType::U8, &rows(head_dim / 2))?;
                let groups = head_dim / INT4_GROUP;
                expect("params", params, DType::U8, &[num_pages, num_kv_heads, groups, page_size, 2])?;
                if params.strides()[3] != 2 {
                    let expected = "the tokens of a group side by side";
                    return Err(Error::shape(op, "params", expected, params.strides()));
                }
            }
        }
        Ok(PageDims { num_pages, page_size, num_tails })
    }
}

/// Conversions of `abi::codec`, as the `half` crate does them.
pub(crate) struct Host;

impl codec::F16Bits for Host {
    fn bits(x: f32) -> u32 {
        half::f16::from_f32(x).to_bits() as u32
    }
    fn value(bits: u32) -> f32 {
        half::f16::from_bits(bits as u16).to_f32()
    }
}
