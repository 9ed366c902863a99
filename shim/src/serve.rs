//! The main loop: lines in, steps through the model, lines out.
//!
//! Three threads: a reader that parses and tokenises, the engine, and a writer. The channels between
//! them are bounded, so memory does not grow with the input.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ferroflash::op::sample::{SamplingParams, sample};
use ferroflash::{KvCacheSpec, KvFormat};

use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::forward::{Buffers, Caches};
use crate::scheduler::{Limits, Part, Scheduler};
use crate::sequence::Sequence;
use crate::wire::{self, Form, Prompt, Refused, Request, Stamp};

/// A longer line is refused without being kept.
const MAX_LINE_BYTES: usize = 16 << 20;
/// Lines between reader and engine, and between engine and writer.
const CHANNEL_LINES: usize = 16;
/// How long a stop waits for the output to take what is written.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// How the server runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Generations under way at once.
    pub max_sequences: usize,
    /// Tokens of a step: a longer prompt is computed in chunks.
    pub max_step_tokens: usize,
    /// Tokens of a KV page.
    pub page_size: usize,
    /// KV pages.
    pub num_pages: usize,
    /// KV element format.
    pub kv_format: KvFormat,
    /// Tokens of prompt and answer together, at most.
    pub max_context: usize,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Lines answered.
    pub answered: usize,
    /// Of those, refused ones.
    pub refused: usize,
    /// Prompt tokens computed, recomputed ones included.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Seconds in steps with prompt tokens.
    pub prefill_seconds: f64,
    /// Tokens generated in steps without prompt tokens.
    pub decode_tokens: usize,
    /// Seconds in those steps.
    pub decode_seconds: f64,
    /// Generations that gave their pages back and were recomputed.
    pub preemptions: usize,
    /// Whether the run was stopped before its end.
    pub stopped: bool,
}

/// A line on its way from the reader to the engine.
struct Incoming {
    line: u64,
    parsed: std::result::Result<(Request, Vec<Vec<u32>>), Box<Refused>>,
}

/// A request under way.
struct Pending {
    form: Form,
    line: u64,
    n: usize,
    finished: Vec<Option<Sequence>>,
}

/// Serves `input` until its end, `stop`, or the end of `output`; calls `progress` after each step.
pub fn serve(
    model: &Arc<Model>,
    name: &str,
    options: Options,
    input: impl BufRead + Send + 'static,
    output: impl Write + Send + 'static,
    stop: &Arc<AtomicBool>,
    progress: impl FnMut(&Summary) + Send,
) -> Result<Summary> {
    let (to_engine, from_reader) = sync_channel(CHANNEL_LINES);
    let (to_writer, from_engine) = sync_channel(CHANNEL_LINES);
    let reader_model = Arc::clone(model);
    // Not joined: it may wait for input that never comes.
    std::thread::spawn(move || read(input, &reader_model, options.max_context, &to_engine));
    let writer_stop = Arc::clone(stop);
    let writer = std::thread::spawn(move || write(output, &from_engine, &writer_stop));
    let engine = Engine::new(model, name, options, to_writer, stop)?;
    let summary = model.device().scope(move || engine.run(&from_reader, progress));
    if summary.stopped {
        // Lines on their way get some time; where nobody reads them, the writer is left behind.
        let start = Instant::now();
        while !writer.is_finished() && start.elapsed() < STOP_GRACE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !writer.is_finished() {
            tracing::warn!("the output is not being read: some answers were not written");
            return Ok(summary);
        }
    }
    match writer.join() {
        Ok(Err(e)) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::Request(format!("writing the output: {e}")))
        }
        _ => Ok(summary),
    }
}

fn read(mut input: impl BufRead, model: &Model, max_context: usize, to_engine: &SyncSender<Incoming>) {
    let mut line = 0;
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let parsed = match read_line(&mut input, &mut bytes) {
            Ok(None) => return,
            Ok(Some(true)) => {
                wire::parse(&bytes, line + 1).and_then(|request| tokenize(request, model, max_context))
            }
            Ok(Some(false)) => Err(refused(
                Form::Short { id: serde_json::Value::Null },
                "line_too_long",
                format!("the line is longer than {MAX_LINE_BYTES} bytes"),
            )),
            Err(e) => {
                tracing::error!("reading the input: {e}");
                return;
            }
        };
        line += 1;
        if to_engine.send(Incoming { line, parsed }).is_err() {
            return;
        }
    }
}

