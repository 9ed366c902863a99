//! Attention on this machine's CPU: `cargo bench --bench attention`.
//!
//! Prefill counts the lower half of the matrix (two products, causal): its `Gelem/s` are GFLOP/s. Decode
//! counts the bytes of K and V, read once, in GB/s; `quantized` does so for each KV format, and appends tokens to
//! it. `benches/peers/torch_cpu.py` times torch on the same shapes and prints the ratios.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ferroflash::op::append_kv::AppendPlan;
use ferroflash::op::attention::AttentionPlan;
use ferroflash::op::{decode, prefill};
use ferroflash::{
    AttentionSpec, Batch, DType, Device, Kv, KvCache, KvCacheSpec, KvFormat, KvTable, Splits, Tensor,
};
use half::{bf16, f16};

/// Numbers that are neither constant nor sorted.
fn tensor(device: &Device, dtype: DType, shape: &[usize]) -> Tensor {
    let n: usize = shape.iter().product();
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 2.0
    };
    match dtype {
        DType::F16 => {
            Tensor::from_slice(device, &(0..n).map(|_| f16::from_f32(next())).collect::<Vec<_>>(), shape)
        }
        DType::BF16 => {
            Tensor::from_slice(device, &(0..n).map(|_| bf16::from_f32(next())).collect::<Vec<_>>(), shape)
        }
        _ => Tensor::from_slice(device, &(0..n).map(|_| next()).collect::<Vec<_>>(), shape),
    }
    .expect("enough memory")
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn prefill_bench(c: &mut Criterion) {
    let device = Device::auto();
    let mut group = c.benchmark_group("prefill");
    group.sample_size(10);
    for (heads, kv_heads, len, dim) in
        [(8, 8, 1024, 128), (8, 8, 4096, 128), (32, 32, 1024, 64), (32, 8, 1024, 128), (8, 2, 4096, 128)]
    {
        for dtype in DTYPES {
            let q = tensor(&device, dtype, &[len, heads, dim]);
            let k = tensor(&device, dtype, &[len, kv_heads, dim]);
            let v = tensor(&device, dtype, &[len, kv_heads, dim]);
            let mut out = tensor(&device, dtype, &[len, heads, dim]);
            let spec = AttentionSpec::new(heads, kv_heads, dim).causal();
            let indptr = [0, len as u32];
            let batch = Batch::new(&indptr, KvTable::Ragged { kv_indptr: &indptr });
            let mut plan = prefill::plan(&device, &spec, &batch).expect("a valid batch");
            group.throughput(Throughput::Elements((2 * heads * len * len * dim) as u64));
            let id = BenchmarkId::new(format!("{heads}x{kv_heads}x{len}x{dim}"), dtype);
            group.bench_function(id, |b| {
                b.iter(|| run(&mut plan, &q, Kv::Ragged { k: k.view(), v: v.view() }, &mut out));
            });
        }
    }
}

fn decode_bench(c: &mut Criterion) {
    let device = Device::auto();
    let mut group = c.benchmark_group("decode");
    group.sample_size(10);
    let (heads, kv_heads, dim, page_size) = (32, 8, 128, 16);
    for (len, batch_size) in [(4096usize, 1usize), (4096, 8), (32768, 1), (32768, 8)] {
        for dtype in DTYPES {
            let pages = len / page_size * batch_size;
            let q = tensor(&device, dtype, &[batch_size, heads, dim]);
            let mut out = tensor(&device, dtype, &[batch_size, heads, dim]);
            let spec = AttentionSpec::new(heads, kv_heads, dim).causal();
            let qo_indptr: Vec<u32> = (0..=batch_size as u32).collect();
            let bytes = 2 * batch_size * len * kv_heads * dim * dtype.size();
            group.throughput(Throughput::BytesDecimal(bytes as u64));
            let shape = [pages, kv_heads, page_size, dim];
            let (k, v) = (tensor(&device, dtype, &shape), tensor(&device, dtype, &shape));
            let name = format!("{len}x{batch_size}");

            let contiguous = [batch_size * len, kv_heads, dim];
            let kv = Kv::Ragged {
                k: k.reshaped(&contiguous).expect("same size"),
                v: v.reshaped(&contiguous).expect("same size"),
            };
            let kv_indptr: Vec<u32> = (0..=batch_size as u32).map(|i| i * len as u32).collect();
            let batch = Batch::new(&qo_indptr, KvTable::Ragged { kv_indptr: &kv_indptr });
            let mut plan = decode::plan(&device, &spec, &batch, Splits::Auto).expect("a valid batch");
            group.bench_function(BenchmarkId::new(format!("ragged {name}"), dtype), |b| {
                b.iter(|| run(&mut plan, &q, kv, &mut out));
            });

            // A stride through the pool, so that no two pages follow each other.
            let table: Vec<u32> = (0..pages).map(|i| (i * 7919 % pages) as u32).collect();
            let seq_lens = vec![len as u32; batch_size];
            let table = KvTable::Block {
                page_size,
                block_table: &table,
                max_blocks: len / page_size,
                seq_lens: &seq_lens,
            };
            let batch = Batch::new(&qo_indptr, table);
            let mut plan = decode::plan(&device, &spec, &batch, Splits::Auto).expect("a valid batch");
            let kv = Kv::Paged { k: k.view(), v: v.view() };
            group.bench_function(BenchmarkId::new(format!("paged {name}"), dtype), |b| {
                b.iter(|| run(&mut plan, &q, kv, &mut out));
            });
        }
    }
}

