//! Hopper's instructions against their definitions, on the simulator and, where there is one, on a GPU, bit for bit:
//! products of small integers are exact in any order of sums; boxes are compared with a layout worked out here.

mod common;

use std::collections::BTreeMap;

use common::Rng;
use ferroflash::Device;
use ferroflash::device::ConformanceSm90;
use ferroflash_kernels::abi::{ConformanceSm90Params, TensorMap, TensorMapSpec, conformance as op};
use ferroflash_kernels::tile::fragment::{a_at, c_at};
use half::{bf16, f16};

/// Simulated Hoppers, and the first GPU, where it is one.
fn devices() -> Vec<Device> {
    let mut devices = common::devices();
    devices.retain(|d| call(d, &request(op::LANES), &[0; 2048], &[0; 2048], None).is_some());
    if devices.is_empty() {
        println!("skipped: no Hopper GPU");
    }
    devices
}

fn request(op: u32) -> ConformanceSm90Params {
    ConformanceSm90Params {
        maps: [TensorMap([0; 16]); 2],
        input: 0,
        output: 0,
        descriptors: [0; 2],
        op,
        shape: 0,
        bf16: 0,
        bytes: 0,
        at: [0; 5],
        reserved: 0,
    }
}

fn call(
    device: &Device,
    params: &ConformanceSm90Params,
    input: &[u32],
    output: &[u32],
    tensors: Option<[TensorMapSpec; 2]>,
) -> Option<Vec<u32>> {
    run(device, "conformance_sm90", 1, params, input, output, tensors)
}

fn run(
    device: &Device,
    entry: &'static str,
    grid: u32,
    params: &ConformanceSm90Params,
    input: &[u32],
    output: &[u32],
    tensors: Option<[TensorMapSpec; 2]>,
) -> Option<Vec<u32>> {
    let call = ConformanceSm90 { entry, params: *params, tensors, input, output, grid };
    device.conformance_sm90(&call).map(|result| result.unwrap())
}

/// A matrix of small integers.
struct Matrix {
    columns: usize,
    data: Vec<f32>,
}

impl Matrix {
    fn draw(rng: &mut Rng, rows: usize, columns: usize) -> Self {
        Matrix { columns, data: (0..rows * columns).map(|_| rng.below(41) as f32 - 20.0).collect() }
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        self.data[row * self.columns + column]
    }
}

fn bits(is_bf16: bool, x: f32) -> u16 {
    if is_bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() }
}

/// Puts a 16-bit element at a byte address.
fn put(words: &mut [u32], at: usize, x: u16) {
    words[at / 4] |= (x as u32) << (8 * (at % 4));
}

/// A swizzle of addresses (PTX ISA): bits 4 and up are changed by those from 7 on.
fn swizzled(at: usize, bytes: usize) -> usize {
    let mask = bytes.max(16) / 16 - 1;
    at ^ ((at >> 7) & mask) << 4
}

/// Element of a tile of panels: 64 columns wide, or 32 where the row is no multiple of 64.
fn panel_at(rows: usize, columns: usize, row: usize, column: usize) -> usize {
    let width = if columns.is_multiple_of(64) { 64 } else { 32 };
    swizzled(column / width * rows * width * 2 + row * width * 2 + column % width * 2, 2 * width)
}

#[test]
fn products_along_k() {
    let mut rng = Rng(1);
    for n in [64, 80, 96, 112, 128, 144, 160, 176, 192] {
        for is_bf16 in [false, true] {
            let (a, b) = (Matrix::draw(&mut rng, 64, 64), Matrix::draw(&mut rng, n, 64));
            let mut input = vec![0u32; (64 + n) * 32];
            for k in 0..64 {
                (0..64).for_each(|r| put(&mut input, panel_at(64, 64, r, k), bits(is_bf16, a.at(r, k))));
                let tile = &mut input[64 * 32..];
                (0..n).for_each(|r| put(tile, panel_at(n, 64, r, k), bits(is_bf16, b.at(r, k))));
            }
            let expected: Vec<u32> = (0..64 * n)
                .map(|i| (0..64).map(|k| a.at(i / n, k) * b.at(i % n, k)).sum::<f32>().to_bits())
                .collect();
            let params = ConformanceSm90Params { shape: n as u32, bf16: is_bf16 as u32, ..request(op::A_BT) };
            for device in devices() {
                let got = call(&device, &params, &input, &vec![0; 64 * n], None).unwrap();
                assert!(got == expected, "{n} columns, bf16 {is_bf16}, {device:?}");
            }
        }
    }
}

