//! What a model is: read from `config.json` or GGUF metadata into one form.

use ferroflash::{RopeScaling, RopeSpec, RopeStyle};
use serde_json::Value;

use super::gguf::{self, Gguf};
use super::source::TensorSource;
use crate::error::{Error, Result};

/// The architectures that the layer loop knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen 2 and 2.5: biases on Q, K and V.
    Qwen2,
    /// Qwen 3: norms on Q and K.
    Qwen3,
}

impl Architecture {
    fn from_name(name: &str) -> Result<Self> {
        Ok(match name {
            "llama" => Architecture::Llama,
            "mistral" => Architecture::Mistral,
            "qwen2" => Architecture::Qwen2,
            "qwen3" => Architecture::Qwen3,
            _ => {
                return Err(Error::model(format!(
                    "architecture {name:?} is not supported; llama, mistral, qwen2 and qwen3 are"
                )));
            }
        })
    }
}

/// Sizes and constants of a model.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // the names are those of config.json
pub struct Config {
    pub architecture: Architecture,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub rope: RopeSpec,
    pub max_position: usize,
    pub window: Option<u32>,
    pub tie_word_embeddings: bool,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

impl Config {
    /// Refuses sizes that no kernel takes, or that would not fit the word of a size.
    fn checked(self) -> Result<Self> {
        let bounded = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 17),
            ("intermediate_size", self.intermediate_size, 1 << 19),
            ("num_hidden_layers", self.num_layers, 1 << 10),
            ("num_attention_heads", self.num_q_heads, 1 << 12),
            ("num_key_value_heads", self.num_kv_heads, 1 << 12),
            ("max_position_embeddings", self.max_position, 1 << 28),
        ];
        for (name, value, limit) in bounded {
            if value == 0 || value > limit {
                return Err(Error::model(format!("{name} is {value}; 1 to {limit} is possible")));
            }
        }
        if !self.num_q_heads.is_multiple_of(self.num_kv_heads) {
            let (q, kv) = (self.num_q_heads, self.num_kv_heads);
            return Err(Error::model(format!("{q} attention heads are no multiple of {kv} key-value heads")));
        }
        if self.head_dim == 0 || self.head_dim > 256 || !self.head_dim.is_multiple_of(8) {
            let d = self.head_dim;
            return Err(Error::model(format!("head_dim is {d}; multiples of 8 up to 256 are supported")));
        }
        self.rope.frequencies()?;
        Ok(self)
    }

    /// From a Hugging Face `config.json`, and `generation_config.json` where there is one.
    pub fn from_hf(config: &Value, generation: Option<&Value>) -> Result<Self> {
        let name = config["model_type"].as_str().ok_or_else(|| Error::model("no string `model_type`"))?;
        let architecture = Architecture::from_name(name)?;
        if let Some(act) = config["hidden_act"].as_str()
            && act != "silu"
        {
            return Err(Error::model(format!("hidden_act {act:?} is not supported; \"silu\" is")));
        }
        if !config["quantization_config"].is_null() {
            return Err(Error::model(
                "quantization_config: quantised safetensors are not supported; GGUF is",
            ));
        }
        let required = |key: &str| {
            let n = config[key].as_u64().and_then(|n| usize::try_from(n).ok());
            n.ok_or_else(|| Error::model(format!("no whole number `{key}`")))
        };
        let optional = |key: &str| config[key].as_u64().map(|n| n as usize);
        let number = |key: &str, default: f64| config[key].as_f64().unwrap_or(default);
        let (hidden_size, num_q_heads) = (required("hidden_size")?, required("num_attention_heads")?);
        let head_dim = optional("head_dim").unwrap_or(hidden_size / num_q_heads.max(1));
        let max_position = required("max_position_embeddings")?;
        let uses_window = match architecture {
            Architecture::Qwen2 | Architecture::Qwen3 => config["use_sliding_window"].as_bool() == Some(true),
            _ => true,
        };
        let per_layer = config["max_window_layers"].as_u64().is_some_and(|n| n > 0);
        if uses_window && per_layer && matches!(architecture, Architecture::Qwen2 | Architecture::Qwen3) {
            return Err(Error::model("use_sliding_window with max_window_layers is not supported"));
        }
        let window = config["sliding_window"].as_u64().filter(|_| uses_window).map(|w| w as u32);
        // Newer files keep theta and scaling together.
        let parameters = &config["rope_parameters"];
        let scaling = if parameters.is_object() { parameters } else { &config["rope_scaling"] };
        let theta = parameters["rope_theta"].as_f64().unwrap_or(number("rope_theta", 10000.0));
        let partial = number("partial_rotary_factor", 1.0);
        let rope = RopeSpec {
            rotary_dim: (head_dim as f64 * partial) as usize / 2 * 2,
            theta,
            style: RopeStyle::HalfRotated,
            scaling: hf_scaling(scaling, max_position)?,
        };
        let mut eos = Vec::new();
        for source in [Some(config), generation].into_iter().flatten() {
            match &source["eos_token_id"] {
                Value::Array(ids) => eos.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32)),
                id => eos.extend(id.as_u64().map(|id| id as u32)),
            }
        }
        eos.sort_unstable();
        eos.dedup();
        Config {
            architecture,
            vocab_size: required("vocab_size")?,
            hidden_size,
            intermediate_size: required("intermediate_size")?,
            num_layers: required("num_hidden_layers")?,
            num_q_heads,
            num_kv_heads: optional("num_key_value_heads").unwrap_or(num_q_heads),
            head_dim,
            rms_norm_eps: number("rms_norm_eps", 1e-6) as f32,
            rope,
            max_position,
            window,
            tie_word_embeddings: config["tie_word_embeddings"].as_bool().unwrap_or(false),
            eos,
        }
        .checked()
    }

    /// From GGUF metadata.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let missing = |key: &str| Error::model(format!("metadata {key:?} is missing or of the wrong type"));
        let name =
            file.str("general.architecture").ok_or_else(|| missing("general.architecture"))?.to_string();
        let architecture = Architecture::from_name(&name)?;
        let key = |suffix: &str| format!("{name}.{suffix}");
        let required = |suffix: &str| file.uint(&key(suffix)).ok_or_else(|| missing(&key(suffix)));
        let (hidden_size, num_q_heads) = (required("embedding_length")?, required("attention.head_count")?);
        let head_dim = file.uint(&key("attention.key_length")).unwrap_or(hidden_size / num_q_heads.max(1));
        let rotary_dim = file.uint(&key("rope.dimension_count")).unwrap_or(head_dim);
        let scaling = gguf_scaling(file, &name)?;
        // ggml keeps Llama's pairs side by side: its files have Q and K rows in that order.
        let style = match architecture {
            Architecture::Llama | Architecture::Mistral => RopeStyle::Interleaved,
            Architecture::Qwen2 | Architecture::Qwen3 => RopeStyle::HalfRotated,
        };
        let theta = file.number(&key("rope.freq_base")).unwrap_or(10000.0);
        let vocab_size = match (file.uint(&key("vocab_size")), file.get("tokenizer.ggml.tokens")) {
            (Some(n), _) => n,
            (None, Some(gguf::Value::Strs(tokens))) => tokens.len(),
            _ => return Err(missing("tokenizer.ggml.tokens")),
        };
        let mut eos = Vec::new();
        for id in ["eos_token_id", "eot_token_id"] {
            eos.extend(file.uint(&format!("tokenizer.ggml.{id}")).map(|id| id as u32));
        }
        eos.dedup();
        Config {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_layers: required("block_count")?,
            num_q_heads,
            num_kv_heads: file.uint(&key("attention.head_count_kv")).unwrap_or(num_q_heads),
            head_dim,
            rms_norm_eps: file
                .number(&key("attention.layer_norm_rms_epsilon"))
                .ok_or_else(|| missing(&key("attention.layer_norm_rms_epsilon")))?
                as f32,
            rope: RopeSpec { rotary_dim, theta, style, scaling },
            max_position: required("context_length")?,
            window: file.uint(&key("attention.sliding_window")).filter(|&w| w > 0).map(|w| w as u32),
            tie_word_embeddings: file.tensor("output.weight")?.is_none(),
            eos,
        }
        .checked()
    }
}

