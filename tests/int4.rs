//! int4 KV: the documented layout, the bounded error, and attention over pages and tails.

mod common;

use common::cases::compare;
use common::reference::{Features, attend};
use common::{Elements, Rng, devices, is_gpu, on, rounded};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::int4;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, INT4_GROUP, Int4Pages, Int4PagesMut, Kv, KvMut, KvTable, Splits,
    Tensor,
};
use half::f16;

/// int4 pages on a device, and their last copy on the host.
struct Int4Memory {
    tensors: [Tensor; 6],
    codes: [Vec<u8>; 2],
    params: [Vec<f16>; 2],
    heads: usize,
    page_size: usize,
    dim: usize,
    v_group: usize,
}

impl Int4Memory {
    fn new(
        device: &Device,
        num_pages: usize,
        heads: usize,
        page_size: usize,
        dim: usize,
        num_tails: usize,
    ) -> Self {
        let v_group = [32, 16, 8].into_iter().find(|&g| dim.is_multiple_of(g)).unwrap();
        let codes = [num_pages, heads, page_size, dim / 2];
        let k_params = [num_pages, heads, page_size / INT4_GROUP, 2, dim];
        let v_params = [num_pages, heads, page_size, 2, dim / v_group];
        let tail = [num_tails, heads, INT4_GROUP, dim];
        let bytes = |x: u8| on(device, &vec![x; codes.iter().product()], &codes);
        let nans = |shape: &[usize]| on(device, &vec![f16::NAN; shape.iter().product()], shape);
        Int4Memory {
            tensors: [bytes(0xa5), nans(&k_params), bytes(0x5a), nans(&v_params), nans(&tail), nans(&tail)],
            codes: [Vec::new(), Vec::new()],
            params: [Vec::new(), Vec::new()],
            heads,
            page_size,
            dim,
            v_group,
        }
    }

