//! What can be wrong with a call, said so that the caller can mend it.

use std::fmt;

/// The result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A refused call: which operation, what was expected, what came.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's shape or strides do not fit the operation.
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What would work.
        expected: String,
        /// What came.
        got: String,
    },
    /// A tensor's element type does not fit the operation.
    DType {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What would work.
        expected: String,
        /// What came.
        got: String,
    },
    /// A parameter outside its domain.
    Value {
        /// The operation.
        op: &'static str,
        /// The parameter.
        what: &'static str,
        /// What would work.
        expected: String,
        /// What came.
        got: String,
    },
    /// An index (page, token id, slot) outside what it indexes.
    Index {
        /// The operation.
        op: &'static str,
        /// The index and where it stands.
        what: String,
        /// The index that came.
        index: i64,
        /// It must be below this.
        limit: u64,
    },
    /// Tensors of one call live on different devices.
    Device {
        /// The operation.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// The operation's device.
        expected: String,
        /// The argument's device.
        got: String,
    },
    /// The device is not there or cannot be used.
    Unavailable {
        /// The device.
        device: String,
        /// Why.
        why: String,
    },
    /// A kernel or a call of the driver failed.
    Kernel {
        /// The device.
        device: String,
        /// The kernel or call.
        kernel: String,
        /// What the device says of it.
        why: String,
    },
    /// Memory could not be had.
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        bytes: u128,
    },
}

impl Error {
    pub(crate) fn shape(
        op: &'static str,
        what: &'static str,
        expected: impl fmt::Display,
        got: impl fmt::Debug,
    ) -> Self {
        Error::Shape { op, what, expected: expected.to_string(), got: format!("{got:?}") }
    }

    pub(crate) fn dtype(
        op: &'static str,
        what: &'static str,
        expected: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Error::DType { op, what, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn value(
        op: &'static str,
        what: &'static str,
        expected: impl fmt::Display,
        got: impl fmt::Display,
    ) -> Self {
        Error::Value { op, what, expected: expected.to_string(), got: got.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Shape { op, what, expected, got } => {
                write!(f, "{op}: shape of {what}: expected {expected}, got {got}")
            }
            Error::DType { op, what, expected, got } => {
                write!(f, "{op}: dtype of {what}: expected {expected}, got {got}")
            }
            Error::Value { op, what, expected, got } => {
                write!(f, "{op}: {what}: expected {expected}, got {got}")
            }
            Error::Index { op, what, index, limit } => {
                write!(f, "{op}: {what}: index {index} is out of range, it must be from 0 to below {limit}")
            }
            Error::Device { op, what, expected, got } => {
                write!(f, "{op}: {what} lives on {got}, the operation runs on {expected}")
            }
            Error::Unavailable { device, why } => write!(f, "device {device} is not available: {why}"),
            Error::Kernel { device, kernel, why } => write!(f, "{device}: {kernel}: {why}"),
            Error::OutOfMemory { device, bytes } => write!(f, "{device}: could not allocate {bytes} bytes"),
        }
    }
}

impl std::error::Error for Error {}
