//! [`KvCache`], which owns one layer's pages.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kv::{INT4_GROUP, Kv, KvMut, QuantPages, check_sizes};
use crate::tensor::{DType, Tensor, View};

/// How a cache keeps its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// f32, f16 or bf16 pages.
    Float(DType),
    /// See [`QuantPages`].
    Quantized {
        /// Keys.
        k: KvCode,
        /// Values.
        v: KvCode,
        /// Tails, which int4 keys need: the most sequences that may be in the cache at once.
        num_tails: usize,
    },
}

/// How one side of a quantised cache, keys or values, keeps its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvCode {
    /// [`QuantPages::F16`].
    F16,
    /// [`QuantPages::Fp8`], with scales of 1 until [`KvCache::set_scales`].
    Fp8,
    /// [`QuantPages::Int8`].
    Int8,
    /// [`QuantPages::Int4Keys`] or [`QuantPages::Int4Values`].
    Int4,
}

impl KvCode {
    /// Bits of `head_dim` channels of a token, params and all.
    fn token_bits(self, is_v: bool, head_dim: usize) -> usize {
        match self {
            KvCode::F16 => 16 * head_dim,
            KvCode::Fp8 => 8 * head_dim,
            KvCode::Int8 => 8 * head_dim + 16,
            KvCode::Int4 if is_v => 4 * head_dim + 16 * (head_dim / INT4_GROUP),
            KvCode::Int4 => 4 * head_dim + 32 * head_dim / INT4_GROUP,
        }
    }
}

impl KvFormat {
    /// int4 keys and values, for at most `num_tails` sequences at once.
    pub const fn int4(num_tails: usize) -> Self {
        KvFormat::Quantized { k: KvCode::Int4, v: KvCode::Int4, num_tails }
    }

    /// fp8 keys and values.
    pub const FP8: KvFormat = KvFormat::Quantized { k: KvCode::Fp8, v: KvCode::Fp8, num_tails: 0 };

    /// int8 keys and values.
    pub const INT8: KvFormat = KvFormat::Quantized { k: KvCode::Int8, v: KvCode::Int8, num_tails: 0 };

    /// Whether an attention spec has to say so.
    pub const fn is_quantized(self) -> bool {
        matches!(self, KvFormat::Quantized { .. })
    }

    /// Whether sequences keep their newest keys in tails, and batches name these.
    pub const fn has_tails(self) -> bool {
        matches!(self, KvFormat::Quantized { k: KvCode::Int4, .. })
    }

    /// What page sizes are multiples of.
    pub const fn page_multiple(self) -> usize {
        match self {
            KvFormat::Float(_) => 1,
            KvFormat::Quantized { k, v, .. } => match (k, v) {
                (KvCode::Int4, _) | (_, KvCode::Int4) => INT4_GROUP,
                (KvCode::Int8, _) | (_, KvCode::Int8) => 8,
                _ => 1,
            },
        }
    }
}

