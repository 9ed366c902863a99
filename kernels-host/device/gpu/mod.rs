//! The GPU backend: checks what kernels need beyond the operation's own door, and launches them.

mod append;
mod attention;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_library;
mod driver;
mod hopper;
mod layer;
mod params;
#[cfg(feature = "cuda")]
mod ptx;
mod select;
#[cfg(feature = "sim")]
mod sim;

use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
pub(crate) use cuda::CudaDriver;
#[cfg(feature = "cuda")]
pub use cuda::Graph;
pub(crate) use driver::{DeviceMemory, Driver};
#[cfg(feature = "sim")]
pub(crate) use sim::SimDriver;

use ferroflash_kernels::abi::{
    ConformanceParams, DECODE_MLA_SM90_ROWS, DECODE_ROWS, PrefillTile, TensorMapSpec, prefill_rows,
};

use super::backend::*;
use super::{DeviceId, Storage};
use crate::error::Result;
use crate::op::append_kv::AppendPlan;
use crate::plan::{Batch, Plan, Schedule, Splits};
use crate::spec::AttentionSpec;

/// CTAs that a plan should give each multiprocessor.
const CTAS_PER_PROCESSOR: usize = 2;

pub(crate) struct Gpu {
    driver: Arc<dyn Driver>,
    /// Preferred over the kernels in use.
    prefill_tile: Option<PrefillTile>,
}

impl Gpu {
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Self {
        Gpu { driver, prefill_tile: None }
    }

    /// Zeros.
    fn memory(&self, bytes: usize) -> Result<DeviceMemory> {
        DeviceMemory::new(&self.driver, bytes, true)
    }

    /// Memory that is written before it is read.
    fn scratch(&self, bytes: usize) -> Result<DeviceMemory> {
        DeviceMemory::new(&self.driver, bytes, false)
    }
}

impl Backend for Gpu {
    fn id(&self) -> DeviceId {
        self.driver.id()
    }

    fn description(&self) -> String {
        self.driver.description()
    }

