#![doc = include_str!("../README.md")]
#![warn(unsafe_op_in_unsafe_fn)]

pub mod device;
mod error;
mod kv;
mod kv_cache;
mod layout;
pub mod op;
mod plan;
mod spec;
mod tensor;

pub use device::{CpuOptions, Device, DeviceId, SimdLevel};
pub use error::{Error, Result};
pub use kv::{INT4_GROUP, Kv, KvMut, QuantPages};
pub use kv_cache::{KvCache, KvCacheSpec, KvCode, KvFormat};
pub use layout::{Dims, MAX_RANK};
pub use plan::{Batch, KvTable, PageLists, Plan, PlanLimits, SharedPrefix, Splits, TreeMask};
pub use spec::{AttentionSpec, RopeScaling, RopeSpec, RopeStyle};
pub use tensor::{DType, Element, NaturalLog, Tensor, View, ViewMut};
