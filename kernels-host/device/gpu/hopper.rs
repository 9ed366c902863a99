//! Attention on Hopper: which kernels, their tensor maps, the launch of those for many rows.

use ferroflash_kernels::abi::{
    AttentionParams, PrefillSm90Params, PrefillTile, TensorMap, TensorMapSpec, panel_channels,
};

use super::Gpu;
use super::driver::{Launch, words};
use crate::error::Result;
use crate::kv::Kv;
use crate::plan::{Batch, Plan, Splits};
use crate::spec::AttentionSpec;
use crate::tensor::{DType, View};

/// Strides as a tensor map takes them: those of dimensions with one entry are never stepped along.
fn map_strides(dims: &[u64; 5], strides: [usize; 3], size: usize) -> [u64; 4] {
    let mut out = [16; 4];
    for (d, stride) in strides.into_iter().enumerate() {
        if dims[d + 1] > 1 {
            out[d] = (stride * size) as u64;
        }
    }
    out
}

impl Gpu {
    /// Packed rows of an item, where the batch is for these kernels; the others take what they do not: quantised KV, groups of
    /// more rows than a tile, and [`Splits::Fixed`], under which rows of many and of few must have the same bits.
    pub(super) fn prefill_sm90_rows(
        &self,
        spec: &AttentionSpec,
        batch: &Batch<'_>,
        splits: Splits,
    ) -> Option<usize> {
        let total_q = batch.qo_indptr.last().copied().unwrap_or(0);
        // Coordinates of boxes are signed.
        if spec.quantized_kv
            || matches!(splits, Splits::Fixed(_))
            || total_q > i32::MAX as u32
            || spec.num_kv_heads == 0
        {
            return None;
        }
        self.prefill_sm90_tile(spec)?.q_rows(spec.group().max(1))
    }

    /// Whether latent attention is Hopper's kernel's, for 64 rows at a time: not under [`Splits::Fixed`], as above.
    pub(super) fn decode_mla_is_wide(&self, spec: &AttentionSpec, splits: Splits) -> bool {
        spec.is_latent() && !matches!(splits, Splits::Fixed(_)) && self.driver.hopper().is_some()
    }

    /// K or V as `[page, head, token, channel]`, ragged KV as one page, of so many channels; boxes of `box_rows` tokens and
    /// `panel` channels.
    pub(super) fn kv_map(
        &self,
        kv: &Kv<'_>,
        view: &View<'_>,
        (channels, panel): (usize, usize),
        box_rows: Option<usize>,
    ) -> Result<TensorMap> {
        let (shape, strides) = (view.shape(), view.strides());
        let (page, head, token) = match kv {
            Kv::Ragged { .. } => ((1, 0), (shape[1], strides[1]), (shape[0], strides[0])),
            _ => ((shape[0], strides[0]), (shape[1], strides[1]), (shape[2], strides[2])),
        };
        let Some(rows) = box_rows.filter(|_| page.0 * head.0 * token.0 > 0) else {
            // Every row is gathered: the map is not used.
            return Ok(TensorMap([0; 16]));
        };
        let dims = [channels, token.0, head.0, page.0, 1].map(|d| d as u64);
        self.driver.tensor_map(&TensorMapSpec {
            base: view.ptr() as u64,
            rank: 4,
            swizzle_bytes: 2 * panel as u32,
            dims,
            strides: map_strides(&dims, [token.1, head.1, page.1], view.dtype().size()),
            box_dims: [panel as u32, rows as u32, 1, 1, 1],
        })
    }

    fn prefill_sm90_tile(&self, spec: &AttentionSpec) -> Option<PrefillTile> {
        let preferred = self.prefill_tile.filter(|t| t.holds(spec.head_dim, spec.v_head_dim));
        preferred.or_else(|| PrefillTile::choose(spec.head_dim, spec.v_head_dim))
    }

    /// Launches `count` items, which `params.items` begins with.
    pub(super) fn launch_prefill_sm90(
        &self,
        spec: &AttentionSpec,
        plan: &Plan,
        params: &AttentionParams,
        (q, kv): (&View<'_>, &Kv<'_>),
        next_item: u64,
        count: usize,
    ) -> Result<()> {
        let (Kv::Ragged { k, v } | Kv::Paged { k, v }) = kv else { return Ok(()) };
        let Some(tile) = self.prefill_sm90_tile(spec) else { return Ok(()) };
        let Some(q_rows) = tile.q_rows(spec.group()) else { return Ok(()) };
        if count == 0 {
            return Ok(());
        }
        let box_rows = tile.box_rows(plan.page_size);
        let group = spec.group();
        let dims = [spec.head_dim, group, spec.num_kv_heads, q.shape()[0], 1].map(|d| d as u64);
        let (token, head) = (q.strides()[0], q.strides()[1]);
        let q_panel = panel_channels(tile.head_dim) as u32;
        let q_map = self.driver.tensor_map(&TensorMapSpec {
            base: q.ptr() as u64,
            rank: 4,
            swizzle_bytes: 2 * q_panel,
            dims,
            strides: map_strides(&dims, [head, group * head, token], q.dtype().size()),
            box_dims: [q_panel, group as u32, 1, (q_rows / group) as u32, 1],
        })?;
        let launch = PrefillSm90Params {
            q_map,
            k_map: self.kv_map(kv, k, (spec.head_dim, panel_channels(tile.head_dim)), box_rows)?,
            v_map: self.kv_map(kv, v, (spec.v_head_dim, panel_channels(tile.v_head_dim)), box_rows)?,
            attention: *params,
            next_item,
            num_items: count as u32,
            q_rows: q_rows as u32,
            box_rows: box_rows.unwrap_or(0) as u32,
            reserved: 0,
        };
        let extras = spec.soft_cap.is_some()
            || spec.alibi_slopes.is_some()
            || spec.softmax_scale <= 0.0
            || !plan.logical_pages.is_empty();
        self.driver.launch(Launch {
            entry: tile.entries[(q.dtype() == DType::BF16) as usize][extras as usize],
            grid: [count.min(self.driver.processors()) as u32, 1],
            params: words(&launch),
        })
    }
}
