//! Devices: where memory lives and work runs. Everything above talks to [`Device`]; everything below
//! implements `Backend`.

// The CPU alone does not read all that a call says.
#[cfg_attr(not(any(feature = "cuda", feature = "sim")), allow(dead_code))]
mod backend;
mod cpu;
#[cfg(any(feature = "cuda", feature = "sim"))]
mod gpu;
mod host;

use std::fmt;
use std::sync::Arc;

#[doc(hidden)]
pub use backend::ConformanceSm90;
pub(crate) use backend::{
    AppendCall, AppendCounts, AttentionCall, Backend, DequantCall, EmbeddingCall, Ids, IdsMut, MergeCall,
    PageMassCall, RmsNormCall, SampleCall, SelectCall, SelectPlan, SiluMulCall,
};
pub use cpu::{CpuOptions, SimdLevel};
/// Building blocks of the CPU backend, for the linear layers of `ferroflash-serve`; not part of the API.
#[doc(hidden)]
pub use cpu::{matmul, simd};
#[cfg(feature = "cuda")]
pub use gpu::Graph;

use crate::error::Result;

/// Which device, for comparing and printing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceId {
    /// Host memory, CPU threads.
    Cpu,
    /// A stream on a CUDA device. Tensors of two streams do not mix, for nothing orders their work.
    Cuda {
        /// The driver's number of the GPU.
        ordinal: usize,
        /// This process's number of the stream.
        stream: u64,
    },
    /// A simulated GPU; each has a number of its own.
    Sim(u64),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceId::Cpu => f.write_str("cpu"),
            DeviceId::Cuda { ordinal, stream } => write!(f, "cuda:{ordinal} (stream {stream})"),
            DeviceId::Sim(number) => write!(f, "sim:{number}"),
        }
    }
}

/// A handle to a device; cheap to clone.
#[derive(Clone)]
pub struct Device {
    backend: Arc<dyn Backend>,
    #[cfg(feature = "cuda")]
    cuda: Option<Arc<gpu::CudaDriver>>,
    #[cfg(feature = "sim")]
    sim: Option<Arc<gpu::SimDriver>>,
}

impl Device {
    /// The CPU, with rayon's global threads and the best instruction set found.
    pub fn cpu() -> Self {
        Device::of(cpu::Cpu::default())
    }

    fn of(backend: impl Backend + 'static) -> Self {
        Device {
            backend: Arc::new(backend),
            #[cfg(feature = "cuda")]
            cuda: None,
            #[cfg(feature = "sim")]
            sim: None,
        }
    }

    /// The CPU with chosen threads or instruction set.
    pub fn cpu_with(options: CpuOptions) -> Result<Self> {
        Ok(Device::of(cpu::Cpu::new(options)?))
    }

    /// A simulated GPU: the GPU kernels themselves, run on the host lane by lane, with every access checked.
    /// `seed` draws the orders that a GPU leaves open. For tests: it is slow.
    #[cfg(feature = "sim")]
    pub fn sim(seed: u64) -> Self {
        Device::of_sim(gpu::SimDriver::new(seed, false))
    }

    /// As [`Device::sim`], a Hopper GPU: kernels on its own instructions (TMA, `wgmma`) where there are such, the others
    /// elsewhere.
    #[cfg(feature = "sim")]
    pub fn sim_hopper(seed: u64) -> Self {
        Device::of_sim(gpu::SimDriver::new(seed, true))
    }

    #[cfg(feature = "sim")]
    fn of_sim(driver: gpu::SimDriver) -> Self {
        let driver = Arc::new(driver);
        Device { sim: Some(driver.clone()), ..Device::of(gpu::Gpu::new(driver)) }
    }

    /// What the launches so far have done, where this is a simulated GPU.
    #[cfg(feature = "sim")]
    pub fn sim_stats(&self) -> Option<ferroflash_kernels::sim::Stats> {
        self.sim.as_ref().map(|driver| driver.stats())
    }

