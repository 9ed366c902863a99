//! Codes of quantised KV in registers, two to a register, as f16: no code needs a multiplication to be a number, and what it
//! is a multiple of is known by its place (after Kim et al., arXiv:2211.10017).

use crate::isa::{self, F16x2};

/// 1024 in both halves: a code below its exponent is 1024 and the code.
const MAGIC: u32 = 0x6400_6400;

/// The four pairs of a word of int4 codes, as bits: the subnormal f16 numbers `2^-24 code` for pairs 0 and 2, `2^-20 code`
/// for pairs 1 and 3 (PTX: products of f16 take subnormal numbers).
#[inline(always)]
pub(crate) fn int4_bits(word: u32) -> [F16x2; 4] {
    let (even, odd) = (0x000f_000f, 0x00f0_00f0);
    [word & even, word & odd, word >> 8 & even, word >> 8 & odd]
}

/// The four pairs of a word of int4 codes, as numbers.
#[inline(always)]
pub(crate) fn int4_numbers(word: u32) -> [F16x2; 4] {
    let [a, b, c, d] = int4_bits(word).map(|x| x | MAGIC);
    // Pairs 1 and 3 are 1024 + 16 codes: a sixteenth of that, less 64. All exact.
    let low = |x| isa::sub_f16x2(x, MAGIC);
    let high = |x| isa::fma_f16x2(x, 0x2c00_2c00, 0xd400_d400);
    [low(a), high(b), low(c), high(d)]
}

/// Two of the four bytes of a word as one register, `FIRST` and `FIRST + STEP`, as the high bytes of its halves over byte 0 of
/// `others`, or as the low ones under its byte 1.
#[inline(always)]
fn two_bytes<const FIRST: u32, const STEP: u32, const HIGH: bool>(word: u32, others: u32) -> u32 {
    let (a, b) = (FIRST, FIRST + STEP);
    let selector = if HIGH { 4 | a << 4 | 4 << 8 | b << 12 } else { a | 5 << 4 | b << 8 | 5 << 12 };
    isa::prmt(word, others, selector)
}

/// Which bytes of a word make a pair: of a token's channels neighbours, `NEIGHBOURS`; of two tokens' halves of two channels
/// those of one channel.
#[inline(always)]
fn byte_pairs<const NEIGHBOURS: bool, const HIGH: bool>(word: u32, others: u32) -> [u32; 2] {
    if NEIGHBOURS {
        [two_bytes::<0, 1, HIGH>(word, others), two_bytes::<2, 1, HIGH>(word, others)]
    } else {
        [two_bytes::<0, 2, HIGH>(word, others), two_bytes::<1, 2, HIGH>(word, others)]
    }
}

/// fp8 e4m3 codes of a word, times 2^-8: exponent and mantissa move into an f16's places, whose exponent has another bias.
/// The two NaN codes read as 480 and -480; no append writes them.
#[inline(always)]
pub(crate) fn fp8_numbers<const NEIGHBOURS: bool>(word: u32) -> [F16x2; 2] {
    byte_pairs::<NEIGHBOURS, true>(word, 0).map(|x| x & 0x8000_8000 | x >> 1 & 0x3f80_3f80)
}

/// int8 codes of a word, over 128.
#[inline(always)]
pub(crate) fn int8_numbers<const NEIGHBOURS: bool>(word: u32) -> [F16x2; 2] {
    // 1024 + 128 + code, over 128, less 9.
    byte_pairs::<NEIGHBOURS, false>(word ^ 0x8080_8080, MAGIC)
        .map(|x| isa::fma_f16x2(x, 0x2000_2000, 0xc880_c880))
}

/// Spans of two tokens from their params of int4 V: f16 without a sign, of which three bits of mantissa are kept.
#[inline(always)]
pub(crate) fn spans(params: u32) -> F16x2 {
    (params & 0x00ff_00ff) << 7
}

/// Minima of two tokens from their params of int4 V: the upper byte of an f16.
#[inline(always)]
pub(crate) fn minima(params: u32) -> F16x2 {
    params & 0xff00_ff00
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::INT4_SHIFTS;

    fn floats<const N: usize>(pairs: [F16x2; N]) -> std::vec::Vec<f32> {
        pairs.into_iter().map(isa::f16x2_to_f32).flat_map(|(a, b)| [a, b]).collect()
    }

    #[test]
    fn every_int4_code_comes_out_where_it_belongs() {
        for first in 0..16 {
            let codes: [u32; 8] = core::array::from_fn(|i| (first + i as u32) % 16);
            let word = (0..8).fold(0, |w, i| w | codes[i] << INT4_SHIFTS[i]);
            let numbers = floats(int4_numbers(word));
            let bits = floats(int4_bits(word));
            for (i, &code) in codes.iter().enumerate() {
                assert_eq!(numbers[i], code as f32);
                let unit = if i / 2 % 2 == 0 { 24 } else { 20 };
                assert_eq!(bits[i] * (1u32 << unit) as f32, code as f32);
            }
        }
    }

    #[test]
    fn every_byte_comes_out_where_it_belongs() {
        for first in 0..=255u8 {
            let bytes: [u8; 4] = core::array::from_fn(|i| first.wrapping_add(67 * i as u8));
            let word = u32::from_le_bytes(bytes);
            let int8 = bytes.map(|b| b as i8 as f32 / 128.0);
            let [a, b, c, d] = int8;
            assert_eq!(floats(int8_numbers::<true>(word)), [a, b, c, d]);
            assert_eq!(floats(int8_numbers::<false>(word)), [a, c, b, d]);
            let [a, b, c, d] = bytes.map(|b| {
                let (exponent, mantissa) = ((b >> 3 & 15) as i32, (b & 7) as f32);
                let size = if exponent == 0 {
                    mantissa / 512.0
                } else {
                    (1.0 + mantissa / 8.0) * f32::exp2((exponent - 7) as f32)
                };
                (if b & 128 == 0 { size } else { -size }) / 256.0
            });
            assert_eq!(floats(fp8_numbers::<true>(word)), [a, b, c, d]);
            assert_eq!(floats(fp8_numbers::<false>(word)), [a, c, b, d]);
        }
    }
}
