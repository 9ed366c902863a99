//! A line to a typed request.

use ferroflash::op::sample::SamplingParams;
use serde_json::{Map, Value};

use super::{Form, Prompt, Refused, Request};
use crate::error::{Error, Result};
use crate::sequence::Generation;

/// Generations of a request at most.
const MAX_CHOICES: usize = 128;
/// `top_logprobs` at most, as in OpenAI's API.
const MAX_TOP_LOGPROBS: usize = 20;

/// Understands a line. `line` is its number, from 1, and the default seed.
pub fn parse(bytes: &[u8], line: u64) -> std::result::Result<Request, Box<Refused>> {
    let unknown = || Form::Short { id: Value::Null };
    let refuse = |form: Form, code, message| Box::new(Refused { form, code, message });
    let value: Value = serde_json::from_slice(bytes).map_err(|e| {
        let message = if bytes.trim_ascii().is_empty() {
            "the line is empty; expected a JSON object".to_string()
        } else {
            format!("not valid JSON: {e}")
        };
        refuse(unknown(), "invalid_json", message)
    })?;
    let Value::Object(object) = value else {
        let message = format!("expected a JSON object, got {}", kind(&value));
        return Err(refuse(unknown(), "invalid_json", message));
    };
    let form = form_of(&object).map_err(|(form, message)| refuse(form, "invalid_request", message))?;
    let body = match &form {
        Form::Short { .. } => Some(&object),
        _ => object.get("body").and_then(Value::as_object),
    };
    let parsed = match body {
        None => Err(Error::request(wrong("body", "an object", object.get("body").unwrap_or(&Value::Null)))),
        Some(body) => request(body, form.clone(), line),
    };
    parsed.map_err(|e| refuse(form, "invalid_request", e.to_string()))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn wrong(field: &str, expected: &str, got: &Value) -> String {
    let got = match got {
        Value::Bool(_) | Value::Number(_) => got.to_string(),
        Value::String(s) if s.len() <= 40 => format!("{s:?}"),
        other => kind(other).to_string(),
    };
    format!("field `{field}`: expected {expected}, got {got}")
}

fn form_of(object: &Map<String, Value>) -> std::result::Result<Form, (Form, String)> {
    let is_batch = ["custom_id", "method", "url", "body"].iter().any(|key| object.contains_key(*key));
    let has_prompt = object.contains_key("prompt") || object.contains_key("messages");
    if !is_batch || has_prompt && !object.contains_key("body") {
        let id = object.get("id").cloned().unwrap_or(Value::Null);
        return match id {
            Value::Null | Value::String(_) | Value::Number(_) => Ok(Form::Short { id }),
            other => Err((Form::Short { id: Value::Null }, wrong("id", "a string or a number", &other))),
        };
    }
    let custom_id = object.get("custom_id").cloned().unwrap_or(Value::Null);
    let null = Form::Completion { custom_id: Value::Null };
    if !custom_id.is_string() {
        return Err((null, wrong("custom_id", "a string", &custom_id)));
    }
    let fail = |field, expected, got: &Value| {
        Err((Form::Completion { custom_id: custom_id.clone() }, wrong(field, expected, got)))
    };
    match object.get("method").unwrap_or(&Value::Null) {
        Value::Null => {}
        Value::String(method) if method == "POST" => {}
        other => return fail("method", "\"POST\"", other),
    }
    match object.get("url").and_then(Value::as_str) {
        Some("/v1/chat/completions") => Ok(Form::Chat { custom_id }),
        Some("/v1/completions") => Ok(Form::Completion { custom_id }),
        _ => {
            let got = object.get("url").unwrap_or(&Value::Null);
            fail("url", "\"/v1/chat/completions\" or \"/v1/completions\"", got)
        }
    }
}

/// Typed access to a body; null counts as absent.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    fn number(&self, field: &str, default: f64, low: f64, high: f64) -> Result<f64> {
        let Some(value) = self.get(field) else { return Ok(default) };
        let fits = value.as_f64().filter(|x| (low..=high).contains(x));
        let expected = if high == f64::MAX {
            format!("a number of at least {low}")
        } else {
            format!("a number from {low} to {high}")
        };
        fits.ok_or_else(|| Error::request(wrong(field, &expected, value)))
    }

    fn whole(&self, field: &str, low: u64, high: u64) -> Result<Option<u64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let fits = value.as_u64().filter(|n| (low..=high).contains(n));
        let expected = if high >= u32::MAX as u64 {
            format!("a whole number of at least {low}")
        } else {
            format!("a whole number from {low} to {high}")
        };
        fits.map(Some).ok_or_else(|| Error::request(wrong(field, &expected, value)))
    }

    fn bool(&self, field: &str) -> Result<bool> {
        let Some(value) = self.get(field) else { return Ok(false) };
        value.as_bool().ok_or_else(|| Error::request(wrong(field, "true or false", value)))
    }
}

