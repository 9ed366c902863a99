//! Shared by the tests: numbers from a printed seed, the oracle, and the cases that every device runs.
#![allow(dead_code, unreachable_pub)] // each test binary uses a part

pub mod cases;
pub mod quant_pages;
pub mod reference;

use ferroflash::{CpuOptions, DType, Device, SimdLevel};
use half::{bf16, f16};

/// Every way in which this machine can run the crate: the CPU's instruction sets, simulated GPUs that differ in the
/// order of all that a GPU leaves open, and the first GPU. `FERROFLASH_TEST_DEVICES` names a part of them, of `cpu`,
/// `sim` and `cuda`, with commas.
pub fn devices() -> Vec<Device> {
    let wanted = std::env::var("FERROFLASH_TEST_DEVICES").unwrap_or_else(|_| "cpu,sim,cuda".into());
    let wanted = |kind: &str| wanted.split(',').any(|w| w == kind);
    let mut devices = Vec::new();
    if wanted("cpu") {
        devices.extend(cpus());
    }
    if wanted("sim") {
        devices.extend(SIM_SEEDS.map(Device::sim));
        devices.extend(SIM_SEEDS.map(Device::sim_hopper));
    }
    #[cfg(feature = "cuda")]
    if wanted("cuda") {
        devices.extend(cuda());
    }
    devices
}

/// The first GPU, where there is one; else says that what needs it is skipped.
#[cfg(feature = "cuda")]
pub fn cuda() -> Option<Device> {
    thread_local! {
        // One stream a test: making a device for each case would compile its kernels anew.
        static CUDA: Option<Device> = Device::cuda(0).ok();
    }
    let device = CUDA.with(Clone::clone);
    if device.is_none() {
        println!("skipped: no CUDA device");
    }
    device
}

/// Seeds of the simulated GPUs.
pub const SIM_SEEDS: [u64; 3] = [1, 2, 3];

/// Whether the device's attention takes 16-bit types only.
pub fn is_gpu(device: &Device) -> bool {
    device.id() != ferroflash::DeviceId::Cpu
}

pub fn cpus() -> Vec<Device> {
    let levels = [SimdLevel::Portable, SimdLevel::Avx2, SimdLevel::Avx512, SimdLevel::Neon];
    levels
        .into_iter()
        .filter(|level| level.is_available())
        .map(|level| Device::cpu_with(CpuOptions { threads: 3, simd: Some(level) }).unwrap())
        .collect()
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
pub struct Rng(pub u64);

impl Rng {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal.
    pub fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.unit(), self.unit());
        ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// A random order of `0..n`.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// `x` as the type would hold it.
pub fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Elements of a type chosen at run time.
pub enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

impl Elements {
    pub fn new(dtype: DType, data: &[f32]) -> Self {
        match dtype {
            DType::F16 => Elements::F16(data.iter().map(|&x| f16::from_f32(x)).collect()),
            DType::BF16 => Elements::BF16(data.iter().map(|&x| bf16::from_f32(x)).collect()),
            _ => Elements::F32(data.to_vec()),
        }
    }

    /// On a device.
    pub fn tensor(&self, device: &Device, shape: &[usize]) -> ferroflash::Tensor {
        match self {
            Elements::F32(x) => ferroflash::Tensor::from_slice(device, x, shape),
            Elements::F16(x) => ferroflash::Tensor::from_slice(device, x, shape),
            Elements::BF16(x) => ferroflash::Tensor::from_slice(device, x, shape),
        }
        .unwrap()
    }

    pub fn of_tensor(tensor: &ferroflash::Tensor) -> Self {
        match tensor.dtype() {
            DType::F16 => Elements::F16(tensor.to_vec().unwrap()),
            DType::BF16 => Elements::BF16(tensor.to_vec().unwrap()),
            _ => Elements::F32(tensor.to_vec().unwrap()),
        }
    }

    pub fn view(&self, shape: &[usize]) -> ferroflash::View<'_> {
        match self {
            Elements::F32(x) => ferroflash::View::from_slice(x, shape),
            Elements::F16(x) => ferroflash::View::from_slice(x, shape),
            Elements::BF16(x) => ferroflash::View::from_slice(x, shape),
        }
        .unwrap()
    }

    pub fn view_mut(&mut self, shape: &[usize]) -> ferroflash::ViewMut<'_> {
        match self {
            Elements::F32(x) => ferroflash::ViewMut::from_slice(x, shape),
            Elements::F16(x) => ferroflash::ViewMut::from_slice(x, shape),
            Elements::BF16(x) => ferroflash::ViewMut::from_slice(x, shape),
        }
        .unwrap()
    }

    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Elements::F32(x) => x.clone(),
            Elements::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Elements::BF16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// Elements on a device.
pub fn on<T: ferroflash::Element>(device: &Device, data: &[T], shape: &[usize]) -> ferroflash::Tensor {
    ferroflash::Tensor::from_slice(device, data, shape).unwrap()
}

/// Every element within `tolerance` of the exact one, relative to the larger of it and 1.
pub fn close(got: &[f32], exact: &[f64], tolerance: f64) {
    for (g, e) in got.iter().zip(exact) {
        assert!((*g as f64 - e).abs() <= tolerance * e.abs().max(1.0), "{g} {e}");
    }
}
