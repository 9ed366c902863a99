//! The table of attention cases: what is asked, how it is laid out, and how it is checked.

use ferroflash::op::attention::AttentionPlan;
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Kv, KvTable, NaturalLog, PageLists, Splits, Tensor, TreeMask,
};

use super::reference::{Features, attend, score_rounding};
use super::{Elements, Rng, is_gpu, rounded};

/// Where a case keeps its KV.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Ragged,
    /// Shuffled pages; unused slots and pages hold NaN.
    Paged {
        page_size: usize,
        nhd: bool,
        block_table: bool,
    },
}

/// One attention problem. `Debug` prints all that makes it.
#[derive(Clone, Debug)]
pub struct Case {
    pub spec: AttentionSpec,
    /// Query and KV tokens of each sequence.
    pub lengths: Vec<(usize, usize)>,
    /// Tree columns: the last `n_tree` of each sequence's KV, as far as it has them.
    pub n_tree: Option<usize>,
    pub q_dtype: DType,
    pub kv_dtype: DType,
    pub place: Place,
    pub splits: Splits,
    /// Random page lists: query tokens of a tile, and whether KV heads have their own.
    pub lists: Option<(usize, bool)>,
    /// Standard deviation of Q: large ones give extreme logits.
    pub q_scale: f32,
    pub seed: u64,
}

/// Calls `run` for every head dimension's kernels, K's and V's, in both types and with every kind of mask: four query heads on
/// two, causal; under a window with sinks; with a soft cap and learned sinks; all visible, with slopes. Counts from `seed`.
pub fn every_kernel_and_mask(mut seed: u64, mut run: impl FnMut(AttentionSpec, DType, usize, u64)) {
    for (head_dim, v_head_dim) in [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)] {
        for dtype in [DType::F16, DType::BF16] {
            for kind in 0..4 {
                let mut spec = AttentionSpec::new(4, 2, head_dim).v_head_dim(v_head_dim).causal();
                match kind {
                    0 => {}
                    1 => (spec.window, spec.num_sinks) = (Some(150), 5),
                    2 => (spec.soft_cap, spec.sink_logits) = (Some(2.0), Some(vec![0.5; 4])),
                    _ => (spec.causal, spec.alibi_slopes) = (false, Some(vec![0.1, 0.02, 0.3, 0.01])),
                }
                run(spec, dtype, kind, seed);
                seed += 1;
            }
        }
    }
}

/// What a device gave.
pub struct Outcome {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

/// A case with its numbers drawn.
pub struct Problem {
    pub case: Case,
    pub qo_indptr: Vec<u32>,
    pub q: Vec<f32>,
    /// `[sequence][kv_head][token]` rows, as their type holds them.
    pub k: Vec<Vec<Vec<Vec<f32>>>>,
    pub v: Vec<Vec<Vec<Vec<f32>>>>,
    pub n_tree: Vec<u32>,
    pub mask: Vec<u32>,
    /// Page lists as the plan takes them.
    pub list_indptr: Vec<u32>,
    pub list_pages: Vec<u32>,
}

impl Problem {
    pub fn new(case: Case) -> Self {
        let mut rng = Rng(case.seed);
        let AttentionSpec { num_q_heads, num_kv_heads, head_dim, .. } = case.spec;
        let mut qo_indptr = vec![0u32];
        for &(q_len, _) in &case.lengths {
            qo_indptr.push(qo_indptr.last().unwrap() + q_len as u32);
        }
        let total_q = *qo_indptr.last().unwrap() as usize;
        let q = rng
            .normals(total_q * num_q_heads * head_dim)
            .into_iter()
            .map(|x| rounded(case.q_dtype, x * case.q_scale))
            .collect();
        let mut rows = |channels: usize| -> Vec<Vec<Vec<Vec<f32>>>> {
            let row = |rng: &mut Rng| -> Vec<f32> {
                rng.normals(channels).into_iter().map(|x| rounded(case.kv_dtype, x)).collect()
            };
            case.lengths
                .iter()
                .map(|&(_, kv)| (0..num_kv_heads).map(|_| (0..kv).map(|_| row(&mut rng)).collect()).collect())
                .collect()
        };
        let (k, v) = (rows(head_dim), rows(case.spec.v_head_dim));
        let (mut n_tree, mut mask) = (Vec::new(), Vec::new());
        if let Some(n) = case.n_tree {
            for &(q_len, kv_len) in &case.lengths {
                let n = n.min(kv_len);
                n_tree.push(n as u32);
                for _ in 0..q_len {
                    mask.extend((0..n.div_ceil(32)).map(|_| rng.bits() as u32));
                }
            }
        }
        let mut problem =
            Problem { case, qo_indptr, q, k, v, n_tree, mask, list_indptr: vec![0], list_pages: Vec::new() };
        problem.draw_lists(&mut rng);
        problem
    }

