//! `ferroflash-serve`: JSONL requests in, completions out.

use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Write, stderr, stdin, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::{Parser, ValueEnum};
use ferroflash::{CpuOptions, DType, Device, KvCacheSpec, KvFormat};
use ferroflash_serve::error::Error;
use ferroflash_serve::model::Model;
use ferroflash_serve::serve::{Options, Summary, serve};
use indicatif::{ProgressBar, ProgressStyle};

/// Runs JSONL requests against a model: one JSON object a line in, one line out.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// A Hugging Face folder, a GGUF file, or `tiny`: the small model that the program carries
    #[arg(long, default_value = "tiny")]
    model: String,
    /// Where requests are read [default: stdin]
    #[arg(long)]
    input: Option<PathBuf>,
    /// Where answers are written [default: stdout]
    #[arg(long)]
    output: Option<PathBuf>,
    /// Generations under way at once
    #[arg(long, default_value_t = 32)]
    max_batch: usize,
    /// Tokens of a step; longer prompts are computed in chunks
    #[arg(long, default_value_t = 512)]
    chunk_size: usize,
    /// Tokens of a KV page [default: 16; 32 for int4, which takes multiples of it; int8 takes multiples of 8]
    #[arg(long)]
    page_size: Option<usize>,
    /// KV pages [default: as many as the batch can use, within 1 GiB]
    #[arg(long)]
    num_pages: Option<usize>,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value_t = KvDtype::F32)]
    kv_dtype: KvDtype,
    /// Tokens of prompt and answer together [default: the model's context]
    #[arg(long)]
    max_context: Option<usize>,
    /// Threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvDtype {
    F32,
    F16,
    Bf16,
    Fp8,
    Int8,
    Int4,
}

fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt().with_writer(stderr).with_ansi(stderr().is_terminal()).with_target(false).init();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode, Error> {
    // Before anything slow: a signal during loading counts too.
    let stop = Arc::new(AtomicBool::new(false));
    let signal = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for number in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)
            .and_then(|_| signal_hook::flag::register(number, Arc::clone(&stop)))
            .map_err(|e| Error::Request(format!("signal {number}: {e}")))?;
    }
    let (input, total) = open_input(args.input.as_deref())?;
    let output: Box<dyn Write + Send> = match &args.output {
        None => Box::new(stdout()),
        Some(path) => Box::new(File::create(path).map_err(|e| at(path, &e))?),
    };
    let device = Device::cpu_with(CpuOptions { threads: args.threads.unwrap_or(0), simd: None })?;
    let start = Instant::now();
    let model = Arc::new(Model::load(&device, &args.model)?);
    tracing::info!(
        "{} loaded in {:.2} s on {}: {:?}, {} layers, {:.0} MB of weights",
        args.model,
        start.elapsed().as_secs_f64(),
        device.description(),
        model.config.architecture,
        model.config.num_layers,
        model.weight_bytes() as f64 / 1e6
    );
    let options = options(args, &model);
    let bar = progress_bar(total);
    let start = Instant::now();
    let name =
        Path::new(&args.model).file_name().map_or(args.model.clone(), |n| n.to_string_lossy().into_owned());
    let summary = serve(&model, &name, options, input, output, &stop, |summary| {
        if let Some(bar) = &bar {
            bar.set_position(summary.answered as u64);
            bar.set_message(rates(summary));
        }
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    tracing::info!(
        "{} lines answered, {} of them refused, {} prompt tokens, {} generated in {:.2} s; {}; {} preemptions",
        summary.answered,
        summary.refused,
        summary.prompt_tokens,
        summary.generated_tokens,
        start.elapsed().as_secs_f64(),
        rates(&summary),
        summary.preemptions
    );
    let signal = signal.load(Ordering::Relaxed);
    if summary.stopped {
        let why = if signal == 0 { "the output was closed".to_string() } else { format!("signal {signal}") };
        tracing::warn!("stopped before the end: {why}");
    }
    Ok(if signal == 0 { ExitCode::SUCCESS } else { ExitCode::from(128 + signal as u8) })
}

fn at(path: &Path, error: &std::io::Error) -> Error {
    Error::Request(format!("{}: {error}", path.display()))
}

/// The input, and its number of lines where that can be told and somebody watches.
fn open_input(path: Option<&Path>) -> Result<(Box<dyn BufRead + Send>, Option<u64>), Error> {
    let Some(path) = path else { return Ok((Box::new(BufReader::new(stdin())), None)) };
    let open = || File::open(path).map(BufReader::new).map_err(|e| at(path, &e));
    let mut total = None;
    if stderr().is_terminal() && path.is_file() {
        let mut lines = 0;
        let mut reader = open()?;
        loop {
            let buffer = reader.fill_buf().map_err(|e| at(path, &e))?;
            if buffer.is_empty() {
                break;
            }
            lines += buffer.iter().filter(|&&b| b == b'\n').count() as u64;
            let used = buffer.len();
            reader.consume(used);
        }
        total = Some(lines);
    }
    Ok((Box::new(open()?), total))
}

fn options(args: &Args, model: &Model) -> Options {
    let config = &model.config;
    let max_context = args.max_context.map_or(config.max_position, |n| n.min(config.max_position));
    let kv_format = match args.kv_dtype {
        KvDtype::F32 => KvFormat::Float(DType::F32),
        KvDtype::F16 => KvFormat::Float(DType::F16),
        KvDtype::Bf16 => KvFormat::Float(DType::BF16),
        KvDtype::Fp8 => KvFormat::FP8,
        KvDtype::Int8 => KvFormat::INT8,
        KvDtype::Int4 => KvFormat::int4(args.max_batch),
    };
    let page_size = args.page_size.unwrap_or(16.max(kv_format.page_multiple()));
    let page_bytes = KvCacheSpec {
        num_pages: 1,
        page_size,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        format: kv_format,
        summaries: false,
    }
    .page_bytes()
    .max(1);
    let useful = max_context.div_ceil(page_size.max(1)).saturating_mul(args.max_batch);
    let affordable = (1 << 30) / (page_bytes * config.num_layers);
    Options {
        max_sequences: args.max_batch,
        max_step_tokens: args.chunk_size.max(args.max_batch),
        page_size,
        num_pages: args.num_pages.unwrap_or(useful.min(affordable).max(1)),
        kv_format,
        max_context,
    }
}

fn progress_bar(total: Option<u64>) -> Option<ProgressBar> {
    if !stderr().is_terminal() {
        return None;
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{bar:30} {pos}/{len} {msg} ETA {eta}"),
        None => (ProgressBar::new_spinner(), "{spinner} {pos} {msg}"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    Some(bar)
}

fn rates(summary: &Summary) -> String {
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    format!(
        "prefill {:.0} tok/s, decode {:.0} tok/s",
        rate(summary.prompt_tokens, summary.prefill_seconds),
        rate(summary.decode_tokens, summary.decode_seconds)
    )
}
