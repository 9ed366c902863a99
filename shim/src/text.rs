//! Text to tokens and back: tokenizers from `tokenizer.json` or GGUF metadata, and chat templates.

use std::collections::HashMap;

use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::{Prepend, Replace as ReplaceNormalizer, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
};

use crate::error::{Error, Result};
use crate::model::gguf::{self, Gguf};
use crate::model::source::Folder;

/// A tokenizer with its chat template.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    /// A token put before completion prompts, where the tokenizer does not do so itself.
    bos: Option<u32>,
    byte_level: bool,
    /// Bytes of the longest token.
    longest_token: usize,
    chat: Option<Chat>,
}

#[derive(Debug)]
struct Chat {
    template: String,
    bos_token: String,
    eos_token: String,
}

/// The characters that stand for bytes in byte-level vocabularies (GPT-2), inverted.
fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x143 => {
            let others = (0u8..=255).filter(|b| !matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff));
            others.into_iter().nth(code as usize - 0x100)
        }
        _ => None,
    }
}

impl Text {
    /// From `tokenizer.json` and `tokenizer_config.json`.
    pub fn from_folder(folder: &Folder) -> Result<Self> {
        let file = folder.file("tokenizer.json")?;
        let bytes = file.ok_or_else(|| Error::model("no tokenizer.json in the folder"))?;
        let tokenizer =
            Tokenizer::from_bytes(&*bytes).map_err(|e| Error::model(format!("tokenizer.json: {e}")))?;
        let config = folder.json("tokenizer_config.json")?.unwrap_or(Value::Null);
        let template = match folder.file("chat_template.jinja")? {
            Some(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            None => match &config["chat_template"] {
                Value::String(template) => Some(template.clone()),
                Value::Array(named) => {
                    let default = named.iter().find(|t| t["name"] == "default");
                    default.and_then(|t| t["template"].as_str()).map(String::from)
                }
                _ => None,
            },
        };
        let token = |key: &str| {
            let value = &config[key];
            value.as_str().or(value["content"].as_str()).unwrap_or_default().to_string()
        };
        let chat = template.map(|template| Chat {
            template,
            bos_token: token("bos_token"),
            eos_token: token("eos_token"),
        });
        Self::new(tokenizer, None, chat)
    }

    /// From GGUF metadata: byte-level BPE (`gpt2`) or SentencePiece (`llama`).
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        const PREFIX: &str = "tokenizer.ggml";
        let missing =
            |key: &str| Error::model(format!("metadata {PREFIX}.{key} is missing or of the wrong type"));
        let kind = file.str(&format!("{PREFIX}.model")).ok_or_else(|| missing("model"))?;
        let Some(gguf::Value::Strs(tokens)) = file.get(&format!("{PREFIX}.tokens")) else {
            return Err(missing("tokens"));
        };
        let mut tokenizer = match kind {
            "gpt2" => byte_level_bpe(file, tokens)?,
            "llama" => sentence_piece(file, tokens)?,
            other => {
                return Err(Error::model(format!(
                    "tokenizer {other:?} is not supported; gpt2 and llama are"
                )));
            }
        };
        if let Some(gguf::Value::Ints(types)) = file.get(&format!("{PREFIX}.token_type")) {
            // ggml's types: 3 control, 4 user defined.
            let special = |kind: i64| tokens.iter().zip(types).filter(move |t| *t.1 == kind);
            let control: Vec<AddedToken> = special(3).map(|t| AddedToken::from(t.0.clone(), true)).collect();
            let user: Vec<AddedToken> =
                special(4).map(|t| AddedToken::from(t.0.clone(), false).normalized(false)).collect();
            let failed = |e| Error::model(format!("special tokens: {e}"));
            tokenizer.add_special_tokens(control).map_err(failed)?;
            tokenizer.add_tokens(user).map_err(failed)?;
        }
        let id = |key: &str| file.uint(&format!("{PREFIX}.{key}")).map(|id| id as u32);
        let token = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).cloned().unwrap_or_default();
        let adds_bos = file.uint(&format!("{PREFIX}.add_bos_token")).map_or(kind == "llama", |b| b != 0);
        let bos = id("bos_token_id").filter(|&id| adds_bos && (id as usize) < tokens.len());
        let chat = file.str("tokenizer.chat_template").map(|template| Chat {
            template: template.to_string(),
            bos_token: token(id("bos_token_id")),
            eos_token: token(id("eos_token_id")),
        });
        Self::new(tokenizer, bos, chat)
    }

    fn new(tokenizer: Tokenizer, bos: Option<u32>, chat: Option<Chat>) -> Result<Self> {
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let longest_token = tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(1);
        Ok(Text { tokenizer, bos, byte_level, longest_token, chat })
    }

    /// Tokens of the vocabulary, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Bytes of text that can at most become `tokens` tokens. Normalisers may shrink text: by no more than
    /// the factor of 4 that is allowed for here.
    pub fn max_bytes(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.longest_token).saturating_mul(4)
    }

    /// Tokens of a completion prompt. Special tokens in the text are parsed as special.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode_fast(text, true).map_err(|e| Error::request(format!("prompt: {e}")))?;
        Ok(self.bos.into_iter().chain(encoding.get_ids().iter().copied()).collect())
    }

    /// Tokens of a chat, by the model's template, up to where the assistant begins.
    pub fn encode_chat(&self, messages: &Value) -> Result<Vec<u32>> {
        let chat = self.chat.as_ref().ok_or_else(|| {
            Error::request(
                "the model has no chat template; send a `prompt` to /v1/completions instead of `messages`",
            )
        })?;
        let text = chat.render(messages).map_err(|e| Error::request(format!("chat template: {e}")))?;
        // The template writes the special tokens itself.
        let encoding =
            self.tokenizer.encode_fast(text, false).map_err(|e| Error::request(format!("messages: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// One token as text and as bytes; the bytes of a character may be spread over tokens.
    pub fn token(&self, id: u32) -> (String, Vec<u8>) {
        let Some(piece) = self.tokenizer.id_to_token(id) else { return (String::new(), Vec::new()) };
        let bytes: Vec<u8> = if self.byte_level {
            match piece.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => bytes,
                None => piece.into_bytes(),
            }
        } else {
            let hex = piece.strip_prefix("<0x").and_then(|p| p.strip_suffix('>'));
            match hex.and_then(|h| u8::from_str_radix(h, 16).ok()) {
                Some(byte) => vec![byte],
                None => piece.replace('▁', " ").into_bytes(),
            }
        };
        (String::from_utf8_lossy(&bytes).into_owned(), bytes)
    }
}

impl Chat {
    fn render(&self, messages: &Value) -> std::result::Result<String, minijinja::Error> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        // A batch's answers must not depend on the day: templates that ask get the epoch.
        env.add_function("strftime_now", |_format: String| "1970-01-01".to_string());
        env.set_fuel(Some(10_000_000));
        let template = env.template_from_str(&self.template)?;
        template.render(context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        })
    }
}

