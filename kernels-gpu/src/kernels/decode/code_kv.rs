//! Keys and values in 8 or 4 bits, or f16 beside such.
//!
//! Codes meet the tensor cores as they are: int4 codes are subnormal f16 numbers without any arithmetic, those of bytes take
//! a shift or an addition. What they are scaled by goes elsewhere. Of K: an int4 group's scales into Q, once for 32 tokens,
//! and its minima into where the scores begin (a product of Q whose columns are all alike); an int8 token's scale and an fp8
//! head's into the scores. Of V: spans or scales into the weights, an int4 group's minima into an accumulator of their own, in
//! which a column is a group; an fp8 head's scale into O at the end.
//!
//! K comes by `ldmatrix`, a word of codes of a token's neighbouring channels to a lane, so that a lane's channels of Q are
//! others than usual; V by its transposing form, 16 bits of two tokens to a lane, so that O's are.

use super::BlockKv;
use crate::abi::{
    AttentionParams, AttentionQuantParams, DecodeQuantParams, INT4_GROUP, KV_BLOCK, RangeParams, Sequence,
    WorkItem, format,
};
use crate::attn::output::Accumulator;
use crate::attn::softmax::Scores;
use crate::isa;
use crate::sched::{CodeRing, coded};
use crate::tile::codes::{fp8_numbers, int4_bits, int8_numbers, minima, spans};
use crate::tile::fragment::c_to_a;
use crate::tile::{F16, Half, SharedTile};

const GROUP: u32 = INT4_GROUP as u32;

/// 2^-4 and 128 in both halves.
const SIXTEENTH: u32 = 0x2c00_2c00;
const X128: u32 = 0x5800_5800;

/// `C16`, `C8`, `C4`: chunks of 16 bytes of a row of 16, 8 and 4 bits a channel; `SLOTS` stages in a warp's ring.
///
/// | head_dim | slots | bytes on their way in a CTA, of int4 and of 8 bits |
/// |---|---|---|
/// | 64 | 6 | 44 KiB, 40 KiB |
/// | 128 | 3 | 36 KiB, 32 KiB |
/// | 256 | 2 | 36 KiB, 32 KiB |
///
/// Two CTAs fit where shared memory ends at 163 KiB.
pub(crate) struct CodeKv<'a, const C16: u32, const C8: u32, const C4: u32, const SLOTS: u32> {
    p: &'a AttentionQuantParams,
    /// It keeps where the item's coded keys end, and its KV head.
    ring: CodeRing<'a, C16, C8, C4, SLOTS>,
}

/// A lane's row and place among four neighbours.
#[inline(always)]
fn row_and_place() -> (u32, u32) {
    let lane = isa::opaque(isa::thread_x()) % 32;
    (lane / 4, lane % 4)
}

/// Which of the tokens `token` and `token + 1` are below `left`, as halves of a register.
#[inline(always)]
fn below(token: u32, left: u32) -> u32 {
    let half = |there| if there { 0xffff } else { 0 };
    half(token < left) | half(token + 1 < left) << 16
}

impl<'a, const C16: u32, const C8: u32, const C4: u32, const SLOTS: u32> CodeKv<'a, C16, C8, C4, SLOTS> {
    /// An fp8 head's scale.
    #[inline(always)]
    #[track_caller]
    fn head_scale(&self, scales: u64) -> f32 {
        // SAFETY: the host gives one per KV head.
        f32::from_bits(unsafe { isa::ld_global_1(scales + 4 * self.ring.kept()[1] as u64) }[0])
    }

