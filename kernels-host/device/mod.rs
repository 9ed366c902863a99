//! Devices: where memory lives and work runs. Everything above talks to [`Device`]; everything below
//! implements `Backend`.

mod backend;
mod cpu;
mod host;

use std::fmt;
use std::sync::Arc;

pub(crate) use backend::{
    AppendCall, AttentionCall, Backend, DequantCall, EmbeddingCall, MergeCall, RmsNormCall, SampleCall,
    SelectCall, SiluMulCall,
};
pub(crate) use cpu::partial_stride;
pub use cpu::{CpuOptions, SimdLevel};
/// Building blocks of the CPU backend, for the linear layers of `ferroflash-serve`; not part of the API.
#[doc(hidden)]
pub use cpu::{matmul, simd};

use crate::error::Result;

/// Which device, for comparing and printing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceId {
    /// Host memory, CPU threads.
    Cpu,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceId::Cpu => f.write_str("cpu"),
        }
    }
}

/// A handle to a device; cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<dyn Backend>);

impl Device {
    /// The CPU, with rayon's global threads and the best instruction set found.
    pub fn cpu() -> Self {
        Device(Arc::new(cpu::Cpu::default()))
    }

    /// The CPU with chosen threads or instruction set.
    pub fn cpu_with(options: CpuOptions) -> Result<Self> {
        Ok(Device(Arc::new(cpu::Cpu::new(options)?)))
    }

    /// The best device of this machine. No GPU backend exists yet: this is [`Device::cpu`].
    pub fn auto() -> Self {
        Device::cpu()
    }

    /// Which device this is.
    pub fn id(&self) -> DeviceId {
        self.0.id()
    }

    /// Name and instruction set, for logs.
    pub fn description(&self) -> String {
        self.0.description()
    }

    /// Runs `f` where the device's threads are at hand: on the CPU inside its thread pool, which
    /// saves a hand-over per operation in a loop of many small ones.
    pub fn scope<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let mut result = None;
        let mut f = Some(f);
        self.0.enter(&mut || result = f.take().map(|f| f()));
        match result {
            Some(result) => result,
            None => unreachable!("Backend::enter calls its argument"),
        }
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.0
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.description())
    }
}

/// A tensor's memory.
pub(crate) enum Storage {
    /// Host memory.
    Host(host::Memory),
}

impl Storage {
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        match self {
            Storage::Host(memory) => Some(memory.bytes()),
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Storage::Host(memory) => Some(memory.bytes_mut()),
        }
    }

    pub(crate) fn ptr(&self) -> *const u8 {
        match self {
            Storage::Host(memory) => memory.bytes().as_ptr(),
        }
    }

    pub(crate) fn ptr_mut(&mut self) -> *mut u8 {
        match self {
            Storage::Host(memory) => memory.bytes_mut().as_mut_ptr(),
        }
    }
}
