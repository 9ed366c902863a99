//! Data in the shapes that tensor cores want.

pub(crate) mod codes;
pub(crate) mod elements;
pub mod fragment;
mod half_type;
mod panels;
mod shared_tile;

pub use half_type::{BF16, F16, Half};
pub use panels::{Panels, Pending};
pub use shared_tile::SharedTile;
