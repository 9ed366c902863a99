//! What becomes of a row's state: a finished row, a partial state, or a section added to those before it.

use crate::abi::{AttentionParams, NO_PARTIAL, Sequence, WorkItem, partial_stride};
use crate::attn::rows::{LaneRows, token_head};
use crate::attn::softmax::{self, State};
use crate::isa;
use crate::tile::Half;

/// Unnormalised O of 16 rows: C fragments of 8 channels each.
pub(crate) type Accumulator<const TILES: usize> = [[f32; 4]; TILES];

/// Where the rows of an item go. A warp may hold a part of the channels: `channel` is its first.
pub(crate) struct Output<'a> {
    pub(crate) p: &'a AttentionParams,
    pub(crate) channel: u32,
    /// Whether this warp writes maxima, sums and LSE.
    pub(crate) leads: bool,
    /// How many times two tiles stand for one that is twice as wide: of `2^fold` tiles a lane has neighbouring pairs.
    pub(crate) fold: u32,
}

impl Output<'_> {
    #[inline(always)]
    fn stride(&self) -> u64 {
        4 * partial_stride(isa::opaque(self.p.v_head_dim) as usize) as u64
    }

    /// Address of the state of packed row `row` among the rows of states from `first`.
    #[inline(always)]
    fn state_at(&self, item: &WorkItem, first: u32, row: u32) -> u64 {
        self.p.partials + (first as u64 + (row - item.row_start) as u64) * self.stride()
    }

    /// Channel of a lane's pair in tile `j`.
    #[inline(always)]
    fn channel_of(&self, j: usize) -> u32 {
        let fold = if self.fold == 0 { 0 } else { isa::opaque(self.fold) };
        let (tile, of) = (j as u32 >> fold, j as u32 & ((1 << fold) - 1));
        isa::opaque(self.channel) + ((8 * tile + 2 * (isa::opaque(isa::thread_x()) % 4)) << fold) + 2 * of
    }

    #[inline(always)]
    fn m_l_at(&self, state: u64) -> u64 {
        state + 4 * (isa::opaque(self.p.v_head_dim) as u64).next_multiple_of(16)
    }

    /// Writes reduced states as rows `first..` of the partial states.
    #[inline(always)]
    fn write_partial<const TILES: usize>(
        &self,
        item: &WorkItem,
        first: u32,
        rows: &LaneRows<'_>,
        state: &State,
        o: &Accumulator<TILES>,
    ) {
        for r in 0..2 {
            let row = item.row_start + rows.row(r);
            if row >= item.row_end {
                continue;
            }
            let at = self.state_at(item, first, row);
            for j in 0..TILES {
                let channel = self.channel_of(j);
                if channel < self.p.v_head_dim {
                    let pair = [o[j][2 * r].to_bits(), o[j][2 * r + 1].to_bits()];
                    // SAFETY: the plan gives each item rows of its own; the channel is inside the row.
                    unsafe { isa::st_global_2(at + 4 * channel as u64, pair) };
                }
            }
            if self.leads && isa::opaque(isa::thread_x()).is_multiple_of(4) {
                let pair = [state.m[r].to_bits(), state.l[r].to_bits()];
                // SAFETY: as above; rows end with room for these two.
                unsafe { isa::st_global_2(self.m_l_at(at), pair) };
            }
        }
    }

    /// `state` and `o` become the merge of the states in rows `first..`, which come first, and themselves.
    /// A barrier of all who wrote them lies between.
    #[inline(always)]
    fn merge_before<const TILES: usize>(
        &self,
        item: &WorkItem,
        first: u32,
        rows: &LaneRows<'_>,
        state: &mut State,
        o: &mut Accumulator<TILES>,
    ) {
        for r in 0..2 {
            let row = item.row_start + rows.row(r);
            if row >= item.row_end {
                continue;
            }
            let at = self.state_at(item, first, row);
            // SAFETY: written by `write_partial` of this item.
            let [m, l] = unsafe { isa::ld_global_2(self.m_l_at(at)) }.map(f32::from_bits);
            let (new, sum, factors) = softmax::merge([m, state.m[r]], [l, state.l[r]]);
            (state.m[r], state.l[r]) = (new, sum);
            for j in 0..TILES {
                let channel = self.channel_of(j);
                if channel < self.p.v_head_dim {
                    // SAFETY: as above.
                    let before = unsafe { isa::ld_global_2(at + 4 * channel as u64) }.map(f32::from_bits);
                    for (i, before) in before.into_iter().enumerate() {
                        let x = &mut o[j][2 * r + i];
                        *x = isa::fma(before, factors[0], *x * factors[1]);
                    }
                }
            }
        }
    }

    /// What makes each of the lane's rows a finished one: where it goes (0: nowhere) and the factor of its
    /// accumulator. Writes LSE.
    #[inline(always)]
    fn finished(
        &self,
        item: &WorkItem,
        seq: &Sequence,
        rows: &LaneRows<'_>,
        state: &State,
    ) -> [(u64, f32); 2] {
        [0, 1].map(|r| {
            let row = item.row_start + rows.row(r);
            if row >= item.row_end {
                return (0, 0.0);
            }
            let (token, head) = token_head(self.p.group, item.kv_head, row);
            let token = seq.q_start + token as u64;
            let sink = sink_logit(self.p.sink_logits, head);
            let (factor, lse) = softmax::finish(state.m[r], state.l[r], sink);
            if self.p.lse.base != 0 && self.leads && isa::opaque(isa::thread_x()).is_multiple_of(4) {
                // SAFETY: each item writes rows of its own, checked by the host to be inside `lse`.
                unsafe { isa::st_global_1(self.p.lse.at(token, head), [lse.to_bits()]) };
            }
            (self.p.out.at(token, head), factor)
        })
    }

    /// Normalises and writes finished rows.
    #[inline(always)]
    fn finish<T: Half, const TILES: usize>(
        &self,
        item: &WorkItem,
        seq: &Sequence,
        rows: &LaneRows<'_>,
        state: &State,
        o: &Accumulator<TILES>,
    ) {
        for (r, (at, factor)) in self.finished(item, seq, rows, state).into_iter().enumerate() {
            if at == 0 {
                continue;
            }
            for j in 0..TILES {
                let channel = self.channel_of(j);
                if channel < self.p.v_head_dim {
                    // SAFETY: each item writes rows of its own, checked by the host to be inside `out`.
                    unsafe { isa::st_global_1(at + 2 * channel as u64, [normalised::<T>(o[j], r, factor)]) };
                }
            }
        }
    }

    /// As [`Output::finish`], 16 bytes at a time: the four lanes that hold a row's pairs exchange them.
    #[inline(always)]
    #[track_caller]
    fn finish_wide<T: Half, const TILES: usize>(
        &self,
        item: &WorkItem,
        seq: &Sequence,
        rows: &LaneRows<'_>,
        state: &State,
        o: &Accumulator<TILES>,
    ) {
        const { assert!(TILES.is_multiple_of(4)) };
        for (r, (at, factor)) in self.finished(item, seq, rows, state).into_iter().enumerate() {
            for j in (0..TILES).step_by(4) {
                let pairs = [0, 1, 2, 3].map(|i| normalised::<T>(o[j + i], r, factor));
                let eight = transpose_quad(pairs);
                let channel = self.channel + 8 * (j as u32 + isa::thread_x() % 4);
                if at != 0 && channel < self.p.v_head_dim {
                    // SAFETY: as in `finish`; the host has checked that rows begin at 16 bytes.
                    unsafe { isa::st_global_4(at + 2 * channel as u64, eight) };
                }
            }
        }
    }

    /// The end of an item that is one section: partial states, or finished rows.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn end_item<T: Half, const TILES: usize>(
        &self,
        rows: &LaneRows<'_>,
        state: State,
        o: &Accumulator<TILES>,
    ) {
        let (item, seq) = rows.place.item();
        if item.partial == NO_PARTIAL {
            self.finish_wide::<T, TILES>(&item, &seq, rows, &state, o);
        } else {
            self.write_partial(&item, item.partial, rows, &state, o);
        }
    }

    /// The end of part `part` of an item: its state is a partial one of its own, or, of the only one, a finished row.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn end_part<T: Half, const TILES: usize>(
        &self,
        rows: &LaneRows<'_>,
        part: u32,
        state: State,
        o: &Accumulator<TILES>,
    ) {
        let (item, seq) = rows.place.item();
        if item.partial == NO_PARTIAL {
            self.finish::<T, TILES>(&item, &seq, rows, &state, o);
        } else {
            let first = item.partial + part * (item.row_end - item.row_start);
            self.write_partial(&item, first, rows, &state, o);
        }
    }

    /// The end, at token `end`, of a section of the item's KV: its state is a partial one of its own, or is
    /// merged with those before it, and at the item's end becomes a finished row.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn end_section<T: Half, const TILES: usize>(
        &self,
        end: u32,
        rows: &LaneRows<'_>,
        mut state: State,
        o: &mut Accumulator<TILES>,
    ) {
        let (item, seq) = rows.place.item();
        let mut section = 0;
        if self.p.section != 0 && end > item.kv_start {
            section = (end - 1) / self.p.section - item.kv_start / self.p.section;
        }
        let num_rows = item.row_end - item.row_start;
        if item.partial != NO_PARTIAL {
            return self.write_partial(&item, item.partial + section * num_rows, rows, &state, o);
        }
        if section > 0 {
            self.merge_before(&item, item.scratch, rows, &mut state, o);
            // Others read the maxima and sums that `write_partial` overwrites.
            isa::bar_sync();
        }
        if end == item.kv_end {
            self.finish::<T, TILES>(&item, &seq, rows, &state, o);
        } else {
            self.write_partial(&item, item.scratch, rows, &state, o);
        }
    }
}