    /// Scores against 32 tokens of int4 codes, from token `first` of a stage.
    #[inline(always)]
    #[track_caller]
    fn int4_scores(&self, q: SharedTile<C16>, stage: u32, first: u32) -> Scores<4> {
        let (codes, (g, c)) = (SharedTile::<C4>::new(stage), row_and_place());
        let params = stage + CodeRing::<C16, C8, C4, SLOTS>::INT4_PARAMS + first / GROUP * (32 * C16);
        // Channels past head_dim are left out.
        let chunks = self.p.attention.head_dim / 32;
        // SAFETY: Q is visible since the barrier.
        let queries = |eight| [g, g + 8].map(|row| unsafe { isa::ld_shared_4(q.at(row, eight)) });
        // Minima and scales in loops of their own: registers are few.
        let (mut start, mut chunk) = ([0.0; 4], 0);
        while chunk < chunks {
            let (eight, [a, b]) = (4 * chunk + c, queries(4 * chunk + c));
            // SAFETY: the stage is visible since `take`.
            let min = unsafe { isa::ld_shared_4(params + 16 * eight) };
            F16::mma(&mut start, [a[0], b[0], a[1], b[1]], [min[0], min[1]]);
            F16::mma(&mut start, [a[2], b[2], a[3], b[3]], [min[2], min[3]]);
            chunk += 1;
        }
        // A code is 2^-24 of itself, or 2^-20.
        let mut part = [start.map(|x| x / (1 << 24) as f32); 4];
        chunk = 0;
        while chunk < chunks {
            let (eight, [a, b]) = (4 * chunk + c, queries(4 * chunk + c));
            // SAFETY: as above.
            let (scale, words) = unsafe {
                (
                    isa::ld_shared_4(params + 16 * (C16 + eight)),
                    isa::ldmatrix_x4(codes.at(first + 4 * g + c, chunk)),
                )
            };
            let scale =
                [0, 1, 2, 3].map(|i| if i % 2 == 0 { scale[i] } else { isa::mul_f16x2(scale[i], SIXTEENTH) });
            let [a, b] = [a, b].map(|x| [0, 1, 2, 3].map(|i| isa::mul_f16x2(x[i], scale[i])));
            for (part, &word) in part.iter_mut().zip(&words) {
                let codes = int4_bits(word);
                F16::mma(part, [a[0], b[0], a[1], b[1]], [codes[0], codes[1]]);
                F16::mma(part, [a[2], b[2], a[3], b[3]], [codes[2], codes[3]]);
            }
            chunk += 1;
        }
        part.map(|part| part.map(|x| x * (1 << 24) as f32))
    }

    /// Scores against the 32 tokens of a stage of bytes.
    #[inline(always)]
    #[track_caller]
    fn byte_scores(&self, q: SharedTile<C16>, stage: u32) -> Scores<4> {
        let (codes, (g, c)) = (SharedTile::<C8>::new(stage), row_and_place());
        let fp8 = self.p.k.format == format::FP8;
        let mut part = [[0.0; 4]; 4];
        let mut chunk = 0;
        while chunk < self.p.attention.head_dim / 16 {
            // SAFETY: Q is visible since the barrier, the stage since `take`.
            let (rows, words) = unsafe {
                (
                    [g, g + 8].map(|row| isa::ld_shared_2(q.at(row, 2 * chunk + c / 2) + 8 * (c % 2))),
                    isa::ldmatrix_x4(codes.at(4 * g + c, chunk)),
                )
            };
            let a = [rows[0][0], rows[1][0], rows[0][1], rows[1][1]];
            for (part, &word) in part.iter_mut().zip(&words) {
                F16::mma(part, a, if fp8 { fp8_numbers::<true>(word) } else { int8_numbers::<true>(word) });
            }
            chunk += 1;
        }
        if fp8 {
            let scale = 256.0 * self.head_scale(self.p.k.params.base);
            return part.map(|part| part.map(|x| x * scale));
        }
        let scales = stage + CodeRing::<C16, C8, C4, SLOTS>::INT8_PARAMS;
        core::array::from_fn(|j| {
            // SAFETY: as above.
            let (low, high) =
                isa::f16x2_to_f32(unsafe { isa::ld_shared_1(scales + 16 * j as u32 + 4 * c) }[0]);
            core::array::from_fn(|i| part[j][i] * (128.0 * if i % 2 == 0 { low } else { high }))
        })
    }

    /// Scores against the next 32 tokens of 16 bits, of which `left` are there.
    #[inline(always)]
    #[track_caller]
    fn half_scores(&mut self, q: SharedTile<C16>, left: u32) -> Scores<4> {
        let mut s = [[0.0; 4]; 4];
        let mut first = 0;
        while first < isa::opaque(32) {
            let mut part = [[0.0; 4]; 2];
            if isa::agreed(first < left || first == 0) {
                let k = SharedTile::<C16>::new(self.ring.take());
                let lane = isa::opaque(isa::thread_x()) % 32;
                let mut chunk = 0;
                while chunk < self.p.attention.head_dim / 8 {
                    // SAFETY: Q is visible since the barrier, the stage since `take`.
                    let (a, b) = unsafe { (q.a(lane, 0, chunk), k.b_from_columns(lane, 0, chunk)) };
                    F16::mma(&mut part[0], a, b[0]);
                    F16::mma(&mut part[1], a, b[1]);
                    chunk += 2;
                }
            }
            s = [s[2], s[3], part[0], part[1]];
            first += 16;
        }
        s
    }

