//! Times the kernels on a GPU and prints one JSON object a line. No Criterion: a GPU is timed by its own events, and
//! the machine that runs this may have nothing but the driver. `benches/gpu/bundle.sh` packs it with the peers' script.

use std::env;

use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::select_pages::{PageBudget, SparsePlan};
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Kv, KvCache, KvCacheSpec, KvFormat, KvTable, Result, Splits, Tensor,
    TreeMask,
};
use ferroflash_kernels::abi::PrefillTile;
use ferroflash_kernels::kernels::ALTERNATIVES;
use half::bf16;

const WARM_UP: usize = 3;
const RUNS: usize = 15;

/// Buffers are used in turn so that none is in the L2 cache when its turn comes (50 MB on an H100).
const ROTATE_BYTES: usize = 256 << 20;

fn main() -> Result<()> {
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    let quick = env::args().any(|a| a == "--quick");
    let filter = env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    println!("{{\"device\":{:?}}}", device.description());
    if filter == "tiles" {
        return tiles(&device);
    }
    let wanted = |name: &str| name.contains(&filter);
    if wanted("copy") {
        copy(&device)?;
    }
    if wanted("prefill") {
        for head_dim in [64, 128, 256] {
            for causal in [false, true] {
                for seq_len in [512, 1024, 2048, 4096, 8192, 16384] {
                    if !quick || seq_len == 4096 {
                        prefill(&device, &Prefill::new(head_dim, 16384 / seq_len, seq_len, causal))?;
                    }
                }
            }
        }
        for seq_len in [4096, 16384] {
            let plain = Prefill::new(128, 16384 / seq_len, seq_len, true);
            prefill(&device, &Prefill { kv_heads: plain.q_heads / 8, ..plain })?;
            for page_size in [1, 16, 64, 256] {
                prefill(&device, &Prefill { page_size, ..plain })?;
            }
        }
        for seq_len in [32768, 131072] {
            if !quick {
                prefill(&device, &Prefill::new(128, 1, seq_len, true))?;
            }
        }
    }
    if wanted("decode") {
        for (batch, len) in [(1, 4096), (1, 65536), (16, 4096), (16, 32768), (64, 4096)] {
            for page_size in [1, 16, 64, 256] {
                if !quick || page_size == 16 {
                    decode(&device, batch, len, page_size, KvFormat::Float(DType::BF16))?;
                }
            }
            for format in [KvFormat::int4(batch), KvFormat::FP8, KvFormat::INT8] {
                decode(&device, batch, len, 64, format)?;
            }
        }
    }
    if wanted("mla") {
        for (heads, batch, len) in [(16, 1, 32768), (16, 64, 4096), (128, 1, 32768), (128, 64, 4096)] {
            // Under a fixed split Hopper takes Ampere's kernel, for 16 rows.
            for splits in [Splits::Auto, Splits::Fixed(1024)] {
                mla(&device, heads, batch, len, splits)?;
            }
        }
    }
    if wanted("sparse") {
        sparse(&device, 65536, 2048)?;
    }
    if wanted("tree") {
        // Beside decoding one token over the same prefix.
        decode(&device, 1, 32768, 16, KvFormat::Float(DType::BF16))?;
        tree(&device, 32768, 64)?;
    }
    if wanted("cascade") {
        // Beside as many sequences of that length that share nothing.
        cascade(&device, 64, 32768, 128)?;
        if !quick {
            decode(&device, 64, 32768 + 128, 64, KvFormat::Float(DType::BF16))?;
        }
    }
    Ok(())
}

/// Median milliseconds of `run(i)`.
fn median(device: &Device, mut run: impl FnMut(usize) -> Result<()>) -> Result<f32> {
    (0..WARM_UP).try_for_each(&mut run)?;
    let mut times = (0..RUNS).map(|i| device.time_ms(|| run(i))).collect::<Result<Vec<f32>>>()?;
    times.sort_by(f32::total_cmp);
    Ok(times[RUNS / 2])
}

/// Normal-ish values: sums of bits of SplitMix64.
fn random(device: &Device, shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed;
    let data: Vec<bf16> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z ^= z >> 27;
            bf16::from_f32((z.count_ones() as f32 - 32.0) / 4.0)
        })
        .collect();
    Tensor::from_slice(device, &data, shape)
}

