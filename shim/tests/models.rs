//! Model files: logits of every architecture against transformers, GGUF's quantisations against its own
//! dequantiser, SentencePiece against sentencepiece, and damaged files. `fixtures/make.py` made them.

mod common;

use std::path::{Path, PathBuf};

use ferroflash::op::sample::SamplingParams;
use ferroflash::{DType, Device, KvCacheSpec, KvFormat};
use ferroflash_serve::Model;
use ferroflash_serve::model::forward::{Buffers, Caches, Step};
use ferroflash_serve::model::linear::Matrix;
use ferroflash_serve::model::quant::{Quant, RowReader};
use ferroflash_serve::sequence::{Finish, Generation, Sequence};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn load(path: &Path) -> Result<Model, String> {
    Model::load(&Device::cpu(), path.to_str().unwrap()).map_err(|e| e.to_string())
}

/// Logits after `tokens`, computed in chunks of 13.
fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let spec = KvCacheSpec {
        num_pages: 64,
        page_size: 8,
        num_kv_heads: model.config.num_kv_heads,
        head_dim: model.config.head_dim,
        format: KvFormat::Float(DType::F32),
        summaries: false,
    };
    let mut caches = Caches::new(model.device(), model.config.num_layers, spec).unwrap();
    let mut buffers = Buffers::new(model, 13, 1).unwrap();
    let mut done = 0;
    for chunk in tokens.chunks(13) {
        done += chunk.len();
        let step = Step {
            tokens: chunk.to_vec(),
            qo_indptr: vec![0, chunk.len() as u32],
            seq_lens: vec![done as u32],
            // Pages from the pool's end backwards.
            page_tables: vec![(0..done.div_ceil(8) as u32).map(|p| 63 - p).collect()],
            tail_slots: Vec::new(),
            logits_rows: vec![chunk.len() - 1],
            page_budget: None,
        };
        model.forward(&step, &mut caches, &mut buffers).unwrap();
    }
    buffers.logits_row(0).unwrap().to_vec()
}

fn check_logits(model: &Model, expected: &Value) {
    let numbers = |key: &str| expected[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap());
    let tokens: Vec<u32> = numbers("tokens").map(|t| t as u32).collect();
    let got = logits(model, &tokens);
    let expected: Vec<f64> = numbers("logits").collect();
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (g, e) in got.iter().zip(&expected) {
        // Both are f32; only the order of sums differs.
        assert!((*g as f64 - e).abs() <= 2e-5 * largest, "{g} {e}");
    }
}

#[test]
fn every_architecture_gives_the_logits_of_transformers() {
    for name in ["llama", "llama3", "yarn", "linear", "mistral", "qwen2", "qwen3"] {
        println!("{name}");
        let path = fixture("models").join(name);
        check_logits(&load(&path).unwrap(), &json(path.join("expected.json")));
    }
}

