//! The CUDA driver as a driver, through `cudarc`. Nothing of CUDA is needed to build; the driver's library is
//! looked for when a device is made.

use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{
    CUdevice_attribute, CUevent_flags, CUfunction, CUfunction_attribute_enum, CUgraphInstantiate_flags,
    CUmemPool_attribute, CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError, result};

use ferroflash_kernels::abi::{TensorMap, TensorMapSpec};

use super::cuda_library::{EncodeTiled, library};
use super::driver::{Driver, Hopper, Launch, ctas_in};
use super::ptx;
use crate::device::DeviceId;
use crate::error::{Error, Result};

/// Oldest GPU that the kernels run on: compute capability 8.0, Ampere.
const MIN_CAPABILITY: (i32, i32) = (8, 0);

/// The one GPU that runs `sm_90a` kernels: compute capability 9.0.
const HOPPER: (i32, i32) = (9, 0);

static NEXT_STREAM: AtomicU64 = AtomicU64::new(0);

/// A GPU and one stream on it; all work is in the stream's order.
pub(crate) struct CudaDriver {
    id: DeviceId,
    stream: Arc<CudaStream>,
    description: String,
    processors: usize,
    /// Shared memory of each.
    shared_bytes: usize,
    /// Most dynamic shared memory that a CTA may have.
    max_shared: u32,
    hopper: Option<(Hopper, EncodeTiled)>,
    modules: Vec<OnceLock<Result<Module>>>,
    functions: Vec<OnceLock<Result<Function>>>,
    staging: Mutex<Staging>,
}

/// A module that stays loaded as long as the driver is there.
struct Module(cudarc::driver::sys::CUmodule);

#[derive(Clone, Copy)]
struct Function(CUfunction);

// SAFETY: handles of the driver API may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Page-locked memory through which uploads go, and the end of the last one.
#[derive(Default)]
struct Staging {
    at: usize,
    bytes: usize,
    done: Option<CudaEvent>,
}

/// The driver's own words.
fn words(error: DriverError) -> String {
    let name = error.error_name().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    let text = error.error_string().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{name}: {text}")
}

impl CudaDriver {
    pub(crate) fn new(ordinal: usize) -> Result<Self> {
        library()?;
        let unavailable = |e| Error::Unavailable { device: format!("cuda:{ordinal}"), why: words(e) };
        let context = CudaContext::new(ordinal).map_err(unavailable)?;
        let stream = context.new_stream().map_err(unavailable)?;
        Self::on_stream(stream)
    }

