//! int4 KV: the documented layout, the bounded error, and attention over pages and tails.

mod common;

use common::cases::compare;
use common::reference::{Features, attend};
use common::{Rng, devices, rounded};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::int4;
use ferroflash::{
    AttentionSpec, Batch, DType, INT4_GROUP, Int4Pages, Int4PagesMut, Kv, KvMut, KvTable, Splits, View,
    ViewMut,
};
use half::f16;

/// int4 pages in the test's own memory.
struct Int4Memory {
    codes: [Vec<u8>; 2],
    params: [Vec<f16>; 2],
    tails: [Vec<f16>; 2],
    num_pages: usize,
    heads: usize,
    page_size: usize,
    dim: usize,
    v_group: usize,
    num_tails: usize,
}

impl Int4Memory {
    fn new(num_pages: usize, heads: usize, page_size: usize, dim: usize, num_tails: usize) -> Self {
        let v_group = [32, 16, 8].into_iter().find(|&g| dim.is_multiple_of(g)).unwrap();
        let tokens = num_pages * heads * page_size;
        let nan = f16::NAN;
        Int4Memory {
            codes: [vec![0xa5; tokens * dim / 2], vec![0x5a; tokens * dim / 2]],
            params: [vec![nan; tokens / INT4_GROUP * 2 * dim], vec![nan; tokens * 2 * dim / v_group]],
            tails: [(); 2].map(|_| vec![nan; num_tails * heads * INT4_GROUP * dim]),
            num_pages,
            heads,
            page_size,
            dim,
            v_group,
            num_tails,
        }
    }

    fn shapes(&self) -> ([usize; 4], [usize; 5], [usize; 5], [usize; 4]) {
        let Int4Memory { num_pages, heads, page_size, dim, v_group, num_tails, .. } = *self;
        (
            [num_pages, heads, page_size, dim / 2],
            [num_pages, heads, page_size / INT4_GROUP, 2, dim],
            [num_pages, heads, page_size, 2, dim / v_group],
            [num_tails, heads, INT4_GROUP, dim],
        )
    }

    fn view(&self) -> Int4Pages<'_> {
        let (codes, k_params, v_params, tail) = self.shapes();
        Int4Pages {
            k_codes: View::from_slice(&self.codes[0], &codes).unwrap(),
            k_params: View::from_slice(&self.params[0], &k_params).unwrap(),
            v_codes: View::from_slice(&self.codes[1], &codes).unwrap(),
            v_params: View::from_slice(&self.params[1], &v_params).unwrap(),
            k_tail: View::from_slice(&self.tails[0], &tail).unwrap(),
            v_tail: View::from_slice(&self.tails[1], &tail).unwrap(),
        }
    }

    fn view_mut(&mut self) -> Int4PagesMut<'_> {
        let (codes, k_params, v_params, tail) = self.shapes();
        let [kc, vc] = &mut self.codes;
        let [kp, vp] = &mut self.params;
        let [kt, vt] = &mut self.tails;
        Int4PagesMut {
            k_codes: ViewMut::from_slice(kc, &codes).unwrap(),
            k_params: ViewMut::from_slice(kp, &k_params).unwrap(),
            v_codes: ViewMut::from_slice(vc, &codes).unwrap(),
            v_params: ViewMut::from_slice(vp, &v_params).unwrap(),
            k_tail: ViewMut::from_slice(kt, &tail).unwrap(),
            v_tail: ViewMut::from_slice(vt, &tail).unwrap(),
        }
    }

    /// One value, by the documented layout; `which` 0 is K, 1 is V.
    fn read(&self, which: usize, page: usize, head: usize, offset: usize, d: usize) -> (f32, f32) {
        let half = self.dim / 2;
        let row = (page * self.heads + head) * self.page_size + offset;
        let byte = self.codes[which][row * half + d % half];
        let code = if d < half { byte & 15 } else { byte >> 4 };
        let (at, n, column) = if which == 0 {
            (row / INT4_GROUP, self.dim, d)
        } else {
            (row, self.dim / self.v_group, d / self.v_group)
        };
        let min = self.params[which][at * 2 * n + column].to_f32();
        let scale = self.params[which][at * 2 * n + n + column].to_f32();
        (min + scale * code as f32, scale)
    }
}

