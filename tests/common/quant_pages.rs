//! Pages of quantised KV that tests append to, and read by the documented forms.

use ferroflash::{Device, INT4_GROUP, KvCode, KvMut, QuantPages, Tensor};
use half::f16;

use super::on;

/// fp8's scales, one per head.
pub const HEAD_SCALES: [f32; 3] = [0.25, 0.5, 0.125];

/// Pages of both sides on a device, all bits set before, and their last copy on the host.
pub struct Memory {
    pub sides: [QuantPages<Tensor>; 2],
    pub bytes: [Vec<u8>; 2],
    pub params: [Vec<u16>; 2],
    pub heads: usize,
    pub page_size: usize,
    pub dim: usize,
}

impl Memory {
    pub fn new(device: &Device, codes: [KvCode; 2], sizes: [usize; 4], num_tails: usize) -> Self {
        let [pages, heads, page_size, dim] = sizes;
        let bytes = |shape: &[usize]| on(device, &vec![0xffu8; shape.iter().product()], shape);
        let nans = |shape: &[usize]| on(device, &vec![f16::NAN; shape.iter().product()], shape);
        let rows = |width| [pages, heads, page_size, width];
        let side = |code, is_v: bool| match code {
            KvCode::F16 => QuantPages::F16(nans(&rows(dim))),
            KvCode::Fp8 => QuantPages::Fp8 {
                codes: bytes(&rows(dim)),
                scales: on(device, &HEAD_SCALES[..heads], &[heads]),
            },
            KvCode::Int8 => {
                QuantPages::Int8 { codes: bytes(&rows(dim)), scales: nans(&[pages, heads, page_size]) }
            }
            KvCode::Int4 if is_v => QuantPages::Int4Values {
                codes: bytes(&rows(dim / 2)),
                params: bytes(&[pages, heads, dim / INT4_GROUP, page_size, 2]),
            },
            KvCode::Int4 => QuantPages::Int4Keys {
                codes: bytes(&rows(dim / 2)),
                params: nans(&[pages, heads, page_size / INT4_GROUP, 2, dim]),
                tail: nans(&[num_tails, heads, INT4_GROUP, dim]),
            },
        };
        let sides = [side(codes[0], false), side(codes[1], true)];
        Memory { sides, bytes: Default::default(), params: Default::default(), heads, page_size, dim }
    }

    pub fn views(&self) -> (QuantPages<ferroflash::View<'_>>, QuantPages<ferroflash::View<'_>>) {
        let [k, v] = self.sides.each_ref().map(|side| side.as_ref().map(Tensor::view));
        (k, v)
    }

    pub fn view_mut(&mut self) -> KvMut<'_> {
        let [k, v] = self.sides.each_mut().map(|side| side.as_mut().map(Tensor::view_mut));
        KvMut::Quantized { k, v }
    }

    pub fn fetch(&mut self) {
        for (i, side) in self.sides.iter().enumerate() {
            let words = |t: &Tensor| t.to_vec::<f16>().unwrap().iter().map(|x| x.to_bits()).collect();
            (self.bytes[i], self.params[i]) = match side {
                QuantPages::F16(pages) => (Vec::new(), words(pages)),
                QuantPages::Fp8 { codes, .. } => (codes.to_vec().unwrap(), Vec::new()),
                QuantPages::Int8 { codes, scales } => (codes.to_vec().unwrap(), words(scales)),
                QuantPages::Int4Keys { codes, params, .. } => (codes.to_vec().unwrap(), words(params)),
                QuantPages::Int4Values { codes, params } => {
                    let pairs = params.to_vec::<u8>().unwrap();
                    let words = pairs.chunks_exact(2).map(|p| u16::from_le_bytes([p[0], p[1]])).collect();
                    (codes.to_vec().unwrap(), words)
                }
            };
        }
    }

    /// One value by the documented form, and the scale of its code; `which` 0 is K, 1 is V.
    pub fn read(&self, which: usize, page: usize, head: usize, offset: usize, d: usize) -> (f32, f32) {
        let row = (page * self.heads + head) * self.page_size + offset;
        let (bytes, params) = (&self.bytes[which], &self.params[which]);
        let half = |i: usize| f16::from_bits(params[i]).to_f32();
        let four_bits = || {
            let at = row * self.dim / 2 + d / 8 * 4;
            let word = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            (word >> (4 * (d % 8 / 2) + 16 * (d % 2)) & 15) as f32
        };
        match &self.sides[which] {
            QuantPages::F16(_) => (half(row * self.dim + d), 0.0),
            QuantPages::Fp8 { .. } => {
                let code = bytes[row * self.dim + d];
                let (exponent, mantissa) = ((code >> 3 & 15) as i32, (code & 7) as f32 / 8.0);
                let size = if exponent == 0 {
                    mantissa * 2f32.powi(-6)
                } else {
                    (1.0 + mantissa) * 2f32.powi(exponent - 7)
                };
                let sign = if code & 128 == 0 { 1.0 } else { -1.0 };
                (sign * size * HEAD_SCALES[head], HEAD_SCALES[head])
            }
            QuantPages::Int8 { .. } => {
                let scale = half(row);
                (bytes[row * self.dim + d] as i8 as f32 * scale, scale)
            }
            QuantPages::Int4Keys { .. } => {
                let group = row / INT4_GROUP * 2 * self.dim;
                let (min, scale) = (half(group + d), half(group + self.dim + d));
                (min + scale * four_bits(), scale)
            }
            QuantPages::Int4Values { .. } => {
                let groups = self.dim / INT4_GROUP;
                let at = ((page * self.heads + head) * groups + d / INT4_GROUP) * self.page_size + offset;
                let (span, min) = (params[at] & 0xff, params[at] & 0xff00);
                let scale = f16::from_bits(span << 7).to_f32() / 16.0;
                (f16::from_bits(min).to_f32() + scale * four_bits(), scale)
            }
        }
    }

    /// Minimum of the group of an int4 value; 0 of other forms.
    pub fn min_of_value(&self, page: u32, head: usize, token: usize, d: usize) -> f32 {
        if !matches!(self.sides[1], QuantPages::Int4Values { .. }) {
            return 0.0;
        }
        let (groups, group) = (self.dim / INT4_GROUP, d / INT4_GROUP);
        let row = (page as usize * self.heads + head) * groups + group;
        f16::from_bits(self.params[1][row * self.page_size + token % self.page_size] & 0xff00).to_f32()
    }

    /// What a value may be off by.
    pub fn bound(&self, which: usize, x: f32, scale: f32) -> f32 {
        1e-6 * x.abs()
            + match &self.sides[which] {
                QuantPages::F16(_) => x.abs() / 2048.0 + 1e-7,
                QuantPages::Fp8 { .. } => (x.abs() / 16.0).max(scale / 1024.0),
                _ => 0.5001 * scale,
            }
    }
}