#[test]
fn products_from_registers_along_n() {
    let mut rng = Rng(2);
    for n in [64, 96, 128, 160, 192, 256] {
        for is_bf16 in [false, true] {
            let (a, b) = (Matrix::draw(&mut rng, 64, 32), Matrix::draw(&mut rng, 32, n));
            let c = Matrix::draw(&mut rng, 64, n);
            let mut input = vec![0u32; 32 * n / 2];
            for (k, j) in (0..32).flat_map(|k| (0..n).map(move |j| (k, j))) {
                put(&mut input, panel_at(32, n, k, j), bits(is_bf16, b.at(k, j)));
            }
            for lane in 0..128 {
                let row = |r: usize| lane / 32 * 16 + r;
                for i in 0..8 {
                    let pair = |half: usize| {
                        let (r, k) = a_at(lane % 32, 2 * (i % 4) + half);
                        bits(is_bf16, a.at(row(r), i / 4 * 16 + k)) as u32
                    };
                    input.push(pair(0) | pair(1) << 16);
                }
                for i in 0..n / 2 {
                    let (r, j) = c_at(lane % 32, i % 4);
                    input.push(c.at(row(r), i / 4 * 8 + j).to_bits());
                }
            }
            let expected: Vec<u32> = (0..64 * n)
                .map(|i| {
                    let sum: f32 = (0..32).map(|k| a.at(i / n, k) * b.at(k, i % n)).sum();
                    (c.at(i / n, i % n) + sum).to_bits()
                })
                .collect();
            let params =
                ConformanceSm90Params { shape: n as u32, bf16: is_bf16 as u32, ..request(op::PLUS_A_B) };
            for device in devices() {
                let got = call(&device, &params, &input, &vec![0; 64 * n], None).unwrap();
                assert!(got == expected, "{n} columns, bf16 {is_bf16}, {device:?}");
            }
        }
    }
}

/// Every swizzle, both ways of both operands: `[64, 16]` by `[16, 64]`, by the canonical layouts of the PTX ISA ("Strides",
/// "Matrix Descriptor Format").
#[test]
fn products_by_descriptors_of_every_form() {
    let mut rng = Rng(3);
    // Byte address of an element (outer index, k), and the descriptor's leading and stride offsets.
    let layout = |swizzle: usize, trans: bool, outer: usize, k: usize| {
        let width = swizzle.max(16);
        let at = match (swizzle, trans) {
            // Eight rows of 16 bytes side by side; halves of k 1024 bytes apart, groups of rows 128.
            (0, false) => k / 8 * 1024 + outer / 8 * 128 + outer % 8 * 16 + k % 8 * 2,
            (_, false) => outer / 8 * 8 * width + outer % 8 * width + k * 2,
            (0, true) => k / 8 * 1024 + outer / 8 * 128 + k % 8 * 16 + outer % 8 * 2,
            // Panels as wide as the swizzle, 16 rows (k) each.
            (_, true) => outer * 2 / width * 16 * width + k * width + outer * 2 % width,
        };
        swizzled(at, swizzle)
    };
    let fields = |swizzle: usize, trans: bool| {
        let (leading, stride) = match (swizzle, trans) {
            (0, false) => (1024, 128),
            (_, false) => (16, 8 * swizzle),
            (0, true) => (1024, 128),
            (_, true) => (16 * swizzle, 8 * swizzle),
        };
        let code = [(0, 0u64), (128, 1), (64, 2), (32, 3)].into_iter().find(|c| c.0 == swizzle).unwrap().1;
        code << 62 | (stride as u64 >> 4) << 32 | (leading as u64 >> 4) << 16
    };
    for (a_swizzle, b_swizzle) in [(0, 0), (32, 64), (64, 128), (128, 32), (128, 128)] {
        for ways in 0..4u32 {
            let (a_trans, b_trans) = (ways / 2 == 1, ways % 2 == 1);
            let (a, b) = (Matrix::draw(&mut rng, 64, 16), Matrix::draw(&mut rng, 64, 16));
            let mut input = vec![0u32; 4096];
            for (i, k) in (0..64).flat_map(|i| (0..16).map(move |k| (i, k))) {
                put(&mut input, layout(a_swizzle, a_trans, i, k), bits(false, a.at(i, k)));
                put(&mut input, 8192 + layout(b_swizzle, b_trans, i, k), bits(false, b.at(i, k)));
            }
            let params = ConformanceSm90Params {
                shape: ways,
                descriptors: [fields(a_swizzle, a_trans), fields(b_swizzle, b_trans) + (8192 >> 4)],
                ..request(op::DESCRIBED)
            };
            let expected: Vec<u32> = (0..64 * 64)
                .map(|i| (0..16).map(|k| a.at(i / 64, k) * b.at(i % 64, k)).sum::<f32>().to_bits())
                .collect();
            for device in devices() {
                let got = call(&device, &params, &input, &[0; 4096], None).unwrap();
                assert!(got == expected, "swizzles {a_swizzle} {b_swizzle}, ways {ways}, {device:?}");
            }
        }
    }
}

