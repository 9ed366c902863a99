//! The server: answers in the right form, nothing lost, and the same text whatever the schedule.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{line_of, options, run, tiny};
use ferroflash::{DType, KvCode, KvFormat};
use ferroflash_serve::serve::Options;
use serde_json::{Value, json};

/// Greedy and seeded requests of many lengths.
fn mixed(n: usize) -> String {
    let line = |i: usize| {
        let words =
            ["the LORD", "and it came to pass", "Moses", "a great multitude of the children of Israel"];
        let prompt = vec![words[i % 4]; 1 + i * 7 % 23].join(" ");
        let temperature = if i.is_multiple_of(3) { 0.8 } else { 0.0 };
        json!({"prompt": prompt, "max_tokens": 1 + i * 5 % 37, "temperature": temperature, "top_p": 0.9, "n": 1 + i % 3})
            .to_string()
    };
    (0..n).map(|i| line(i) + "\n").collect()
}

#[test]
fn text_does_not_depend_on_batch_chunk_page_or_preemption() {
    let model = tiny();
    let input = mixed(24);
    let base = options();
    let (expected, _) = run(&model, base, &input);
    assert_eq!(expected.len(), 24);
    let mut preempted = 0;
    for options in [
        Options { max_sequences: 1, max_step_tokens: 1000, ..base },
        Options { max_sequences: 40, max_step_tokens: 41, ..base },
        Options { max_sequences: 3, max_step_tokens: 3, ..base },
        Options { page_size: 1, num_pages: 4000, ..base },
        Options { page_size: 100, num_pages: 100, ..base },
        // 20 pages of 16 tokens hold one or two of the longest.
        Options { num_pages: 20, ..base },
        Options { page_size: 7, num_pages: 43, max_step_tokens: 33, ..base },
    ] {
        let (answers, summary) = run(&model, options, &input);
        assert_eq!(answers, expected, "{options:?}");
        preempted += summary.preemptions;
    }
    assert!(preempted > 0, "no run was short of pages");
}

#[test]
fn sixteen_bit_and_quantised_caches_serve_everything() {
    let model = tiny();
    let formats = [
        (KvFormat::Float(DType::F16), 16),
        (KvFormat::Float(DType::BF16), 5),
        (KvFormat::int4(16), 32),
        (KvFormat::FP8, 5),
        (KvFormat::INT8, 8),
        (KvFormat::Quantized { k: KvCode::Fp8, v: KvCode::Int4, num_tails: 0 }, 32),
    ];
    for (kv_format, page_size) in formats {
        let (answers, _) =
            run(&model, Options { kv_format, page_size, num_pages: 60, ..options() }, &mixed(24));
        assert_eq!(answers.len(), 24);
        assert!(answers.iter().all(|a| a.get("error").is_none()), "{answers:?}");
    }
}

fn one(line: Value) -> Value {
    let (mut answers, _) = run(&tiny(), options(), &line.to_string());
    assert_eq!(answers.len(), 1);
    answers.remove(0)
}

