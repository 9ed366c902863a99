//! `ferroflash-serve`: a stdio batch server over [`ferroflash`]. A JSONL line in, a JSONL line out.
//!
//! The way of a request, top to bottom: [`serve`] reads a line, [`wire`] makes it a typed request,
//! [`scheduler`] picks the tokens of each step, [`model`] runs them through the layers,
//! [`sequence`] takes the sampled token, and [`wire`] writes the answer.

pub mod error;
pub mod model;
pub mod perplexity;
pub mod scheduler;
pub mod sequence;
pub mod serve;
pub mod text;
pub mod wire;

pub use error::{Error, Result};
pub use model::Model;
