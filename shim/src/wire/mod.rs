//! Lines and requests: OpenAI's Batch form and a short one, with answers in the form of the question.

mod answer;
mod parse;

use serde_json::Value;

use crate::sequence::Generation;
pub use answer::{Stamp, answer, refusal};
pub use parse::parse;

/// Which form a line has, and what its answer must repeat.
#[derive(Clone, Debug)]
pub enum Form {
    /// OpenAI Batch, `/v1/chat/completions`.
    Chat {
        /// Repeated in the answer.
        custom_id: Value,
    },
    /// OpenAI Batch, `/v1/completions`.
    Completion {
        /// Repeated in the answer.
        custom_id: Value,
    },
    /// `{"prompt": ...}` or `{"messages": ...}`.
    Short {
        /// The line's own `id`, or null.
        id: Value,
    },
}

/// What to go on from.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A chat.
    Messages(Value),
}

/// A line understood.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its form.
    pub form: Form,
    /// Its prompts: one, or several in a completion.
    pub prompts: Vec<Prompt>,
    /// Generations per prompt.
    pub n: usize,
    /// `None`: up to the end of the context.
    pub max_tokens: Option<usize>,
    /// What was asked of each generation; `max_tokens` is filled in later.
    pub generation: Generation,
}

/// A line that could not be served: the answer's form, as far as it could be told, and why.
#[derive(Debug)]
pub struct Refused {
    /// What the answer repeats.
    pub form: Form,
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub message: String,
}