#[test]
fn quantised_blocks_have_the_values_of_ggml() {
    for (name, case) in json(fixture("quants.json")).as_object().unwrap() {
        let quant = Quant::from_ggml(case["type"].as_u64().unwrap() as u32).unwrap();
        let bytes: Vec<u8> =
            case["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect();
        let expected: Vec<f64> =
            case["values"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        let rows = RowReader::new(quant, &bytes, 1, expected.len()).unwrap();
        let mut got = vec![0f32; expected.len()];
        rows.read(0, &mut got);
        // The packed matrix, read out by unit vectors.
        let matrix = Matrix::pack(&rows, None);
        for (i, e) in expected.iter().enumerate() {
            let close = |x: f32| (x as f64 - e).abs() <= 1e-6 * e.abs().max(1.0);
            assert!(close(got[i]), "{name} {i}: {} {e}", got[i]);
            let mut unit = vec![0f32; expected.len()];
            unit[i] = 1.0;
            let mut out = [f32::NAN];
            matrix.forward(&unit, &mut out, 1, 0);
            assert!(close(out[0]), "{name} packed {i}: {} {e}", out[0]);
        }
    }
}

#[test]
fn sentencepiece_gguf_has_its_ids_text_and_logits() {
    let model = load(&fixture("spm.gguf")).unwrap();
    let expected = json(fixture("spm.json"));
    for case in expected["strings"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = model.text.encode(text).unwrap();
        let want: Vec<u32> =
            case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(ids, want, "{text:?}");
        assert_eq!(model.text.decode(&ids), text);
    }
    check_logits(&model, &expected);
}

/// Drawn tokens, one by one, give the rest of a text whose beginning was the prompt.
fn check_text_of_tokens(model: &Model, text: &str) {
    let ids = model.text.encode(text).unwrap();
    for prompt_len in 1..ids.len() {
        let prompt = model.text.decode(&ids[..prompt_len]);
        let Some(rest) = text.strip_prefix(&prompt) else { continue };
        let generation = Generation {
            max_tokens: ids.len() - prompt_len,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            ignore_eos: true,
            logprobs: None,
        };
        let mut sequence = Sequence::new(0, 0, ids[..prompt_len].to_vec(), generation);
        ids[prompt_len..].iter().for_each(|&id| sequence.accept(id, None, &[], &model.text));
        assert_eq!(sequence.text, rest, "after {prompt:?}");
        assert_eq!(sequence.finish, Some(Finish::Length));
    }
}

#[test]
fn text_comes_whole_token_by_token() {
    let text = "The word of  the lazy dog: naïve 😀 步 end";
    check_text_of_tokens(&load(&fixture("spm.gguf")).unwrap(), text);
    check_text_of_tokens(&load(Path::new("tiny")).unwrap(), text);
}

/// A copy of a fixture's file in a folder of the test's own.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ferroflash-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn damaged_gguf_files_are_refused_and_never_panic() {
    let scratch = Scratch::new("gguf");
    let whole = std::fs::read(fixture("spm.gguf")).unwrap();
    for len in (0..whole.len() - 1).step_by(4001).chain([4, 8, 23, 24, 100]) {
        let error = load(&scratch.write("cut.gguf", &whole[..len])).unwrap_err();
        assert!(
            error.contains("truncated") || error.contains("left in the file") || len < 4,
            "{len}: {error}"
        );
    }
    // Hostile counts and lengths: the number of tensors, of metadata entries, of a key's bytes.
    for at in [8, 16, 24] {
        let mut bytes = whole.clone();
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = load(&scratch.write("huge.gguf", &bytes)).unwrap_err();
        assert!(error.contains("left in the file"), "{error}");
    }
    // Any other damage is an error or goes unnoticed (a weight, a score), but is no panic.
    let header = 20_000.min(whole.len());
    let mut state = 9u64;
    for _ in 0..400 {
        let mut bytes = whole.clone();
        for _ in 0..3 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            bytes[(state >> 33) as usize % header] = (state >> 20) as u8;
        }
        let _ = load(&scratch.write("flipped.gguf", &bytes));
    }
}

#[test]
fn damaged_folders_are_refused_by_name() {
    let scratch = Scratch::new("folder");
    let from = fixture("models/llama");
    let copy = |name: &str| scratch.write(name, &std::fs::read(from.join(name)).unwrap());
    assert!(load(&scratch.0).unwrap_err().contains("config.json"));
    copy("config.json");
    assert!(load(&scratch.0).unwrap_err().contains("tokenizer.json"));
    copy("tokenizer.json");
    assert!(load(&scratch.0).unwrap_err().contains("model.safetensors"));
    let weights = std::fs::read(from.join("model.safetensors")).unwrap();
    for len in [0, 7, 100, weights.len() - 1] {
        scratch.write("model.safetensors", &weights[..len]);
        assert!(load(&scratch.0).unwrap_err().contains("model.safetensors"), "{len}");
    }
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    scratch.write("model.safetensors", &huge);
    assert!(load(&scratch.0).unwrap_err().contains("model.safetensors"));
    copy("model.safetensors");
    load(&scratch.0).unwrap();

    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    for (from, to, word) in [
        ("\"model_type\": \"llama\"", "\"model_type\": \"gpt_neox\"", "gpt_neox"),
        ("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "gelu"),
        ("\"hidden_size\": 32", "\"hidden_size\": 40", "expected shape"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "missing"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 99999999999", "num_hidden_layers"),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "multiple"),
        ("\"head_dim\": 8", "\"head_dim\": 12", "head_dim"),
        ("\"vocab_size\": 48", "\"vocab_size\": 40", "expected shape"),
        ("{", "", "config.json"),
    ] {
        assert!(config.contains(from), "{from}");
        scratch.write("config.json", config.replacen(from, to, 1).as_bytes());
        let error = load(&scratch.0).unwrap_err();
        assert!(error.contains(word), "{to}: {error}");
    }
    // An unsupported architecture is named before any weight is looked for.
    std::fs::remove_file(scratch.0.join("model.safetensors")).unwrap();
    scratch.write("config.json", br#"{"model_type": "mamba"}"#);
    assert!(load(&scratch.0).unwrap_err().contains("mamba"));
    assert!(load(Path::new("/nowhere")).unwrap_err().contains("no such file"));
}