/// Sizes of a [`KvCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheSpec {
    /// Pages in the pool.
    pub num_pages: usize,
    /// Tokens per page, from 1; a multiple of [`KvFormat::page_multiple`].
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
    /// Bytes that one page takes in one layer, tails, summaries and fp8's scales left out.
    pub fn page_bytes(&self) -> usize {
        let tokens = self.num_kv_heads * self.page_size;
        match self.format {
            KvFormat::Float(dtype) => 2 * tokens * self.head_dim * dtype.size(),
            KvFormat::Quantized { k, v, .. } => {
                tokens * (k.token_bits(false, self.head_dim) + v.token_bits(true, self.head_dim)) / 8
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
    Float { k: Tensor, v: Tensor, summaries: Option<Tensor> },
    Quantized { k: QuantPages<Tensor>, v: QuantPages<Tensor> },
}

const OP: &str = "kv_cache";

impl KvCache {
    /// Allocates the pool, zeroed.
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::DType`] names the size or type that the format is not for.
    pub fn new(device: &Device, spec: KvCacheSpec) -> Result<Self> {
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
            KvFormat::Quantized { k, v, num_tails } => {
                if spec.summaries {
                    return Err(Error::value(OP, "summaries", "a float format", "a quantised one"));
                }
                Pages::Quantized {
                    k: side(device, &spec, k, Some(num_tails))?,
                    v: side(device, &spec, v, None)?,
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
            Pages::Quantized { k, v } => {
                Kv::Quantized { k: k.as_ref().map(Tensor::view), v: v.as_ref().map(Tensor::view) }
            }
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
            Pages::Quantized { k, v } => {
                KvMut::Quantized { k: k.as_mut().map(Tensor::view_mut), v: v.as_mut().map(Tensor::view_mut) }
            }
        }
    }

    /// Page minima and maxima, of the keys' type, where the cache keeps them.
    pub fn summaries(&self) -> Option<View<'_>> {
        match &self.pages {
            Pages::Float { summaries, .. } => summaries.as_ref().map(Tensor::view),
            Pages::Quantized { .. } => None,
        }
    }

    /// Sets the scales of fp8 keys and values, one per KV head, before anything is appended: the largest size of a head's
    /// values over 448, say. What is not fp8 has no use for them.
    ///
    /// # Errors
    /// [`Error::Value`] for another number of scales, or one that is not above 0 and finite.
    pub fn set_scales(&mut self, k: &[f32], v: &[f32]) -> Result<()> {
        let heads = self.spec.num_kv_heads;
        for (what, scales) in [("k", k), ("v", v)] {
            if scales.len() != heads {
                return Err(Error::value(OP, what, format_args!("{heads} scales"), scales.len()));
            }
            if let Some(bad) = scales.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
                return Err(Error::value(OP, what, "scales above 0", bad));
            }
        }
        let Pages::Quantized { k: keys, v: values } = &mut self.pages else { return Ok(()) };
        for (pages, new) in [(keys, k), (values, v)] {
            if let QuantPages::Fp8 { scales, .. } = pages {
                *scales = Tensor::from_slice(scales.device(), new, &[heads])?;
            }
        }
        Ok(())
    }
}

/// One side of the pages, keys with `tails`.
fn side(
    device: &Device,
    spec: &KvCacheSpec,
    code: KvCode,
    tails: Option<usize>,
) -> Result<QuantPages<Tensor>> {
    let &KvCacheSpec { num_pages, page_size, num_kv_heads, head_dim, .. } = spec;
    let rows = |width: usize| [num_pages, num_kv_heads, page_size, width].to_vec();
    let (in_page, in_row) = (page_size / INT4_GROUP, head_dim / INT4_GROUP);
    let shapes: QuantPages<(DType, Vec<usize>)> = match (code, tails) {
        (KvCode::F16, _) => QuantPages::F16((DType::F16, rows(head_dim))),
        (KvCode::Fp8, _) => {
            QuantPages::Fp8 { codes: (DType::U8, rows(head_dim)), scales: (DType::F32, vec![num_kv_heads]) }
        }
        (KvCode::Int8, _) => QuantPages::Int8 {
            codes: (DType::U8, rows(head_dim)),
            scales: (DType::F16, vec![num_pages, num_kv_heads, page_size]),
        },
        (KvCode::Int4, Some(num_tails)) => QuantPages::Int4Keys {
            codes: (DType::U8, rows(head_dim / 2)),
            params: (DType::F16, vec![num_pages, num_kv_heads, in_page, 2, head_dim]),
            tail: (DType::F16, vec![num_tails, num_kv_heads, INT4_GROUP, head_dim]),
        },
        (KvCode::Int4, None) => QuantPages::Int4Values {
            codes: (DType::U8, rows(head_dim / 2)),
            params: (DType::U8, vec![num_pages, num_kv_heads, in_row, page_size, 2]),
        },
    };
    check_sizes(OP, &shapes, page_size, head_dim)?;
    let mut failed = None;
    let made = shapes.map(|(dtype, shape)| {
        let tensor = match dtype {
            DType::F32 => Tensor::from_slice(device, &vec![1.0f32; num_kv_heads], &shape),
            _ => Tensor::zeros(device, dtype, &shape),
        };
        tensor.map_err(|error| failed = Some(error)).ok()
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(made.map(|tensor| tensor.expect("none has failed"))),
    }
}
