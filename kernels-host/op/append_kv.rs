//! Append: rotary embedding of Q and K, and writing of K and V into pages.

use std::collections::HashSet;

use super::Door;
use crate::device::{AppendCall, AppendCounts, Device, Storage};
use crate::error::{Error, Result};
use crate::kv::{KvMut, PageDims};
use crate::plan::{Batch, KvTable, Plan};
use crate::spec::{AttentionSpec, RopeSpec, RopeStyle};
use crate::tensor::{DType, View, ViewMut};

const OP: &str = "append_kv";
const SKIP: u64 = u64::MAX;

/// Where a step's new tokens go, and their rotation angles; made once, run by every layer.
#[derive(Debug)]
pub struct AppendPlan {
    device: Device,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rotary_dim: usize,
    pub(crate) rope_style: RopeStyle,
    num_q_heads: usize,
    pub(crate) page_size: usize,
    num_pages: usize,
    /// What the device keeps of the plan.
    pub(crate) workspace: (Storage, AppendCounts),
    /// `page * page_size + offset` of each token.
    slots: Vec<u64>,
    pub(crate) positions: Vec<u32>,
    /// `[tokens, rotary_dim / 2]`.
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
    /// Tail of each token's sequence; empty where the batch has none.
    pub(crate) tail_slots: Vec<u32>,
}

impl AppendPlan {
    /// Tokens by slot: token `i` goes to slot `slot_mapping[i]`, that is page `slot / page_size`, offset
    /// `slot % page_size`; a negative slot is skipped (it is rotated in Q all the same). Its rotation is
    /// that of `positions[i]`.
    ///
    /// Page summaries begin anew with a page's first slot, so a page is filled in order.
    ///
    /// # Errors
    /// [`Error::Value`] for lengths that differ, a slot named twice, or a bad `rope`.
    pub fn from_slots(
        device: &Device,
        spec: &AttentionSpec,
        rope: Option<&RopeSpec>,
        page_size: usize,
        slot_mapping: &[i64],
        positions: &[u32],
    ) -> Result<Self> {
        if slot_mapping.len() != positions.len() {
            let expected = format_args!("one per slot, {}", slot_mapping.len()).to_string();
            return Err(Error::value(OP, "positions", expected, positions.len()));
        }
        let slots = slot_mapping.iter().map(|&s| u64::try_from(s).unwrap_or(SKIP)).collect();
        Self::new(device, spec, rope, page_size, slots, positions.to_vec(), Vec::new())
    }

    /// Tokens by sequence: the batch's queries are the last tokens of their sequences, and go where its
    /// page table says. This is the form for int4 keys, with `batch.tail_slots`.
    ///
    /// # Errors
    /// As [`AppendPlan::from_slots`]; [`Error::Value`] where a sequence has more queries than KV, or the
    /// batch is ragged.
    pub fn from_batch(
        device: &Device,
        spec: &AttentionSpec,
        rope: Option<&RopeSpec>,
        batch: &Batch<'_>,
    ) -> Result<Self> {
        if let KvTable::Ragged { .. } = batch.kv {
            return Err(Error::value(OP, "batch.kv", "a page table", "ragged KV"));
        }
        let plan = Plan::lengths(OP, spec, batch)?;
        let (mut slots, mut positions, mut tails) = (Vec::new(), Vec::new(), Vec::new());
        for seq in plan.sequences() {
            if seq.q_len > seq.kv_len {
                let expected = format_args!("at most the KV length, {}", seq.kv_len).to_string();
                return Err(Error::value(OP, "query tokens of a sequence", expected, seq.q_len));
            }
            for position in seq.kv_len - seq.q_len..seq.kv_len {
                let at = position as usize;
                let page = plan.pages[seq.page_start as usize + at / plan.page_size] as u64;
                slots.push(page * plan.page_size as u64 + (at % plan.page_size) as u64);
                positions.push(position);
                if plan.num_tails.is_some() {
                    tails.push(seq.tail_slot);
                }
            }
        }
        let mut seen = HashSet::new();
        let with_tokens = plan.sequences().iter().filter(|s| s.q_len > 0);
        if plan.num_tails.is_some()
            && let Some(twice) = with_tokens.map(|s| s.tail_slot).find(|&t| !seen.insert(t))
        {
            return Err(Error::value(OP, "tail_slots", "each tail once", format_args!("tail {twice} twice")));
        }
        Self::new(device, spec, rope, plan.page_size, slots, positions, tails)
    }