    pub(crate) fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        let context: &Arc<CudaContext> = stream.context();
        let ordinal = context.ordinal();
        let unavailable = |why| Error::Unavailable { device: format!("cuda:{ordinal}"), why };
        let ask = |e: CUdevice_attribute| context.attribute(e).map_err(|e| unavailable(words(e)));
        let capability = context.compute_capability().map_err(|e| unavailable(words(e)))?;
        if capability < MIN_CAPABILITY {
            let (major, minor) = capability;
            let why = format!("compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer");
            return Err(unavailable(why));
        }
        let name = context.name().map_err(|e| unavailable(words(e)))?;
        let processors = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_bytes = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let max_shared = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let l2_bytes = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.max(0) as usize;
        // With a driver too old for tensor maps Hopper is a newer Ampere.
        let hopper = if capability == HOPPER { EncodeTiled::find() } else { None };
        let kernels = if hopper.is_some() { "sm_90a and sm_80" } else { "sm_80" };
        let driver = CudaDriver {
            id: DeviceId::Cuda { ordinal, stream: NEXT_STREAM.fetch_add(1, Ordering::Relaxed) },
            description: format!(
                "{name}, compute capability {}.{}, {kernels} kernels",
                capability.0, capability.1
            ),
            processors: processors.max(1) as usize,
            shared_bytes: shared_bytes.max(0) as usize,
            max_shared: max_shared.max(0) as u32,
            hopper: hopper.map(|encode| (Hopper { l2_bytes }, encode)),
            modules: ptx::MODULES.iter().map(|_| OnceLock::new()).collect(),
            functions: ptx::ENTRIES.iter().map(|_| OnceLock::new()).collect(),
            staging: Mutex::default(),
            stream,
        };
        driver.keep_freed_memory()?;
        Ok(driver)
    }

    /// Memory that is given back stays in the device's pool: an allocation after it costs microseconds.
    fn keep_freed_memory(&self) -> Result<()> {
        self.enter("cuDeviceGetDefaultMemPool")?;
        let mut threshold = u64::MAX;
        // SAFETY: the device is the context's; the attribute takes a u64.
        let set = unsafe {
            result::device::get_default_mem_pool(self.stream.context().cu_device()).and_then(|pool| {
                let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
                result::mem_pool::set_attribute(pool, attribute, ptr::from_mut(&mut threshold).cast())
            })
        };
        self.named("cuMemPoolSetAttribute", set)
    }

    fn named<T>(&self, call: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
        result.map_err(|e| self.error(call, words(e)))
    }

    fn error(&self, call: &str, why: String) -> Error {
        Error::Kernel { device: self.id.to_string(), kernel: call.into(), why }
    }

    /// Makes the context current on this thread.
    fn enter(&self, call: &str) -> Result<()> {
        self.named(call, self.stream.context().bind_to_thread())
    }

    /// A kernel, its module compiled by the driver on first use.
    fn function(&self, index: usize) -> Result<Function> {
        self.functions[index].get_or_init(|| self.load(index)).clone()
    }

    fn load(&self, index: usize) -> Result<Function> {
        let entry = &ptx::ENTRIES[index];
        if entry.shared_bytes > self.max_shared {
            let (needs, has) = (entry.shared_bytes, self.max_shared);
            return Err(
                self.error(entry.name, format!("needs {needs} bytes of shared memory, the GPU has {has}"))
            );
        }
        let module = self.modules[entry.module].get_or_init(|| {
            let module = &ptx::MODULES[entry.module];
            let text = module.text().map_err(|why| self.error(module.name, why))?;
            // SAFETY: a NUL-terminated PTX text.
            let loaded = unsafe { result::module::load_data(text.as_ptr().cast()) };
            Ok(Module(self.named(module.name, loaded)?))
        });
        let module = module.as_ref().map_err(Clone::clone)?;
        let name = CString::new(entry.name).map_err(|e| self.error(entry.name, e.to_string()))?;
        // SAFETY: the module is loaded.
        let function = self.named(entry.name, unsafe { result::module::get_function(module.0, name) })?;
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is the module's.
        let set = unsafe {
            result::function::set_function_attribute(function, attribute, entry.shared_bytes as i32)
        };
        self.named(entry.name, set)?;
        Ok(Function(function))
    }

    fn staging(&self) -> MutexGuard<'_, Staging> {
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records what `f` enqueues instead of running it.
    pub(crate) fn capture(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        // Relaxed: a module may have to be loaded on the way.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        self.named("cuStreamBeginCapture", self.stream.begin_capture(mode))?;
        let done = f();
        let graph = self.stream.end_capture(CUgraphInstantiate_flags(0));
        done?;
        let graph = self.named("cuStreamEndCapture", graph)?;
        graph.map(|g| Graph(Mutex::new(g), self.id)).ok_or_else(|| {
            self.error("cuStreamEndCapture", "no graph: nothing was enqueued on the device's stream".into())
        })
    }

    /// Milliseconds between the start and the end of what `f` enqueues.
    pub(crate) fn time_ms(&self, f: &mut dyn FnMut() -> Result<()>) -> Result<f32> {
        let record =
            || self.named("cuEventRecord", self.stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)));
        let start = record()?;
        f()?;
        let end = record()?;
        self.named("cuEventElapsedTime", start.elapsed_ms(&end))
    }

    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        // An error here has nobody to tell.
        let _ = self.stream.synchronize();
        let staging = std::mem::take(&mut *self.staging());
        if staging.at != 0 {
            // SAFETY: allocated by `upload`, and all work is done.
            let _ = unsafe { result::free_host(staging.at as *mut c_void) };
        }
        for module in self.modules.iter_mut().filter_map(OnceLock::take).flatten() {
            // SAFETY: loaded once, and nothing of it runs any more.
            let _ = unsafe { result::module::unload(module.0) };
        }
    }
}

impl Driver for CudaDriver {
    fn id(&self) -> DeviceId {
        self.id
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn resident_ctas(&self, entry: &'static str) -> usize {
        let found = ptx::ENTRIES.iter().find(|e| e.name == entry);
        found.map_or(0, |e| ctas_in(self.shared_bytes, e.shared_bytes))
    }

    fn bytes_of_launches(&self) -> u64 {
        // 2 us each, at 2 to 4 TB/s: an estimate.
        16 << 20
    }

    fn alloc(&self, bytes: usize, zeroed: bool) -> Result<u64> {
        self.enter("cuMemAllocAsync")?;
        let stream = self.stream.cu_stream();
        // An empty allocation is one byte, for every tensor has an address of its own.
        // SAFETY: the stream is alive; zeros are set before anything reads the memory, in the stream's order.
        let made = unsafe {
            result::malloc_async(stream, bytes.max(1)).and_then(|at| {
                if zeroed {
                    result::memset_d8_async(at, 0, bytes.max(1), stream)?;
                }
                Ok(at)
            })
        };
        made.map_err(|e| match e.0 {
            cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Error::OutOfMemory { device: self.id.to_string(), bytes: bytes as u128 }
            }
            _ => self.error("cuMemAllocAsync", words(e)),
        })
    }