fn copy(device: &Device) -> Result<()> {
    // The same bytes read and written by the plainest kernel of ours: rows of a table.
    let (rows, dim) = (1 << 15, 8192);
    let from = Tensor::zeros(device, DType::BF16, &[rows, 2 * dim])?;
    let mut to = Tensor::zeros(device, DType::BF16, &[rows, dim])?;
    let ms = median(device, |_| ferroflash::op::layer::silu_mul(device, from.view(), to.view_mut()))?;
    let gbps = (3 * rows * dim * 2) as f64 / ms as f64 / 1e6;
    println!("{{\"op\":\"silu_mul\",\"rows\":{rows},\"dim\":{dim},\"ms\":{ms},\"gbps\":{gbps}}}");
    Ok(())
}

/// A prefill of equal sequences: 2048 channels in all, as FlashAttention's figures have it.
#[derive(Clone, Copy)]
struct Prefill {
    head_dim: usize,
    v_head_dim: usize,
    batch: usize,
    seq_len: usize,
    causal: bool,
    q_heads: usize,
    kv_heads: usize,
    /// 0: ragged.
    page_size: usize,
}

impl Prefill {
    fn new(head_dim: usize, batch: usize, seq_len: usize, causal: bool) -> Self {
        let heads = 2048 / head_dim;
        Prefill {
            head_dim,
            v_head_dim: head_dim,
            batch,
            seq_len,
            causal,
            q_heads: heads,
            kv_heads: heads,
            page_size: 0,
        }
    }
}

/// Hopper's tiles, those in use and the others of the same channels, one after the other on the same problems.
fn tiles(device: &Device) -> Result<()> {
    for (other, _) in ALTERNATIVES {
        let (head_dim, v_head_dim) = (other.head_dim, other.v_head_dim);
        for tile in PrefillTile::choose(head_dim, v_head_dim).into_iter().chain([*other]) {
            // SAFETY: a tile of the kernels' tables.
            let Some(device) = (unsafe { device.with_prefill_tile(tile) }) else {
                println!("skipped: {} has no kernels for Hopper", device.description());
                return Ok(());
            };
            for causal in [false, true] {
                let problem = Prefill { v_head_dim, ..Prefill::new(head_dim, 2, 8192, causal) };
                match time_prefill(&device, &problem) {
                    Ok((ms, tflops)) => println!(
                        "{{\"op\":\"prefill_tile\",\"tile\":{:?},\"rows\":{},\"block\":{},\"head_dim\":{head_dim},\"v_head_dim\":{v_head_dim},\"seq_len\":8192,\"batch\":2,\"causal\":{causal},\"ms\":{ms},\"tflops\":{tflops}}}",
                        tile.name, tile.rows, tile.block
                    ),
                    // Not built with the feature `alternative-tiles`, or more shared memory than there is.
                    Err(error) => println!("skipped: {}: {error}", tile.name),
                }
            }
        }
    }
    Ok(())
}

fn prefill(device: &Device, problem: &Prefill) -> Result<()> {
    let (ms, tflops) = time_prefill(device, problem)?;
    let Prefill { head_dim, batch, seq_len, causal, q_heads, kv_heads, page_size, .. } = problem;
    println!(
        "{{\"op\":\"prefill\",\"head_dim\":{head_dim},\"seq_len\":{seq_len},\"batch\":{batch},\"heads\":{q_heads},\"kv_heads\":{kv_heads},\"page_size\":{page_size},\"causal\":{causal},\"ms\":{ms},\"tflops\":{tflops}}}"
    );
    Ok(())
}

