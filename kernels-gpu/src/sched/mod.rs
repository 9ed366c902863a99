//! How work is scheduled.

pub(crate) mod radix;
mod ring;

pub(crate) use ring::{Ring, section_end};