fn vocab_of(tokens: &[String]) -> tokenizers::models::bpe::Vocab {
    tokens.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect()
}

fn byte_level_bpe(file: &Gguf, tokens: &[String]) -> Result<Tokenizer> {
    let Some(gguf::Value::Strs(lines)) = file.get("tokenizer.ggml.merges") else {
        return Err(Error::model("metadata tokenizer.ggml.merges is missing or of the wrong type"));
    };
    let merges = lines
        .iter()
        .map(|line| line.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())))
        .collect::<Option<Vec<_>>>()
        .ok_or_else(|| Error::model("tokenizer.ggml.merges: an entry without a space"))?;
    // How ggml names the ways in which text is cut before merging.
    let pre = file.str("tokenizer.ggml.pre").unwrap_or("default");
    const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|";
    const REST: &str = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let plain: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
    let split = |numbers: &str| -> Result<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(format!("{WORDS}{numbers}{REST}"));
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
        let split = split.map_err(|e| Error::model(format!("pre-tokenizer: {e}")))?;
        Ok(PreSequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
    };
    let (pre_tokenizer, whole_words, normalizer) = match pre {
        "default" | "gpt-2" | "gpt2" => (plain, false, None),
        "smollm" => (PreSequence::new(vec![Digits::new(true).into(), plain]).into(), false, None),
        "llama-bpe" | "llama3" | "llama-v3" => (split(r"\p{N}{1,3}")?, true, None),
        "qwen2" => (split(r"\p{N}")?, false, Some(NormalizerWrapper::from(NFC))),
        other => {
            return Err(Error::model(format!(
                "pre-tokenizer {other:?} is not supported; default, gpt-2, smollm, llama-bpe and qwen2 are"
            )));
        }
    };
    let model = BPE::builder().vocab_and_merges(vocab_of(tokens), merges).ignore_merges(whole_words).build();
    let mut tokenizer = Tokenizer::new(model.map_err(|e| Error::model(format!("tokenizer: {e}")))?);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
    tokenizer.with_normalizer(normalizer).map_err(|e| Error::model(format!("tokenizer: {e}")))?;
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// SentencePiece BPE: the file has scores, and a merge's rank is that of the token it makes.
fn sentence_piece(file: &Gguf, tokens: &[String]) -> Result<Tokenizer> {
    let Some(gguf::Value::Floats(scores)) = file.get("tokenizer.ggml.scores") else {
        return Err(Error::model("metadata tokenizer.ggml.scores is missing or of the wrong type"));
    };
    if scores.len() != tokens.len() {
        return Err(Error::model(format!("{} tokens but {} scores", tokens.len(), scores.len())));
    }
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, t)| (t.as_str(), id)).collect();
    let mut merges: Vec<(f64, usize, usize, (String, String))> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        for (cut, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(cut);
            if let (Some(&left), Some(&right)) = (ids.get(a), ids.get(b)) {
                merges.push((-scores[id], left, right, (a.to_string(), b.to_string())));
            }
        }
    }
    merges.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges = merges.into_iter().map(|m| m.3).collect();
    let unknown = file.uint("tokenizer.ggml.unknown_token_id").and_then(|id| tokens.get(id)).cloned();
    let mut model =
        BPE::builder().vocab_and_merges(vocab_of(tokens), merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = unknown {
        model = model.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(|e| Error::model(format!("tokenizer: {e}")))?);
    let failed = |e| Error::model(format!("tokenizer: {e}"));
    let spaces = ReplaceNormalizer::new(" ", "▁").map_err(failed)?;
    let adds_space = file.uint("tokenizer.ggml.add_space_prefix").is_none_or(|b| b != 0);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if adds_space {
        normalizers.push(Prepend::new("▁".into()).into());
    }
    normalizers.push(spaces.into());
    tokenizer.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(failed)?;
    let mut decoders: Vec<DecoderWrapper> = vec![
        tokenizers::normalizers::replace::Replace::new("▁", " ").map_err(failed)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if adds_space {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(tokenizer)
}
