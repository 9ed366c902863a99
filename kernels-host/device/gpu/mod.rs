//! The GPU backend: checks what kernels need beyond the operation's own door, and launches them.

mod attention;
mod driver;
mod params;
#[cfg(feature = "sim")]
mod sim;

use std::sync::Arc;

pub(crate) use driver::{DeviceMemory, Driver};
#[cfg(feature = "sim")]
pub(crate) use sim::SimDriver;

use super::backend::*;
use super::{DeviceId, Storage};
use crate::error::{Error, Result};
use crate::plan::{Plan, Schedule};
use crate::spec::AttentionSpec;

/// CTAs that a plan should give each multiprocessor.
const CTAS_PER_PROCESSOR: usize = 2;

pub(crate) struct Gpu {
    driver: Arc<dyn Driver>,
}

impl Gpu {
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Self {
        Gpu { driver }
    }

    fn memory(&self, bytes: usize) -> Result<DeviceMemory> {
        DeviceMemory::new(&self.driver, bytes)
    }
}

impl Backend for Gpu {
    fn id(&self) -> DeviceId {
        self.driver.id()
    }

    fn description(&self) -> String {
        self.driver.description()
    }

    fn schedule(&self) -> Schedule {
        Schedule { workers: CTAS_PER_PROCESSOR * self.driver.processors(), scratch: true }
    }

    fn enter(&self, f: &mut (dyn FnMut() + Send)) {
        f();
    }

    fn alloc(&self, bytes: usize) -> Result<Storage> {
        Ok(Storage::Device(self.memory(bytes)?))
    }

    fn upload(&self, from: &[u8], to: &mut Storage) -> Result<()> {
        self.driver.upload(from, to.address())
    }

    fn download(&self, from: &Storage, to: &mut [u8]) -> Result<()> {
        self.driver.download(from.address(), to)
    }

    fn plan_attention(&self, spec: &AttentionSpec, plan: &Plan) -> Result<Storage> {
        self.plan_workspace(spec, plan)
    }

    fn attention(&self, call: AttentionCall<'_>) -> Result<()> {
        self.run_attention(call)
    }

    fn merge(&self, _: MergeCall<'_>) -> Result<()> {
        self.missing("merge")
    }

    fn append_kv(&self, _: AppendCall<'_>) -> Result<()> {
        self.missing("append_kv")
    }

    fn select_pages(&self, _: SelectCall<'_>) -> Result<()> {
        self.missing("select_pages")
    }

    fn dequantize_int4(&self, _: DequantCall<'_>) -> Result<()> {
        self.missing("int4::dequantize")
    }

    fn rms_norm(&self, _: RmsNormCall<'_>) -> Result<()> {
        self.missing("rms_norm")
    }

    fn silu_mul(&self, _: SiluMulCall<'_>) -> Result<()> {
        self.missing("silu_mul")
    }

    fn embedding(&self, _: EmbeddingCall<'_>) -> Result<()> {
        self.missing("embedding")
    }

    fn sample(&self, _: SampleCall<'_>) -> Result<()> {
        self.missing("sample")
    }
}

impl Gpu {
    fn missing(&self, op: &str) -> Result<()> {
        let why = format!("{op} has no GPU kernel yet");
        Err(Error::Unavailable { device: self.driver.id().to_string(), why })
    }
}
