//! Memory with a shape: [`Tensor`] owns it on a device, [`View`] and [`ViewMut`] borrow it.

use std::fmt;
use std::marker::PhantomData;

use bytemuck::Pod;
use half::{bf16, f16};

use crate::device::{Device, DeviceId, Storage};
use crate::error::{Error, Result};
use crate::layout::{Dims, Layout, checked_numel};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// Byte; a code of quantised KV, or two of four bits.
    U8,
    /// 32-bit unsigned, for indices.
    U32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 => 1,
        }
    }

    /// Whether this is one of the three float types that attention takes.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::U8 => "u8",
            DType::U32 => "u32",
        })
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: Pod + Send + Sync {
    /// Its element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
elements!(f32 => F32, f16 => F16, bf16 => BF16, u8 => U8, u32 => U32);

/// Owned memory on a device, contiguous in row-major order.
pub struct Tensor {
    device: Device,
    storage: Storage,
    layout: Layout,
}

impl Tensor {
    /// A tensor of zeros.
    pub fn zeros(device: &Device, dtype: DType, shape: &[usize]) -> Result<Self> {
        let dims = Dims::new(shape)?;
        let bytes = checked_numel(shape).and_then(|n| n.checked_mul(dtype.size())).ok_or_else(|| {
            Error::OutOfMemory {
                device: device.id().to_string(),
                bytes: shape.iter().fold(dtype.size() as u128, |n, &d| n.saturating_mul(d as u128)),
            }
        })?;
        let layout = Layout { device: device.id(), dtype, shape: dims, strides: dims.contiguous_strides() };
        Ok(Tensor { device: device.clone(), storage: device.backend().alloc(bytes)?, layout })
    }

    /// A tensor with the given elements.
    pub fn from_slice<T: Element>(device: &Device, data: &[T], shape: &[usize]) -> Result<Self> {
        if checked_numel(shape) != Some(data.len()) {
            return Err(Error::shape(
                "tensor",
                "data",
                format_args!("the elements of {shape:?}"),
                data.len(),
            ));
        }
        let mut tensor = Tensor::zeros(device, T::DTYPE, shape)?;
        device.backend().upload(bytemuck::cast_slice(data), &mut tensor.storage)?;
        Ok(tensor)
    }

    /// Copies the elements to the host.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.layout.dtype {
            return Err(Error::dtype("to_vec", "self", T::DTYPE, self.layout.dtype));
        }
        let mut data = vec![T::zeroed(); self.numel()];
        self.device.backend().download(&self.storage, bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }

    /// The elements in place, where the tensor lives in host memory.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        let bytes = self.storage.bytes()?;
        (T::DTYPE == self.layout.dtype).then(|| &bytemuck::cast_slice(bytes)[..self.numel()])
    }

    /// The elements in place, where the tensor lives in host memory.
    pub fn as_mut_slice<T: Element>(&mut self) -> Option<&mut [T]> {
        let numel = self.numel();
        let same = T::DTYPE == self.layout.dtype;
        let bytes = self.storage.bytes_mut()?;
        same.then(|| &mut bytemuck::cast_slice_mut(bytes)[..numel])
    }

    /// The device that holds the memory.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.layout.dtype
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.layout.shape.iter().product()
    }

    /// Borrows the whole tensor.
    pub fn view(&self) -> View<'_> {
        View { ptr: self.storage.ptr(), layout: self.layout, _data: PhantomData }
    }

    /// Borrows the whole tensor for writing.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut { ptr: self.storage.ptr_mut(), layout: self.layout, _data: PhantomData }
    }

    /// Borrows the tensor under another shape of the same number of elements.
    pub fn reshaped(&self, shape: &[usize]) -> Result<View<'_>> {
        Ok(View { ptr: self.storage.ptr(), layout: self.relayout(shape)?, _data: PhantomData })
    }

    /// Borrows the tensor for writing under another shape of at most its number of elements,
    /// the first ones: a buffer made for the longest step serves shorter ones.
    pub fn reshaped_mut(&mut self, shape: &[usize]) -> Result<ViewMut<'_>> {
        let layout = self.relayout(shape)?;
        Ok(ViewMut { ptr: self.storage.ptr_mut(), layout, _data: PhantomData })
    }

    fn relayout(&self, shape: &[usize]) -> Result<Layout> {
        let strides = Dims::new(shape)?.contiguous_strides();
        Layout::strided(self.layout.device, self.layout.dtype, self.numel(), shape, &strides)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {:?} on {})", self.layout.dtype, self.layout.shape, self.layout.device)
    }
}