fn request(body: &Map<String, Value>, form: Form, line: u64) -> Result<Request> {
    let fields = Fields(body);
    let short = matches!(form, Form::Short { .. });
    let prompts = prompts(&fields, &form)?;
    let n = fields.whole("n", 1, MAX_CHOICES as u64)?.unwrap_or(1) as usize;
    if prompts.len() * n > MAX_CHOICES {
        let message =
            format!("{} prompts with `n` of {n}: at most {MAX_CHOICES} generations in all", prompts.len());
        return Err(Error::request(message));
    }
    let max_tokens = match fields.whole("max_completion_tokens", 1, u64::MAX)? {
        Some(n) => Some(n),
        None => fields.whole("max_tokens", 1, u64::MAX)?,
    };
    let default_max = match form {
        Form::Completion { .. } => Some(16), // OpenAI's
        Form::Short { .. } => Some(256),
        Form::Chat { .. } => None,
    };
    let top_p = fields.number("top_p", 1.0, 0.0, 1.0)?;
    let sampling = SamplingParams {
        temperature: fields.number("temperature", if short { 0.0 } else { 1.0 }, 0.0, 1e6)? as f32,
        top_k: top_k(&fields)?,
        // 0 is taken as "the most likely token".
        top_p: (top_p as f32).max(f32::MIN_POSITIVE),
        min_p: fields.number("min_p", 0.0, 0.0, 1.0)? as f32,
        seed: seed(&fields)?.unwrap_or(line),
        step: 0,
    };
    let generation = Generation {
        max_tokens: 0,
        sampling,
        stop: stop(&fields)?,
        ignore_eos: fields.bool("ignore_eos")?,
        logprobs: logprobs_wanted(&fields, &form)?,
    };
    let max_tokens = max_tokens.map(|n| usize::try_from(n).unwrap_or(usize::MAX)).or(default_max);
    Ok(Request { form, prompts, n, max_tokens, generation })
}

fn prompts(fields: &Fields<'_>, form: &Form) -> Result<Vec<Prompt>> {
    let messages = fields.get("messages");
    let prompt = fields.get("prompt");
    match (form, messages, prompt) {
        (Form::Chat { .. }, None, _) => Err(Error::request("field `messages` is missing")),
        (Form::Completion { .. }, _, None) => Err(Error::request("field `prompt` is missing")),
        (Form::Short { .. }, None, None) => Err(Error::request("field `prompt` or `messages` is missing")),
        (Form::Short { .. }, Some(_), Some(_)) => {
            Err(Error::request("fields `prompt` and `messages` exclude each other"))
        }
        (Form::Chat { .. } | Form::Short { .. }, Some(messages), _) => {
            Ok(vec![Prompt::Messages(checked_messages(messages)?)])
        }
        (_, _, Some(prompt)) => completion_prompts(prompt),
    }
}

