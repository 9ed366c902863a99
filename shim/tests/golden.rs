//! SmolLM2-135M-Instruct against PyTorch in f32: token ids, logits, and greedy text.
//!
//! The model is fetched by `examples/get-smollm2.sh`; `FERROFLASH_SMOLLM2` names another place.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use ferroflash::{DType, Device, KvFormat};
use ferroflash_serve::Model;
use ferroflash_serve::model::forward::{Buffers, Caches, Step};
use ferroflash_serve::perplexity::{Setting, losses, perplexity};
use serde_json::{Value, json};

/// Largest difference of a logit allowed: both sides are f32 throughout, and differ in the order of
/// their sums (measured: 4.5e-5).
const LOGIT_BOUND: f64 = 1e-3;
/// The reference may part from us where its two best tokens are nearer than this.
const NARROW_GAP: f64 = 0.1;

fn smollm2() -> Option<Arc<Model>> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("FERROFLASH_SMOLLM2").map_or_else(|| PathBuf::from(default), PathBuf::from);
    if !path.is_file() {
        println!("skipped: no SmolLM2 model; examples/get-smollm2.sh fetches it");
        return None;
    }
    Some(Arc::new(Model::load(&Device::cpu(), path.to_str().unwrap()).unwrap()))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn token_ids_are_exact() {
    let Some(model) = smollm2() else { return };
    for case in lines(include_str!("golden/smollm2_tokenizer.jsonl")) {
        assert_eq!(model.text.encode(case["text"].as_str().unwrap()).unwrap(), ids(&case["ids"]), "{case}");
    }
    for case in lines(include_str!("golden/smollm2.jsonl")) {
        assert_eq!(model.text.encode(case["prompt"].as_str().unwrap()).unwrap(), ids(&case["prompt_ids"]));
    }
}

#[test]
fn chats_become_the_prompts() {
    let Some(model) = smollm2() else { return };
    let user = |text: &str| json!({"role": "user", "content": text});
    let gravity = json!([user("What is gravity?")]);
    let multi_turn = json!([
        user("My name is Bob and I have two cats."),
        {"role": "assistant", "content": "Nice to meet you, Bob! What are your cats called?"},
        user("Salt and Pepper. What is my name?"),
    ]);
    let cases = lines(include_str!("golden/smollm2.jsonl"));
    for (id, messages) in [("chat_gravity", gravity), ("chat_multi_turn", multi_turn)] {
        let case = cases.iter().find(|c| c["id"] == id).unwrap();
        assert_eq!(model.text.encode_chat(&messages).unwrap(), ids(&case["prompt_ids"]), "{id}");
    }
}

#[test]
fn logits_after_the_prompt_are_the_references() {
    let Some(model) = smollm2() else { return };
    let mut worst = 0f64;
    for case in lines(include_str!("golden/smollm2.jsonl")) {
        let tokens = ids(&case["prompt_ids"]);
        let n = tokens.len();
        let options = common::options();
        let spec = ferroflash::KvCacheSpec {
            num_pages: n.div_ceil(options.page_size),
            page_size: options.page_size,
            num_kv_heads: model.config.num_kv_heads,
            head_dim: model.config.head_dim,
            format: options.kv_format,
            summaries: false,
        };
        let mut caches = Caches::new(model.device(), model.config.num_layers, spec).unwrap();
        let mut buffers = Buffers::new(&model, n, 1).unwrap();
        let step = Step {
            qo_indptr: vec![0, n as u32],
            seq_lens: vec![n as u32],
            page_tables: vec![(0..spec.num_pages as u32).collect()],
            tail_slots: Vec::new(),
            logits_rows: vec![n - 1],
            page_budget: None,
            tokens,
        };
        model.forward(&step, &mut caches, &mut buffers).unwrap();
        let logits = buffers.logits_row(0).unwrap();
        for pair in case["torch_f32"]["prompt_top20_logits"].as_array().unwrap() {
            let (id, expected) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            worst = worst.max((logits[id] as f64 - expected).abs());
        }
    }
    println!("largest difference of a logit: {worst:e}");
    assert!(worst < LOGIT_BOUND, "{worst:e}");
}

#[test]
fn greedy_text_is_the_references() {
    let Some(model) = smollm2() else { return };
    let cases = lines(include_str!("golden/smollm2.jsonl"));
    let requests: Vec<String> = cases
        .iter()
        .map(|case| json!({"prompt": case["prompt"], "max_tokens": 48, "temperature": 0}).to_string())
        .collect();
    let options = ferroflash_serve::serve::Options { max_context: 4096, ..common::options() };
    let (answers, _) = common::run(&model, options, &requests.join("\n"));
    assert_eq!(answers.len(), cases.len());
    let mut whole = 0;
    for (case, answer) in cases.iter().zip(&answers) {
        let reference = &case["torch_f32"];
        let (text, got) = (reference["text"].as_str().unwrap(), answer["text"].as_str().unwrap());
        let gaps = reference["gap"].as_array().unwrap().iter().map(|g| g.as_f64().unwrap());
        let ends = ids(&reference["text_byte_ends"]);
        let narrow = gaps.take(ends.len()).position(|gap| gap < NARROW_GAP);
        let sure = narrow.map_or(text.len(), |step| if step == 0 { 0 } else { ends[step - 1] as usize });
        assert!(got.as_bytes().starts_with(&text.as_bytes()[..sure]), "{}:\n{got:?}\n{text:?}", case["id"]);
        whole += (got == text) as usize;
    }
    println!("{whole} of {} texts are equal to their end", cases.len());
}

/// int4 KV while generating, against 16-bit KV: what it costs in perplexity on a text that is in the public domain.
#[test]
fn int4_keeps_the_perplexity() {
    let Some(model) = smollm2() else { return };
    let text = include_str!("../../benches/accuracy/esther.txt");
    let mut tokens = model.text.encode(text).unwrap();
    tokens.truncate(1024);
    let dense = Setting { format: KvFormat::Float(DType::BF16), page_size: 64, chunk: 128, sparse: None };
    let int4 = Setting { format: KvFormat::int4(1), chunk: 1, ..dense };
    let [dense, int4] = [dense, int4].map(|setting| perplexity(&losses(&model, &tokens, setting).unwrap()));
    println!(
        "perplexity of {} tokens: bf16 {dense:.4}, int4 {int4:.4}, {:+.2}%",
        tokens.len(),
        100.0 * (int4 / dense - 1.0)
    );
    assert!(dense > 2.0 && dense < 60.0, "the text is predicted, and not by heart");
    assert!(int4 <= 1.02 * dense);
}
