//! The CPU backend: rayon threads over work items, SIMD inside them.

mod append;
mod attend;
mod convert;
mod kv_rows;
mod layer;
#[doc(hidden)]
pub mod matmul;
mod page_mass;
mod quantized;
mod sampling;
mod select;
#[doc(hidden)]
pub mod simd;
mod softmax;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::backend::*;
use super::host::Memory;
use super::{DeviceId, Storage};
use crate::error::{Error, Result};
use crate::op::append_kv::AppendPlan;
use crate::plan::{Batch, Plan, Schedule, Splits};
use crate::spec::AttentionSpec;
use ferroflash_kernels::abi::{DECODE_ROWS, partial_stride};
pub use simd::SimdLevel;

/// Packed query rows of one work item: enough that loading a KV block is small beside computing on
/// it (its cost is about that of 8 rows), small enough that a tile's state stays in the L2 cache.
const ROW_TILE: usize = 128;

/// Settings of a CPU device.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads of the device's own pool; 0: rayon's global pool.
    pub threads: usize,
    /// Instruction set; `None`: the best one found.
    pub simd: Option<SimdLevel>,
}

pub(crate) struct Cpu {
    pool: Option<rayon::ThreadPool>,
    level: SimdLevel,
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu { pool: None, level: SimdLevel::detect() }
    }
}

impl Cpu {
    pub(crate) fn new(options: CpuOptions) -> Result<Self> {
        let unavailable = |why: String| Error::Unavailable { device: "cpu".into(), why };
        let level = options.simd.unwrap_or_else(SimdLevel::detect);
        if !level.is_available() {
            return Err(unavailable(format!(
                "this machine has no {level:?}; it has {:?}",
                SimdLevel::detect()
            )));
        }
        let pool = match options.threads {
            0 => None,
            n => {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build();
                Some(pool.map_err(|e| unavailable(e.to_string()))?)
            }
        };
        Ok(Cpu { pool, level })
    }

    fn workers(&self) -> usize {
        self.pool.as_ref().map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    /// Calls `f` for `0..n`, each index once, on as many threads as help; early indices start first.
    fn for_each(&self, n: usize, f: impl Fn(usize) + Sync + Send) {
        if n <= 1 || self.workers() == 1 {
            return (0..n).for_each(f);
        }
        let next = AtomicUsize::new(0);
        let work = |_| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= n {
                    return;
                }
                f(i);
            }
        };
        let workers = self.workers().min(n);
        let run = || (0..workers).into_par_iter().with_max_len(1).for_each(work);
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    /// As [`Cpu::for_each`] over `rows` rows in runs, sequential where the work (in elements) is so
    /// small that waking a thread would cost more.
    fn for_rows(&self, rows: usize, elements: usize, f: impl Fn(std::ops::Range<usize>) + Sync + Send) {
        if elements < 1 << 15 {
            return f(0..rows);
        }
        let runs = (4 * self.workers()).min(rows);
        self.for_each(runs, |i| f(i * rows / runs..(i + 1) * rows / runs));
    }
}

impl Backend for Cpu {
    fn id(&self) -> DeviceId {
        DeviceId::Cpu
    }

    fn description(&self) -> String {
        format!("cpu, {} threads, {:?}", self.workers(), self.level)
    }