    /// Each page is in a list or not by chance; some lists are empty, some have every page.
    fn draw_lists(&mut self, rng: &mut Rng) {
        let (Some((q_tile, per_head)), Place::Paged { page_size, .. }) = (self.case.lists, self.case.place)
        else {
            return;
        };
        let heads = if per_head { self.case.spec.num_kv_heads } else { 1 };
        for &(q_len, kv_len) in &self.case.lengths {
            for _ in 0..heads * q_len.div_ceil(q_tile) {
                let odds = [0, 2, 4, 8][rng.below(4)];
                self.list_pages
                    .extend((0..kv_len.div_ceil(page_size) as u32).filter(|_| rng.below(8) < odds));
                self.list_indptr.push(self.list_pages.len() as u32);
            }
        }
    }

    /// Whether the page of KV column `column` is in the list of the query and KV head.
    fn listed(&self, s: usize, token: usize, kv_head: usize, column: usize) -> bool {
        let (Some((q_tile, per_head)), Place::Paged { page_size, .. }) = (self.case.lists, self.case.place)
        else {
            return true;
        };
        let heads = if per_head { self.case.spec.num_kv_heads } else { 1 };
        let tiles = |s: usize| self.case.lengths[s].0.div_ceil(q_tile);
        let before: usize = (0..s).map(|s| heads * tiles(s)).sum();
        let list = before + if per_head { kv_head * tiles(s) } else { 0 } + token / q_tile;
        let range = self.list_indptr[list] as usize..self.list_indptr[list + 1] as usize;
        self.list_pages[range].contains(&((column / page_size) as u32))
    }

    /// Whether the tree mask lets query `token` of sequence `s` see KV column `column`.
    pub fn tree_visible(&self, s: usize, token: usize, column: usize) -> bool {
        if self.case.n_tree.is_none() {
            return true;
        }
        let (n_tree, kv_len) = (self.n_tree[s] as usize, self.case.lengths[s].1);
        let words = n_tree.div_ceil(32);
        let before: usize =
            (0..s).map(|s| self.case.lengths[s].0 * (self.n_tree[s] as usize).div_ceil(32)).sum();
        let Some(bit) = (column + n_tree).checked_sub(kv_len) else { return true };
        self.mask[before + token * words + bit / 32] >> (bit % 32) & 1 == 1
    }

    /// The case with types that the device takes.
    pub fn for_device(case: &Case, device: &Device) -> Self {
        let mut case = case.clone();
        if is_gpu(device) {
            if case.q_dtype == DType::F32 {
                case.q_dtype = DType::F16;
            }
            case.kv_dtype = case.q_dtype;
        }
        Problem::new(case)
    }

    /// What results are measured by; with `round_p` the naive implementation's weights are rounded to the output type, as
    /// tensor cores take them.
    pub fn truth(&self, round_p: bool) -> Truth {
        let spec = &self.case.spec;
        let dim = spec.head_dim;
        let Truth { mut exact, mut naive, mut moved } = Truth::default();
        for (s, &(q_len, kv_len)) in self.case.lengths.iter().enumerate() {
            for token in 0..q_len {
                for head in 0..spec.num_q_heads {
                    let kv_head = head / spec.group();
                    let row = (self.qo_indptr[s] as usize + token) * spec.num_q_heads + head;
                    let features = Features {
                        scale: spec.softmax_scale as f64,
                        causal: spec.causal,
                        window: spec.window,
                        num_sinks: spec.num_sinks,
                        soft_cap: spec.soft_cap,
                        alibi_slope: spec.alibi_slopes.as_ref().map(|a| a[head]),
                        sink_logit: spec.sink_logits.as_ref().map(|a| a[head]),
                        v_head_dim: Some(spec.v_head_dim),
                    };
                    let q = &self.q[row * dim..][..dim];
                    let q_pos = kv_len as i64 - q_len as i64 + token as i64;
                    let (k, v) = (&self.k[s][kv_head], &self.v[s][kv_head]);
                    let visible = |column| {
                        self.tree_visible(s, token, column) && self.listed(s, token, kv_head, column)
                    };
                    let (o, lse) = attend::<f64>(q, q_pos, k, v, &features, visible, |p| p);
                    moved.extend(score_rounding(q, q_pos, k, v, &features, visible, (&o, lse)));
                    exact.out.extend(o);
                    exact.lse.push(lse);
                    let (o, lse) = attend::<f32>(q, q_pos, k, v, &features, visible, |p| {
                        if round_p { rounded(self.case.q_dtype, p) } else { p }
                    });
                    naive.out.extend(o.iter().map(|&x| rounded(self.case.q_dtype, x as f32) as f64));
                    naive.lse.push(lse);
                }
            }
        }
        Truth { exact, naive, moved }
    }

