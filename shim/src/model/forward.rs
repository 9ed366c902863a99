//! The layer loop: one step of a ragged batch through the model, over `ferroflash`'s operations.

use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::layer::{embedding, rms_norm, rms_norm_in_place, silu_mul};
use ferroflash::op::select_pages::{PageBudget, SparsePlan};
use ferroflash::{
    AttentionSpec, Batch, DType, Device, KvCache, KvCacheSpec, KvTable, Splits, Tensor, View, ViewMut,
};

use super::Model;
use crate::error::Result;

/// KV tokens between merges. A fixed split makes a token's logits independent of the batch, of the
/// chunks in which its prompt was computed, and of a preemption in between.
const SPLIT: usize = 512;

/// One step's tokens.
#[derive(Debug, Default)]
pub struct Step {
    /// New tokens, sequences side by side.
    pub tokens: Vec<u32>,
    /// Where each sequence's new tokens start; one more than sequences.
    pub qo_indptr: Vec<u32>,
    /// KV tokens of each sequence, the new ones included.
    pub seq_lens: Vec<u32>,
    /// Pages of each sequence.
    pub page_tables: Vec<Vec<u32>>,
    /// Tail of each sequence in an int4 cache.
    pub tail_slots: Vec<u32>,
    /// Rows of `tokens` whose logits are wanted.
    pub logits_rows: Vec<usize>,
    /// Pages that each KV head attends to, in a step of one new token a sequence over caches with summaries; `None`: all.
    pub page_budget: Option<PageBudget>,
}

/// One step's attention.
enum Attention {
    Dense(AttentionPlan),
    Sparse(SparsePlan),
}

/// The KV cache of all layers.
#[derive(Debug)]
pub struct Caches {
    layers: Vec<KvCache>,
    spec: KvCacheSpec,
}

impl Caches {
    /// Allocates a page pool per layer.
    pub fn new(device: &Device, num_layers: usize, spec: KvCacheSpec) -> Result<Self> {
        let layers =
            (0..num_layers).map(|_| KvCache::new(device, spec)).collect::<ferroflash::Result<_>>()?;
        Ok(Caches { layers, spec })
    }

    /// The sizes of each layer's pool.
    pub fn spec(&self) -> &KvCacheSpec {
        &self.spec
    }
}

/// Activations, made for the largest step.
#[derive(Debug)]
pub struct Buffers {
    max_tokens: usize,
    residual: Tensor,
    hidden: Tensor,
    qkv: Tensor,
    attention: Tensor,
    gate_up: Tensor,
    gated: Tensor,
    selected: Tensor,
    logits: Tensor,
}

impl Buffers {
    /// For steps of up to `max_tokens` tokens and `max_logits` rows of logits.
    pub fn new(model: &Model, max_tokens: usize, max_logits: usize) -> Result<Self> {
        let c = &model.config;
        let zeros = |rows: usize, cols: usize| Tensor::zeros(&model.device, DType::F32, &[rows, cols]);
        let heads = c.num_q_heads + 2 * c.num_kv_heads;
        Ok(Buffers {
            max_tokens,
            residual: zeros(max_tokens, c.hidden_size)?,
            hidden: zeros(max_tokens, c.hidden_size)?,
            qkv: zeros(max_tokens, heads * c.head_dim)?,
            attention: zeros(max_tokens, c.num_q_heads * c.head_dim)?,
            gate_up: zeros(max_tokens, 2 * c.intermediate_size)?,
            gated: zeros(max_tokens, c.intermediate_size)?,
            selected: zeros(max_logits, c.hidden_size)?,
            logits: zeros(max_logits, c.vocab_size)?,
        })
    }

    /// Logits of the last step's wanted rows, `[rows, vocab]`.
    pub fn logits(&self, rows: usize) -> Result<View<'_>> {
        Ok(self.logits.view().narrow(0, 0, rows)?)
    }

    /// One row of them, where they are in host memory.
    pub fn logits_row(&self, row: usize) -> Option<&[f32]> {
        let vocab = self.logits.shape()[1];
        self.logits.as_slice::<f32>().map(|all| &all[row * vocab..][..vocab])
    }
}

fn rows(tensor: &Tensor, n: usize) -> Result<View<'_>> {
    Ok(tensor.view().narrow(0, 0, n)?)
}

fn rows_mut(tensor: &mut Tensor, n: usize) -> Result<ViewMut<'_>> {
    Ok(tensor.view_mut().narrow(0, 0, n)?)
}