#[test]
fn openai_batch_forms() {
    let chat = one(json!({
        "custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "any", "messages": [{"role": "user", "content": "In the beginning"}], "max_tokens": 5,
                 "temperature": 0, "logprobs": true, "top_logprobs": 2, "n": 2, "some_new_field": {"x": 1}},
    }));
    assert_eq!((&chat["custom_id"], &chat["error"]), (&json!("a-1"), &Value::Null));
    assert_eq!(chat["response"]["status_code"], 200);
    let body = &chat["response"]["body"];
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["choices"].as_array().unwrap().len(), 2);
    for (index, choice) in body["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(index), &json!("length")));
        assert_eq!(choice["message"]["role"], "assistant");
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 5);
        let joined: String = content.iter().map(|t| t["token"].as_str().unwrap()).collect();
        assert_eq!(joined, choice["message"]["content"].as_str().unwrap());
        for token in content {
            // Greedy: the drawn token is the most likely one.
            let top = token["top_logprobs"].as_array().unwrap();
            assert_eq!((top.len(), &top[0]["logprob"]), (2, &token["logprob"]));
            assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        }
    }
    let usage = &body["usage"];
    assert_eq!(usage["completion_tokens"], 10);
    let sum = usage["prompt_tokens"].as_u64().unwrap() + 10;
    assert_eq!(usage["total_tokens"], sum);

    let completion = one(json!({
        "custom_id": "b", "method": "POST", "url": "/v1/completions",
        "body": {"prompt": ["And", "But"], "temperature": 0, "logprobs": 3},
    }));
    let body = &completion["response"]["body"];
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["choices"].as_array().unwrap().len(), 2);
    let choice = &body["choices"][1];
    assert_eq!(body["usage"]["completion_tokens"], 32, "16 tokens each is the default");
    let offsets = choice["logprobs"]["text_offset"].as_array().unwrap();
    assert_eq!((offsets.len(), &offsets[0]), (16, &json!(0)));
    assert_eq!(choice["logprobs"]["top_logprobs"][0].as_object().unwrap().len(), 3);
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let free = one(json!({"prompt": "In the beginning", "max_tokens": 40}));
    let text = free["text"].as_str().unwrap();
    assert_eq!(free["finish_reason"], "length");
    // Some words from the middle, so that the match spans tokens.
    let stop: String = text.chars().skip(20).take(9).collect();
    let stopped = one(json!({"prompt": "In the beginning", "max_tokens": 40, "stop": ["never so", stop]}));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
    let tokens = stopped["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(tokens < 40);
}

#[test]
fn seeds_and_sampling_parameters_work() {
    let line = |extra: Value| {
        let mut line = json!({"prompt": "And the king", "max_tokens": 24, "temperature": 1.0});
        line.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        one(line)["text"].as_str().unwrap().to_string()
    };
    let greedy = line(json!({"temperature": 0}));
    assert_eq!(line(json!({"seed": 1})), line(json!({"seed": 1})));
    assert_ne!(line(json!({"seed": 1})), line(json!({"seed": 2})));
    for narrow in [json!({"top_k": 1}), json!({"top_p": 0.0}), json!({"min_p": 1.0})] {
        assert_eq!(line(narrow), greedy);
    }
    let choices = one(json!({"prompt": "And the king", "max_tokens": 24, "temperature": 1.0, "n": 2}));
    assert_ne!(choices["choices"][0]["text"], choices["choices"][1]["text"]);
}

