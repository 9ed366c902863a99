//! Every instruction's model against its definition, on the simulator and, where there is one, on a GPU: bit for bit,
//! but for the functions that the reference calls approximate, which get its bounds.

mod common;

use common::{Rng, devices};
use ferroflash::Device;
use ferroflash_kernels::abi::conformance as op;
use ferroflash_kernels::tile::fragment::{a_at, b_at, c_at};
use half::{bf16, f16};

type Words = [[u32; 16]; 32];

/// Runs an instruction on every device that has it and compares words `0..n` of each lane.
fn check(op: u32, input: &Words, n: usize, expected: impl Fn(&Words, usize) -> Vec<u32>) {
    for device in devices() {
        let Some(result) = device.conformance(op, input.as_flattened()) else { continue };
        let (output, _) = result.unwrap();
        for lane in 0..32 {
            assert_eq!(output[16 * lane..][..n], expected(input, lane), "lane {lane} on {device:?}");
        }
    }
}

fn draw(rng: &mut Rng, word: impl Fn(&mut Rng, usize) -> u32) -> Words {
    std::array::from_fn(|_| std::array::from_fn(|i| word(rng, i)))
}

/// Floats of every kind: ordinary, tiny, huge, infinite, NaN.
fn any_float(rng: &mut Rng) -> f32 {
    match rng.below(8) {
        0 => [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY][rng.below(4)],
        1 => rng.normal() * 1e-7,
        2 => rng.normal() * 1e5,
        _ => rng.normal(),
    }
}

#[test]
fn shuffles_and_votes() {
    let mut rng = Rng(1);
    for _ in 0..8 {
        let mask = rng.below(32) as u32;
        let by = rng.below(32) as u32;
        let words = draw(&mut rng, |rng, i| match i {
            1 => mask,
            2 => rng.below(32) as u32,
            3 => by,
            _ => rng.bits() as u32,
        });
        check(op::SHUFFLES, &words, 4, |w, lane| {
            let up = lane.checked_sub(w[lane][3] as usize).unwrap_or(lane);
            let ballot = (0..32).fold(0, |all, i| all | (w[i][0] & 1) << i);
            vec![w[lane ^ w[lane][1] as usize][0], w[w[lane][2] as usize][0], w[up][0], ballot]
        });
    }
}

/// Small integers: every product and sum is exact, so that no order of adding shows.
#[test]
fn products_of_matrices() {
    let mut rng = Rng(2);
    for (code, bits) in [
        (op::MMA_F16, (|x: f32| f16::from_f32(x).to_bits()) as fn(f32) -> u16),
        (op::MMA_BF16, |x: f32| bf16::from_f32(x).to_bits()),
    ] {
        let mut integer = |n: usize| rng.below(2 * n + 1) as f32 - n as f32;
        let mut a = [[0f32; 16]; 16];
        let (mut b, mut c) = ([[0f32; 8]; 16], [[0f32; 8]; 16]);
        a.as_flattened_mut().iter_mut().for_each(|x| *x = integer(100));
        b.as_flattened_mut().iter_mut().for_each(|x| *x = integer(100));
        c.as_flattened_mut().iter_mut().for_each(|x| *x = integer(5000));
        let mut words = [[0u32; 16]; 32];
        for (lane, w) in words.iter_mut().enumerate() {
            for i in 0..8 {
                let (row, k) = a_at(lane, i);
                w[i / 2] |= (bits(a[row][k]) as u32) << (16 * (i % 2));
            }
            for i in 0..4 {
                let (k, column) = b_at(lane, i);
                w[4 + i / 2] |= (bits(b[k][column]) as u32) << (16 * (i % 2));
                let (row, column) = c_at(lane, i);
                w[6 + i] = c[row][column].to_bits();
            }
        }
        check(code, &words, 4, |_, lane| {
            (0..4)
                .map(|i| {
                    let (row, column) = c_at(lane, i);
                    let sum: f32 = (0..16).map(|k| a[row][k] * b[k][column]).sum();
                    (c[row][column] + sum).to_bits()
                })
                .collect()
        });
    }
}

#[test]
fn matrices_from_shared_memory() {
    let mut rng = Rng(3);
    let order = rng.permutation(32);
    let mut words = draw(&mut rng, |rng, _| rng.bits() as u32);
    words.iter_mut().zip(&order).for_each(|(w, &row)| w[4] = row);
    check(op::LDMATRIX, &words, 8, |w, lane| {
        // Row `r` of matrix `m` is the 16 bytes of the lane that lane `8 m + r` names.
        let element = |m: usize, r: usize, c: usize| {
            let row = &w[w[8 * m + r][4] as usize];
            row[c / 2] >> (16 * (c % 2)) & 0xffff
        };
        let (i, j) = (lane / 4, 2 * (lane % 4));
        let plain = (0..4).map(|m| element(m, i, j) | element(m, i, j + 1) << 16);
        let transposed = (0..4).map(|m| element(m, j, i) | element(m, j + 1, i) << 16);
        plain.chain(transposed).collect()
    });
}

