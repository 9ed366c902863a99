//! What quantised KV and sparse top-k attention cost in accuracy, on SmolLM2 and the book of Esther (King James Version, public
//! domain): `cargo run --release -p ferroflash-serve --example accuracy [MODEL] [TOKENS]`. Prints a table, and writes
//! `benches/accuracy/accuracy.svg` where it is run in the repository.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use ferroflash::op::select_pages::PageBudget;
use ferroflash::{DType, Device, KvCode, KvFormat};
use ferroflash_serve::Model;
use ferroflash_serve::perplexity::{Setting, losses, perplexity};

const PAGE: usize = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut args = std::env::args().skip(1);
    let model = args.next().map_or_else(|| root.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"), Into::into);
    if !model.exists() {
        println!("skipped: no {}; examples/get-smollm2.sh fetches it", model.display());
        return Ok(());
    }
    let model = Model::load(&Device::cpu(), &model.to_string_lossy())?;
    let text = std::fs::read_to_string(root.join("benches/accuracy/esther.txt"))?;
    let mut tokens = model.text.encode(&text)?;
    tokens.truncate(args.next().map_or(Ok(4096), |n| n.parse())?);
    // Sparse attention is compared from the middle on: before, budgets cover most.
    let from = tokens.len() / 2;

    let dense = |format| Setting { format, page_size: 64, chunk: 128, sparse: None };
    let sparse = |tokens: usize| {
        let budget = PageBudget { recent: 2, ..PageBudget::new(tokens / PAGE) };
        let format = KvFormat::Float(DType::BF16);
        Setting { format, page_size: PAGE, chunk: 128, sparse: Some((budget, from)) }
    };
    let int4 = dense(KvFormat::int4(1));
    let fp8_int4 = KvFormat::Quantized { k: KvCode::Fp8, v: KvCode::Int4, num_tails: 0 };
    let mut settings = vec![
        ("f32".to_string(), dense(KvFormat::Float(DType::F32))),
        ("bf16".to_string(), dense(KvFormat::Float(DType::BF16))),
        ("f16".to_string(), dense(KvFormat::Float(DType::F16))),
        ("fp8".to_string(), dense(KvFormat::FP8)),
        ("int8".to_string(), dense(KvFormat::INT8)),
        ("fp8 keys, int4 values".to_string(), dense(fp8_int4)),
        // A prompt in chunks sees its own newest groups quantised; token by token they are still in the 16-bit tail.
        ("int4, in chunks".to_string(), int4),
        ("int4, token by token".to_string(), Setting { chunk: 1, ..int4 }),
    ];
    settings.extend([1024, 512, 256, 128].map(|n| (format!("bf16, top {n} tokens"), sparse(n))));

    println!("{} tokens; perplexity of all, and of those from token {from} on", tokens.len());
    let mut rows: Vec<(String, f64, f64)> = Vec::new();
    for (name, setting) in settings {
        let start = Instant::now();
        let losses = losses(&model, &tokens, setting)?;
        let (all, late) = (perplexity(&losses), perplexity(&losses[from..]));
        println!("{name:24} {all:8.4} {late:8.4}  ({:.0} s)", start.elapsed().as_secs_f64());
        rows.push((name, all, late));
    }
    let base = rows.iter().find(|r| r.0 == "bf16").map_or(1.0, |r| r.2);
    let changes: Vec<(&str, f64)> = rows.iter().map(|r| (r.0.as_str(), 100.0 * (r.2 / base - 1.0))).collect();
    println!("\nlate perplexity against bf16:");
    changes.iter().for_each(|(name, change)| println!("{name:24} {change:+.2}%"));
    let path = root.join("benches/accuracy/accuracy.svg");
    std::fs::write(&path, plot(&changes))?;
    println!("written: {}", path.display());
    Ok(())
}

/// Bars of changes in percent.
fn plot(changes: &[(&str, f64)]) -> String {
    let most = changes.iter().fold(2.0f64, |m, c| m.max(c.1.abs()));
    let (left, width, line) = (170.0, 360.0, 26.0);
    let height = line * (changes.len() as f64 + 2.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"640\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"640\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"18\">Perplexity against 16-bit dense KV (bf16), in percent</text>\n"
    );
    for (i, (name, change)) in changes.iter().enumerate() {
        let y = line * (i as f64 + 1.5);
        let bar = (change.abs() / most * width).max(1.0);
        let color = if *change > 2.0 { "#c44" } else { "#48a" };
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{:.1}\">{name}</text><rect x=\"{left}\" y=\"{:.1}\" width=\"{bar:.1}\" height=\"14\" fill=\"{color}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{change:+.2}</text>",
            y + 12.0,
            y + 1.0,
            left + bar + 6.0,
            y + 12.0
        );
    }
    svg + "</svg>\n"
}