/// A tensor in `words` of memory with a gap after each row, and what a box of it is.
struct Tensor {
    spec: TensorMapSpec,
    words: usize,
}

impl Tensor {
    fn new(dims: &[u64], box_dims: &[u32], swizzle_bytes: u32) -> Self {
        let mut spec = TensorMapSpec {
            base: 0,
            rank: dims.len() as u32,
            swizzle_bytes,
            dims: [1; 5],
            strides: [16; 4],
            box_dims: [1; 5],
        };
        spec.dims[..dims.len()].copy_from_slice(dims);
        spec.box_dims[..dims.len()].copy_from_slice(box_dims);
        let mut bytes = (2 * dims[0]).next_multiple_of(16) + 16;
        for d in 1..dims.len() {
            spec.strides[d - 1] = bytes;
            bytes *= dims[d];
        }
        Tensor { spec, words: bytes as usize / 4 }
    }

    /// For each 16-bit element of the box at `at`: its byte in shared memory, and its byte in the tensor, if it is inside.
    fn elements(&self, at: [i32; 5]) -> Vec<(usize, Option<usize>)> {
        let b = self.spec.box_dims.map(|b| b as usize);
        let mut all = Vec::new();
        for i in 0..b.iter().product() {
            let (mut rest, mut byte, mut inside) = (i, 0usize, true);
            for d in 0..5 {
                let x = at[d] as i64 + (rest % b[d]) as i64;
                rest /= b[d];
                inside &= x >= 0 && (x as u64) < self.spec.dims[d];
                let stride = if d == 0 { 2 } else { self.spec.strides[d - 1] as i64 };
                byte = byte.wrapping_add((x * stride) as usize);
            }
            all.push((swizzled(2 * i, self.spec.swizzle_bytes as usize), inside.then_some(byte)));
        }
        all
    }
}

fn element(words: &[u32], at: usize) -> u16 {
    (words[at / 4] >> (8 * (at % 4))) as u16
}

/// Dimensions of a tensor and of a box of it, a swizzle, where the box is.
type BoxCase = (&'static [u64], &'static [u32], u32, [i32; 5]);

#[test]
fn boxes_of_every_rank_and_swizzle() {
    let mut rng = Rng(4);
    let cases: [BoxCase; 8] = [
        (&[72, 40], &[64, 32], 128, [0, 4, 0, 0, 0]),
        (&[72, 40], &[64, 32], 128, [16, 20, 0, 0, 0]),
        (&[64, 30], &[32, 16], 64, [32, -5, 0, 0, 0]),
        (&[48, 9, 7], &[16, 8, 5], 32, [-8, 3, 4, 0, 0]),
        (&[40, 6, 5], &[40, 4, 3], 0, [8, 1, 3, 0, 0]),
        (&[128, 3, 2, 10], &[64, 3, 1, 8], 128, [64, 0, 1, 5, 0]),
        (&[64, 5, 4, 3], &[64, 4, 2, 2], 128, [0, 3, 3, 2, 0]),
        (&[32, 4, 3, 3, 4], &[16, 2, 3, 2, 2], 32, [16, 1, 0, 2, 3]),
    ];
    for (dims, box_dims, swizzle, at) in cases {
        let tensor = Tensor::new(dims, box_dims, swizzle);
        let bytes = 2 * box_dims.iter().product::<u32>();
        let input: Vec<u32> = (0..tensor.words).map(|_| rng.bits() as u32).collect();
        // The box as it stands in shared memory, then the tensor that the same box is written to.
        let target = bytes as usize / 4;
        let output: Vec<u32> = (0..target + tensor.words).map(|_| rng.bits() as u32).collect();
        let mut expected = output.clone();
        let set = |words: &mut [u32], at: usize, x: u16| {
            words[at / 4] &= !(0xffff << (8 * (at % 4)));
            put(words, at, x);
        };
        for (shared, global) in tensor.elements(at) {
            set(&mut expected, shared, global.map_or(0, |g| element(&input, g)));
            if let Some(g) = global {
                set(&mut expected[target..], g, element(&input, g));
            }
        }
        let params = ConformanceSm90Params { shape: dims.len() as u32, bytes, at, ..request(op::BOXES) };
        let to = TensorMapSpec { base: bytes as u64, ..tensor.spec };
        for device in devices() {
            let got = call(&device, &params, &input, &output, Some([tensor.spec, to])).unwrap();
            assert!(got == expected, "{:?} at {at:?}, {device:?}", tensor.spec);
        }
    }
}

