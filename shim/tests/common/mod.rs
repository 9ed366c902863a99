//! Shared by the tests: the tiny model, and the server run in this process.
#![allow(dead_code, unreachable_pub)] // each test binary uses a part

use std::io::{Cursor, Write};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use ferroflash::{DType, Device, KvFormat};
use ferroflash_serve::Model;
use ferroflash_serve::serve::{Options, Summary, serve};
use serde_json::Value;

pub fn tiny() -> Arc<Model> {
    Arc::new(Model::load(&Device::cpu(), "tiny").unwrap())
}

pub fn options() -> Options {
    Options {
        max_sequences: 16,
        max_step_tokens: 256,
        page_size: 16,
        num_pages: 1000,
        kv_format: KvFormat::Float(DType::F32),
        max_context: 1024,
    }
}

#[derive(Clone, Default)]
pub struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Serves `input`; the answers by line number.
pub fn run(model: &Arc<Model>, options: Options, input: &str) -> (Vec<Value>, Summary) {
    let sink = Sink::default();
    let stop = Arc::new(AtomicBool::new(false));
    let reader = Cursor::new(input.as_bytes().to_vec());
    let summary = serve(model, "test", options, reader, sink.clone(), &stop, |_| {}).unwrap();
    let bytes = sink.0.lock().unwrap().clone();
    let text = String::from_utf8(bytes).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    let mut answers: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    answers.sort_by_key(line_of);
    (answers, summary)
}

/// The number of the line that an answer answers.
pub fn line_of(answer: &Value) -> u64 {
    let from_id = || answer["id"].as_str()?.strip_prefix("batch_req_")?.parse().ok();
    answer["line"].as_u64().or_else(from_id).unwrap()
}