#[test]
fn conversions_and_half_arithmetic() {
    let mut rng = Rng(4);
    for _ in 0..16 {
        // No NaN: their payloads are not specified.
        let finite_halves = |rng: &mut Rng| {
            let half = |rng: &mut Rng| f16::from_f32(rng.normal() * 8.0).to_bits() as u32;
            half(rng) | half(rng) << 16
        };
        let words =
            draw(&mut rng, |rng, i| if i < 2 { any_float(rng).to_bits() } else { finite_halves(rng) });
        check(op::CONVERT, &words, 8, |w, lane| {
            let w = &w[lane];
            let (x, y) = (f32::from_bits(w[0]), f32::from_bits(w[1]));
            let halves = |i: usize, s: u32| f16::from_bits((w[i] >> s) as u16).to_f64();
            let both = |f: &dyn Fn(u32) -> f64| {
                f16::from_f64(f(0)).to_bits() as u32 | (f16::from_f64(f(16)).to_bits() as u32) << 16
            };
            vec![
                f16::from_f32(x).to_bits() as u32 | (f16::from_f32(y).to_bits() as u32) << 16,
                bf16::from_f32(x).to_bits() as u32 | (bf16::from_f32(y).to_bits() as u32) << 16,
                (halves(2, 0) as f32).to_bits(),
                (halves(2, 16) as f32).to_bits(),
                w[2] << 16,
                w[2] & 0xffff_0000,
                both(&|s| halves(3, s) * halves(4, s) + halves(5, s)),
                both(&|s| halves(3, s) - halves(4, s)),
            ]
        });
    }
}

#[test]
fn exact_arithmetic() {
    let mut rng = Rng(5);
    for _ in 0..16 {
        let words = draw(&mut rng, |rng, i| match i {
            0..=2 => any_float(rng).to_bits(),
            4 => rng.below(1000) as u32 + 1,
            6 => rng.below(3) as u32,
            _ => rng.bits() as u32 | 1,
        });
        for device in devices() {
            let Some(result) = device.conformance(op::ARITHMETIC, words.as_flattened()) else { continue };
            let (output, _) = result.unwrap();
            for (w, out) in words.iter().zip(output.chunks(16)) {
                let [x, y, z] = [0, 1, 2].map(|i| f32::from_bits(w[i]));
                let same = |got: u32, exact: f32| {
                    let got = f32::from_bits(got);
                    assert!(
                        got.to_bits() == exact.to_bits() || got.is_nan() && exact.is_nan(),
                        "{got} {exact}"
                    );
                };
                same(out[0], x.mul_add(y, z));
                if x != y {
                    same(out[1], if x.is_nan() || y.is_nan() { f32::NAN } else { x.max(y) });
                }
                let (a, b) = (w[3] as u64 | (w[4] as u64) << 32, w[5] as u64 | (w[6] as u64) << 32);
                assert_eq!(out[2..4], [w[3] / w[4], w[3] % w[4]]);
                assert_eq!(out[4] as u64 | (out[5] as u64) << 32, a / b);
                assert_eq!(out[6] as u64 | (out[7] as u64) << 32, a % b);
            }
        }
    }
}

/// Within the bounds that the PTX ISA reference states.
#[test]
fn approximate_functions() {
    let mut rng = Rng(6);
    let words = draw(&mut rng, |rng, i| {
        let x = rng.normal();
        if i == 0 { (x * 20.0).to_bits() } else { (x.abs() * 100.0 + 1e-3).to_bits() }
    });
    for device in devices() {
        let Some(result) = device.conformance(op::APPROXIMATE, words.as_flattened()) else { continue };
        let (output, _) = result.unwrap();
        for (w, out) in words.iter().zip(output.chunks(16)) {
            let (x, y) = (f32::from_bits(w[0]) as f64, f32::from_bits(w[1]) as f64);
            let near = |i: usize, exact: f64, relative: f64, absolute: f64| {
                let got = f32::from_bits(out[i]) as f64;
                assert!(
                    (got - exact).abs() <= relative * exact.abs() + absolute,
                    "{i}: {got} {exact} {device:?}"
                );
            };
            let ulp = 2f64.powi(-23);
            near(0, x.exp2(), 2.0 * ulp + 2f64.powi(-22), 0.0);
            near(1, y.log2(), 2.0 * ulp, 2f64.powi(-22));
            near(2, 1.0 / y, ulp, 0.0);
            near(3, 1.0 / y.sqrt(), 2f64.powi(-22), 0.0);
        }
    }
}

#[test]
fn asynchronous_copies() {
    let mut rng = Rng(7);
    let words = draw(&mut rng, |rng, _| rng.bits() as u32);
    check(op::COPIES, &words, 6, |w, lane| {
        let next = (lane + 1) % 32;
        vec![w[lane][0], w[lane][1], w[lane][2], w[lane][3], w[next][4], 0]
    });
}

#[test]
fn atomics_and_widths() {
    let mut rng = Rng(8);
    let words = draw(&mut rng, |rng, _| rng.bits() as u32);
    let sum = words.iter().fold(0u32, |s, w| s.wrapping_add(w[0]));
    let wide = words.iter().fold(0u64, |s, w| s.wrapping_add(w[1] as u64 | (w[2] as u64) << 32));
    check(op::MEMORY, &words, 15, |w, lane| {
        let (w, next) = (&w[lane], &w[(lane + 1) % 32]);
        let sums = [sum, wide as u32, (wide >> 32) as u32];
        let halves = [w[3], w[3] >> 16, 0];
        let rest = [w[2], w[3], w[4], w[5], w[6], w[7], next[8], next[10], 1 << 16];
        [&sums[..], &halves, &rest].concat()
    });
    for device in devices() {
        let result: Option<_> = device.conformance(op::MEMORY, words.as_flattened());
        if let Some(result) = result {
            assert_eq!(result.unwrap().1, sum);
        }
    }
}

#[test]
fn the_cpu_has_no_gpu_instructions() {
    assert!(Device::cpu().conformance(op::SHUFFLES, &[]).is_none());
}