/// Borrowed memory with a shape and strides. Every element that the layout reaches is in bounds: the
/// constructors check it, so operations need not.
#[derive(Clone, Copy)]
pub struct View<'a> {
    ptr: *const u8,
    pub(crate) layout: Layout,
    _data: PhantomData<&'a [u8]>,
}

/// Like [`View`], for writing. No two indices name the same element.
pub struct ViewMut<'a> {
    ptr: *mut u8,
    pub(crate) layout: Layout,
    _data: PhantomData<&'a mut [u8]>,
}

// SAFETY: a `View` is a shared borrow of plain data, a `ViewMut` an exclusive one.
unsafe impl Send for View<'_> {}
// SAFETY: as above; nothing is mutable through `&View`.
unsafe impl Sync for View<'_> {}
// SAFETY: an exclusive borrow of plain data may move to another thread.
unsafe impl Send for ViewMut<'_> {}
// SAFETY: nothing is mutable through `&ViewMut` in safe code.
unsafe impl Sync for ViewMut<'_> {}

impl<'a> View<'a> {
    /// Host memory, contiguous.
    pub fn from_slice<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        View::from_slice_strided(data, shape, &Dims::new(shape)?.contiguous_strides())
    }

    /// Host memory with strides in elements. A stride of 0 repeats.
    pub fn from_slice_strided<T: Element>(data: &'a [T], shape: &[usize], strides: &[usize]) -> Result<Self> {
        let layout = Layout::strided(DeviceId::Cpu, T::DTYPE, data.len(), shape, strides)?;
        Ok(View { ptr: data.as_ptr().cast(), layout, _data: PhantomData })
    }

    pub(crate) fn ptr(&self) -> *const u8 {
        self.ptr
    }
}

impl<'a> ViewMut<'a> {
    /// Host memory, contiguous.
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        ViewMut::from_slice_strided(data, shape, &Dims::new(shape)?.contiguous_strides())
    }

    /// Host memory with strides in elements; refused where two indices would name one element.
    pub fn from_slice_strided<T: Element>(
        data: &'a mut [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let layout = Layout::strided(DeviceId::Cpu, T::DTYPE, data.len(), shape, strides)?;
        if !layout.is_injective() {
            return Err(Error::shape("view", "strides", "no element named twice", strides));
        }
        Ok(ViewMut { ptr: data.as_mut_ptr().cast(), layout, _data: PhantomData })
    }

    /// Borrows again, for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { ptr: self.ptr, layout: self.layout, _data: PhantomData }
    }

    /// Borrows for reading.
    pub fn as_view(&self) -> View<'_> {
        View { ptr: self.ptr, layout: self.layout, _data: PhantomData }
    }

    /// Two parts along one dimension, before and from `at`: a fused QKV buffer is split along its heads.
    pub fn split(self, dim: usize, at: usize) -> Result<(ViewMut<'a>, ViewMut<'a>)> {
        let size = self.layout.shape.get(dim).copied().unwrap_or(0);
        let first = ViewMut { ptr: self.ptr, layout: self.layout, _data: PhantomData }.narrow(dim, 0, at)?;
        // The parts share no element: their indices along `dim` differ, and the layout is injective.
        let second = self.narrow(dim, at, size.saturating_sub(at))?;
        Ok((first, second))
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }
}

/// Memory of a device that this crate does not own, as other engines have it.
impl<'a> View<'a> {
    /// `len` elements at a device address.
    ///
    /// # Safety
    /// The address holds `len` elements of `dtype` on the device for all of `'a`, and all work that writes them comes
    /// before what this crate enqueues (the same stream, or waited for).
    ///
    /// # Errors
    /// [`Error::Shape`] where shape and strides reach past `len`.
    pub unsafe fn from_device_ptr(
        device: &Device,
        address: u64,
        len: usize,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let layout = Layout::strided(device.id(), dtype, len, shape, strides)?;
        Ok(View { ptr: address as *const u8, layout, _data: PhantomData })
    }

