//! How work is scheduled.

mod ring;

pub(crate) use ring::{Ring, section_end};