/// Lines that must be refused, each with a word that its message must have.
const BAD: &[(&str, &str)] = &[
    ("", "empty"),
    ("{", "JSON"),
    ("[1]", "array"),
    ("\"text\"", "string"),
    ("{}", "prompt"),
    (r#"{"prompt": 5}"#, "prompt"),
    (r#"{"prompt": ""}"#, "empty"),
    (r#"{"prompt": [99999999]}"#, "99999999"),
    (r#"{"prompt": "a", "messages": []}"#, "exclude"),
    (r#"{"messages": [{"role": "user"}]}"#, "messages[0].content"),
    (r#"{"prompt": "a", "max_tokens": "many"}"#, "max_tokens"),
    (r#"{"prompt": "a", "max_tokens": 0}"#, "max_tokens"),
    (r#"{"prompt": "a", "max_tokens": -3}"#, "max_tokens"),
    (r#"{"prompt": "a", "temperature": -1}"#, "temperature"),
    (r#"{"prompt": "a", "top_p": 1.5}"#, "top_p"),
    (r#"{"prompt": "a", "n": 0}"#, "`n`"),
    (r#"{"prompt": "a", "stop": [1]}"#, "stop"),
    (r#"{"prompt": "a", "stop": ""}"#, "stop"),
    (r#"{"prompt": "a", "ignore_eos": 1}"#, "ignore_eos"),
    (r#"{"prompt": "a", "seed": "x"}"#, "seed"),
    (r#"{"prompt": "a", "logprobs": 100}"#, "logprobs"),
    (r#"{"custom_id": "x", "method": "GET", "url": "/v1/completions", "body": {}}"#, "method"),
    (r#"{"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {}}"#, "url"),
    (r#"{"custom_id": "x", "method": "POST", "url": "/v1/completions"}"#, "body"),
    (r#"{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}"#, "custom_id"),
];

#[test]
fn bad_lines_are_answered_each_by_itself() {
    let mut input: String = BAD.iter().map(|(line, _)| format!("{line}\n")).collect();
    input.push_str(&json!({"prompt": "word ".repeat(3000)}).to_string());
    input.push_str("\n{\"prompt\": \"In the\", \"id\": \"good\", \"max_tokens\": 3}");
    let (answers, summary) = run(&tiny(), options(), &input);
    assert_eq!((answers.len(), summary.refused), (BAD.len() + 2, BAD.len() + 1));
    for (i, ((line, word), answer)) in BAD.iter().zip(&answers).enumerate() {
        let message = answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{line}: {answer}"));
        assert!(message.contains(word), "{line}: {message}");
        assert_eq!(answer["error"]["line"], i + 1);
        let id = if line.contains(r#""custom_id": "x""#) { json!("x") } else { Value::Null };
        let key = if line.contains("custom_id") { "custom_id" } else { "id" };
        assert_eq!(answer[key], id, "{line}");
    }
    assert_eq!(answers[BAD.len()]["error"]["code"], "context_length_exceeded");
    assert_eq!(answers[BAD.len() + 1]["id"], "good");
}

#[test]
fn megabytes_of_prompt_are_refused_untokenised() {
    for text in [" ".repeat(8 << 20), "\u{65e5}".repeat(2 << 20), "a b".repeat(2 << 20)] {
        for line in [json!({"prompt": text}), json!({"messages": [{"role": "user", "content": text}]})] {
            assert_eq!(one(line)["error"]["code"], "context_length_exceeded");
        }
    }
    let (answers, _) = run(&tiny(), options(), &format!("{}\n{{\"prompt\": \"a\"}}", "x".repeat(17 << 20)));
    assert_eq!(answers[0]["error"]["code"], "line_too_long");
    assert!(answers[1]["error"].is_null());
}

#[test]
fn two_hundred_mixed_lines_give_two_hundred_answers() {
    let lines: Vec<String> = (0..200)
        .map(|i| match i % 8 {
            0 => json!({"id": "same", "prompt": "And", "max_tokens": 3}).to_string(),
            1 => json!({"prompt": "And it came to pass ".repeat(1 + i / 8), "max_tokens": 9}).to_string(),
            2 => BAD[i / 8 % BAD.len()].0.to_string(),
            3 => json!({"id": i, "prompt": "the king", "n": 3, "temperature": 1, "max_tokens": 5}).to_string(),
            4 => json!({"id": "ключ-😀", "prompt": "naïve 日本語 😀 \u{202e}", "max_tokens": 6}).to_string(),
            5 => json!({"prompt": "Moses", "stop": [" the", ","], "max_tokens": 20}).to_string(),
            6 => json!({
                "custom_id": format!("c{i}"), "method": "POST", "url": "/v1/chat/completions",
                "body": {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "y"}]}],
                         "max_completion_tokens": 4},
            }).to_string(),
            _ => json!({"prompt": "\\u0000\n\t", "max_tokens": 2, "ignore_eos": true}).to_string(),
        })
        .collect();
    let (answers, summary) = run(&tiny(), Options { num_pages: 40, ..options() }, &lines.join("\n"));
    assert_eq!((answers.len(), summary.answered), (200, 200));
    for (i, (line, answer)) in lines.iter().zip(&answers).enumerate() {
        assert_eq!(line_of(answer), i as u64 + 1);
        let bad = i % 8 == 2;
        assert_eq!(!answer["error"].is_null(), bad, "{line}\n{answer}");
        if let (Ok(line), false) = (serde_json::from_str::<Value>(line), bad) {
            let key = if i % 8 == 6 { "custom_id" } else { "id" };
            assert_eq!(answer[key], line[key]);
        }
        if i % 8 == 3 {
            assert_eq!(answer["choices"].as_array().unwrap().len(), 3);
        }
    }
}

fn spawn() -> Child {
    Command::new(env!("CARGO_BIN_EXE_ferroflash-serve"))
        .args(["--max-batch", "8"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Feeds requests until the program no longer takes them.
fn feed(child: &mut Child) -> std::thread::JoinHandle<()> {
    let mut stdin = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        let line = json!({"prompt": "And it came to pass", "max_tokens": 60}).to_string() + "\n";
        while stdin.write_all(line.as_bytes()).is_ok() {}
    })
}

fn ended(child: &mut Child) -> std::process::ExitStatus {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "the server did not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn bad_options_are_an_error_and_int4_works_by_default() {
    let run = |args: &[&str]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ferroflash-serve"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that has refused its options may be gone already.
        let _ = child.stdin.take().unwrap().write_all(b"{\"prompt\": \"And\", \"max_tokens\": 2}\n");
        let output = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    for (args, word) in [
        (["--model", "/nowhere"], "no such file"),
        (["--input", "/nowhere"], "/nowhere"),
        (["--output", "/nowhere/x"], "/nowhere/x"),
        (["--page-size", "0"], "page_size"),
        (["--max-batch", "0"], "0 sequences"),
        (["--num-pages", "0"], "0 pages"),
        (["--num-pages", "99999999999"], "pages"),
    ] {
        let (code, stdout, stderr) = run(&args);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{args:?} {stderr}");
        assert!(stderr.contains(word), "{args:?}: {stderr}");
    }
    let (code, stdout, _) = run(&["--kv-dtype", "int4"]);
    assert_eq!(code, Some(0));
    assert!(stdout.contains("completion_tokens"));
}

#[test]
fn signals_leave_whole_lines() {
    for (signal, code) in [("TERM", Some(143)), ("INT", Some(130)), ("KILL", None)] {
        let mut child = spawn();
        let feeder = feed(&mut child);
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        for _ in 0..5 {
            stdout.read_line(&mut text).unwrap();
        }
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        stdout.read_to_string(&mut text).unwrap();
        assert_eq!(ended(&mut child).code(), code, "SIG{signal}");
        feeder.join().unwrap();
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            let answer: Value = serde_json::from_str(line).unwrap();
            assert_eq!(answer["usage"]["completion_tokens"], 60);
        }
    }
}

#[test]
fn a_closed_output_stops_the_server() {
    let mut child = spawn();
    let feeder = feed(&mut child);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    drop(stdout);
    assert!(ended(&mut child).success());
    feeder.join().unwrap();
}

#[test]
fn a_signal_stops_the_server_whose_output_nobody_reads() {
    let mut child = spawn();
    let feeder = feed(&mut child);
    // Until pipes and channels are full.
    std::thread::sleep(Duration::from_millis(1500));
    assert!(Command::new("kill").args(["-s", "TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(ended(&mut child).code(), Some(143));
    feeder.join().unwrap();
}

#[test]
fn answers_come_while_the_input_is_open_and_memory_is_bounded() {
    let mut child = spawn();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    writeln!(stdin, r#"{{"prompt": "And", "max_tokens": 2}}"#).unwrap();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("\"line\":1"));
    let resident = || -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
        let line = status.lines().find(|l| l.starts_with("VmRSS"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let before = resident();
    // 60 MB of requests that are refused, while nobody reads the answers for a while.
    let feeder = std::thread::spawn(move || {
        let long = format!("{{\"prompt\": 1, \"x\": \"{}\"}}\n", "y".repeat(1 << 20));
        for _ in 0..60 {
            stdin.write_all(long.as_bytes()).unwrap();
        }
    });
    let mut peak = before;
    for i in 0..60 {
        line.clear();
        stdout.read_line(&mut line).unwrap();
        assert!(line.contains("expected a string"), "{i}: {line}");
        peak = peak.max(resident());
    }
    feeder.join().unwrap();
    assert!(ended(&mut child).success());
    if let (Some(before), Some(peak)) = (before, peak) {
        assert!(peak < before + 40_000, "{before} kB, then {peak} kB");
    }
}