    fn new(
        device: &Device,
        spec: &AttentionSpec,
        rope: Option<&RopeSpec>,
        page_size: usize,
        slots: Vec<u64>,
        positions: Vec<u32>,
        tail_slots: Vec<u32>,
    ) -> Result<Self> {
        spec.check(OP)?;
        spec.check_not_latent(OP)?;
        if spec.v_head_dim != spec.head_dim {
            let expected =
                format_args!("head_dim, {}: appends write K and V alike", spec.head_dim).to_string();
            return Err(Error::value(OP, "v_head_dim", expected, spec.v_head_dim));
        }
        if page_size == 0 {
            return Err(Error::value(OP, "page_size", "at least 1", page_size));
        }
        let written = || slots.iter().copied().filter(|&s| s != SKIP);
        let mut seen = HashSet::with_capacity(slots.len());
        if let Some(twice) = written().find(|&s| !seen.insert(s)) {
            return Err(Error::value(OP, "slots", "each slot once", format_args!("slot {twice} twice")));
        }
        let num_pages = written().max().map_or(0, |s| (s / page_size as u64) as usize + 1);
        let (frequencies, factor) = match rope {
            Some(rope) if rope.rotary_dim > spec.head_dim => {
                let expected = format_args!("at most head_dim, {}", spec.head_dim).to_string();
                return Err(Error::value(OP, "rotary_dim", expected, rope.rotary_dim));
            }
            Some(rope) => rope.frequencies()?,
            None => (Vec::new(), 1.0),
        };
        // In f64: at position 10^6 an f32 angle is off by 0.03.
        let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |f| p as f64 * f));
        let (sin, cos) =
            angles.map(|a| a.sin_cos()).map(|(s, c)| ((s * factor) as f32, (c * factor) as f32)).unzip();
        let mut plan = AppendPlan {
            device: device.clone(),
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            rotary_dim: rope.map_or(0, |r| r.rotary_dim),
            rope_style: rope.map_or(RopeStyle::HalfRotated, |r| r.style),
            num_q_heads: spec.num_q_heads,
            page_size,
            num_pages,
            slots,
            positions,
            cos,
            sin,
            tail_slots,
            workspace: (Storage::none(), AppendCounts::default()),
        };
        plan.workspace = device.backend().plan_append(&plan)?;
        Ok(plan)
    }

    /// Tokens of the step.
    pub fn num_tokens(&self) -> usize {
        self.slots.len()
    }

    /// Page and offset of a token; `None` where it is skipped.
    pub(crate) fn slot(&self, token: usize) -> Option<(usize, usize)> {
        let slot = self.slots[token];
        let page_size = self.page_size as u64;
        (slot != SKIP).then_some(((slot / page_size) as usize, (slot % page_size) as usize))
    }

    /// Rotates `q` in place, and writes rotated `k` and `v` to their slots.
    ///
    /// - `q`: `[tokens, num_q_heads, head_dim]`.
    /// - `k`, `v`: `[tokens, num_kv_heads, head_dim]`, before rotation.
    /// - `kv`: the cache.
    ///
    /// Any float types; values are converted to the cache's, rounding to nearest even. A group
    /// of int4 keys is quantised when its last token comes.
    pub fn run(&self, q: Option<ViewMut<'_>>, k: View<'_>, v: View<'_>, kv: KvMut<'_>) -> Result<()> {
        let door = Door { op: OP, device: &self.device };
        if let Some(q) = &q {
            door.floats("q", &q.as_view(), &[self.num_tokens(), self.num_q_heads, self.head_dim])?;
        }
        let rows = [self.num_tokens(), self.num_kv_heads, self.head_dim];
        door.floats("k", &k, &rows)?;
        door.floats("v", &v, &rows)?;
        let view = kv.as_view();
        for (what, view) in view.views() {
            door.device(what, &view)?;
        }
        let dims = view.check(OP, self.num_kv_heads, (self.head_dim, self.head_dim))?;
        door.page_size(self.page_size, dims.page_size)?;
        door.pages("the slots", self.num_pages, dims.num_pages)?;
        self.check_extras(&door, &kv, dims)?;
        self.device.backend().append_kv(AppendCall { plan: self, q, k, v, kv })
    }

    fn check_extras(&self, door: &Door<'_>, kv: &KvMut<'_>, dims: PageDims) -> Result<()> {
        match kv {
            KvMut::Paged { k, summaries: Some(summaries), .. } => {
                let shape = [dims.num_pages, self.num_kv_heads, 2, self.head_dim];
                door.floats("summaries", &summaries.as_view(), &shape)?;
                let (dtype, keys) = (summaries.dtype(), k.dtype());
                if dtype != DType::F32 && dtype != keys {
                    let expected = format_args!("{keys}, as the keys, or f32").to_string();
                    return Err(Error::dtype(OP, "summaries", expected, dtype));
                }
                Ok(())
            }
            KvMut::Quantized { k, .. } if !k.has_tails() => Ok(()),
            KvMut::Quantized { .. } if self.tail_slots.len() != self.num_tokens() => {
                let expected = "a plan from AppendPlan::from_batch with tail_slots, for int4 keys";
                Err(Error::value(OP, "tail_slots", expected, "none"))
            }
            KvMut::Quantized { .. } => match self.tail_slots.iter().max() {
                Some(&tail) if tail as usize >= dims.num_tails => Err(Error::Index {
                    op: OP,
                    what: "tail_slots".into(),
                    index: tail as i64,
                    limit: dims.num_tails as u64,
                }),
                _ => Ok(()),
            },
            KvMut::Paged { summaries: None, .. } => Ok(()),
        }
    }
}
