//! How work is scheduled.

mod int4_ring;
pub(crate) mod radix;
mod ring;
mod stages;
mod units;
mod walk;
mod warp_ring;

pub(crate) use int4_ring::Int4Ring;
pub(crate) use ring::{Ring, Source, section_end};
pub(crate) use stages::{Cursor, Full, Stages};
pub(crate) use units::{Unit, Units};
pub(crate) use walk::Walk;
pub(crate) use warp_ring::{STAGE, WarpRing};