    fn schedule(&self, spec: &AttentionSpec, batch: &Batch<'_>, splits: Splits) -> Schedule {
        let processors = self.driver.processors();
        let wide = self.decode_mla_is_wide(spec, splits);
        let range_rows = if wide { DECODE_MLA_SM90_ROWS } else { DECODE_ROWS };
        let ranges = match splits {
            // Rows of many and of few must have the same bits: those of quantised KV are the prefill kernel's.
            Splits::Fixed(_) if spec.quantized_kv => 0,
            _ => processors * self.decode_ctas(spec, wide),
        };
        let common = Schedule {
            ranges,
            range_rows,
            cascade: Some(self.driver.bytes_of_launches()),
            ..Schedule::default()
        };
        if spec.is_latent() {
            // All rows are its decode kernel's.
            return Schedule { row_tile: range_rows, workers: processors, hopper: wide, ..common };
        }
        if let Some((hopper, rows)) = self.driver.hopper().zip(self.prefill_sm90_rows(spec, batch, splits)) {
            return Schedule {
                row_tile: rows,
                workers: processors,
                hopper: true,
                cache_bytes: hopper.l2_bytes,
                ..common
            };
        }
        Schedule {
            row_tile: prefill_rows(spec.head_dim),
            workers: CTAS_PER_PROCESSOR * processors,
            scratch: true,
            ..common
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.driver.synchronize()
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

    fn update_attention(&self, spec: &AttentionSpec, plan: &Plan, workspace: &mut Storage) -> Result<()> {
        self.update_workspace(spec, plan, workspace)
    }

    fn attention(&self, call: AttentionCall<'_>) -> Result<()> {
        self.run_attention(call)
    }

    fn page_mass(&self, call: PageMassCall<'_>) -> Result<()> {
        self.run_page_mass(call)
    }

    fn merge(&self, call: MergeCall<'_>) -> Result<()> {
        self.run_merge(call)
    }

    fn plan_append(&self, plan: &AppendPlan) -> Result<(Storage, AppendCounts)> {
        self.append_workspace(plan)
    }

    fn append_kv(&self, call: AppendCall<'_>) -> Result<()> {
        self.run_append(call)
    }

    fn plan_select(&self, plan: &SelectPlan<'_>) -> Result<Storage> {
        self.select_workspace(plan)
    }

    fn select_pages(&self, call: SelectCall<'_>) -> Result<()> {
        self.run_select(call)
    }

    fn chosen_pages(
        &self,
        spec: &AttentionSpec,
        plan: &Plan,
        attention: &Storage,
        range: Range<usize>,
    ) -> Result<Vec<u32>> {
        self.read_chosen(spec, plan, attention, range)
    }

    fn dequantize(&self, call: DequantCall<'_>) -> Result<()> {
        self.run_dequantize(call)
    }

    fn run_conformance(&self, op: u32, input: &[u32]) -> Option<Result<(Vec<u32>, u32)>> {
        Some(self.conformance(op, input))
    }

    fn run_conformance_sm90(&self, call: &ConformanceSm90<'_>) -> Option<Result<Vec<u32>>> {
        self.driver.hopper().map(|_| self.conformance_sm90(call))
    }

    fn with_prefill_tile(&self, tile: PrefillTile) -> Option<Arc<dyn Backend>> {
        self.driver.hopper()?;
        Some(Arc::new(Gpu { driver: self.driver.clone(), prefill_tile: Some(tile) }))
    }

    fn rms_norm(&self, call: RmsNormCall<'_>) -> Result<()> {
        self.run_rms_norm(call)
    }

    fn silu_mul(&self, call: SiluMulCall<'_>) -> Result<()> {
        self.run_silu_mul(call)
    }

    fn embedding(&self, call: EmbeddingCall<'_>) -> Result<()> {
        self.run_embedding(call)
    }

    fn sample(&self, call: SampleCall<'_>) -> Result<()> {
        self.run_sample(call)
    }
}

impl Gpu {
    /// One warp's run of one instruction: 16 words in and out for each lane, and the word that lanes add to.
    fn conformance(&self, op: u32, input: &[u32]) -> Result<(Vec<u32>, u32)> {
        let mut output = vec![0u32; 16 * 32];
        let mut words = [0u32; 16 * 32];
        words[..input.len().min(16 * 32)].copy_from_slice(&input[..input.len().min(16 * 32)]);
        let memory = self.memory(2 * 16 * 32 * 4 + 4)?;
        self.driver.upload(bytemuck::cast_slice(&words), memory.at())?;
        let (input, output_at) = (memory.at(), memory.at() + 2048);
        let sum_at = output_at + 2048;
        let params = ConformanceParams { input, output: output_at, sum: sum_at, op, reserved: 0 };
        self.launch("conformance", [1, 1], driver::words(&params))?;
        let mut sum = [0u8; 4];
        self.driver.download(output_at, bytemuck::cast_slice_mut(&mut output))?;
        self.driver.download(sum_at, &mut sum)?;
        Ok((output, u32::from_le_bytes(sum)))
    }
}

impl Gpu {
    fn conformance_sm90(&self, call: &ConformanceSm90<'_>) -> Result<Vec<u32>> {
        let [input, output] = [call.input, call.output].map(|words| -> Result<DeviceMemory> {
            let memory = self.memory(4 * words.len())?;
            self.driver.upload(bytemuck::cast_slice(words), memory.at())?;
            Ok(memory)
        });
        let (input, output) = (input?, output?);
        let mut params = call.params;
        (params.input, params.output) = (input.at(), output.at());
        if let Some([from, to]) = call.tensors {
            let map = |spec: TensorMapSpec, base| {
                self.driver.tensor_map(&TensorMapSpec { base: base + spec.base, ..spec })
            };
            params.maps = [map(from, input.at())?, map(to, output.at())?];
        }
        self.launch(call.entry, [call.grid as usize, 1], driver::words(&params))?;
        let mut words = vec![0u32; call.output.len()];
        self.driver.download(output.at(), bytemuck::cast_slice_mut(&mut words))?;
        Ok(words)
    }
}

/// Where the parts of a plan begin: one after the other, each at a multiple of 256 bytes.
#[derive(Default)]
struct Offsets {
    end: usize,
}

impl Offsets {
    fn place(&mut self, bytes: usize) -> usize {
        let at = self.end;
        self.end = (at + bytes).next_multiple_of(256);
        at
    }
}

/// Parts of a plan where [`Offsets`] places them.
#[derive(Default)]
struct Blob {
    data: Vec<u8>,
    offsets: Offsets,
}

impl Blob {
    fn put(&mut self, bytes: &[u8]) {
        self.offsets.place(bytes.len());
        self.data.extend_from_slice(bytes);
        self.data.resize(self.offsets.end, 0);
    }
}