#[test]
fn int4_round_trip_is_within_half_a_scale() {
    let mut rng = Rng(11);
    for dim in [64, 128, 40, 72] {
        let (num_pages, heads, page_size) = (2, 3, 64);
        let total = num_pages * page_size;
        let mut k = rng.normals(total * heads * dim);
        let mut v: Vec<f32> = rng.normals(total * heads * dim).iter().map(|x| x * 40.0 + 7.0).collect();
        // A constant channel, a constant token, an outlier.
        (0..total).for_each(|t| k[t * heads * dim + 5] = 2.5);
        v[..dim].fill(-1.25);
        k[17] = 300.0;
        for device in devices() {
            let mut memory = Int4Memory::new(num_pages, heads, page_size, dim, 1);
            let shape = [total, heads, dim];
            let view = |x| View::from_slice(x, &shape).unwrap();
            int4::quantize(&device, view(&k), view(&v), memory.view_mut()).unwrap();
            let pages = [num_pages, heads, page_size, dim];
            let (mut k_back, mut v_back) = (vec![f32::NAN; k.len()], vec![f32::NAN; k.len()]);
            int4::dequantize(
                &device,
                memory.view(),
                ViewMut::from_slice(&mut k_back, &pages).unwrap(),
                ViewMut::from_slice(&mut v_back, &pages).unwrap(),
            )
            .unwrap();
            for (which, (x, back)) in [(&k, &k_back), (&v, &v_back)].into_iter().enumerate() {
                for (i, x) in x.iter().enumerate() {
                    let (token, head, d) = (i / dim / heads, i / dim % heads, i % dim);
                    let (page, offset) = (token / page_size, token % page_size);
                    let (read, scale) = memory.read(which, page, head, offset, d);
                    let back = back[((page * heads + head) * page_size + offset) * dim + d];
                    assert!((read - back).abs() <= 1e-6 * read.abs(), "{read} {back}");
                    let x = f16::from_f32(*x).to_f32();
                    assert!((x - back).abs() <= 0.5001 * scale + 1e-6 * x.abs(), "{x} {back} {scale}");
                }
            }
        }
    }
}

#[test]
fn int4_attention_reads_pages_and_tails() {
    let mut rng = Rng(5);
    let (heads, dim, page_size) = (2, 64, 64);
    let spec = AttentionSpec::new(4, heads, dim).causal();
    // Appended in two steps, so that groups fill up across calls.
    let (first, second) = ([70usize, 31, 1], [83usize, 32, 64]);
    let tables: [&[u32]; 3] = [&[4, 1], &[0, u32::MAX], &[3, u32::MAX]];
    let block_table: Vec<u32> = tables.concat();
    let tail_slots = [2, 0, 1];
    let rows: Vec<(Vec<f32>, Vec<f32>)> =
        second.iter().map(|n| (rng.normals(n * heads * dim), rng.normals(n * heads * dim))).collect();
    let q = rng.normals(3 * 4 * dim);
    for device in devices() {
        let mut memory = Int4Memory::new(5, heads, page_size, dim, 3);
        for (from, to) in [([0, 0, 0], first), (first, second)] {
            let (mut qo_indptr, mut k, mut v) = (vec![0u32], Vec::new(), Vec::new());
            for s in 0..3 {
                qo_indptr.push(qo_indptr[s] + (to[s] - from[s]) as u32);
                k.extend_from_slice(&rows[s].0[from[s] * heads * dim..to[s] * heads * dim]);
                v.extend_from_slice(&rows[s].1[from[s] * heads * dim..to[s] * heads * dim]);
            }
            let seq_lens = to.map(|n| n as u32);
            let table =
                KvTable::Block { page_size, block_table: &block_table, max_blocks: 2, seq_lens: &seq_lens };
            let batch = Batch { tail_slots: &tail_slots, ..Batch::new(&qo_indptr, table) };
            let shape = [qo_indptr[3] as usize, heads, dim];
            AppendPlan::from_batch(&device, &spec, None, &batch)
                .unwrap()
                .run(
                    None,
                    View::from_slice(&k, &shape).unwrap(),
                    View::from_slice(&v, &shape).unwrap(),
                    KvMut::Int4(memory.view_mut()),
                )
                .unwrap();
        }
        let seq_lens = second.map(|n| n as u32);
        let table =
            KvTable::Block { page_size, block_table: &block_table, max_blocks: 2, seq_lens: &seq_lens };
        let batch = Batch { tail_slots: &tail_slots, ..Batch::new(&[0, 1, 2, 3], table) };
        let mut out = vec![f32::NAN; q.len()];
        AttentionPlan::new(&device, &spec, &batch, Splits::Auto)
            .unwrap()
            .run(
                View::from_slice(&q, &[3, 4, dim]).unwrap(),
                Kv::Int4(memory.view()),
                ViewMut::from_slice(&mut out, &[3, 4, dim]).unwrap(),
                None,
            )
            .unwrap();
        for s in 0..3 {
            for head in 0..4 {
                let row = |which: usize, token: usize| -> Vec<f32> {
                    let page = tables[s][token / page_size] as usize;
                    let full = second[s] / INT4_GROUP * INT4_GROUP;
                    let source = if which == 0 { &rows[s].0 } else { &rows[s].1 };
                    (0..dim)
                        .map(|d| {
                            if token < full {
                                memory.read(which, page, head / 2, token % page_size, d).0
                            } else {
                                rounded(DType::F16, source[(token * heads + head / 2) * dim + d])
                            }
                        })
                        .collect()
                };
                let keys: Vec<_> = (0..second[s]).map(|t| row(0, t)).collect();
                let values: Vec<_> = (0..second[s]).map(|t| row(1, t)).collect();
                let at = (s * 4 + head) * dim;
                let features = Features { scale: 0.125, ..Default::default() };
                let (exact, _) = attend::<f64>(&q[at..][..dim], 0, &keys, &values, &features, |_| true);
                let (naive, _) = attend::<f32>(&q[at..][..dim], 0, &keys, &values, &features, |_| true);
                compare("O", &out[at..][..dim], &exact, &naive, 2e-6).unwrap();
            }
        }
    }
}