/// Median milliseconds, and TFLOP/s.
fn time_prefill(device: &Device, problem: &Prefill) -> Result<(f32, f64)> {
    let &Prefill { head_dim, v_head_dim, batch, seq_len, causal, q_heads, kv_heads, page_size } = problem;
    let total = batch * seq_len;
    let mut spec = AttentionSpec::new(q_heads, kv_heads, head_dim).v_head_dim(v_head_dim);
    spec.causal = causal;
    let indptr: Vec<u32> = (0..=batch).map(|i| (i * seq_len) as u32).collect();
    let seq_lens = vec![seq_len as u32; batch];
    // Ragged KV has none.
    let [num_pages, max_blocks] = [total, seq_len].map(|tokens| tokens.checked_div(page_size).unwrap_or(0));
    let table = scattered(num_pages);
    let kv_table = if page_size == 0 {
        KvTable::Ragged { kv_indptr: &indptr }
    } else {
        KvTable::Block { page_size, block_table: &table, max_blocks, seq_lens: &seq_lens }
    };
    let kv_shape = |channels| match page_size {
        0 => vec![total, kv_heads, channels],
        _ => vec![num_pages, kv_heads, page_size, channels],
    };
    let q = random(device, &[total, q_heads, head_dim], 1)?;
    let (k, v) = (random(device, &kv_shape(head_dim), 2)?, random(device, &kv_shape(v_head_dim), 3)?);
    let mut out = Tensor::zeros(device, DType::BF16, &[total, q_heads, v_head_dim])?;
    let mut plan = AttentionPlan::new(device, &spec, &Batch::new(&indptr, kv_table), Splits::Auto)?;
    let kv = match page_size {
        0 => Kv::Ragged { k: k.view(), v: v.view() },
        _ => Kv::Paged { k: k.view(), v: v.view() },
    };
    let ms = median(device, |_| plan.run(q.view(), kv, out.view_mut(), None))?;
    let channels = head_dim + v_head_dim;
    let flops = 2.0 * (total * q_heads * channels) as f64 * seq_len as f64 * if causal { 0.5 } else { 1.0 };
    Ok((ms, flops / ms as f64 / 1e9))
}

/// All of `num_pages` page numbers, each far from the last: an odd stride visits every one once.
fn scattered(num_pages: usize) -> Vec<u32> {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let stride = (num_pages as u64 * 5 / 8) | 1;
    let stride = (stride..).step_by(2).find(|&s| gcd(s, num_pages as u64) == 1).unwrap_or(1);
    (0..num_pages as u64).map(|i| (i * stride % num_pages as u64) as u32).collect()
}

/// A cache with `batch` sequences of `len` random tokens in scattered pages, and its page table.
fn filled(
    device: &Device,
    spec: &AttentionSpec,
    batch: usize,
    len: usize,
    page_size: usize,
    format: KvFormat,
) -> Result<(KvCache, Vec<u32>)> {
    let pages = len.div_ceil(page_size);
    let num_pages = pages * batch;
    let mut cache = KvCache::new(
        device,
        KvCacheSpec {
            num_pages,
            page_size,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            format,
            summaries: matches!(format, KvFormat::Float(_)),
        },
    )?;
    let table = scattered(num_pages);
    let chunk = 4096.min(len);
    let shape = [chunk, spec.num_kv_heads, spec.head_dim];
    let (k, v) = (random(device, &shape, 7)?, random(device, &shape, 8)?);
    for s in 0..batch {
        let block_table = &table[s * pages..(s + 1) * pages];
        for start in (0..len).step_by(chunk) {
            let n = chunk.min(len - start);
            let (indptr, seq_lens) = ([0, n as u32], [(start + n) as u32]);
            let kv = KvTable::Block { page_size, block_table, max_blocks: pages, seq_lens: &seq_lens };
            let tail = [s as u32];
            let tail_slots: &[u32] = if format.has_tails() { &tail } else { &[] };
            let step = Batch { tail_slots, ..Batch::new(&indptr, kv) };
            let (k, v) = (k.view().narrow(0, 0, n)?, v.view().narrow(0, 0, n)?);
            AppendPlan::from_batch(device, spec, None, &step)?.run(None, k, v, cache.view_mut())?;
        }
    }
    Ok((cache, table))
}