    /// An NVIDIA GPU, by the driver's number, with a stream of its own; from compute capability 8.0 (Ampere).
    ///
    /// Calls only enqueue work, in the order of the stream; [`Tensor::to_vec`](crate::Tensor::to_vec), results in host
    /// memory and [`Device::synchronize`] wait. Kernels are compiled by the driver when first used.
    ///
    /// # Errors
    /// [`Error::Unavailable`](crate::Error::Unavailable) without a driver, without such a GPU, or where it is too old.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Device::of_cuda(gpu::CudaDriver::new(ordinal)?))
    }

    /// The GPU and stream of another library's `cudarc` handle: work is enqueued there.
    ///
    /// # Errors
    /// As [`Device::cuda`].
    #[cfg(feature = "cuda")]
    pub fn cuda_on_stream(stream: &Arc<cudarc::driver::CudaStream>) -> Result<Self> {
        Ok(Device::of_cuda(gpu::CudaDriver::on_stream(stream.clone())?))
    }

    #[cfg(feature = "cuda")]
    fn of_cuda(driver: gpu::CudaDriver) -> Self {
        let driver = Arc::new(driver);
        Device { cuda: Some(driver.clone()), ..Device::of(gpu::Gpu::new(driver)) }
    }

    /// The stream that work is enqueued on, where this is a GPU.
    #[cfg(feature = "cuda")]
    pub fn cuda_stream(&self) -> Option<&Arc<cudarc::driver::CudaStream>> {
        self.cuda.as_ref().map(|driver| driver.stream())
    }

    /// Records the launches that `f` makes on this device as a CUDA graph, without running them. Runs of plans can be
    /// recorded; what allocates or gives results to the host cannot. Run everything once before, so that its kernels
    /// are loaded.
    ///
    /// # Errors
    /// What `f` gives; [`Error::Kernel`](crate::Error::Kernel) with the driver's words;
    /// [`Error::Unavailable`](crate::Error::Unavailable) where this is no CUDA device.
    #[cfg(feature = "cuda")]
    pub fn capture(&self, mut f: impl FnMut() -> Result<()>) -> Result<Graph> {
        match &self.cuda {
            Some(driver) => driver.capture(&mut f),
            None => Err(crate::Error::Unavailable {
                device: self.id().to_string(),
                why: "graphs are recorded on CUDA devices".into(),
            }),
        }
    }

    /// Milliseconds that the device takes for what `f` enqueues, by CUDA events; waits for it.
    ///
    /// # Errors
    /// What `f` gives; [`Error::Unavailable`](crate::Error::Unavailable) where this is no CUDA device.
    #[cfg(feature = "cuda")]
    pub fn time_ms(&self, mut f: impl FnMut() -> Result<()>) -> Result<f32> {
        match &self.cuda {
            Some(driver) => driver.time_ms(&mut f),
            None => Err(crate::Error::Unavailable {
                device: self.id().to_string(),
                why: "events are timed on CUDA devices".into(),
            }),
        }
    }

    /// One GPU instruction on chosen words; `None` on the CPU. For this crate's tests, not part of the API.
    #[doc(hidden)]
    pub fn conformance(&self, op: u32, input: &[u32]) -> Option<Result<(Vec<u32>, u32)>> {
        self.backend.run_conformance(op, input)
    }

    /// Hopper's instructions on chosen data; `None` elsewhere. For this crate's tests, not part of the API.
    #[doc(hidden)]
    pub fn conformance_sm90(&self, call: &ConformanceSm90<'_>) -> Option<Result<Vec<u32>>> {
        self.backend.run_conformance_sm90(call)
    }

    /// This device with another tile for Hopper's prefill; `None` where there are no such kernels. For this crate's tests
    /// and benches, not part of the API.
    ///
    /// # Safety
    /// The tile's sizes are those that its entries are compiled for: it is one of the kernels' tables.
    #[doc(hidden)]
    pub unsafe fn with_prefill_tile(&self, tile: ferroflash_kernels::abi::PrefillTile) -> Option<Self> {
        let mut device = self.clone();
        device.backend = self.backend.with_prefill_tile(tile)?;
        Some(device)
    }

    /// Waits until all work enqueued so far is done.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel): what the device says of work that failed.
    pub fn synchronize(&self) -> Result<()> {
        self.backend.synchronize()
    }

    /// The first GPU where a driver and a supported GPU answer (feature `cuda`), else the CPU.
    pub fn auto() -> Self {
        #[cfg(feature = "cuda")]
        if let Ok(device) = Device::cuda(0) {
            return device;
        }
        Device::cpu()
    }

    /// Which device this is.
    pub fn id(&self) -> DeviceId {
        self.backend.id()
    }

    /// Name and instruction set, for logs.
    pub fn description(&self) -> String {
        self.backend.description()
    }

    /// Runs `f` where the device's threads are at hand: on the CPU inside its thread pool, which
    /// saves a hand-over per operation in a loop of many small ones.
    pub fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let mut result = None;
        let mut f = Some(f);
        self.backend.enter(&mut || result = f.take().map(|f| f()));
        match result {
            Some(result) => result,
            None => unreachable!("Backend::enter calls its argument"),
        }
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.description())
    }
}

/// A tensor's or plan's memory.
pub(crate) enum Storage {
    /// Host memory.
    Host(host::Memory),
    /// A GPU's.
    #[cfg(any(feature = "cuda", feature = "sim"))]
    Device(gpu::DeviceMemory),
}

impl Storage {
    /// No memory.
    pub(crate) fn none() -> Self {
        Storage::Host(host::Memory::Small(Vec::new(), 0))
    }

    /// The bytes, where they are host memory.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        match self {
            Storage::Host(memory) => Some(memory.bytes()),
            #[cfg(any(feature = "cuda", feature = "sim"))]
            Storage::Device(_) => None,
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Storage::Host(memory) => Some(memory.bytes_mut()),
            #[cfg(any(feature = "cuda", feature = "sim"))]
            Storage::Device(_) => None,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Storage::Host(memory) => memory.bytes().len(),
            #[cfg(any(feature = "cuda", feature = "sim"))]
            Storage::Device(memory) => memory.bytes(),
        }
    }

    /// The address on the device, as a pointer that only the device may follow.
    pub(crate) fn ptr(&self) -> *const u8 {
        match self {
            Storage::Host(memory) => memory.bytes().as_ptr(),
            #[cfg(any(feature = "cuda", feature = "sim"))]
            Storage::Device(memory) => memory.at() as *const u8,
        }
    }

    pub(crate) fn ptr_mut(&mut self) -> *mut u8 {
        match self {
            Storage::Host(memory) => memory.bytes_mut().as_mut_ptr(),
            #[cfg(any(feature = "cuda", feature = "sim"))]
            Storage::Device(memory) => memory.at() as *mut u8,
        }
    }

    #[cfg(any(feature = "cuda", feature = "sim"))]
    pub(crate) fn address(&self) -> u64 {
        self.ptr() as u64
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}