/// One token over a cache of each format, and 4096 tokens into it; bytes are those of the format.
fn quantized_bench(c: &mut Criterion) {
    let device = Device::auto();
    let mut group = c.benchmark_group("quantized");
    group.sample_size(10);
    let (heads, kv_heads, dim, page_size, len) = (32, 8, 128, 64, 4096);
    let (pages, one, all, seq_lens) = (len / page_size, [0, 1], [0, len as u32], [len as u32]);
    let table: Vec<u32> = (0..pages).map(|i| (i * 7919 % pages) as u32).collect();
    let kv = KvTable::Block { page_size, block_table: &table, max_blocks: pages, seq_lens: &seq_lens };
    let q = tensor(&device, DType::BF16, &[1, heads, dim]);
    let k = tensor(&device, DType::BF16, &[len, kv_heads, dim]);
    let mut out = tensor(&device, DType::BF16, &[1, heads, dim]);
    let formats = [
        ("bf16", KvFormat::Float(DType::BF16)),
        ("int4", KvFormat::int4(1)),
        ("int8", KvFormat::INT8),
        ("fp8", KvFormat::FP8),
    ];
    for (name, format) in formats {
        let spec = KvCacheSpec {
            num_pages: pages,
            page_size,
            num_kv_heads: kv_heads,
            head_dim: dim,
            format,
            summaries: false,
        };
        group.throughput(Throughput::BytesDecimal((pages * spec.page_bytes()) as u64));
        let mut cache = KvCache::new(&device, spec).expect("enough memory");
        let spec = AttentionSpec {
            quantized_kv: format.is_quantized(),
            ..AttentionSpec::new(heads, kv_heads, dim).causal()
        };
        let tail_slots: &[u32] = if format.has_tails() { &[0] } else { &[] };
        let all = Batch { tail_slots, ..Batch::new(&all, kv) };
        let append = AppendPlan::from_batch(&device, &spec, None, &all).expect("a valid batch");
        append.run(None, k.view(), k.view(), cache.view_mut()).expect("the planned tensors");
        let step = Batch { tail_slots, ..Batch::new(&one, kv) };
        let mut plan = decode::plan(&device, &spec, &step, Splits::Auto).expect("a valid batch");
        group.bench_function(BenchmarkId::new(format!("decode {len}x1"), name), |b| {
            b.iter(|| run(&mut plan, &q, cache.view(), &mut out));
        });
        group.throughput(Throughput::Elements(len as u64));
        group.bench_function(BenchmarkId::new(format!("append {len}"), name), |b| {
            b.iter(|| append.run(None, k.view(), k.view(), cache.view_mut()).expect("the planned tensors"));
        });
    }
}

fn run(plan: &mut AttentionPlan, q: &Tensor, kv: Kv<'_>, out: &mut Tensor) {
    plan.run(q.view(), kv, out.view_mut(), None).expect("the planned tensors");
}

/// The ceiling of decode: summing 256 MB.
fn read_bench(c: &mut Criterion) {
    use rayon::prelude::*;
    let data = vec![1u64; 32 << 20];
    let mut group = c.benchmark_group("memory");
    group.sample_size(10);
    group.throughput(Throughput::BytesDecimal(256 << 20));
    group.bench_function("read", |b| {
        b.iter(|| {
            data.par_chunks(1 << 16).map(|c| c.iter().fold(0u64, |a, x| a.wrapping_add(*x))).sum::<u64>()
        })
    });
}

criterion_group!(benches, read_bench, prefill_bench, decode_bench, quantized_bench);
criterion_main!(benches);
