//! Weight formats of files: floats, and the block quantisations of GGUF (the layouts are ggml's).

use half::{bf16, f16};

use crate::error::{Error, Result};

/// How a file keeps a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // ggml's own names
pub enum Quant {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

impl Quant {
    /// From GGUF's type number.
    pub fn from_ggml(number: u32) -> Option<Self> {
        Some(match number {
            0 => Quant::F32,
            1 => Quant::F16,
            2 => Quant::Q4_0,
            3 => Quant::Q4_1,
            6 => Quant::Q5_0,
            7 => Quant::Q5_1,
            8 => Quant::Q8_0,
            12 => Quant::Q4K,
            13 => Quant::Q5K,
            14 => Quant::Q6K,
            30 => Quant::BF16,
            _ => return None,
        })
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Quant::F32 => (1, 4),
            Quant::F16 | Quant::BF16 => (1, 2),
            Quant::Q4_0 => (32, 18),
            Quant::Q4_1 => (32, 20),
            Quant::Q5_0 => (32, 22),
            Quant::Q5_1 => (32, 24),
            Quant::Q8_0 => (32, 34),
            Quant::Q4K => (256, 144),
            Quant::Q5K => (256, 176),
            Quant::Q6K => (256, 210),
        }
    }

    /// Elements that share a scale.
    pub fn group(self) -> usize {
        match self {
            Quant::F32 | Quant::F16 | Quant::BF16 => 1,
            Quant::Q6K => 16,
            _ => 32,
        }
    }

    /// Whether codes go from 0 to 15.
    pub fn is_four_bit(self) -> bool {
        matches!(self, Quant::Q4_0 | Quant::Q4_1 | Quant::Q4K)
    }
}

/// Rows of a matrix in a file.
#[derive(Clone, Copy, Debug)]
pub struct RowReader<'a> {
    quant: Quant,
    bytes: &'a [u8],
    rows: usize,
    row_len: usize,
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

impl<'a> RowReader<'a> {
    /// `rows` rows of `row_len` elements; the bytes must be just those.
    pub fn new(quant: Quant, bytes: &'a [u8], rows: usize, row_len: usize) -> Result<Self> {
        let (elements, size) = quant.block();
        let needed = rows.checked_mul(row_len / elements).and_then(|n| n.checked_mul(size));
        if row_len == 0 || !row_len.is_multiple_of(elements) || needed != Some(bytes.len()) {
            return Err(Error::model(format!(
                "a tensor of {rows} x {row_len} in {quant:?} takes blocks of {elements} elements in {size} bytes, \
                 but has {} bytes",
                bytes.len()
            )));
        }
        Ok(RowReader { quant, bytes, rows, row_len })
    }

    /// The format.
    pub fn quant(&self) -> Quant {
        self.quant
    }

    /// Rows.
    pub fn num_rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn row_len(&self) -> usize {
        self.row_len
    }

