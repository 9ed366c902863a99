//! Launches of what stands around attention.

use ferroflash_kernels::abi::{
    EmbeddingParams, MERGE_STATES, MergeStatesParams, ROWS_PER_CTA, RmsNormParams, Rows, SampleParams,
    SampleRow, SiluMulParams,
};

use super::Gpu;
use super::driver::{bytes, words};
use super::params::{rows, token_rows};
use crate::device::{EmbeddingCall, Ids, IdsMut, MergeCall, RmsNormCall, SampleCall, SiluMulCall};
use crate::error::{Error, Result};
use crate::op::sample::random_bits;
use crate::tensor::View;

impl Gpu {
    pub(super) fn run_rms_norm(&self, call: RmsNormCall<'_>) -> Result<()> {
        let RmsNormCall { x, residual, weight, eps, out } = call;
        let shape = out.shape();
        let (dim, count) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product());
        let params = RmsNormParams {
            x: rows(&x.unwrap_or(out.as_view())),
            residual: residual.map_or(Rows::NONE, |r| rows(&r.as_view())),
            weight: rows(&weight),
            out: rows(&out.as_view()),
            dim: dim as u32,
            eps,
        };
        self.launch("rms_norm", [count, 1], words(&params))
    }

    pub(super) fn run_silu_mul(&self, call: SiluMulCall<'_>) -> Result<()> {
        let out = call.out.as_view();
        let dim = out.shape()[1] as u32;
        let params = SiluMulParams { gate_up: rows(&call.gate_up), out: rows(&out), dim, reserved: 0 };
        self.launch("silu_mul", [out.shape()[0], 1], words(&params))
    }

    pub(super) fn run_embedding(&self, call: EmbeddingCall<'_>) -> Result<()> {
        let EmbeddingCall { table, ids, out } = call;
        let out = out.as_view();
        // Ids from the host live until the launch is enqueued, and are freed after it in the stream's order.
        let (staged, ids, id_stride) = match ids {
            Ids::Host(ids) => {
                let memory = self.scratch(4 * ids.len())?;
                self.driver.upload(bytemuck::cast_slice(ids), memory.at())?;
                let at = memory.at();
                (Some(memory), at, 4)
            }
            Ids::Device(ids) => (None, ids.ptr() as u64, 4 * ids.strides()[0] as u64),
        };
        let params = EmbeddingParams {
            table: rows(&table),
            out: rows(&out),
            ids,
            id_stride,
            dim: out.shape()[1] as u32,
            vocab: table.shape()[0].min(u32::MAX as usize) as u32,
        };
        let launched = self.launch("embedding", [out.shape()[0], 1], words(&params));
        drop(staged);
        launched
    }

    pub(super) fn run_merge(&self, call: MergeCall<'_>) -> Result<()> {
        let MergeCall { states, out, lse } = call;
        if states.len() > MERGE_STATES {
            let expected = format_args!("at most {MERGE_STATES} in one call on a GPU").to_string();
            return Err(Error::value("merge", "states", expected, states.len()));
        }
        let (out, lse) = (out.as_view(), lse.0.as_view());
        let (count, dim) = (out.shape()[0] * out.shape()[1], out.shape()[2]);
        let scalars = |view: &View<'_>| Rows {
            inner: token_rows(Some(view)).head,
            num_inner: out.shape()[1] as u32,
            ..rows(view)
        };
        let mut params = MergeStatesParams {
            o: [Rows::NONE; MERGE_STATES],
            lse: [Rows::NONE; MERGE_STATES],
            out: rows(&out),
            out_lse: scalars(&lse),
            num_states: states.len() as u32,
            num_rows: count as u32,
            dim: dim as u32,
            reserved: 0,
        };
        for (i, (o, lse)) in states.iter().enumerate() {
            (params.o[i], params.lse[i]) = (rows(o), scalars(&lse.0));
        }
        self.launch("merge_states", [count.div_ceil(ROWS_PER_CTA), 1], words(&params))
    }

    pub(super) fn run_sample(&self, call: SampleCall<'_>) -> Result<()> {
        let SampleCall { logits, params, ids } = call;
        let how: Vec<SampleRow> = params
            .iter()
            .map(|p| SampleRow {
                random: random_bits(p.seed, p.step),
                temperature: p.temperature,
                top_k: u32::try_from(p.top_k).unwrap_or(0),
                top_p: p.top_p,
                min_p: p.min_p,
            })
            .collect();
        let rows_at = self.scratch(size_of::<SampleRow>() * how.len())?;
        self.driver.upload(bytes(&how), rows_at.at())?;
        let launch = |ids, id_stride| {
            let params = SampleParams {
                logits: rows(&logits),
                rows: rows_at.at(),
                ids,
                id_stride,
                vocab: logits.shape()[1] as u32,
                reserved: 0,
            };
            self.launch("sample", [how.len(), 1], words(&params))
        };
        match ids {
            IdsMut::Device(ids) => launch(ids.ptr() as u64, 4 * ids.strides()[0] as u64),
            IdsMut::Host(ids) => {
                let ids_at = self.scratch(4 * ids.len())?;
                launch(ids_at.at(), 4)?;
                self.driver.download(ids_at.at(), bytemuck::cast_slice_mut(ids))
            }
        }
    }
}