    /// A `cudarc` slice, contiguous, on the device whose stream it belongs to ([`Device::cuda_on_stream`]).
    ///
    /// # Errors
    /// [`Error::Device`] where `device` works on another stream; [`Error::Shape`].
    #[cfg(feature = "cuda")]
    pub fn from_cuda_slice<T: Element>(
        device: &Device,
        slice: &'a cudarc::driver::CudaSlice<T>,
        shape: &[usize],
    ) -> Result<Self> {
        let strides = Dims::new(shape)?.contiguous_strides();
        let (address, _order) = cudarc::driver::DevicePtr::device_ptr(slice, same_stream(device, slice)?);
        // SAFETY: the slice is borrowed for `'a`, and its stream is the device's.
        unsafe { View::from_device_ptr(device, address, slice.len(), T::DTYPE, shape, &strides) }
    }
}

/// As for [`View`], for writing.
impl<'a> ViewMut<'a> {
    /// `len` elements at a device address.
    ///
    /// # Safety
    /// As [`View::from_device_ptr`], and nobody else reads or writes them for all of `'a`.
    ///
    /// # Errors
    /// [`Error::Shape`] where shape and strides reach past `len` or name an element twice.
    pub unsafe fn from_device_ptr(
        device: &Device,
        address: u64,
        len: usize,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let layout = Layout::strided(device.id(), dtype, len, shape, strides)?;
        if !layout.is_injective() {
            return Err(Error::shape("view", "strides", "no element named twice", strides));
        }
        Ok(ViewMut { ptr: address as *mut u8, layout, _data: PhantomData })
    }

    /// A `cudarc` slice, contiguous, on the device whose stream it belongs to ([`Device::cuda_on_stream`]).
    ///
    /// # Errors
    /// As [`View::from_cuda_slice`].
    #[cfg(feature = "cuda")]
    pub fn from_cuda_slice<T: Element>(
        device: &Device,
        slice: &'a mut cudarc::driver::CudaSlice<T>,
        shape: &[usize],
    ) -> Result<Self> {
        let strides = Dims::new(shape)?.contiguous_strides();
        let stream = same_stream(device, slice)?;
        let len = slice.len();
        let (address, _order) = cudarc::driver::DevicePtrMut::device_ptr_mut(slice, stream);
        // SAFETY: the slice is borrowed for `'a` alone, and its stream is the device's.
        unsafe { ViewMut::from_device_ptr(device, address, len, T::DTYPE, shape, &strides) }
    }
}

/// The device's stream, where the slice belongs to it.
#[cfg(feature = "cuda")]
fn same_stream<'d, T>(
    device: &'d Device,
    slice: &cudarc::driver::CudaSlice<T>,
) -> Result<&'d cudarc::driver::CudaStream> {
    match device.cuda_stream() {
        Some(stream) if stream.cu_stream() == slice.stream().cu_stream() => Ok(stream),
        _ => Err(Error::Device {
            op: "view",
            what: "slice",
            expected: device.id().to_string(),
            got: format!("another stream of cuda:{}", slice.stream().context().ordinal()),
        }),
    }
}

macro_rules! layout_methods {
    ($($t:ident),*) => { $(
        impl $t<'_> {
            /// Dimensions in another order, without moving data: an NHD page pool is an HND one with
            /// dimensions 1 and 2 exchanged.
            pub fn permute(mut self, order: &[usize]) -> Result<Self> {
                self.layout.permute(order)?;
                Ok(self)
            }

            /// `len` entries from `start` along one dimension.
            pub fn narrow(mut self, dim: usize, start: usize, len: usize) -> Result<Self> {
                let offset = self.layout.narrow(dim, start, len)?;
                self.ptr = self.ptr.wrapping_add(offset * self.layout.dtype.size());
                Ok(self)
            }

            /// Sizes of the dimensions.
            pub fn shape(&self) -> &[usize] {
                &self.layout.shape
            }

            /// Distance between neighbours along each dimension, in elements.
            pub fn strides(&self) -> &[usize] {
                &self.layout.strides
            }

            /// Element type.
            pub fn dtype(&self) -> DType {
                self.layout.dtype
            }
        }

        impl fmt::Debug for $t<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let Layout { device, dtype, shape, strides } = &self.layout;
                write!(f, concat!(stringify!($t), "({} {:?} strides {:?} on {})"), dtype, shape, strides, device)
            }
        }
    )* };
}
layout_methods!(View, ViewMut);

/// Marks log-sum-exp values as natural logarithms (other libraries keep base 2).
///
/// The tensor is f32 `[total_q, num_q_heads]`; a row with nothing to attend to holds `-inf`.
#[derive(Clone, Copy, Debug)]
pub struct NaturalLog<T>(pub T);
