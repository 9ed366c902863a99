//! What the host's plan hands to a kernel: plain `#[repr(C)]` data, the same bytes on every device.

mod append;
mod attention;
pub mod codec;
mod layer;
mod quantized;
mod rows;
mod select;
mod sm90;
mod testing;

pub use append::*;
pub use attention::*;
pub use layer::*;
pub use quantized::*;
pub use rows::*;
pub use select::*;
pub use sm90::*;
pub use testing::*;

/// Data that the device is given as bytes.
///
/// # Safety
/// `#[repr(C)]`, without padding: each file checks that sizes are the sums of the fields'.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($t:ty: $size:literal),* $(,)?) => { $(
        // SAFETY: as the trait says.
        unsafe impl $crate::abi::Plain for $t {}
        const _: () = assert!(size_of::<$t>() == $size);
    )* };
}
use plain;