    /// Adds 32 tokens of int4 codes from token `first` of a stage; `o` ends with the minima's accumulator.
    #[inline(always)]
    #[track_caller]
    fn add_int4<const TILES: usize>(
        &self,
        o: &mut Accumulator<TILES>,
        weights: [[u32; 4]; 2],
        stage: u32,
        (first, left): (u32, u32),
    ) {
        let (codes, (g, c)) = (SharedTile::<C4>::new(stage), row_and_place());
        let params = stage + CodeRing::<C16, C8, C4, SLOTS>::INT4_PARAMS;
        // Params of a group of channels, of the lane's tokens: two each of 8.
        let of_group = |group: u32| {
            [0, 8, 16, 24].map(|eight| {
                let token = first + eight + 2 * c;
                // SAFETY: the stage is visible since `take`.
                let [both] = unsafe { isa::ld_shared_1(params + 128 * group + 2 * token) };
                both & below(token, left)
            })
        };
        let mut min = [0; 4];
        if g < C4 {
            min = of_group(g).map(minima);
        }
        F16::mma(&mut o[TILES - 1], weights[0], [min[0], min[1]]);
        F16::mma(&mut o[TILES - 1], weights[1], [min[2], min[3]]);
        for group in 0..C4 {
            // Anew for each group: all addresses at once would take the accumulators' registers.
            let (g, c) = row_and_place();
            let span = of_group(group).map(spans);
            let scaled = [0, 1].map(|step: usize| {
                core::array::from_fn(|i| isa::mul_f16x2(weights[step][i], span[2 * step + i / 2]))
            });
            // SAFETY: as above.
            let words = unsafe { isa::ldmatrix_x4_trans(codes.at(first + 4 * g + c, group)) }.map(int4_bits);
            for j in 0..4 {
                let o = &mut o[4 * group as usize + j];
                F16::mma(o, scaled[0], [words[0][j], words[1][j]]);
                F16::mma(o, scaled[1], [words[2][j], words[3][j]]);
            }
        }
    }

    /// Adds the 32 tokens of a stage of bytes, of which `left` are there.
    #[inline(always)]
    #[track_caller]
    fn add_bytes<const TILES: usize>(
        &self,
        o: &mut Accumulator<TILES>,
        mut weights: [[u32; 4]; 2],
        stage: u32,
        left: u32,
    ) {
        let codes = SharedTile::<C8>::new(stage);
        let fp8 = self.p.v.format == format::FP8;
        if !fp8 {
            let (_, c) = row_and_place();
            let scales = stage + CodeRing::<C16, C8, C4, SLOTS>::INT8_PARAMS;
            for (step, weights) in weights.iter_mut().enumerate() {
                for (i, weight) in weights.iter_mut().enumerate() {
                    let token = 16 * step as u32 + 8 * (i as u32 / 2) + 2 * c;
                    // SAFETY: the stage is visible since `take`.
                    let [scale] = unsafe { isa::ld_shared_1(scales + 2 * token) };
                    let scale = isa::mul_f16x2(scale & below(token, left), X128);
                    *weight = isa::mul_f16x2(*weight, scale);
                }
            }
        }
        for chunk in 0..C8 {
            let (g, c) = row_and_place();
            // SAFETY: as above.
            let words = unsafe { isa::ldmatrix_x4_trans(codes.at(4 * g + c, chunk)) }
                .map(|x| if fp8 { fp8_numbers::<false>(x) } else { int8_numbers::<false>(x) });
            for j in 0..2 {
                let o = &mut o[2 * chunk as usize + j];
                F16::mma(o, weights[0], [words[0][j], words[1][j]]);
                F16::mma(o, weights[1], [words[2][j], words[3][j]]);
            }
        }
    }
}

