//! A model's weights, checked against its config and packed.

use ferroflash::{DType, Device, Tensor};
use half::{bf16, f16};

use super::config::{Architecture, Config};
use super::linear::Matrix;
use super::quant::{Quant, RowReader};
use super::source::TensorSource;
use crate::error::{Error, Result};

/// What a format calls its tensors; `{i}` is the layer.
#[derive(Debug)]
pub struct Names {
    embedding: &'static str,
    final_norm: &'static str,
    output: &'static str,
    layer: &'static str,
    attention_norm: &'static str,
    qkv: [&'static str; 3],
    q_norm: &'static str,
    k_norm: &'static str,
    attention_out: &'static str,
    mlp_norm: &'static str,
    gate_up: [&'static str; 2],
    down: &'static str,
}

/// Hugging Face.
pub const HF_NAMES: Names = Names {
    embedding: "model.embed_tokens",
    final_norm: "model.norm",
    output: "lm_head",
    layer: "model.layers.",
    attention_norm: "input_layernorm",
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    attention_out: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm",
    gate_up: ["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
};

/// ggml.
pub const GGUF_NAMES: Names = Names {
    embedding: "token_embd",
    final_norm: "output_norm",
    output: "output",
    layer: "blk.",
    attention_norm: "attn_norm",
    qkv: ["attn_q", "attn_k", "attn_v"],
    q_norm: "attn_q_norm",
    k_norm: "attn_k_norm",
    attention_out: "attn_output",
    mlp_norm: "ffn_norm",
    gate_up: ["ffn_gate", "ffn_up"],
    down: "ffn_down",
};

/// One or more matrices over the same input, their outputs side by side.
#[derive(Debug)]
pub(crate) struct Linear {
    parts: Vec<Matrix>,
}

impl Linear {
    pub(crate) fn outputs(&self) -> usize {
        self.parts.iter().map(Matrix::outputs).sum()
    }

    fn bytes(&self) -> usize {
        self.parts.iter().map(Matrix::bytes).sum()
    }

    /// `out[..rows] = x[..rows] W^T + bias`; `x` and `out` hold at least `rows` rows.
    pub(crate) fn forward(&self, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let elsewhere = || Error::model("linear layers run on the CPU only, in f32");
        let x = x.as_slice::<f32>().ok_or_else(elsewhere)?;
        let out = out.as_mut_slice::<f32>().ok_or_else(elsewhere)?;
        let width = self.outputs();
        let mut column = 0;
        for part in &self.parts {
            part.forward(&x[..rows * part.inputs()], out, width, column);
            column += part.outputs();
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Tensor,
    pub(crate) qkv: Linear,
    /// Norms of Q and K, where the architecture has them.
    pub(crate) qk_norm: Option<(Tensor, Tensor)>,
    pub(crate) attention_out: Linear,
    pub(crate) mlp_norm: Tensor,
    pub(crate) gate_up: Linear,
    pub(crate) down: Linear,
}

#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Tensor,
    pub(crate) output: Linear,
}

struct Loader<'a, S> {
    device: &'a Device,
    source: &'a S,
}

impl Weights {
    /// A function that loads the weights of a config; curried so that the config is read first.
    pub(crate) fn load<'a, S: TensorSource>(
        device: &'a Device,
        source: &'a S,
        names: &'a Names,
    ) -> impl FnOnce(&Config) -> Result<Weights> + 'a {
        move |config| {
            let loader = Loader { device, source };
            let (hidden, vocab) = (config.hidden_size, config.vocab_size);
            let output = if config.tie_word_embeddings { names.embedding } else { names.output };
            Ok(Weights {
                embedding: loader.table(names.embedding, vocab, hidden)?,
                layers: (0..config.num_layers)
                    .map(|i| loader.layer(config, names, i))
                    .collect::<Result<_>>()?,
                final_norm: loader.vector(names.final_norm, hidden)?,
                output: loader.linear(&[(output.to_string(), vocab)], hidden)?,
            })
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let layers: usize = self
            .layers
            .iter()
            .map(|l| l.qkv.bytes() + l.attention_out.bytes() + l.gate_up.bytes() + l.down.bytes())
            .sum();
        layers + self.output.bytes() + self.embedding.numel() * self.embedding.dtype().size()
    }
}

impl<S: TensorSource> Loader<'_, S> {
    fn layer(&self, config: &Config, names: &Names, i: usize) -> Result<Layer> {
        let name = |part: &str| format!("{}{i}.{part}", names.layer);
        let (hidden, mlp, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q, kv) = (config.num_q_heads * dim, config.num_kv_heads * dim);
        let [q_name, k_name, v_name] = names.qkv.map(name);
        let [gate, up] = names.gate_up.map(name);
        let qk_norm = match config.architecture {
            Architecture::Qwen3 => {
                Some((self.vector(&name(names.q_norm), dim)?, self.vector(&name(names.k_norm), dim)?))
            }
            _ => None,
        };
        Ok(Layer {
            attention_norm: self.vector(&name(names.attention_norm), hidden)?,
            qkv: self.linear(&[(q_name, q), (k_name, kv), (v_name, kv)], hidden)?,
            qk_norm,
            attention_out: self.linear(&[(name(names.attention_out), hidden)], q)?,
            mlp_norm: self.vector(&name(names.mlp_norm), hidden)?,
            gate_up: self.linear(&[(gate, mlp), (up, mlp)], hidden)?,
            down: self.linear(&[(name(names.down), hidden)], mlp)?,
        })
    }

    fn rows(&self, name: &str, shape: &[usize]) -> Result<RowReader<'_>> {
        let found = self.source.tensor(name)?;
        let (rows, got) = found.ok_or_else(|| Error::model(format!("tensor {name:?} is missing")))?;
        if got != shape {
            return Err(Error::model(format!("tensor {name:?}: expected shape {shape:?}, got {got:?}")));
        }
        Ok(rows)
    }

