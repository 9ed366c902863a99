//! What is computed.

pub(crate) mod kv;
pub(crate) mod mask;
pub(crate) mod merge;
pub(crate) mod output;
pub(crate) mod rows;
pub(crate) mod shared_scores;
pub(crate) mod softmax;