/// Reads a line without its end; `Some(false)` where it was too long and is gone.
fn read_line(input: &mut impl BufRead, bytes: &mut Vec<u8>) -> std::io::Result<Option<bool>> {
    let (mut any, mut fits) = (false, true);
    loop {
        let buffer = match input.fill_buf() {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if buffer.is_empty() {
            return Ok(any.then_some(fits));
        }
        any = true;
        let end = buffer.iter().position(|&b| b == b'\n');
        let part = &buffer[..end.unwrap_or(buffer.len())];
        fits &= bytes.len() + part.len() <= MAX_LINE_BYTES;
        if fits {
            bytes.extend_from_slice(part);
        }
        let used = part.len() + end.is_some() as usize;
        input.consume(used);
        if end.is_some() {
            return Ok(Some(fits));
        }
    }
}

fn refused(form: Form, code: &'static str, message: String) -> Box<Refused> {
    Box::new(Refused { form, code, message })
}

fn tokenize(
    request: Request,
    model: &Model,
    max_context: usize,
) -> std::result::Result<(Request, Vec<Vec<u32>>), Box<Refused>> {
    // Cutting megabytes into tokens to find that they are too many takes a tokenizer minutes.
    let max_bytes = model.text.max_bytes(max_context);
    let bytes = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Messages(messages) => messages
            .as_array()
            .map_or(0, |list| list.iter().filter_map(|m| m["content"].as_str()).map(str::len).sum()),
        Prompt::Tokens(_) => 0,
    };
    if let Some(bytes) = request.prompts.iter().map(bytes).find(|&bytes| bytes > max_bytes) {
        let message =
            format!("the prompt has {bytes} bytes; no text longer than {max_bytes} fits in the context");
        return Err(refused(request.form, "context_length_exceeded", message));
    }
    let tokens = |prompt: &Prompt| -> Result<Vec<u32>> {
        let ids = match prompt {
            Prompt::Text(text) => model.text.encode(text)?,
            Prompt::Messages(messages) => model.text.encode_chat(messages)?,
            Prompt::Tokens(ids) => ids.clone(),
        };
        let vocab = model.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(Error::request(format!("field `prompt`: token {id} is not below {vocab}"))),
            None if ids.is_empty() => {
                Err(Error::request("the prompt is empty: it has no tokens to go on from"))
            }
            None => Ok(ids),
        }
    };
    let prompts = request.prompts.iter().map(tokens).collect::<Result<Vec<_>>>();
    match prompts {
        Ok(prompts) => Ok((request, prompts)),
        Err(e) => Err(refused(request.form, "invalid_request", e.to_string())),
    }
}

/// Writes whole lines; sets `stop` where the output has ended.
fn write(mut output: impl Write, from_engine: &Receiver<String>, stop: &AtomicBool) -> std::io::Result<()> {
    let result = from_engine.iter().try_for_each(|mut line| {
        line.push('\n');
        output.write_all(line.as_bytes())?;
        output.flush()
    });
    if result.is_err() {
        stop.store(true, Ordering::Relaxed);
    }
    result
}

struct Engine<'a> {
    model: &'a Model,
    name: &'a str,
    options: Options,
    scheduler: Scheduler,
    caches: Caches,
    buffers: Buffers,
    pending: HashMap<u64, Pending>,
    to_writer: SyncSender<String>,
    stop: &'a AtomicBool,
    summary: Summary,
}

impl<'a> Engine<'a> {
    fn new(
        model: &'a Model,
        name: &'a str,
        options: Options,
        to_writer: SyncSender<String>,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        let Options { max_sequences, max_step_tokens, page_size, num_pages, kv_format, .. } = options;
        if max_sequences == 0 || max_step_tokens < max_sequences || !(1..1 << 31).contains(&num_pages) {
            return Err(Error::request(format!(
                "expected at least one sequence, as many tokens in a step, and 1 to 2^31 pages; got {max_sequences} \
                 sequences, {max_step_tokens} tokens, {num_pages} pages"
            )));
        }
        let cache_spec = KvCacheSpec {
            num_pages,
            page_size,
            num_kv_heads: model.config.num_kv_heads,
            head_dim: model.config.head_dim,
            format: kv_format,
            summaries: false,
        };
        let tails = kv_format.has_tails();
        // Before the scheduler's list of free pages: it is here that a pool beyond the machine is refused.
        let caches = Caches::new(model.device(), model.config.num_layers, cache_spec)?;
        Ok(Engine {
            model,
            name,
            options,
            scheduler: Scheduler::new(Limits { max_sequences, max_step_tokens, num_pages, page_size, tails }),
            caches,
            buffers: Buffers::new(model, max_step_tokens, max_sequences)?,
            pending: HashMap::new(),
            to_writer,
            stop,
            summary: Summary::default(),
        })
    }

    fn run(mut self, from_reader: &Receiver<Incoming>, mut progress: impl FnMut(&Summary)) -> Summary {
        let mut open = true;
        while !self.stop.load(Ordering::Relaxed) {
            while open && self.scheduler.num_waiting() < self.options.max_sequences {
                match from_reader.try_recv() {
                    Ok(incoming) => self.take(incoming),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => open = false,
                }
            }
            if !self.scheduler.is_idle() {
                self.step();
            } else if open {
                // A short wait, so that `stop` is seen.
                match from_reader.recv_timeout(Duration::from_millis(50)) {
                    Ok(incoming) => self.take(incoming),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => open = false,
                }
            } else {
                break;
            }
            progress(&self.summary);
        }
        self.summary.stopped = self.stop.load(Ordering::Relaxed);
        self.summary.preemptions = self.scheduler.preemptions();
        self.summary
    }