fn decode(device: &Device, batch: usize, len: usize, page_size: usize, format: KvFormat) -> Result<()> {
    let mut spec = AttentionSpec::new(32, 8, 128).causal();
    spec.quantized_kv = format.is_quantized();
    let cache_bytes = filled_bytes(&spec, batch, len, page_size, format);
    let copies = (ROTATE_BYTES / cache_bytes).clamp(1, 8);
    let caches: Vec<_> =
        (0..copies).map(|_| filled(device, &spec, batch, len, page_size, format)).collect::<Result<_>>()?;
    let indptr: Vec<u32> = (0..=batch as u32).collect();
    let seq_lens = vec![len as u32; batch];
    let tails: Vec<u32> = (0..batch as u32).collect();
    let table = KvTable::Block {
        page_size,
        block_table: &caches[0].1,
        max_blocks: len.div_ceil(page_size),
        seq_lens: &seq_lens,
    };
    let lengths =
        Batch { tail_slots: if format.has_tails() { &tails } else { &[] }, ..Batch::new(&indptr, table) };
    let mut plan = AttentionPlan::new(device, &spec, &lengths, Splits::Auto)?;
    let q = random(device, &[batch, 32, 128], 9)?;
    let mut out = Tensor::zeros(device, DType::BF16, &[batch, 32, 128])?;
    let ms = median(device, |i| plan.run(q.view(), caches[i % copies].0.view(), out.view_mut(), None))?;
    let gbps = cache_bytes as f64 / ms as f64 / 1e6;
    let kv = match format {
        KvFormat::INT8 => "int8",
        KvFormat::FP8 => "fp8",
        KvFormat::Quantized { .. } => "int4",
        KvFormat::Float(_) => "bf16",
    };
    println!(
        "{{\"op\":\"decode\",\"kv\":\"{kv}\",\"batch\":{batch},\"len\":{len},\"page_size\":{page_size},\"q_heads\":32,\"kv_heads\":8,\"head_dim\":128,\"ms\":{ms},\"gbps\":{gbps}}}"
    );
    Ok(())
}

fn filled_bytes(spec: &AttentionSpec, batch: usize, len: usize, page_size: usize, format: KvFormat) -> usize {
    let page = KvCacheSpec {
        num_pages: 1,
        page_size,
        num_kv_heads: spec.num_kv_heads,
        head_dim: spec.head_dim,
        format,
        summaries: false,
    };
    page.page_bytes() * len.div_ceil(page_size) * batch
}

fn sparse(device: &Device, len: usize, budget: usize) -> Result<()> {
    let spec = AttentionSpec::new(32, 8, 128).causal();
    let page_size = 16;
    let (cache, table) = filled(device, &spec, 1, len, page_size, KvFormat::Float(DType::BF16))?;
    let seq_lens = [len as u32];
    let kv = KvTable::Block {
        page_size,
        block_table: &table,
        max_blocks: len.div_ceil(page_size),
        seq_lens: &seq_lens,
    };
    let lengths = Batch::new(&[0, 1], kv);
    let pages = PageBudget::new(budget / page_size);
    let mut plan = SparsePlan::new(device, &spec, &lengths, pages, Splits::Auto)?;
    let q = random(device, &[1, 32, 128], 9)?;
    let mut out = Tensor::zeros(device, DType::BF16, &[1, 32, 128])?;
    let Some(summaries) = cache.summaries() else { return Ok(()) };
    let ms = median(device, |_| {
        plan.select(q.view(), summaries)?;
        plan.run(q.view(), cache.view(), out.view_mut(), None)
    })?;
    println!("{{\"op\":\"sparse\",\"len\":{len},\"budget\":{budget},\"page_size\":{page_size},\"ms\":{ms}}}");
    Ok(())
}

/// Latent attention with DeepSeek's channels; 16 heads are a share of 128 on eight GPUs.
fn mla(device: &Device, heads: usize, batch: usize, len: usize, splits: Splits) -> Result<()> {
    let (page_size, dim, v_dim) = (64, 576, 512);
    let spec = AttentionSpec::new(heads, 1, dim).v_head_dim(v_dim).causal();
    let pages = batch * len / page_size;
    let copies = (ROTATE_BYTES / (batch * len * dim * 2)).clamp(1, 8);
    let latents: Vec<Tensor> = (0..copies)
        .map(|i| random(device, &[pages, 1, page_size, dim], 6 + i as u64))
        .collect::<Result<_>>()?;
    let (table, seq_lens) = (scattered(pages), vec![len as u32; batch]);
    let indptr: Vec<u32> = (0..=batch as u32).collect();
    let kv =
        KvTable::Block { page_size, block_table: &table, max_blocks: len / page_size, seq_lens: &seq_lens };
    let mut plan = AttentionPlan::new(device, &spec, &Batch::new(&indptr, kv), splits)?;
    let q = random(device, &[batch, heads, dim], 9)?;
    let mut out = Tensor::zeros(device, DType::BF16, &[batch, heads, v_dim])?;
    let ms = median(device, |i| {
        let k = latents[i % copies].view();
        plan.run(q.view(), Kv::Paged { k, v: k.narrow(3, 0, v_dim)? }, out.view_mut(), None)
    })?;
    let rows = (batch * len) as f64;
    let gbps = rows * (dim * 2) as f64 / ms as f64 / 1e6;
    let tflops = rows * (2 * heads * (dim + v_dim)) as f64 / ms as f64 / 1e9;
    println!(
        "{{\"op\":\"mla\",\"splits\":\"{splits:?}\",\"heads\":{heads},\"batch\":{batch},\"len\":{len},\"page_size\":{page_size},\"ms\":{ms},\"gbps\":{gbps},\"tflops\":{tflops}}}"
    );
    Ok(())
}