impl<'a, const C16: u32, const C8: u32, const C4: u32, const TILES: usize, const SLOTS: u32>
    BlockKv<'a, C16, TILES> for CodeKv<'a, C16, C8, C4, SLOTS>
{
    type Params = DecodeQuantParams;
    type Product = F16;
    const BYTES: u32 = CodeRing::<C16, C8, C4, SLOTS>::BYTES;
    // Their rows are the prefill kernel's, whose sums are others.
    const SECTIONS: bool = false;

    #[inline(always)]
    fn attention(p: &DecodeQuantParams) -> &AttentionParams {
        &p.quant.attention
    }

    #[inline(always)]
    fn ranges(p: &DecodeQuantParams) -> &RangeParams {
        &p.ranges
    }

    #[inline(always)]
    #[track_caller]
    unsafe fn start(p: &'a DecodeQuantParams, first: u32, last: u32, at: u32) -> Self {
        const { assert!(TILES == C16 as usize + 1 && C4 <= 8) };
        let p = &p.quant;
        // SAFETY: the caller's promise.
        let ring = unsafe { CodeRing::start(p, first, last, at) };
        CodeKv { p, ring }
    }

    #[inline(always)]
    #[track_caller]
    fn begin(&mut self, item: &WorkItem, seq: &Sequence) {
        let tail_start = seq.kv_len / GROUP * GROUP;
        self.ring.keep([if tail_start < item.kv_end { tail_start } else { item.kv_end }, item.kv_head]);
    }

    #[inline(always)]
    #[track_caller]
    fn scores(&mut self, q: SharedTile<C16>, at: u32, left: u32) -> Scores<8> {
        let mut s: Scores<8> = [[0.0; 4]; 8];
        // Registers are few: what can be had again is not kept over the loops.
        let mut first = 0;
        while first < isa::opaque(KV_BLOCK as u32) {
            let mut part = [[0.0; 4]; 4];
            if isa::agreed(first < left || first == 0) {
                part = match self.p.k.format {
                    format::INT4 if isa::agreed(first < coded(self.ring.kept()[0], at, left)) => {
                        if isa::agreed(first == 0) {
                            self.ring.take();
                        }
                        self.int4_scores(q, self.ring.taken(), first)
                    }
                    format::FP8 | format::INT8 => {
                        let stage = self.ring.take();
                        self.byte_scores(q, stage)
                    }
                    _ => self.half_scores(q, left - first),
                };
            }
            s = [s[4], s[5], s[6], s[7], part[0], part[1], part[2], part[3]];
            first += 32;
        }
        s
    }

    #[inline(always)]
    #[track_caller]
    fn accumulate(&mut self, o: &mut Accumulator<TILES>, s: &Scores<8>, left: u32) {
        let mut weights: [[u32; 4]; 4] = core::array::from_fn(|i| c_to_a::<F16>(s[2 * i], s[2 * i + 1]));
        let mut first = 0;
        while isa::agreed(first < KV_BLOCK as u32 && (first < left || first == 0)) {
            let two = [weights[0], weights[1]];
            match self.p.v.format {
                format::INT4 => {
                    if isa::agreed(first == 0) {
                        self.ring.take();
                    }
                    self.add_int4(o, two, self.ring.taken(), (first, left));
                }
                format::FP8 | format::INT8 => {
                    let stage = self.ring.take();
                    self.add_bytes(o, two, stage, left - first);
                }
                _ => {
                    let (mut weights, mut token) = (two, first);
                    while isa::agreed(token < first + 32 && (token < left || token == 0)) {
                        let v = SharedTile::<C16>::new(self.ring.take());
                        let lane = isa::opaque(isa::thread_x()) % 32;
                        for j in (0..TILES - 1).step_by(2) {
                            // SAFETY: the stage is visible since `take`.
                            let b = unsafe { v.b_pair_from_rows(lane, 0, j as u32) };
                            F16::mma(&mut o[j], weights[0], b[0]);
                            F16::mma(&mut o[j + 1], weights[0], b[1]);
                        }
                        weights[0] = weights[1];
                        token += 16;
                    }
                }
            }
            weights = [weights[2], weights[3], weights[2], weights[3]];
            first += 32;
        }
    }

    #[inline(always)]
    #[track_caller]
    fn finish(&self, o: &mut Accumulator<TILES>) {
        match self.p.v.format {
            format::INT4 => {
                // A scale is a sixteenth of a span. The minima of a group are a column of the last tile.
                let (_, c) = row_and_place();
                let of_four = isa::thread_x() % 32 - c;
                for tile in 0..TILES - 1 {
                    let (group, unit) = (tile / 4, if tile % 2 == 0 { 1 << 20 } else { 1 << 16 });
                    for row in 0..2 {
                        let min = o[TILES - 1][2 * row + group % 2].to_bits();
                        let min = f32::from_bits(isa::shfl_idx(min, of_four + group as u32 / 2));
                        for x in &mut o[tile][2 * row..2 * row + 2] {
                            *x = isa::fma(*x, unit as f32, min);
                        }
                    }
                }
            }
            format::FP8 | format::INT8 => {
                let fp8 = self.p.v.format == format::FP8;
                let scale = if fp8 { 256.0 * self.head_scale(self.p.v.params.base) } else { 1.0 };
                // Two tiles have a channel of each pair: now each has pairs.
                for tile in (0..TILES - 1).step_by(2) {
                    let [a, b] = [o[tile], o[tile + 1]].map(|x| x.map(|x| x * scale));
                    o[tile] = [a[0], b[0], a[2], b[2]];
                    o[tile + 1] = [a[1], b[1], a[3], b[3]];
                }
            }
            _ => {}
        }
    }

    #[inline(always)]
    fn fold(&self) -> u32 {
        match self.p.v.format {
            format::INT4 => 2,
            format::FP8 | format::INT8 => 1,
            _ => 0,
        }
    }
}
