//! What is looked for in the CUDA driver's library by name: the library itself, and how it makes tensor maps.

use std::ffi::c_void;

use ferroflash_kernels::abi::{TensorMap, TensorMapSpec};

use crate::error::{self, Error};

/// `cuTensorMapEncodeTiled` (CUDA driver API, from 12.0 on): looked for by its name, so that the crate builds and runs with
/// older bindings and drivers too.
#[derive(Clone, Copy)]
pub(super) struct EncodeTiled(
    unsafe extern "C" fn(
        map: *mut AlignedMap,
        data_type: u32,
        rank: u32,
        address: *mut c_void,
        dims: *const u64,
        strides: *const u64,
        box_dims: *const u32,
        element_strides: *const u32,
        interleave: u32,
        swizzle: u32,
        l2_promotion: u32,
        fill: u32,
    ) -> u32,
);

/// Where the driver writes a tensor map.
#[repr(C, align(128))]
struct AlignedMap(TensorMap);

/// The driver's library, if it is there; `cudarc` would panic on the first call where it is not.
pub(super) fn library() -> error::Result<libloading::Library> {
    let names: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    // SAFETY: the library is the CUDA driver's, whose initialisers a program that uses CUDA runs anyway.
    let found = names.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    found.ok_or_else(|| {
        let why = format!("no CUDA driver: none of {names:?} can be loaded");
        Error::Unavailable { device: "cuda".into(), why }
    })
}

impl EncodeTiled {
    pub(super) fn find() -> Option<Self> {
        let library = library().ok()?;
        // SAFETY: the symbol has the type that the driver API gives it; the library stays loaded, for `cudarc` has
        // loaded it for good.
        unsafe { library.get(b"cuTensorMapEncodeTiled\0").ok().map(|f| EncodeTiled(*f)) }
    }

    /// The map, or the driver's `CUresult`.
    pub(super) fn encode(self, spec: &TensorMapSpec) -> Result<TensorMap, u32> {
        // Values of the driver's enumerations.
        const UINT16: u32 = 1;
        const NOT_INTERLEAVED: u32 = 0;
        const L2_PROMOTION_256: u32 = 3;
        const FILL_WITH_ZEROS: u32 = 0;
        let swizzle = match spec.swizzle_bytes {
            32 => 1,
            64 => 2,
            128 => 3,
            _ => 0,
        };
        let mut map = AlignedMap(TensorMap([0; 16]));
        // SAFETY: all pointers are to arrays of at least `rank` entries; the address is only noted down.
        let result = unsafe {
            (self.0)(
                &mut map,
                UINT16,
                spec.rank,
                spec.base as *mut c_void,
                spec.dims.as_ptr(),
                spec.strides.as_ptr(),
                spec.box_dims.as_ptr(),
                [1u32; 5].as_ptr(),
                NOT_INTERLEAVED,
                swizzle,
                L2_PROMOTION_256,
                FILL_WITH_ZEROS,
            )
        };
        if result == 0 { Ok(map.0) } else { Err(result) }
    }
}
