//! How a value becomes a code of quantised KV: the same arithmetic on every device. NaN becomes what 0 does.

/// Conversion to f16 and back, nearest even: the device's instruction, or the host's.
pub trait F16Bits {
    /// Bits of the nearest f16.
    fn bits(x: f32) -> u32;
    /// What the bits mean.
    fn value(bits: u32) -> f32;
}

/// Largest size of a value in int4 V: the largest that an f16 with three bits of mantissa holds, where spans fit too.
pub const INT4_V_MAX: f32 = 28672.0;

/// Largest size of a value in int4 K, which is kept in f16 at first.
pub const INT4_K_MAX: f32 = 65504.0;

/// Largest scale of int8: with 128 times it products of f16 are still finite.
const INT8_MAX_SCALE: f32 = 511.0;

/// `x`, of size `max` at most; 0 of NaN.
#[inline(always)]
pub fn clamped(x: f32, max: f32) -> f32 {
    let x = if x > max { max } else { x };
    let x = if x < -max { -max } else { x };
    if x.is_nan() { 0.0 } else { x }
}

/// `x` as f16, clamped to `max`.
#[inline(always)]
pub fn to_f16<F: F16Bits>(x: f32, max: f32) -> f32 {
    F::value(F::bits(clamped(x, max)))
}

/// Bits of the least f16 that is not below `x`, which is not negative.
#[inline(always)]
fn not_below<F: F16Bits>(x: f32) -> u32 {
    let bits = F::bits(x);
    if F::value(bits) < x { bits + 1 } else { bits }
}

/// The nearest integer from 0 to `most`, halves up; 0 of NaN.
#[inline(always)]
fn nearest(x: f32, most: f32) -> u32 {
    let x = x + 0.5;
    let x = if x > most { most } else { x };
    // SAFETY: between 0 and `most`, whose codes are bytes. Compilers make vectors of this, not of a cast that saturates.
    unsafe { (if x > 0.0 { x } else { 0.0 }).to_int_unchecked::<i32>() as u32 }
}