    /// Runs the case, and compares with the oracle.
    pub fn run_and_check(&self, device: &Device) {
        if let Err(error) = self.check(device, &self.run(device)) {
            panic!("{error}\non {device:?}\n{:#?}", self.case);
        }
    }

    /// Runs the case on a device.
    pub fn run(&self, device: &Device) -> Outcome {
        let case = &self.case;
        let spec = &case.spec;
        let shape = [*self.qo_indptr.last().unwrap() as usize, spec.num_q_heads, spec.head_dim];
        let q = Elements::new(case.q_dtype, &self.q).tensor(device, &shape);
        let out_shape = [shape[0], shape[1], spec.v_head_dim];
        let unwritten = vec![f32::NAN; out_shape.iter().product()];
        let mut out = Elements::new(case.q_dtype, &unwritten).tensor(device, &out_shape);
        let unset = vec![f32::NAN; shape[0] * shape[1]];
        let mut lse = Tensor::from_slice(device, &unset, &shape[..2]).unwrap();
        let tables = Tables::new(self, device);
        let mut batch = Batch::new(&self.qo_indptr, tables.kv_table());
        if case.n_tree.is_some() {
            batch.tree = Some(TreeMask { n_tree: &self.n_tree, mask: &self.mask });
        }
        if let Some((q_tile, per_head)) = case.lists {
            let (indptr, pages) = (&self.list_indptr[..], &self.list_pages[..]);
            batch.page_lists = Some(PageLists { q_tile, per_head, indptr, pages });
        }
        let mut plan = AttentionPlan::new(device, spec, &batch, case.splits).unwrap();
        let lse_view = NaturalLog(lse.view_mut());
        plan.run(q.view(), tables.kv(), out.view_mut(), Some(lse_view))
            .unwrap_or_else(|e| panic!("{e}\n{case:#?}"));
        Outcome { out: Elements::of_tensor(&out).to_f32(), lse: lse.to_vec().unwrap() }
    }