    /// Waits while the output is slow, unless the run is to stop.
    fn send(&mut self, mut line: String) {
        while !self.stop.load(Ordering::Relaxed) {
            match self.to_writer.try_send(line) {
                Ok(()) => {
                    self.summary.answered += 1;
                    return;
                }
                Err(TrySendError::Full(back)) => line = back,
                Err(TrySendError::Disconnected(_)) => return,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn refuse(&mut self, refused: &Refused, line: u64) {
        self.summary.refused += 1;
        self.send(wire::refusal(refused, line));
    }

    /// Queues a request's generations.
    fn take(&mut self, incoming: Incoming) {
        let line = incoming.line;
        let (request, prompts) = match incoming.parsed {
            Ok(parsed) => parsed,
            Err(refused) => return self.refuse(&refused, line),
        };
        let limit = self.options.max_context.min(self.scheduler.capacity());
        if let Some(prompt) = prompts.iter().find(|p| p.len() >= limit) {
            let message = format!(
                "the prompt has {} tokens; with at least one more it must fit in a context of {limit}",
                prompt.len()
            );
            return self
                .refuse(&Refused { form: request.form, code: "context_length_exceeded", message }, line);
        }
        let mut choice = 0;
        for prompt in prompts {
            for _ in 0..request.n {
                let mut generation = request.generation.clone();
                generation.max_tokens = request.max_tokens.unwrap_or(limit).min(limit - prompt.len());
                // Choices of one request draw apart.
                generation.sampling.seed = generation
                    .sampling
                    .seed
                    .wrapping_add((choice as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
                self.scheduler.add(Sequence::new(line, choice, prompt.clone(), generation));
                choice += 1;
            }
        }
        let finished = (0..choice).map(|_| None).collect();
        self.pending.insert(line, Pending { form: request.form, line, n: request.n, finished });
    }

    /// One step: schedule, run, sample, and answer what is finished.
    fn step(&mut self) {
        let start = Instant::now();
        let parts = self.scheduler.schedule();
        let prompt_tokens: usize = parts
            .iter()
            .map(|&(i, n)| {
                let sequence = self.scheduler.running(i);
                if sequence.tokens.len() - sequence.computed > 1 { n } else { 0 }
            })
            .sum();
        if let Err(error) = self.compute(&parts) {
            return self.fail(&parts, &error);
        }
        let finished = self.scheduler.take_finished();
        let seconds = start.elapsed().as_secs_f64();
        self.summary.prompt_tokens += prompt_tokens;
        if prompt_tokens > 0 {
            self.summary.prefill_seconds += seconds;
        } else {
            self.summary.decode_seconds += seconds;
            self.summary.decode_tokens += parts.len();
        }
        finished.into_iter().for_each(|sequence| self.finish(sequence));
    }

    fn compute(&mut self, parts: &[Part]) -> Result<()> {
        let step = self.scheduler.step(parts);
        self.model.forward(&step, &mut self.caches, &mut self.buffers)?;
        let mut drawn = Vec::new();
        for &(i, n) in parts {
            let sequence = self.scheduler.running(i);
            sequence.computed += n;
            if sequence.computed == sequence.tokens.len() {
                drawn.push(i);
            }
        }
        let params: Vec<SamplingParams> =
            drawn.iter().map(|&i| self.scheduler.running(i).sampling()).collect();
        let mut ids = vec![0; params.len()];
        sample(self.model.device(), self.buffers.logits(ids.len())?, &params, &mut ids)?;
        self.summary.generated_tokens += ids.len();
        for (row, (i, id)) in drawn.into_iter().zip(ids).enumerate() {
            let logits = self.buffers.logits_row(row);
            self.scheduler.running(i).accept(id, logits, &self.model.config.eos, &self.model.text);
        }
        Ok(())
    }

    /// Keeps a finished generation, and answers its request where it was the last one.
    fn finish(&mut self, sequence: Sequence) {
        let request = sequence.request;
        let Some(pending) = self.pending.get_mut(&request) else { return };
        let choice = sequence.choice;
        pending.finished[choice] = Some(sequence);
        if pending.finished.iter().any(Option::is_none) {
            return;
        }
        let Some(pending) = self.pending.remove(&request) else { return };
        let choices: Vec<Sequence> = pending.finished.into_iter().flatten().collect();
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let stamp = Stamp { line: pending.line, model: self.name, created };
        self.send(wire::answer(&pending.form, &choices, pending.n, stamp, &self.model.text));
    }

    /// Answers the requests of a step that could not be computed with an error.
    fn fail(&mut self, parts: &[Part], error: &Error) {
        tracing::error!("a step failed: {error}");
        let mut requests: Vec<u64> = parts.iter().map(|&(i, _)| self.scheduler.running(i).request).collect();
        requests.sort_unstable();
        requests.dedup();
        for request in requests {
            self.scheduler.cancel(request);
            if let Some(pending) = self.pending.remove(&request) {
                let refused =
                    Refused { form: pending.form, code: "internal_error", message: error.to_string() };
                self.refuse(&refused, pending.line);
            }
        }
    }
}