/// Sequences of `own` tokens each behind one prefix.
fn cascade(device: &Device, batch: usize, prefix: usize, own: usize) -> Result<()> {
    let (spec, page_size) = (AttentionSpec::new(32, 8, 128).causal(), 64);
    let pages = |tokens: usize| tokens / page_size;
    let (shared, rest) = (pages(prefix), pages(own));
    let shape = [shared + batch * rest, 8, page_size, 128];
    let (k, v) = (random(device, &shape, 4)?, random(device, &shape, 5)?);
    let all = scattered(shape[0]);
    let table: Vec<u32> = (0..batch)
        .flat_map(|i| all[..shared].iter().chain(&all[shared + i * rest..][..rest]).copied())
        .collect();
    let indptr: Vec<u32> = (0..=batch as u32).collect();
    let seq_lens = vec![(prefix + own) as u32; batch];
    let kv =
        KvTable::Block { page_size, block_table: &table, max_blocks: shared + rest, seq_lens: &seq_lens };
    let mut plan = AttentionPlan::new(device, &spec, &Batch::new(&indptr, kv), Splits::Auto)?;
    let q = random(device, &[batch, 32, 128], 9)?;
    let mut out = Tensor::zeros(device, DType::BF16, &[batch, 32, 128])?;
    let kv = Kv::Paged { k: k.view(), v: v.view() };
    let ms = median(device, |_| plan.run(q.view(), kv, out.view_mut(), None))?;
    let levels = plan.plan().shared_prefixes().len();
    println!(
        "{{\"op\":\"cascade\",\"batch\":{batch},\"prefix\":{prefix},\"own\":{own},\"page_size\":{page_size},\"prefixes\":{levels},\"ms\":{ms}}}"
    );
    Ok(())
}

fn tree(device: &Device, len: usize, nodes: usize) -> Result<()> {
    let spec = AttentionSpec::new(32, 8, 128);
    let page_size = 16;
    let (cache, table) = filled(device, &spec, 1, len, page_size, KvFormat::Float(DType::BF16))?;
    let seq_lens = [len as u32];
    let kv = KvTable::Block {
        page_size,
        block_table: &table,
        max_blocks: len.div_ceil(page_size),
        seq_lens: &seq_lens,
    };
    // A chain: node `i` sees itself and all before.
    let words = nodes.div_ceil(32);
    let seen = |node: usize, word: usize| {
        (0..32).filter(|bit| 32 * word + bit <= node).fold(0u32, |m, bit| m | 1 << bit)
    };
    let mask: Vec<u32> = (0..nodes).flat_map(|node| (0..words).map(move |word| seen(node, word))).collect();
    let indptr = [0, nodes as u32];
    let mut lengths = Batch::new(&indptr, kv);
    let n_tree = [nodes as u32];
    lengths.tree = Some(TreeMask { n_tree: &n_tree, mask: &mask });
    let mut plan = AttentionPlan::new(device, &spec, &lengths, Splits::Auto)?;
    let q = random(device, &[nodes, 32, 128], 9)?;
    let mut out = Tensor::zeros(device, DType::BF16, &[nodes, 32, 128])?;
    let ms = median(device, |_| plan.run(q.view(), cache.view(), out.view_mut(), None))?;
    println!("{{\"op\":\"tree\",\"len\":{len},\"nodes\":{nodes},\"page_size\":{page_size},\"ms\":{ms}}}");
    Ok(())
}
