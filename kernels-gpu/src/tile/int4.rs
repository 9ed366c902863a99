//! int4 codes to f16 in registers (after Kim et al., arXiv:2211.10017): the bits of a code under the exponent of
//! 1024 are the number 1024 + code.

use crate::isa::{self, F16x2};

/// 1024 in both halves.
const MAGIC: u32 = 0x6400_6400;

/// Codes of a word, which stand for eight channels, as f16: channels 0 1, 2 3 of the low nibbles, then of the
/// high ones.
#[inline(always)]
pub(crate) fn unpack(word: u32) -> [F16x2; 4] {
    let spread = |x: u32| (x & 0xff) | (x & 0xff00) << 8;
    let (first, second) = (spread(word), spread(word >> 16));
    [first, second, first >> 4, second >> 4].map(|x| isa::sub_f16x2(x & 0x000f_000f | MAGIC, MAGIC))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_out_where_it_belongs() {
        let word = (0..4u32).fold(0, |w, i| w | (i + 1) << (8 * i) | (i + 9) << (8 * i + 4));
        let pairs = unpack(word).map(isa::f16x2_to_f32);
        assert_eq!(pairs, [(1.0, 2.0), (3.0, 4.0), (9.0, 10.0), (11.0, 12.0)]);
    }
}