    /// Compares with the oracle: the error may be twice the naive implementation's, plus what one rounding of
    /// the scores moves, plus a floor of rounding in the accumulation.
    pub fn check(&self, device: &Device, outcome: &Outcome) -> Result<(), String> {
        let Truth { exact, naive, moved } = self.truth(is_gpu(device));
        let allowed = allowance(&exact.out, &naive.out, 2e-6);
        compare_within("O", &outcome.out, &exact.out, |i| allowed + moved[i])?;
        compare("LSE", &outcome.lse, &exact.lse, &naive.lse, 4e-6)
    }
}

/// Results in f64.
#[derive(Default)]
pub struct Outcome64 {
    pub out: Vec<f64>,
    pub lse: Vec<f64>,
}

/// What a case's results are measured by.
#[derive(Default)]
pub struct Truth {
    /// The oracle's, in f64.
    pub exact: Outcome64,
    /// The naive implementation's, in f32, O rounded to the output type.
    pub naive: Outcome64,
    /// How far a rounding of the scores moves each element of O.
    pub moved: Vec<f64>,
}

/// Compares with the exact values, within their [`allowance`].
pub fn compare(what: &str, got: &[f32], exact: &[f64], naive: &[f64], floor: f64) -> Result<(), String> {
    let allowed = allowance(exact, naive, floor);
    compare_within(what, got, exact, |_| allowed)
}

/// The error allowed: twice the naive one's largest, plus `floor` times the largest magnitude (at least 1).
fn allowance(exact: &[f64], naive: &[f64], floor: f64) -> f64 {
    let finite = |x: &&f64| x.is_finite();
    let magnitude = exact.iter().filter(finite).fold(1.0f64, |m, x| m.max(x.abs()));
    let mut allowed = 0.0f64;
    for (n, e) in naive.iter().zip(exact).filter(|(_, e)| e.is_finite()) {
        allowed = allowed.max((n - e).abs());
    }
    2.0 * allowed + floor * magnitude
}

/// Compares each value with the exact one, within the error that its index allows.
fn compare_within(
    what: &str,
    got: &[f32],
    exact: &[f64],
    allowed: impl Fn(usize) -> f64,
) -> Result<(), String> {
    assert_eq!(got.len(), exact.len());
    for (i, (&g, &e)) in got.iter().zip(exact).enumerate() {
        let allowed = allowed(i);
        let same = if e.is_finite() { (g as f64 - e).abs() <= allowed } else { g as f64 == e };
        if !same {
            return Err(format!("{what}[{i}] is {g}, exact {e}, error allowed {allowed:e}"));
        }
    }
    Ok(())
}

/// KV laid out as the case says.
pub struct Tables {
    place: Place,
    k: Tensor,
    v: Tensor,
    kv_indptr: Vec<u32>,
    pages: Vec<u32>,
    last_page_len: Vec<u32>,
    block_table: Vec<u32>,
    max_blocks: usize,
    seq_lens: Vec<u32>,
}

impl Tables {
    pub fn new(problem: &Problem, device: &Device) -> Self {
        let case = &problem.case;
        let AttentionSpec { num_kv_heads: heads, head_dim, v_head_dim, .. } = case.spec;
        let seq_lens: Vec<u32> = case.lengths.iter().map(|&(_, kv)| kv as u32).collect();
        let mut kv_indptr = vec![0u32];
        let (page_size, nhd) = match case.place {
            Place::Ragged => (0, false),
            Place::Paged { page_size, nhd, .. } => (page_size, nhd),
        };
        let pages_of = |len: u32| if page_size == 0 { len } else { len.div_ceil(page_size as u32) };
        for &len in &seq_lens {
            kv_indptr.push(kv_indptr.last().unwrap() + pages_of(len));
        }
        let used = *kv_indptr.last().unwrap() as usize;
        let mut rng = Rng(case.seed ^ 1);
        // Two pages more than needed, never named.
        let pages: Vec<u32> = rng.permutation(used + 2)[..used].to_vec();
        let lay = |rows: &Vec<Vec<Vec<Vec<f32>>>>, dim: usize| {
            let shape = match case.place {
                Place::Ragged => vec![used, heads, dim],
                Place::Paged { nhd: false, .. } => vec![used + 2, heads, page_size, dim],
                Place::Paged { nhd: true, .. } => vec![used + 2, page_size, heads, dim],
            };
            let mut data = vec![f32::NAN; shape.iter().product()];
            for (s, by_head) in rows.iter().enumerate() {
                for (head, tokens) in by_head.iter().enumerate() {
                    for (t, row) in tokens.iter().enumerate() {
                        let start = kv_indptr[s] as usize;
                        let at = if matches!(case.place, Place::Ragged) {
                            (start + t) * heads + head
                        } else {
                            let (page, offset) = (pages[start + t / page_size] as usize, t % page_size);
                            if nhd {
                                (page * page_size + offset) * heads + head
                            } else {
                                (page * heads + head) * page_size + offset
                            }
                        };
                        data[at * dim..][..dim].copy_from_slice(row);
                    }
                }
            }
            Elements::new(case.kv_dtype, &data).tensor(device, &shape)
        };
        let (k, v) = (lay(&problem.k, head_dim), lay(&problem.v, v_head_dim));
        let last_page_len = seq_lens
            .iter()
            .map(|&len| if page_size == 0 || len == 0 { 0 } else { (len - 1) % page_size as u32 + 1 })
            .collect();
        let max_blocks = seq_lens.iter().map(|&len| pages_of(len)).max().unwrap_or(0) as usize + 1;
        // Entries past a sequence's end are out of range on purpose.
        let mut block_table = vec![u32::MAX; max_blocks * seq_lens.len()];
        for s in 0..seq_lens.len() {
            let list = &pages[kv_indptr[s] as usize..kv_indptr[s + 1] as usize];
            block_table[s * max_blocks..][..list.len()].copy_from_slice(list);
        }
        let place = case.place;
        Tables { place, k, v, kv_indptr, pages, last_page_len, block_table, max_blocks, seq_lens }
    }

    pub fn kv_table(&self) -> KvTable<'_> {
        match self.place {
            Place::Ragged => KvTable::Ragged { kv_indptr: &self.kv_indptr },
            Place::Paged { page_size, block_table: true, .. } => KvTable::Block {
                page_size,
                block_table: &self.block_table,
                max_blocks: self.max_blocks,
                seq_lens: &self.seq_lens,
            },
            Place::Paged { page_size, .. } => KvTable::Csr {
                page_size,
                kv_indptr: &self.kv_indptr,
                kv_indices: &self.pages,
                last_page_len: &self.last_page_len,
            },
        }
    }

    pub fn kv(&self) -> Kv<'_> {
        let (k, v) = (self.k.view(), self.v.view());
        match self.place {
            Place::Ragged => Kv::Ragged { k, v },
            Place::Paged { nhd: true, .. } => {
                Kv::Paged { k: k.permute(&[0, 2, 1, 3]).unwrap(), v: v.permute(&[0, 2, 1, 3]).unwrap() }
            }
            Place::Paged { .. } => Kv::Paged { k, v },
        }
    }
}