/// A pair of row `r` in a lane's C fragment. A row that saw nothing is 0 whatever its accumulator holds.
#[inline(always)]
fn normalised<T: Half>(tile: [f32; 4], r: usize, factor: f32) -> u32 {
    let x = |i: usize| if factor == 0.0 { 0.0 } else { tile[2 * r + i] * factor };
    T::pack(x(0), x(1))
}

/// Lane `t` of four neighbours brings word `t` of four rows, and takes row `t`.
#[inline(always)]
#[track_caller]
fn transpose_quad(x: [u32; 4]) -> [u32; 4] {
    let lane = isa::thread_x();
    let (odd, upper) = (lane & 1 == 1, lane & 2 == 2);
    // Words of two lanes of rows `odd` and `2 + odd`.
    let pairs = [0, 2].map(|i| {
        let (kept, sent) = if odd { (x[i + 1], x[i]) } else { (x[i], x[i + 1]) };
        let taken = isa::shfl_bfly(sent, 1);
        if odd { [taken, kept] } else { [kept, taken] }
    });
    let (kept, sent) = if upper { (pairs[1], pairs[0]) } else { (pairs[0], pairs[1]) };
    let taken = sent.map(|word| isa::shfl_bfly(word, 2));
    let [low, high] = if upper { [taken, kept] } else { [kept, taken] };
    [low[0], low[1], high[0], high[1]]
}

/// The learned sink of a head, where there is one.
#[inline(always)]
pub(crate) fn sink_logit(sink_logits: u64, head: u32) -> Option<f32> {
    if sink_logits == 0 {
        return None;
    }
    // SAFETY: the host gives one logit per query head.
    Some(f32::from_bits(unsafe { isa::ld_global_1(sink_logits + 4 * head as u64) }[0]))
}
