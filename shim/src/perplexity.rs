//! What a KV cache costs in accuracy: how well a model predicts a text with it.

use ferroflash::op::select_pages::PageBudget;
use ferroflash::{KvCacheSpec, KvFormat};

use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::forward::{Buffers, Caches, Step};

/// A cache, and how it is used.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Element format.
    pub format: KvFormat,
    /// Tokens per page.
    pub page_size: usize,
    /// Tokens of a step.
    pub chunk: usize,
    /// Pages that each KV head attends to in steps of one token, and the token from which on these are taken.
    pub sparse: Option<(PageBudget, usize)>,
}

/// For each token of a text but the first, `-ln` of the probability that the model gave it.
///
/// # Errors
/// What the model's steps give; [`Error::Request`] for a chunk of 0.
pub fn losses(model: &Model, tokens: &[u32], setting: Setting) -> Result<Vec<f64>> {
    if setting.chunk == 0 {
        return Err(Error::Request("chunk: expected at least 1 token, got 0".into()));
    }
    let config = &model.config;
    let spec = KvCacheSpec {
        num_pages: tokens.len().div_ceil(setting.page_size),
        page_size: setting.page_size,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        format: setting.format,
        summaries: setting.sparse.is_some(),
    };
    let mut caches = Caches::new(model.device(), config.num_layers, spec)?;
    let mut buffers = Buffers::new(model, setting.chunk, setting.chunk)?;
    let pages: Vec<u32> = (0..spec.num_pages as u32).collect();
    let mut losses = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at + 1 < tokens.len() {
        let (n, page_budget) = match setting.sparse {
            Some((budget, from)) if at >= from => (1, Some(budget)),
            Some((_, from)) => (setting.chunk.min(from - at), None),
            None => (setting.chunk, None),
        };
        let n = n.min(tokens.len() - at);
        let step = Step {
            tokens: tokens[at..at + n].to_vec(),
            qo_indptr: vec![0, n as u32],
            seq_lens: vec![(at + n) as u32],
            page_tables: vec![pages[..(at + n).div_ceil(setting.page_size)].to_vec()],
            tail_slots: if setting.format.has_tails() { vec![0] } else { Vec::new() },
            logits_rows: (0..n).collect(),
            page_budget,
        };
        model.forward(&step, &mut caches, &mut buffers)?;
        for (row, &next) in tokens[at + 1..].iter().take(n).enumerate() {
            let logits = buffers
                .logits_row(row)
                .ok_or_else(|| Error::Request("perplexity: expected a model in host memory".into()))?;
            let max = logits.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x)) as f64;
            let sum: f64 = logits.iter().map(|&x| (x as f64 - max).exp()).sum();
            losses.push(max + sum.ln() - logits[next as usize] as f64);
        }
        at += n;
    }
    Ok(losses)
}

/// Perplexity of a run of losses.
pub fn perplexity(losses: &[f64]) -> f64 {
    (losses.iter().sum::<f64>() / losses.len().max(1) as f64).exp()
}