fn checked_messages(messages: &Value) -> Result<Value> {
    let list = messages.as_array().filter(|list| !list.is_empty());
    let list =
        list.ok_or_else(|| Error::request(wrong("messages", "a list of at least one message", messages)))?;
    let mut checked = Vec::new();
    for (i, message) in list.iter().enumerate() {
        let field = format!("messages[{i}]");
        let Some(object) = message.as_object() else {
            return Err(Error::request(wrong(&field, "an object", message)));
        };
        let role = object.get("role").unwrap_or(&Value::Null);
        if !role.is_string() {
            return Err(Error::request(wrong(&format!("{field}.role"), "a string", role)));
        }
        let content = object.get("content").unwrap_or(&Value::Null);
        let text = match content {
            Value::String(text) => text.clone(),
            Value::Array(parts) => {
                let expected = "a string, or parts of type \"text\"";
                let texts = parts.iter().map(|part| match part["type"].as_str() {
                    Some("text") => part["text"].as_str(),
                    _ => None,
                });
                let texts: Option<Vec<&str>> = texts.collect();
                texts
                    .ok_or_else(|| Error::request(wrong(&format!("{field}.content"), expected, content)))?
                    .concat()
            }
            other => return Err(Error::request(wrong(&format!("{field}.content"), "a string", other))),
        };
        let mut object = object.clone();
        object.insert("content".into(), Value::String(text));
        checked.push(Value::Object(object));
    }
    Ok(Value::Array(checked))
}

fn completion_prompts(prompt: &Value) -> Result<Vec<Prompt>> {
    let bad =
        || Error::request(wrong("prompt", "a string, a list of strings, or a list of token ids", prompt));
    match prompt {
        Value::String(text) => Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list)
            if !list.is_empty() && list.len() <= MAX_CHOICES && list.iter().all(Value::is_string) =>
        {
            Ok(list.iter().filter_map(Value::as_str).map(|s| Prompt::Text(s.to_string())).collect())
        }
        Value::Array(list) => {
            let ids: Option<Vec<u32>> =
                list.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect();
            ids.filter(|ids| !ids.is_empty()).map(|ids| vec![Prompt::Tokens(ids)]).ok_or_else(bad)
        }
        _ => Err(bad()),
    }
}

/// -1 is other servers' word for "all".
fn top_k(fields: &Fields<'_>) -> Result<usize> {
    match fields.get("top_k") {
        Some(value) if value.as_i64() == Some(-1) => Ok(0),
        _ => Ok(fields.whole("top_k", 0, u64::MAX)?.map_or(0, |k| usize::try_from(k).unwrap_or(0))),
    }
}

fn seed(fields: &Fields<'_>) -> Result<Option<u64>> {
    let Some(value) = fields.get("seed") else { return Ok(None) };
    let seed = value.as_u64().or(value.as_i64().map(|n| n as u64));
    seed.map(Some).ok_or_else(|| Error::request(wrong("seed", "a whole number", value)))
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>> {
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let list = match value {
        Value::String(s) => vec![s.clone()],
        Value::Array(list) => {
            let list: Option<Vec<String>> = list.iter().map(|s| s.as_str().map(String::from)).collect();
            list.ok_or_else(|| Error::request(wrong("stop", "a string or a list of strings", value)))?
        }
        other => return Err(Error::request(wrong("stop", "a string or a list of strings", other))),
    };
    if list.iter().any(String::is_empty) || list.len() > MAX_CHOICES {
        return Err(Error::request(format!(
            "field `stop`: expected at most {MAX_CHOICES} strings, none empty"
        )));
    }
    Ok(list)
}

/// Chat: `logprobs: true` with `top_logprobs`; completions: `logprobs: n`; the short form takes both.
fn logprobs_wanted(fields: &Fields<'_>, form: &Form) -> Result<Option<usize>> {
    let top = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS as u64)?.map(|n| n as usize);
    match (form, fields.get("logprobs")) {
        (_, None | Some(Value::Bool(false))) => match (form, top) {
            (Form::Short { .. }, top) => Ok(top),
            (_, Some(1..)) => Err(Error::request("field `top_logprobs` needs `logprobs`")),
            _ => Ok(None),
        },
        (Form::Chat { .. } | Form::Short { .. }, Some(Value::Bool(true))) => Ok(Some(top.unwrap_or(0))),
        (Form::Chat { .. }, Some(other)) => Err(Error::request(wrong("logprobs", "true or false", other))),
        (_, Some(_)) => Ok(fields.whole("logprobs", 0, MAX_TOP_LOGPROBS as u64)?.map(|n| n as usize)),
    }
}
