//! How work is scheduled.

mod block_ring;
mod int4_ring;
pub(crate) mod radix;
mod ring;
mod stages;
mod units;
mod walk;

pub(crate) use block_ring::{BlockRing, STAGE, stages};
pub(crate) use int4_ring::Int4Ring;
pub(crate) use ring::{Ring, Source, section_end};
pub(crate) use stages::{Cursor, Full, Stages};
pub(crate) use units::{Units, range};
pub(crate) use walk::Walk;