impl Model {
    /// Appends the step's tokens to the caches and leaves the wanted logits in `buffers`.
    pub fn forward(&self, step: &Step, caches: &mut Caches, buffers: &mut Buffers) -> Result<()> {
        let (config, device) = (&self.config, &self.device);
        let tokens = step.tokens.len();
        if tokens > buffers.max_tokens {
            let message = format!("a step of {tokens} tokens in buffers for {}", buffers.max_tokens);
            return Err(crate::error::Error::Request(message));
        }
        let mut spec = AttentionSpec::new(config.num_q_heads, config.num_kv_heads, config.head_dim).causal();
        spec.window = config.window;
        spec.quantized_kv = caches.spec.format.is_quantized();
        let max_blocks = step.page_tables.iter().map(Vec::len).max().unwrap_or(0);
        let mut block_table = vec![0; max_blocks * step.page_tables.len()];
        for (row, pages) in block_table.chunks_mut(max_blocks.max(1)).zip(&step.page_tables) {
            row[..pages.len()].copy_from_slice(pages);
        }
        let table = KvTable::Block {
            page_size: caches.spec.page_size,
            block_table: &block_table,
            max_blocks,
            seq_lens: &step.seq_lens,
        };
        let batch = Batch { tail_slots: &step.tail_slots, ..Batch::new(&step.qo_indptr, table) };
        let append = AppendPlan::from_batch(device, &spec, Some(&config.rope), &batch)?;
        let splits = Splits::Fixed(SPLIT);
        let mut attention = match step.page_budget {
            None => Attention::Dense(AttentionPlan::new(device, &spec, &batch, splits)?),
            Some(budget) => Attention::Sparse(SparsePlan::new(device, &spec, &batch, budget, splits)?),
        };

        let weights = &self.weights;
        embedding(device, weights.embedding.view(), &step.tokens, rows_mut(&mut buffers.residual, tokens)?)?;
        let eps = config.rms_norm_eps;
        let last = weights.layers.len();
        for (i, layer) in weights.layers.iter().enumerate() {
            if i == 0 {
                let x = rows(&buffers.residual, tokens)?;
                rms_norm(
                    device,
                    x,
                    None,
                    layer.attention_norm.view(),
                    eps,
                    rows_mut(&mut buffers.hidden, tokens)?,
                )?;
            }
            layer.qkv.forward(tokens, &buffers.hidden, &mut buffers.qkv)?;
            self.attend(i, tokens, &append, &mut attention, caches, buffers)?;
            layer.attention_out.forward(tokens, &buffers.attention, &mut buffers.hidden)?;
            self.add_norm(tokens, &layer.mlp_norm, buffers)?;
            layer.gate_up.forward(tokens, &buffers.hidden, &mut buffers.gate_up)?;
            silu_mul(device, rows(&buffers.gate_up, tokens)?, rows_mut(&mut buffers.gated, tokens)?)?;
            layer.down.forward(tokens, &buffers.gated, &mut buffers.hidden)?;
            let next = if i + 1 < last { &weights.layers[i + 1].attention_norm } else { &weights.final_norm };
            self.add_norm(tokens, next, buffers)?;
        }
        // Only the wanted rows go through the largest matrix.
        let ids: Vec<u32> = step.logits_rows.iter().map(|&row| row as u32).collect();
        let hidden = rows(&buffers.hidden, tokens)?;
        embedding(device, hidden, &ids, rows_mut(&mut buffers.selected, ids.len())?)?;
        weights.output.forward(ids.len(), &buffers.selected, &mut buffers.logits)
    }

    /// Norms and rotates Q and K, appends K and V, attends.
    fn attend(
        &self,
        layer: usize,
        tokens: usize,
        append: &AppendPlan,
        attention: &mut Attention,
        caches: &mut Caches,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (config, device) = (&self.config, &self.device);
        let (q_heads, kv_heads, dim) = (config.num_q_heads, config.num_kv_heads, config.head_dim);
        let heads = q_heads + 2 * kv_heads;
        let cache = &mut caches.layers[layer];
        if let Some((q_norm, k_norm)) = &self.weights.layers[layer].qk_norm {
            let (q, kv) = buffers.qkv.reshaped_mut(&[tokens, heads, dim])?.split(1, q_heads)?;
            rms_norm_in_place(device, q, None, q_norm.view(), config.rms_norm_eps)?;
            rms_norm_in_place(device, kv.narrow(1, 0, kv_heads)?, None, k_norm.view(), config.rms_norm_eps)?;
        }
        let (mut q, kv) = buffers.qkv.reshaped_mut(&[tokens, heads, dim])?.split(1, q_heads)?;
        let kv = kv.as_view();
        let (k, v) = (kv.narrow(1, 0, kv_heads)?, kv.narrow(1, kv_heads, kv_heads)?);
        append.run(Some(q.reborrow()), k, v, cache.view_mut())?;
        let out = buffers.attention.reshaped_mut(&[tokens, q_heads, dim])?;
        match attention {
            Attention::Dense(plan) => plan.run(q.as_view(), cache.view(), out, None)?,
            Attention::Sparse(plan) => {
                if let Some(summaries) = cache.summaries() {
                    plan.select(q.as_view(), summaries)?;
                }
                plan.run(q.as_view(), cache.view(), out, None)?;
            }
        }
        Ok(())
    }

    /// `residual += hidden; hidden = norm(residual)`.
    fn add_norm(&self, tokens: usize, weight: &Tensor, buffers: &mut Buffers) -> Result<()> {
        let hidden = rows_mut(&mut buffers.hidden, tokens)?;
        let residual = rows_mut(&mut buffers.residual, tokens)?;
        Ok(rms_norm_in_place(&self.device, hidden, Some(residual), weight.view(), self.config.rms_norm_eps)?)
    }

    /// The device that the model is on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }
}