    fn schedule(&self, spec: &AttentionSpec, _: &Batch<'_>, splits: Splits) -> Schedule {
        Schedule {
            row_tile: ROW_TILE,
            workers: self.workers(),
            // Limits are the GPU's, where all rows of latent attention are decoded.
            range_rows: if spec.is_latent() && splits.section() == 0 { ROW_TILE } else { DECODE_ROWS },
            cascade: Some(1),
            ..Schedule::default()
        }
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn enter(&self, f: &mut (dyn FnMut() + Send)) {
        match &self.pool {
            Some(pool) => pool.install(f),
            None => rayon::scope(|_| f()),
        }
    }

    fn alloc(&self, bytes: usize) -> Result<Storage> {
        let memory = Memory::zeroed(bytes);
        memory
            .map(Storage::Host)
            .ok_or_else(|| Error::OutOfMemory { device: "cpu".into(), bytes: bytes as u128 })
    }

    fn upload(&self, from: &[u8], to: &mut Storage) -> Result<()> {
        if let Some(to) = to.bytes_mut() {
            to.copy_from_slice(from);
        }
        Ok(())
    }

    fn download(&self, from: &Storage, to: &mut [u8]) -> Result<()> {
        if let Some(from) = from.bytes() {
            to.copy_from_slice(from);
        }
        Ok(())
    }

    fn plan_attention(&self, spec: &AttentionSpec, plan: &Plan) -> Result<Storage> {
        // Partial states, then the page lists, which a selection rewrites.
        let partials = 4 * plan.partial_rows * partial_stride(spec.v_head_dim);
        let mut storage = self.alloc(partials + 4 * plan.pages.len())?;
        if let Some(bytes) = storage.bytes_mut() {
            bytes[partials..].copy_from_slice(bytemuck::cast_slice(&plan.pages));
        }
        Ok(storage)
    }

    fn update_attention(&self, spec: &AttentionSpec, plan: &Plan, workspace: &mut Storage) -> Result<()> {
        *workspace = self.plan_attention(spec, plan)?;
        Ok(())
    }

    fn attention(&self, call: AttentionCall<'_>) -> Result<()> {
        attend::attention(self, call);
        Ok(())
    }

    fn page_mass(&self, call: PageMassCall<'_>) -> Result<()> {
        page_mass::page_mass(self, call);
        Ok(())
    }

    fn merge(&self, call: MergeCall<'_>) -> Result<()> {
        layer::merge(self, call);
        Ok(())
    }

    fn plan_append(&self, _: &AppendPlan) -> Result<(Storage, AppendCounts)> {
        Ok((Storage::none(), AppendCounts::default()))
    }

    fn append_kv(&self, call: AppendCall<'_>) -> Result<()> {
        append::append_kv(self, call);
        Ok(())
    }

    fn plan_select(&self, _: &SelectPlan<'_>) -> Result<Storage> {
        Ok(Storage::none())
    }

    fn select_pages(&self, call: SelectCall<'_>) -> Result<()> {
        select::select_pages(self, call);
        Ok(())
    }

    fn chosen_pages(
        &self,
        _: &AttentionSpec,
        plan: &Plan,
        attention: &Storage,
        range: Range<usize>,
    ) -> Result<Vec<u32>> {
        let bytes = attention.bytes().unwrap_or(&[]);
        let pages: &[u32] = bytemuck::cast_slice(&bytes[bytes.len() - 4 * plan.pages.len()..]);
        Ok(pages[range].to_vec())
    }

    fn dequantize(&self, call: DequantCall<'_>) -> Result<()> {
        quantized::dequantize(self, call);
        Ok(())
    }

    fn rms_norm(&self, call: RmsNormCall<'_>) -> Result<()> {
        layer::rms_norm(self, call);
        Ok(())
    }

    fn silu_mul(&self, call: SiluMulCall<'_>) -> Result<()> {
        layer::silu_mul(self, call);
        Ok(())
    }

    fn embedding(&self, call: EmbeddingCall<'_>) -> Result<()> {
        layer::embedding(self, call);
        Ok(())
    }

    fn sample(&self, call: SampleCall<'_>) -> Result<()> {
        sampling::sample(self, call);
        Ok(())
    }
}

/// Partial states and page lists in an attention plan's workspace.
fn split_workspace<'a>(plan: &Plan, workspace: &'a mut Storage) -> (&'a mut [f32], &'a mut [u32]) {
    let bytes = workspace.bytes_mut().unwrap_or(&mut []);
    let (partials, pages) = bytes.split_at_mut(bytes.len() - 4 * plan.pages.len());
    (bytemuck::cast_slice_mut(partials), bytemuck::cast_slice_mut(pages))
}

/// A pointer that threads share, each for rows of its own.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);

// SAFETY: the users write disjoint rows: each says which.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    fn get(self) -> *mut T {
        self.0
    }
}
