//! A consumer: 64 rows of an item against its blocks.

use super::layout::{ITEMS, Layout, STAGES};
use super::{BATON_BARRIER, WARPGROUP};
use crate::abi::PrefillSm90Params;
use crate::attn::mask;
use crate::attn::output::Output;
use crate::attn::rows::{LaneRows, Place};
use crate::attn::softmax::{Logits, Scores, State, rescale};
use crate::isa;
use crate::sched::{Cursor, Walk};
use crate::tile::fragment::c_to_a;
use crate::tile::{Half, Pending};

/// All lanes of consumer `consumer`.
#[inline(always)]
pub(super) fn run<
    T: Half,
    const EXTRAS: bool,
    const M: u32,
    const N: u32,
    const CHUNKS: u32,
    const V_CHUNKS: u32,
    const S_TILES: usize,
    const STEPS: usize,
    const O_TILES: usize,
>(
    params: &PrefillSm90Params,
    shared: Layout<M, N, CHUNKS, V_CHUNKS>,
    consumer: u32,
) {
    let p = &params.attention;
    let (items, q, k, v) = (shared.items(), shared.q_stages(), shared.k_stages(), shared.v_stages());
    let mut item_at = Cursor::<ITEMS>::START;
    let mut k_at = Cursor::<STAGES>::START;
    let mut v_at = Cursor::<STAGES>::START;
    let baton = Baton::<M>(consumer);
    let factor = Logits::new(&p.score, p.alibi_slopes != 0).factor;
    let row = 64 * consumer;
    if consumer == M / 64 - 1 {
        baton.pass();
    }
    loop {
        let item = items.wait_full(item_at);
        let place = Place::new(p, shared.place(item.slot()));
        if place.is_none() {
            return;
        }
        // SAFETY: the slot is full.
        let (Walk { steps, .. }, _) = unsafe { shared.walk(item.slot()) };
        let rows = place.rows(row + isa::thread_x() % WARPGROUP / 32 * 16);
        let mut state = State::EMPTY;
        let mut o = [[0.0; 4]; O_TILES];
        let q_full = q.wait_full(item_at.of());
        let seen = Rows { rows, shared, slot: item.slot(), factor };
        let mut step = steps - 1;
        let k_full = k.wait_full(k_at);
        // SAFETY: both are full.
        let s =
            unsafe { Pending::a_bt::<T, M, N, CHUNKS>(shared.full_q(&q_full), row, shared.full_k(&k_full)) };
        let mut s = s.wait::<0>();
        k.release(k_full);
        k_at.advance();
        // Nothing has been accumulated yet that there could be to scale.
        seen.weigh::<EXTRAS, S_TILES>(&mut s, &mut state, step);
        let mut weights = pack::<T, S_TILES, STEPS>(&s);
        while step > 0 {
            step -= 1;
            let k_full = k.wait_full(k_at);
            baton.take();
            // SAFETY: K, and V below, are full until they are released.
            let s = unsafe {
                Pending::a_bt::<T, M, N, CHUNKS>(shared.full_q(&q_full), row, shared.full_k(&k_full))
            };
            let v_full = v.wait_full(v_at);
            let v_tile = shared.full_v(&v_full);
            // SAFETY: as above.
            let sum = unsafe { Pending::plus_a_b::<T, N, V_CHUNKS, STEPS>(o, &weights, v_tile) };
            baton.pass();
            let mut s = s.wait::<1>();
            k.release(k_full);
            k_at.advance();
            let correction = seen.weigh::<EXTRAS, S_TILES>(&mut s, &mut state, step);
            isa::settle(state.l[0] + state.l[1]);
            o = sum.wait::<0>();
            v.release(v_full);
            v_at.advance();
            rescale(&mut o, correction);
            weights = pack::<T, S_TILES, STEPS>(&s);
        }
        // Q of the next item may come.
        q.release(q_full);
        let v_full = v.wait_full(v_at);
        // SAFETY: V is full.
        let sum = unsafe { Pending::plus_a_b::<T, N, V_CHUNKS, STEPS>(o, &weights, shared.full_v(&v_full)) };
        o = sum.wait::<0>();
        v.release(v_full);
        v_at.advance();
        Output { p, channel: 0, leads: true, fold: 0 }.end_item::<T, O_TILES>(&rows, state.reduced(), &o);
        items.release(item);
        item_at.advance();
    }
}

/// Rows of an item, and where it says which blocks they meet: registers are what limits the tile.
struct Rows<'a, const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> {
    rows: LaneRows<'a>,
    shared: Layout<M, N, CHUNKS, V_CHUNKS>,
    slot: u32,
    factor: f32,
}

impl<const M: u32, const N: u32, const CHUNKS: u32, const V_CHUNKS: u32> Rows<'_, M, N, CHUNKS, V_CHUNKS> {
    /// Products of a step's block become weights; gives the factors for what was accumulated before.
    #[inline(always)]
    fn weigh<const EXTRAS: bool, const TILES: usize>(
        &self,
        s: &mut Scores<TILES>,
        state: &mut State,
        step: u32,
    ) -> [f32; 2] {
        // SAFETY: the slot is full until this consumer gives it back.
        let (walk, [kv_start, ..]) = unsafe { self.shared.walk(self.slot) };
        let block = walk.block(step);
        let at = kv_start + N * block;
        if EXTRAS {
            let p = self.rows.place.p;
            Logits::new(&p.score, p.alibi_slopes != 0).apply(s, &self.rows, at);
        }
        if walk.is_edge(block) {
            mask::hide::<EXTRAS, TILES>(&self.rows, at, s);
        }
        state.step(s, self.factor)
    }
}

/// Weights as A fragments of 16 columns.
#[inline(always)]
fn pack<T: Half, const TILES: usize, const STEPS: usize>(s: &Scores<TILES>) -> [[u32; 4]; STEPS] {
    core::array::from_fn(|i| c_to_a::<T>(s[2 * i], s[2 * i + 1]))
}

/// The right to set out with products, which goes round the `M / 64` consumers.
struct Baton<const M: u32>(u32);

impl<const M: u32> Baton<M> {
    #[inline(always)]
    fn take(&self) {
        isa::bar_sync_named(BATON_BARRIER + self.0, 2 * WARPGROUP);
    }

    #[inline(always)]
    fn pass(&self) {
        let next = if self.0 == M / 64 - 1 { 0 } else { self.0 + 1 };
        isa::bar_arrive_named(BATON_BARRIER + next, 2 * WARPGROUP);
    }
}