fn hf_scaling(scaling: &Value, max_position: usize) -> Result<RopeScaling> {
    if scaling.is_null() {
        return Ok(RopeScaling::None);
    }
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("default");
    let number = |key: &str| {
        scaling[key]
            .as_f64()
            .ok_or_else(|| Error::model(format!("rope scaling {kind:?} has no number `{key}`")))
    };
    let original = || {
        let n = scaling["original_max_position_embeddings"].as_u64();
        n.map_or(max_position, |n| n as usize)
    };
    let list = |key: &str| -> Result<Vec<f64>> {
        let list = scaling[key].as_array().map(|a| a.iter().filter_map(Value::as_f64).collect());
        list.ok_or_else(|| Error::model(format!("rope scaling {kind:?} has no list `{key}`")))
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: number("factor")? },
        "ntk" => RopeScaling::Ntk { factor: number("factor")? },
        "yarn" => RopeScaling::Yarn {
            factor: number("factor")?,
            original_max_position: original(),
            beta_fast: scaling["beta_fast"].as_f64().unwrap_or(32.0),
            beta_slow: scaling["beta_slow"].as_f64().unwrap_or(1.0),
            attention_factor: scaling["attention_factor"].as_f64(),
        },
        "llama3" => RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position: original(),
        },
        "longrope" | "su" => RopeScaling::LongRope {
            short_factor: list("short_factor")?,
            long_factor: list("long_factor")?,
            original_max_position: original(),
            max_position,
            attention_factor: scaling["attention_factor"].as_f64(),
        },
        _ => {
            return Err(Error::model(format!(
                "rope scaling {kind:?} is not supported; default, linear, ntk, yarn, llama3 and longrope are"
            )));
        }
    })
}

fn gguf_scaling(file: &Gguf, name: &str) -> Result<RopeScaling> {
    // Llama 3's scaling comes as a tensor of divisors.
    if let Some((rows, _)) = file.tensor("rope_freqs.weight")? {
        let mut divisors = vec![0f32; rows.row_len()];
        if rows.num_rows() == 1 {
            rows.read(0, &mut divisors);
        }
        let divisors: Vec<f64> = divisors.into_iter().map(f64::from).collect();
        return Ok(RopeScaling::LongRope {
            short_factor: divisors.clone(),
            long_factor: divisors,
            original_max_position: 2,
            max_position: 2,
            attention_factor: Some(1.0),
        });
    }
    let kind = file.str(&format!("{name}.rope.scaling.type")).unwrap_or("none");
    let factor = file.number(&format!("{name}.rope.scaling.factor")).unwrap_or(1.0);
    let original = file.uint(&format!("{name}.rope.scaling.original_context_length"));
    let context = file.uint(&format!("{name}.context_length")).unwrap_or(1);
    Ok(match kind {
        "none" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "yarn" => RopeScaling::Yarn {
            factor,
            original_max_position: original.unwrap_or(context),
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
        },
        _ => {
            return Err(Error::model(format!(
                "rope scaling {kind:?} is not supported; none, linear and yarn are"
            )));
        }
    })
}