#[test]
fn runs_of_bytes() {
    let mut rng = Rng(5);
    for words in [4, 256, 2000] {
        let input: Vec<u32> = (0..words).map(|_| rng.bits() as u32).collect();
        let expected: Vec<u32> = input.iter().rev().copied().collect();
        let params = ConformanceSm90Params { bytes: 4 * words, ..request(op::RUNS) };
        for device in devices() {
            let got = call(&device, &params, &input, &vec![0; words as usize], None).unwrap();
            assert_eq!(got, expected, "{device:?}");
        }
    }
}

#[test]
fn barriers_elections_and_matrices_to_shared_memory() {
    let mut rng = Rng(6);
    let input: Vec<u32> = (0..128 * 16).map(|_| rng.bits() as u32).collect();
    for device in devices() {
        let got = call(&device, &request(op::LANES), &input, &[0; 2048], None).unwrap();
        for lane in 0..128 {
            let word = |lane: usize, i: usize| input[16 * lane + i];
            let got = &got[16 * lane..];
            let next = (lane + 1) % 128;
            let given = if lane < 64 { 0 } else { word(lane - 64, 2) };
            assert_eq!(got[..5], [word(next, 0), word(next, 1), given, 1, 1], "lane {lane}, {device:?}");
            // Row `r` of matrix `m`: pairs of elements from lanes `4 r` to `4 r + 3`.
            let (warp, m, r) = (lane / 32 * 32, lane % 32 / 8, lane % 8);
            let row: Vec<u32> = (0..4).map(|t| word(warp + 4 * r + t, 5 + m)).collect();
            assert_eq!(got[5..9], row[..], "lane {lane}, {device:?}");
        }
    }
}

#[test]
fn multicast_and_remote_arrivals_in_a_cluster() {
    let mut rng = Rng(7);
    let tensor = Tensor::new(&[64, 20], &[64, 16], 128);
    let (bytes, at) = (2048, [0, 3, 0, 0, 0]);
    let input: Vec<u32> = (0..tensor.words).map(|_| rng.bits() as u32).collect();
    let mut expected = vec![0u32; 1024];
    for (shared, global) in tensor.elements(at) {
        for cta in 0..2 {
            put(&mut expected, cta * 2048 + shared, element(&input, global.unwrap()));
        }
    }
    let params = ConformanceSm90Params { shape: 2, bytes, at, ..request(op::BOXES) };
    for device in devices() {
        let maps = Some([tensor.spec; 2]);
        let got = run(&device, "conformance_sm90_cluster", 2, &params, &input, &[0; 1024], maps).unwrap();
        assert!(got == expected, "{device:?}");
    }
}

#[test]
fn registers_move_between_a_producer_and_a_consumer() {
    let mut rng = Rng(8);
    let input: Vec<u32> = (0..512).map(|_| rng.bits() as u32).collect();
    for device in devices() {
        let got = run(&device, "conformance_sm90_roles", 1, &request(0), &input, &[0; 512], None).unwrap();
        for (i, x) in got.iter().enumerate() {
            assert_eq!(*x, input[4 * (127 - i / 4) + i % 4], "{device:?}");
        }
    }
}

#[test]
fn simulated_launches_are_counted() {
    let device = Device::sim_hopper(1);
    call(&device, &request(op::LANES), &[0; 2048], &[0; 2048], None).unwrap();
    let collectives: BTreeMap<_, _> = device.sim_stats().unwrap().collectives;
    assert!(collectives["stmatrix.x4"] == 4 && collectives["elect"] == 8, "{collectives:?}");
}
