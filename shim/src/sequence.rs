//! One generation: its tokens, its place in the cache, its text so far, and when it ends.

use ferroflash::op::sample::SamplingParams;

use crate::text::Text;

/// What was asked of a generation.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Tokens to generate at most, at least 1.
    pub max_tokens: usize,
    /// How tokens are drawn; `step` is filled in.
    pub sampling: SamplingParams,
    /// Text that ends the generation and is left out of it.
    pub stop: Vec<String>,
    /// Whether the model's end tokens count as ordinary ones.
    pub ignore_eos: bool,
    /// Log-probabilities of the drawn tokens, and of so many most likely ones.
    pub logprobs: Option<usize>,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the model's context.
    Length,
}

impl Finish {
    /// OpenAI's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// A drawn token's log-probability and the most likely tokens', largest first.
#[derive(Clone, Debug)]
pub struct Logprobs {
    /// The drawn token.
    pub token: (u32, f32),
    /// The most likely ones.
    pub top: Vec<(u32, f32)>,
    /// Where the token's text starts in the answer.
    pub text_at: usize,
}

/// A generation under way.
#[derive(Debug)]
pub struct Sequence {
    /// Which request it belongs to, and which of its choices it is.
    pub request: u64,
    /// See `request`.
    pub choice: usize,
    /// Prompt, then what was drawn.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Leading tokens whose K and V are in the cache.
    pub computed: usize,
    /// The cache's pages that hold them.
    pub pages: Vec<u32>,
    /// The sequence's tail in an int4 cache.
    pub tail_slot: u32,
    /// What was asked.
    pub generation: Generation,
    /// Text so far.
    pub text: String,
    /// Filled where asked for.
    pub logprobs: Vec<Logprobs>,
    /// Set when it has ended.
    pub finish: Option<Finish>,
    /// Drawn tokens before this one are in `text`.
    decoded: usize,
    /// Tokens from here are decoded together with new ones, for their spacing.
    context: usize,
}

impl Sequence {
    /// A generation that has not begun.
    pub fn new(request: u64, choice: usize, prompt: Vec<u32>, generation: Generation) -> Self {
        let prompt_len = prompt.len();
        Sequence {
            request,
            choice,
            tokens: prompt,
            prompt_len,
            computed: 0,
            pages: Vec::new(),
            tail_slot: 0,
            generation,
            text: String::new(),
            logprobs: Vec::new(),
            finish: None,
            decoded: prompt_len,
            // A few of the prompt's tokens: decoders treat a text's first token apart.
            context: prompt_len.saturating_sub(4),
        }
    }

    /// Drawn tokens.
    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// How the next token is drawn.
    pub fn sampling(&self) -> SamplingParams {
        SamplingParams { step: self.num_generated() as u64, ..self.generation.sampling }
    }

    /// Takes the drawn token. `logits` are those that it was drawn from.
    pub fn accept(&mut self, token: u32, logits: Option<&[f32]>, eos: &[u32], text: &Text) {
        let before = self.text.len();
        if let (Some(top), Some(logits)) = (self.generation.logprobs, logits) {
            self.logprobs.push(logprobs(token, logits, top, before));
        }
        self.tokens.push(token);
        let full = self.num_generated() >= self.generation.max_tokens;
        if eos.contains(&token) && !self.generation.ignore_eos {
            self.decode(text, true);
            self.finish = Some(Finish::Stop);
        } else {
            self.decode(text, full);
        }
        // A stop string may begin in earlier text and end in the new.
        let longest = self.generation.stop.iter().map(String::len).max().unwrap_or(0);
        let mut from = before.saturating_sub(longest);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        let found =
            self.generation.stop.iter().filter_map(|stop| self.text[from..].find(stop.as_str())).min();
        if let Some(at) = found {
            self.text.truncate(from + at);
            self.finish = Some(Finish::Stop);
        } else if full && self.finish.is_none() {
            self.finish = Some(Finish::Length);
        }
    }

    /// Adds the text of new tokens, once their last character is whole (or at the end, whatever it is).
    fn decode(&mut self, text: &Text, end: bool) {
        let known = text.decode(&self.tokens[self.context..self.decoded]);
        let all = text.decode(&self.tokens[self.context..]);
        if all.ends_with('\u{fffd}') && !end {
            return;
        }
        // A character that was not whole yet has become one.
        if let Some(new) = all.strip_prefix(known.trim_end_matches('\u{fffd}')) {
            self.text.push_str(new);
        }
        self.context = self.decoded;
        self.decoded = self.tokens.len();
    }
}

fn logprobs(token: u32, logits: &[f32], top: usize, text_at: usize) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let log_sum = max + logits.iter().map(|&x| (x as f64 - max).exp()).sum::<f64>().ln();
    let of = |id: u32| (id, (logits[id as usize] as f64 - log_sum) as f32);
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let larger = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let top = top.min(order.len());
    if top > 0 {
        order.select_nth_unstable_by(top - 1, larger);
        order.truncate(top);
        order.sort_unstable_by(larger);
    } else {
        order.clear();
    }
    Logprobs { token: of(token), top: order.into_iter().map(of).collect(), text_at }
}
