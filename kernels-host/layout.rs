//! Sizes, strides, and what they reach.

use std::fmt;

use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Most dimensions that a tensor may have.
pub const MAX_RANK: usize = 5;

/// A short list of sizes or strides.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    len: u8,
    at: [usize; MAX_RANK],
}

impl Dims {
    pub(crate) fn new(dims: &[usize]) -> Result<Self> {
        if dims.len() > MAX_RANK {
            return Err(Error::shape("tensor", "dims", format_args!("at most {MAX_RANK} dimensions"), dims));
        }
        let mut at = [0; MAX_RANK];
        at[..dims.len()].copy_from_slice(dims);
        Ok(Dims { len: dims.len() as u8, at })
    }

    pub(crate) fn contiguous_strides(&self) -> Self {
        let mut strides = *self;
        let mut step = 1usize;
        for i in (0..self.len()).rev() {
            strides.at[i] = step;
            step = step.saturating_mul(self[i].max(1));
        }
        strides
    }
}

impl std::ops::Deref for Dims {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.at[..self.len as usize]
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

pub(crate) fn checked_numel(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
}

/// Shape, strides (in elements), element type and place of some memory.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) device: DeviceId,
    pub(crate) dtype: DType,
    pub(crate) shape: Dims,
    pub(crate) strides: Dims,
}

impl Layout {
    pub(crate) fn strided(
        device: DeviceId,
        dtype: DType,
        len: usize,
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let (shape, strides) = (Dims::new(shape)?, Dims::new(strides)?);
        if shape.len() != strides.len() {
            return Err(Error::shape(
                "view",
                "strides",
                format_args!("one per dimension of {shape:?}"),
                strides,
            ));
        }
        let layout = Layout { device, dtype, shape, strides };
        match layout.extent() {
            Some(extent) if extent <= len => Ok(layout),
            _ => Err(Error::shape(
                "view",
                "data",
                format_args!("the elements that shape {shape:?} with strides {strides:?} reaches"),
                len,
            )),
        }
    }

    /// One past the furthest element reached; `None` where that overflows.
    fn extent(&self) -> Option<usize> {
        let mut last = 0usize;
        for (&d, &s) in self.shape.iter().zip(self.strides.iter()) {
            if d == 0 {
                return Some(0);
            }
            last = last.checked_add((d - 1).checked_mul(s)?)?;
        }
        let extent = last.checked_add(1)?;
        (extent.checked_mul(self.dtype.size())? <= isize::MAX as usize).then_some(extent)
    }

    /// Whether no two indices name the same element.
    pub(crate) fn is_injective(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let mut axes: Vec<(usize, usize)> =
            self.strides.iter().copied().zip(self.shape.iter().copied()).filter(|&(_, d)| d > 1).collect();
        axes.sort_unstable();
        let mut reach = 1usize;
        for (stride, dim) in axes {
            if stride < reach {
                return false;
            }
            reach += stride * (dim - 1);
        }
        true
    }

    pub(crate) fn permute(&mut self, order: &[usize]) -> Result<()> {
        let mut seen = [false; MAX_RANK];
        let valid = order.len() == self.shape.len()
            && order.iter().all(|&i| i < self.shape.len() && !std::mem::replace(&mut seen[i], true));
        if !valid {
            return Err(Error::shape(
                "permute",
                "order",
                format_args!("a permutation of 0..{}", self.shape.len()),
                order,
            ));
        }
        let (shape, strides) = (self.shape, self.strides);
        for (to, &from) in order.iter().enumerate() {
            self.shape.at[to] = shape[from];
            self.strides.at[to] = strides[from];
        }
        Ok(())
    }

    /// Narrows one dimension; gives the offset in elements.
    pub(crate) fn narrow(&mut self, dim: usize, start: usize, len: usize) -> Result<usize> {
        let size = self.shape.get(dim).copied().unwrap_or(0);
        if dim >= self.shape.len() || start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::shape(
                "narrow",
                "range",
                format_args!("inside dimension {dim} of {:?}", self.shape),
                (start, len),
            ));
        }
        self.shape.at[dim] = len;
        Ok(if len == 0 { 0 } else { start * self.strides[dim] })
    }
}