    fn row(&self, row: usize) -> &'a [u8] {
        let (elements, size) = self.quant.block();
        let len = self.row_len / elements * size;
        &self.bytes[row * len..][..len]
    }

    /// One row as f32.
    pub fn read(&self, row: usize, to: &mut [f32]) {
        let bytes = self.row(row);
        match self.quant {
            Quant::F32 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *to = f32::from_le_bytes(*b);
                }
            }
            Quant::F16 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = f16::from_le_bytes(*b).to_f32();
                }
            }
            Quant::BF16 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = bf16::from_le_bytes(*b).to_f32();
                }
            }
            quant => self.groups(row, |group, scale, min, codes| {
                let to = &mut to[group * quant.group()..];
                to.iter_mut().zip(codes).for_each(|(to, &code)| *to = code as f32 * scale + min);
            }),
        }
    }

    /// Calls `f(group, scale, min, codes)` for each group of a row of a block format: elements are
    /// `min + scale * code`.
    pub fn groups(&self, row: usize, mut f: impl FnMut(usize, f32, f32, &[i8])) {
        let (elements, size) = self.quant.block();
        let per_block = elements / self.quant.group();
        for (i, b) in self.row(row).chunks_exact(size).enumerate() {
            let first = i * per_block;
            match self.quant {
                Quant::Q4_0 => f(first, half_at(b, 0), -8.0 * half_at(b, 0), &nibbles(&b[2..18])),
                Quant::Q4_1 => f(first, half_at(b, 0), half_at(b, 2), &nibbles(&b[4..20])),
                Quant::Q5_0 => {
                    let codes = fifth_bits(nibbles(&b[6..22]), &b[2..6]).map(|c| c - 16);
                    f(first, half_at(b, 0), 0.0, &codes);
                }
                Quant::Q5_1 => {
                    let codes = fifth_bits(nibbles(&b[8..24]), &b[4..8]);
                    f(first, half_at(b, 0), half_at(b, 2), &codes);
                }
                Quant::Q8_0 => f(first, half_at(b, 0), 0.0, bytemuck::cast_slice(&b[2..34])),
                Quant::Q4K | Quant::Q5K => k_groups(self.quant, b, first, &mut f),
                Quant::Q6K => six_bit_groups(b, first, &mut f),
                Quant::F32 | Quant::F16 | Quant::BF16 => {}
            }
        }
    }
}

/// 32 codes of 16 bytes: the low nibbles, then the high ones.
fn nibbles(bytes: &[u8]) -> [i8; 32] {
    std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 } as i8)
}

/// Adds bit `i` of `high` to code `i`.
fn fifth_bits(codes: [i8; 32], high: &[u8]) -> [i8; 32] {
    std::array::from_fn(|i| codes[i] | ((high[i / 8] >> (i % 8) & 1) << 4) as i8)
}

/// Q4_K and Q5_K: eight groups of 32, with 6-bit scales and minima in 12 bytes.
fn k_groups(quant: Quant, b: &[u8], first: usize, f: &mut impl FnMut(usize, f32, f32, &[i8])) {
    let (d, d_min, packed) = (half_at(b, 0), half_at(b, 2), &b[4..16]);
    let five = quant == Quant::Q5K;
    let (high, low) = if five { (&b[16..48], &b[48..176]) } else { (&b[..0], &b[16..144]) };
    for group in 0..8 {
        let (scale, min) = if group < 4 {
            (packed[group] & 63, packed[group + 4] & 63)
        } else {
            let nibbles = packed[group + 4];
            let (s, m) = (packed[group - 4] >> 6, packed[group] >> 6);
            (nibbles & 15 | s << 4, nibbles >> 4 | m << 4)
        };
        // Two groups share 32 bytes, one in each nibble.
        let bytes = &low[group / 2 * 32..][..32];
        let codes: [i8; 32] = std::array::from_fn(|i| {
            let code = bytes[i] >> (group % 2 * 4) & 15;
            let fifth = if five { high[i] >> group & 1 } else { 0 };
            (code | fifth << 4) as i8
        });
        f(first + group, d * scale as f32, -d_min * min as f32, &codes);
    }
}

/// Q6_K: sixteen groups of 16 with 8-bit scales; four low bits in 128 bytes, two high ones in 64.
fn six_bit_groups(b: &[u8], first: usize, f: &mut impl FnMut(usize, f32, f32, &[i8])) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half_at(b, 208));
    for group in 0..16 {
        // Each half of the block is four runs of 32; a run is a nibble of 32 bytes and a bit pair.
        let (half, run, odd) = (group / 8, group % 8 / 2, group % 2);
        let codes: [i8; 16] = std::array::from_fn(|i| {
            let column = odd * 16 + i;
            let nibble = low[half * 64 + run % 2 * 32 + column] >> (run / 2 * 4) & 15;
            let pair = high[half * 32 + column] >> (run * 2) & 3;
            (nibble | pair << 4) as i8 - 32
        });
        f(first + group, d * scales[group] as i8 as f32, 0.0, &codes);
    }
}
