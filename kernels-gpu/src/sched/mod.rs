//! How work is scheduled.

mod block_ring;
mod code_ring;
mod kv_tiles;
mod progress;
mod quantized_ring;
pub(crate) mod radix;
mod ring;
mod stages;
mod units;
mod walk;

pub(crate) use block_ring::{BlockRing, STAGE, stages};
pub(crate) use code_ring::{CodeRing, coded};
pub(crate) use kv_tiles::{Columns, ItemKv, KvTiles};
pub(crate) use quantized_ring::QuantizedRing;
pub(crate) use ring::{Ring, Source, section_end};
pub(crate) use stages::{Cursor, Full, Stages};
pub(crate) use units::{Units, range};
pub(crate) use walk::Walk;