/// Code of a value over its scale: fp8 e4m3, nearest even, saturating.
#[inline(always)]
pub fn fp8_code(x: f32) -> u32 {
    let sign = x.to_bits() >> 31 << 7;
    let size = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    if size >= 448.0 {
        return sign | 0x7e;
    }
    if size >= 1.0 / 64.0 {
        let bits = size.to_bits();
        return sign | (((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
    }
    // Multiples of 2^-9: added to 2^23, whose last bit is 1, the sum is rounded to them.
    let code = (size * 512.0 + 8_388_608.0).to_bits() & 15;
    if size < 1.0 / 64.0 { sign | code } else { sign }
}

/// What a code of fp8 e4m3 means; its NaN codes read as 480 and -480.
#[inline(always)]
pub fn fp8_value(code: u32) -> f32 {
    // A float with that exponent and mantissa is 2^-120 of it.
    f32::from_bits((code & 0x80) << 24 | (code & 0x7f) << 20) * f32::from_bits((120 + 127) << 23)
}

/// Bits of an int8 row's scale; `max` is the largest size of its values.
#[inline(always)]
pub fn int8_scale<F: F16Bits>(max: f32) -> u32 {
    let scale = max / 127.0;
    not_below::<F>(if scale < INT8_MAX_SCALE { scale } else { INT8_MAX_SCALE })
}

/// Byte of a value over its scale.
#[inline(always)]
pub fn int8_code(x: f32, scale: f32) -> u32 {
    if scale > 0.0 {
        let size = nearest(f32::from_bits(x.to_bits() & 0x7fff_ffff) / scale, 127.0);
        (if x < 0.0 { size.wrapping_neg() } else { size }) & 0xff
    } else {
        0
    }
}

/// Scale of an int4 group of K from `min`, an f16, to `max`: code 15 reaches the maximum.
#[inline(always)]
pub fn int4_scale<F: F16Bits>(min: f32, max: f32) -> f32 {
    F::value(not_below::<F>((max - min) / 15.0))
}

/// Code of a value in an int4 group.
#[inline(always)]
pub fn int4_code(x: f32, min: f32, scale: f32) -> u32 {
    if scale > 0.0 { nearest((x - min) / scale, 15.0) } else { 0 }
}

/// Params of an int4 group of V from `min` to `max`, f16 of at most [`INT4_V_MAX`]: in the low byte the span, 16 scales, an
/// f16 without sign with three bits of mantissa, not below; in the high byte the minimum, the upper byte of an f16, not
/// above.
#[inline(always)]
pub fn int4_v_params<F: F16Bits>(min: f32, max: f32) -> u32 {
    let bits = F::bits(min);
    // Of a negative number a larger size is lower.
    let min_bits = (if bits & 0x8000 != 0 { bits + 0xff } else { bits }) & 0xff00;
    let span = not_below::<F>((max - F::value(min_bits)) * (16.0 / 15.0));
    min_bits | (span + 0x7f) >> 7
}

/// Minimum and scale of such params.
#[inline(always)]
pub fn int4_v_range<F: F16Bits>(params: u32) -> (f32, f32) {
    (F::value(params & 0xff00), F::value((params & 0xff) << 7) / 16.0)
}

#[cfg(all(test, feature = "sim", not(target_arch = "nvptx64")))]
mod tests {
    use half::f16;

    use super::*;

    struct Host;

    impl F16Bits for Host {
        fn bits(x: f32) -> u32 {
            f16::from_f32(x).to_bits() as u32
        }
        fn value(bits: u32) -> f32 {
            f16::from_bits(bits as u16).to_f32()
        }
    }

    #[test]
    fn fp8_is_nearest_even() {
        for code in 0..=0x7e_u32 {
            let value = fp8_value(code);
            assert_eq!(fp8_value(code | 0x80), -value);
            for sign in [0, 0x80] {
                let signed = |x: f32| if sign == 0 { x } else { -x };
                assert_eq!(fp8_code(signed(value)), sign | code);
                if code < 0x7e {
                    // Half way to the next one, and a little to either side.
                    let half = (value + fp8_value(code + 1)) / 2.0;
                    assert_eq!(fp8_code(signed(half)), sign | (code + code % 2), "{half}");
                    let bits = half.to_bits();
                    assert_eq!(fp8_code(signed(f32::from_bits(bits - 1))), sign | code);
                    assert_eq!(fp8_code(signed(f32::from_bits(bits + 1))), sign | (code + 1));
                }
            }
        }
        // By the format's definition: the least number, the least normal one, the greatest.
        assert_eq!([1, 8, 0x38, 0x7e].map(fp8_value), [1.0 / 512.0, 1.0 / 64.0, 1.0, 448.0]);
        assert_eq!([1e9, -449.0, f32::INFINITY, f32::NAN].map(fp8_code), [0x7e, 0xfe, 0x7e, 0]);
    }

    #[test]
    fn what_is_no_number_has_a_code() {
        assert_eq!(
            [f32::NAN, f32::INFINITY, -1e9, 2.5].map(|x| to_f16::<Host>(x, 64.0)),
            [0.0, 64.0, -64.0, 2.5]
        );
        assert_eq!(int8_code(f32::NAN, 0.5), 0);
        assert_eq!([int8_code(f32::INFINITY, 0.5), int8_code(f32::NEG_INFINITY, 0.5)], [127, 129]);
        assert_eq!([int8_code(0.5, 0.0), int4_code(1.0, 1.0, 0.0)], [0, 0]);
    }

    #[test]
    fn groups_reach_both_ends() {
        let ends = [-28672.0, -300.5, -1.0, -1e-3, 0.0, 2e-6, 0.7, 1.0, 513.0, 28672.0];
        for (min, max) in ends.iter().flat_map(|&a| ends.iter().map(move |&b| (a, b))) {
            if min > max {
                continue;
            }
            let [min, max] = [min, max].map(|x| to_f16::<Host>(x, INT4_V_MAX));
            let scale = int4_scale::<Host>(min, max);
            // Up to the rounding of this sum.
            let rounding = 1e-6 * (max.abs() + min.abs());
            assert!(min + 15.0 * scale >= max - rounding, "{min} {max} {scale}");
            assert_eq!(int4_code(min, min, scale), 0);
            let (low, scale) = int4_v_range::<Host>(int4_v_params::<Host>(min, max));
            assert!(low <= min && low + 15.0 * scale >= max, "{min} {max}: {low} {scale}");
            // Three bits of mantissa of the span, two of the minimum.
            assert!(
                15.0 * scale <= 1.13 * (max - low) + 1e-3 && low >= min - min.abs() / 4.0 - 2e-5,
                "{min} {max}: {low} {scale}"
            );
        }
    }
}