    fn free(&self, at: u64) {
        if self.enter("cuMemFreeAsync").is_ok() {
            // SAFETY: from `alloc`, freed once, after all work before it in the stream. An error has nobody to tell.
            let _ = unsafe { result::free_async(at, self.stream.cu_stream()) };
        }
    }

    fn upload(&self, from: &[u8], to: u64) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        self.enter("cuMemcpyHtoDAsync")?;
        let mut staging = self.staging();
        if let Some(done) = staging.done.take() {
            self.named("cuEventSynchronize", done.synchronize())?;
        }
        if staging.bytes < from.len() {
            if staging.at != 0 {
                // SAFETY: from `malloc_host`; the last copy out of it is done.
                self.named("cuMemFreeHost", unsafe { result::free_host(staging.at as *mut c_void) })?;
                (staging.at, staging.bytes) = (0, 0);
            }
            let bytes = from.len().next_power_of_two();
            // SAFETY: plain allocation.
            let at = self.named("cuMemHostAlloc", unsafe { result::malloc_host(bytes, 0) })?;
            (staging.at, staging.bytes) = (at as usize, bytes);
        }
        // SAFETY: the staging memory holds `from.len()` bytes, nobody else uses it (the lock), and it stays until
        // the event below has passed.
        unsafe {
            let buffer = staging.at as *mut u8;
            ptr::copy_nonoverlapping(from.as_ptr(), buffer, from.len());
            let staged = std::slice::from_raw_parts(buffer, from.len());
            self.named("cuMemcpyHtoDAsync", result::memcpy_htod_async(to, staged, self.stream.cu_stream()))?;
        }
        let event = self.stream.record_event(Some(CUevent_flags::CU_EVENT_DISABLE_TIMING));
        staging.done = Some(self.named("cuEventRecord", event)?);
        Ok(())
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        if to.is_empty() {
            return Ok(());
        }
        self.enter("cuMemcpyDtoHAsync")?;
        // SAFETY: `to` outlives the copy, for it is waited for.
        let copied = unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) };
        self.named("cuMemcpyDtoHAsync", copied)?;
        self.named("cuStreamSynchronize", self.stream.synchronize())
    }

    fn hopper(&self) -> Option<Hopper> {
        self.hopper.map(|(hopper, _)| hopper)
    }

    fn tensor_map(&self, spec: &TensorMapSpec) -> Result<TensorMap> {
        let call = "cuTensorMapEncodeTiled";
        spec.check().map_err(|why| self.error(call, why.into()))?;
        let Some((_, encode)) = self.hopper else {
            return Err(self.error(call, "this GPU has no tensor maps".into()));
        };
        encode.encode(spec).map_err(|result| self.error(call, format!("CUresult {result} for {spec:?}")))
    }

    fn launch(&self, launch: Launch<'_>) -> Result<()> {
        let Some(index) = ptx::ENTRIES.iter().position(|e| e.name == launch.entry) else {
            return Err(self.error(launch.entry, "no such entry in the embedded PTX".into()));
        };
        let entry = &ptx::ENTRIES[index];
        self.enter(entry.name)?;
        let function = self.function(index)?;
        debug_assert_eq!(size_of_val(launch.params), entry.params_bytes as usize);
        let [x, y] = launch.grid;
        // SAFETY: the parameter struct is the entry's, filled by the backend from checked views; the driver copies
        // it before it returns.
        let launched = unsafe {
            result::launch_kernel(
                function.0,
                (x, y, 1),
                (entry.threads, 1, 1),
                entry.shared_bytes,
                self.stream.cu_stream(),
                &mut [launch.params.as_ptr().cast_mut().cast()],
            )
        };
        self.named(entry.name, launched)
    }

    fn synchronize(&self) -> Result<()> {
        self.named("cuStreamSynchronize", self.stream.synchronize())
    }
}

/// Recorded launches, to be run again as one.
pub struct Graph(Mutex<CudaGraph>, DeviceId);

// SAFETY: a graph's handles may be used from any thread, one at a time (the lock).
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl Graph {
    /// Runs the recorded launches, in the order of the device's stream.
    ///
    /// # Safety
    /// Everything that the recorded calls were given (tensors, plans) is still alive: a graph holds addresses.
    ///
    /// # Errors
    /// [`Error::Kernel`] with the driver's words.
    pub unsafe fn replay(&self) -> Result<()> {
        let launched = self.0.lock().unwrap_or_else(PoisonError::into_inner).launch();
        launched.map_err(|e| Error::Kernel {
            device: self.1.to_string(),
            kernel: "cuGraphLaunch".into(),
            why: words(e),
        })
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph on {}", self.1)
    }
}
