//! The simulator as a driver.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ferroflash_kernels::abi::{TensorMap, TensorMapSpec};
use ferroflash_kernels::kernels::{ALTERNATIVES, ENTRIES};
use ferroflash_kernels::sim::{self, Kernel, Memory, Stats};

use super::driver::{Driver, Hopper, Launch, ctas_in};
use crate::device::DeviceId;
use crate::error::{Error, Result};

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A simulated GPU with memory of its own.
pub(crate) struct SimDriver {
    number: u64,
    seed: u64,
    hopper: bool,
    memory: Memory,
    launches: AtomicU64,
    stats: Mutex<Stats>,
}

impl SimDriver {
    pub(crate) fn new(seed: u64, hopper: bool) -> Self {
        SimDriver {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            seed,
            hopper,
            memory: Memory::default(),
            launches: AtomicU64::new(0),
            stats: Mutex::default(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn error(&self, kernel: &str, why: String) -> Error {
        Error::Kernel { device: self.id().to_string(), kernel: kernel.into(), why }
    }
}

impl Driver for SimDriver {
    fn id(&self) -> DeviceId {
        DeviceId::Sim(self.number)
    }

    fn description(&self) -> String {
        let kernels = if self.hopper { "sm_90a and sm_80" } else { "sm_80" };
        format!("simulated GPU, {kernels} kernels, seed {}", self.seed)
    }

    fn processors(&self) -> usize {
        // Few enough that plans of small tests are both split and not.
        4
    }

    fn resident_ctas(&self, entry: &'static str) -> usize {
        // As much shared memory as on Hopper.
        ENTRIES.iter().find(|e| e.name == entry).map_or(0, |e| ctas_in(228 << 10, e.shared_bytes))
    }

    fn bytes_of_launches(&self) -> u64 {
        // So that small tests share prefixes too.
        1
    }

    fn alloc(&self, bytes: usize, zeroed: bool) -> Result<u64> {
        let at = self.memory.alloc(bytes, zeroed);
        at.ok_or_else(|| Error::OutOfMemory { device: self.id().to_string(), bytes: bytes as u128 })
    }

    fn free(&self, at: u64) {
        self.memory.free(at);
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        self.memory.upload(from, to).map_err(|why| self.error("upload", why))
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.memory.download(from, to).map_err(|why| self.error("download", why))
    }

    fn launch(&self, launch: Launch<'_>) -> Result<()> {
        let mut entries = ENTRIES.iter().chain(ALTERNATIVES.iter().map(|a| &a.1));
        let Some(entry) = entries.find(|e| e.name == launch.entry) else {
            return Err(self.error(launch.entry, "no such entry".into()));
        };
        let kernel = Kernel {
            name: entry.name,
            threads: entry.threads,
            cluster: entry.cluster,
            shared_bytes: entry.shared_bytes,
            run: entry.run,
        };
        let number = self.launches.fetch_add(1, Ordering::Relaxed);
        let job = sim::Launch { kernel, grid: launch.grid, params: launch.params, seed: self.seed, number };
        let stats =
            sim::launch(&self.memory, &job).map_err(|fault| self.error(entry.name, fault.to_string()))?;
        self.stats.lock().unwrap_or_else(PoisonError::into_inner).add(&stats);
        Ok(())
    }

    fn hopper(&self) -> Option<Hopper> {
        // A small cache, so that plans of small tests have several sections.
        self.hopper.then_some(Hopper { l2_bytes: 256 << 10 })
    }

    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        sim::encode(spec).map_err(|why| self.error("tensor map", why))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
