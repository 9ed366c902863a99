//! Finished generations to a line.

use serde_json::{Value, json};

use super::{Form, Refused};
use crate::sequence::{Logprobs, Sequence};
use crate::text::Text;

/// Where a line came from and when it was answered.
#[derive(Clone, Copy, Debug)]
pub struct Stamp<'a> {
    /// Its number, from 1.
    pub line: u64,
    /// The model's name.
    pub model: &'a str,
    /// Seconds since 1970.
    pub created: u64,
}

/// The answer to a line that could not be served.
pub fn refusal(refused: &Refused, line: u64) -> String {
    let error = json!({"code": refused.code, "message": refused.message, "line": line});
    match &refused.form {
        Form::Short { id } => json!({"id": id, "line": line, "error": error}),
        Form::Chat { custom_id } | Form::Completion { custom_id } => json!({
            "id": format!("batch_req_{line}"),
            "custom_id": custom_id,
            "response": null,
            "error": error,
        }),
    }
    .to_string()
}

/// The answer of finished generations, in the order of their choices.
pub fn answer(form: &Form, choices: &[Sequence], n: usize, stamp: Stamp<'_>, text: &Text) -> String {
    let line = stamp.line;
    // Each prompt counts once, whatever its number of choices.
    let prompt_tokens: usize = choices.iter().step_by(n.max(1)).map(|c| c.prompt_len).sum();
    let completion_tokens: usize = choices.iter().map(Sequence::num_generated).sum();
    let usage = json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    });
    let finish = |c: &Sequence| c.finish.map(|f| f.as_str());
    let body = |id: &str, object: &str, choices: Vec<Value>| {
        json!({
            "id": format!("{id}-{line}"),
            "object": object,
            "created": stamp.created,
            "model": stamp.model,
            "choices": choices,
            "usage": usage,
        })
    };
    let batch = |custom_id: &Value, body: Value| {
        json!({
            "id": format!("batch_req_{line}"),
            "custom_id": custom_id,
            "response": {"status_code": 200, "request_id": format!("req_{line}"), "body": body},
            "error": null,
        })
    };
    let numbered = choices.iter().enumerate();
    match form {
        Form::Chat { custom_id } => {
            let choices = numbered.map(|(index, c)| {
                json!({
                    "index": index,
                    "message": {"role": "assistant", "content": c.text},
                    "logprobs": chat_logprobs(c, text),
                    "finish_reason": finish(c),
                })
            });
            batch(custom_id, body("chatcmpl", "chat.completion", choices.collect()))
        }
        Form::Completion { custom_id } => {
            let choices = numbered.map(|(index, c)| {
                json!({
                    "index": index,
                    "text": c.text,
                    "logprobs": completion_logprobs(c, text),
                    "finish_reason": finish(c),
                })
            });
            batch(custom_id, body("cmpl", "text_completion", choices.collect()))
        }
        Form::Short { id } => {
            let all: Vec<Value> = numbered
                .map(|(index, c)| {
                    let mut choice = json!({"index": index, "text": c.text, "finish_reason": finish(c)});
                    if c.generation.logprobs.is_some() {
                        choice["logprobs"] = chat_logprobs(c, text);
                    }
                    choice
                })
                .collect();
            let mut answer = json!({"id": id, "line": line});
            if let [one] = &all[..] {
                for key in ["text", "finish_reason", "logprobs"] {
                    if let Some(value) = one.get(key) {
                        answer[key] = value.clone();
                    }
                }
            } else {
                answer["choices"] = Value::Array(all);
            }
            answer["usage"] = usage;
            answer
        }
    }
    .to_string()
}

fn chat_logprobs(choice: &Sequence, text: &Text) -> Value {
    if choice.generation.logprobs.is_none() {
        return Value::Null;
    }
    let entry = |(id, logprob): (u32, f32)| {
        let (token, bytes) = text.token(id);
        json!({"token": token, "logprob": logprob, "bytes": bytes})
    };
    let content = choice.logprobs.iter().map(|l: &Logprobs| {
        let mut one = entry(l.token);
        one["top_logprobs"] = l.top.iter().map(|&t| entry(t)).collect();
        one
    });
    json!({"content": content.collect::<Vec<_>>()})
}

fn completion_logprobs(choice: &Sequence, text: &Text) -> Value {
    if choice.generation.logprobs.is_none() {
        return Value::Null;
    }
    let all = &choice.logprobs;
    let top = all.iter().map(|l| {
        let pairs = l.top.iter().map(|&(id, logprob)| (text.token(id).0, json!(logprob)));
        Value::Object(pairs.collect())
    });
    json!({
        "tokens": all.iter().map(|l| text.token(l.token.0).0).collect::<Vec<_>>(),
        "token_logprobs": all.iter().map(|l| l.token.1).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": all.iter().map(|l| l.text_at).collect::<Vec<_>>(),
    })
}