    fn linear(&self, parts: &[(String, usize)], inputs: usize) -> Result<Linear> {
        let pack = |(name, outputs): &(String, usize)| {
            let rows = self.rows(&format!("{name}.weight"), &[*outputs, inputs])?;
            let bias = match self.source.tensor(&format!("{name}.bias"))? {
                None => None,
                Some(_) => Some(self.floats(&format!("{name}.bias"), *outputs)?),
            };
            Ok(Matrix::pack(&rows, bias))
        };
        Ok(Linear { parts: parts.iter().map(pack).collect::<Result<_>>()? })
    }

    fn floats(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let rows = self.rows(name, &[len])?;
        let mut data = vec![0f32; len];
        rows.read(0, &mut data);
        Ok(data)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        let data = self.floats(&format!("{name}.weight"), len)?;
        Ok(Tensor::from_slice(self.device, &data, &[len])?)
    }

    /// The embedding table, in 16 bits where the file has it so.
    fn table(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let reader = self.rows(&format!("{name}.weight"), &[rows, cols])?;
        let dtype = match reader.quant() {
            Quant::F16 => DType::F16,
            Quant::BF16 => DType::BF16,
            _ => DType::F32,
        };
        let mut table = Tensor::zeros(self.device, dtype, &[rows, cols])?;
        let mut row = vec![0f32; cols];
        for i in 0..rows {
            reader.read(i, &mut row);
            let at = i * cols..(i + 1) * cols;
            if let Some(to) = table.as_mut_slice::<f32>() {
                to[at].copy_from_slice(&row);
            } else if let Some(to) = table.as_mut_slice::<f16>() {
                to[at].iter_mut().zip(&row).for_each(|(to, &x)| *to = f16::from_f32(x));
            } else if let Some(to) = table.as_mut_slice::<bf16>() {
                to[at].iter_mut().zip(&row).for_each(|(to, &x)| *to = bf16::from_f32(x));
            }
        }
        Ok(table)
    }
}
