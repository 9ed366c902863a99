//! What a GPU backend asks of the thing that runs its kernels: the CUDA driver, or the simulator.

use std::fmt;
use std::sync::Arc;

use ferroflash_kernels::abi::{Plain, TensorMap, TensorMapSpec};

use crate::device::DeviceId;
use crate::error::Result;

/// A launch of one entry; sizes other than the grid are the entry's own.
pub(crate) struct Launch<'a> {
    pub(crate) entry: &'static str,
    pub(crate) grid: [u32; 2],
    /// The parameter struct.
    pub(crate) params: &'a [u64],
}

/// Memory, copies and launches, all in the order of one stream.
pub(crate) trait Driver: Send + Sync {
    fn id(&self) -> DeviceId;
    fn description(&self) -> String;
    /// Streaming multiprocessors.
    fn processors(&self) -> usize;
    /// CTAs of an entry that the shared memory of one has room for.
    fn resident_ctas(&self, entry: &'static str) -> usize;
    /// Bytes that memory delivers in the time of two more launches.
    fn bytes_of_launches(&self) -> u64;
    /// Memory, 256-byte aligned: zeros, or not `zeroed` what nobody may read before it is written.
    fn alloc(&self, bytes: usize, zeroed: bool) -> Result<u64>;
    fn free(&self, at: u64);
    fn upload(&self, from: &[u8], to: u64) -> Result<()>;
    /// Waits for all work before.
    fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    fn launch(&self, launch: Launch<'_>) -> Result<()>;
    /// What Hopper's kernels need to know, where they run here.
    fn hopper(&self) -> Option<Hopper>;
    /// How the copy engine finds boxes of a tensor; on Hopper.
    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap>;
    /// Waits for all work before.
    fn synchronize(&self) -> Result<()>;
}

/// A GPU that runs `sm_90a` kernels.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hopper {
    /// Bytes of the L2 cache.
    pub(crate) l2_bytes: usize,
}

/// CTAs of so many bytes that a multiprocessor's shared memory has room for: each takes 1 KiB more (CUDA programming guide,
/// compute capabilities).
pub(crate) fn ctas_in(shared_bytes: usize, cta: u32) -> usize {
    shared_bytes / (cta as usize + 1024)
}

/// A parameter struct as words.
pub(crate) fn words<P: Plain>(params: &P) -> &[u64] {
    const { assert!(size_of::<P>().is_multiple_of(8) && align_of::<P>() == 8) };
    // SAFETY: `Plain` promises no padding; size and alignment are checked above.
    unsafe { std::slice::from_raw_parts((params as *const P).cast(), size_of::<P>() / 8) }
}

/// Structs as bytes.
pub(crate) fn bytes<P: Plain>(structs: &[P]) -> &[u8] {
    // SAFETY: `Plain` promises no padding.
    unsafe { std::slice::from_raw_parts(structs.as_ptr().cast(), size_of_val(structs)) }
}

/// Device memory that is given back when dropped.
pub(crate) struct DeviceMemory {
    driver: Arc<dyn Driver>,
    at: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// As [`Driver::alloc`].
    pub(crate) fn new(driver: &Arc<dyn Driver>, bytes: usize, zeroed: bool) -> Result<Self> {
        Ok(DeviceMemory { driver: driver.clone(), at: driver.alloc(bytes, zeroed)?, bytes })
    }

    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.driver.free(self.at);
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes on {}", self.bytes, self.driver.id())
    }
}