    fn view(&self) -> Int4Pages<'_> {
        let [k_codes, k_params, v_codes, v_params, k_tail, v_tail] =
            self.tensors.each_ref().map(|t| t.view());
        Int4Pages { k_codes, k_params, v_codes, v_params, k_tail, v_tail }
    }

    fn view_mut(&mut self) -> Int4PagesMut<'_> {
        let [k_codes, k_params, v_codes, v_params, k_tail, v_tail] =
            self.tensors.each_mut().map(|t| t.view_mut());
        Int4PagesMut { k_codes, k_params, v_codes, v_params, k_tail, v_tail }
    }

    fn fetch(&mut self) {
        self.codes = [0, 2].map(|i: usize| self.tensors[i].to_vec().unwrap());
        self.params = [1, 3].map(|i: usize| self.tensors[i].to_vec().unwrap());
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
            let mut memory = Int4Memory::new(&device, num_pages, heads, page_size, dim, 1);
            let shape = [total, heads, dim];
            let (k_in, v_in) = (on(&device, &k, &shape), on(&device, &v, &shape));
            int4::quantize(&device, k_in.view(), v_in.view(), memory.view_mut()).unwrap();
            memory.fetch();
            let unset = vec![f32::NAN; k.len()];
            let [mut k_back, mut v_back] =
                [(); 2].map(|_| on(&device, &unset, &[num_pages, heads, page_size, dim]));
            int4::dequantize(&device, memory.view(), k_back.view_mut(), v_back.view_mut()).unwrap();
            let [k_back, v_back] = [k_back, v_back].map(|t| t.to_vec::<f32>().unwrap());
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

/// One query a sequence, and many; every kernel size, among them rows that it does not fill; both types of queries.
#[test]
fn int4_attention_reads_pages_and_tails() {
    for (dim, half) in
        [(64, DType::F16), (96, DType::BF16), (128, DType::F16), (192, DType::BF16), (256, DType::F16)]
    {
        attention_over_int4(dim, [1, 1, 1], half);
        attention_over_int4(dim, [20, 9, 40], half);
    }
    attention_over_int4(40, [1, 32, 3], DType::F16);
    attention_over_int4(72, [60, 1, 10], DType::BF16);
}

/// `half`: the type of queries on devices that take no f32.
fn attention_over_int4(dim: usize, q_lens: [usize; 3], half: DType) {
    let mut rng = Rng(5);
    let (heads, page_size) = (2, 64);
    let spec = AttentionSpec::new(4, heads, dim).causal();
    // Appended in two steps, so that groups fill up across calls.
    let (first, second) = ([70usize, 31, 1], [83usize, 32, 64]);
    let tables: [&[u32]; 3] = [&[4, 1], &[0, u32::MAX], &[3, u32::MAX]];
    let block_table: Vec<u32> = tables.concat();
    let tail_slots = [2, 0, 1];
    let rows: Vec<(Vec<f32>, Vec<f32>)> =
        second.iter().map(|n| (rng.normals(n * heads * dim), rng.normals(n * heads * dim))).collect();
    let total_q: usize = q_lens.iter().sum();
    let q = rng.normals(total_q * 4 * dim);
    for device in devices() {
        let mut memory = Int4Memory::new(&device, 5, heads, page_size, dim, 3);
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
                    on(&device, &k, &shape).view(),
                    on(&device, &v, &shape).view(),
                    KvMut::Int4(memory.view_mut()),
                )
                .unwrap();
        }
        let seq_lens = second.map(|n| n as u32);
        let table =
            KvTable::Block { page_size, block_table: &block_table, max_blocks: 2, seq_lens: &seq_lens };
        let qo_indptr = [0, q_lens[0], q_lens[0] + q_lens[1], total_q].map(|n| n as u32);
        let batch = Batch { tail_slots: &tail_slots, ..Batch::new(&qo_indptr, table) };
        memory.fetch();
        let dtype = if is_gpu(&device) { half } else { DType::F32 };
        // Tensor cores take f16 keys, values and weights.
        let product = |x: f32| if is_gpu(&device) { rounded(DType::F16, x) } else { x };
        let q: Vec<f32> = q.iter().map(|&x| rounded(dtype, x)).collect();
        let shape = [total_q, 4, dim];
        let mut out = Elements::new(dtype, &vec![f32::NAN; q.len()]).tensor(&device, &shape);
        let queries = Elements::new(dtype, &q).tensor(&device, &shape);
        AttentionPlan::new(&device, &spec, &batch, Splits::Auto)
            .unwrap()
            .run(queries.view(), Kv::Int4(memory.view()), out.view_mut(), None)
            .unwrap();
        let out = Elements::of_tensor(&out).to_f32();
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
                let products = |rows: &[Vec<f32>]| -> Vec<Vec<f32>> {
                    rows.iter().map(|r| r.iter().map(|&x| product(x)).collect()).collect()
                };
                let (near_keys, near_values) = (products(&keys), products(&values));
                let scale = 1.0 / (dim as f32).sqrt();
                let features = Features { scale: scale as f64, causal: true, ..Default::default() };
                for token in 0..q_lens[s] {
                    let at = ((qo_indptr[s] as usize + token) * 4 + head) * dim;
                    let q = &q[at..][..dim];
                    let position = (second[s] - q_lens[s] + token) as i64;
                    let (exact, _) = attend::<f64>(q, position, &keys, &values, &features, |_| true, |p| p);
                    let (naive, _) =
                        attend::<f32>(q, position, &near_keys, &near_values, &features, |_| true, product);
                    let naive: Vec<f64> = naive.iter().map(|&x| rounded(dtype, x as f32) as f64).collect();
                    compare("O", &out[at..][..dim], &exact, &naive, 2e-6).unwrap_or_else(|e| {
                        panic!(
                            "{e}\n{dim} channels, {q_lens:?} queries, sequence {s}, head {head}, {device:?}"
                        )
                    });
                }
            }
        }
    }
}
