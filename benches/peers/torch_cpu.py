#!/usr/bin/env python3
"""Times ferroflash and torch's scaled_dot_product_attention on the same shapes, one after the other.

    python3 benches/peers/torch_cpu.py [--quick]

Needs torch and cargo. Runs `cargo bench --bench attention`, then torch with the same number of threads,
and prints a Markdown table. Prefill is causal and counts the lower half (GFLOP/s); decode counts K and V
read once (GB/s). For decode torch's better form is taken: `enable_gqa`, or the query heads of a KV head
folded into the query length by hand.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PREFILL = [(8, 8, 1024, 128), (8, 8, 4096, 128), (32, 32, 1024, 64), (32, 8, 1024, 128), (8, 2, 4096, 128)]
DECODE = [(4096, 1), (4096, 8), (32768, 1), (32768, 8)]


def ours(*path: str) -> float:
    """Median seconds of a bench."""
    file = ROOT / "target" / "criterion" / Path(*path) / "new" / "estimates.json"
    return json.loads(file.read_text())["median"]["point_estimate"] * 1e-9


def theirs(f) -> float:
    f()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(name: str, dtype: str, unit: str, amount: float, our_s: float, torch_s: float) -> None:
    print(f"| {name} | {dtype} | {amount / our_s / 1e9:.1f} | {amount / torch_s / 1e9:.1f} | {unit} "
          f"| **{torch_s / our_s:.2f}** |", flush=True)


def main() -> None:
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    env = dict(os.environ, RAYON_NUM_THREADS=str(threads))
    args = ["cargo", "bench", "--quiet", "--bench", "attention", "--", *sys.argv[1:]]
    subprocess.run(args, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    read = ours("memory", "read")
    print(f"{threads} threads; memory read {(256 << 20) / read / 1e9:.1f} GB/s; torch {torch.__version__}\n")
    print("| shape | dtype | ferroflash | torch | | ratio |\n|---|---|---|---|---|---|")
    for heads, kv_heads, length, dim in PREFILL:
        for name, dtype in DTYPES.items():
            q = torch.randn(1, heads, length, dim, dtype=dtype)
            k, v = (torch.randn(1, kv_heads, length, dim, dtype=dtype) for _ in range(2))
            torch_s = theirs(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads))
            shape = f"{heads}x{kv_heads}x{length}x{dim}"
            row(f"prefill {shape}", name, "GFLOP/s", 2 * heads * length**2 * dim, ours("prefill", shape, name), torch_s)
    heads, kv_heads, dim = 32, 8, 128
    for length, batch in DECODE:
        for name, dtype in DTYPES.items():
            q = torch.randn(batch, heads, 1, dim, dtype=dtype)
            k, v = (torch.randn(batch, kv_heads, length, dim, dtype=dtype) for _ in range(2))
            folded = q.view(batch, kv_heads, heads // kv_heads, dim)
            torch_s = min(
                theirs(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
                theirs(lambda: F.scaled_dot_product_attention(folded, k, v)),
            )
            amount = 2 * batch * length * kv_heads * dim * k.element_size()
            for place in ("ragged", "paged"):
                row(f"decode {place} {length}, batch {batch}", name, "GB/s", amount,
                    ours("decode", f"{place} {length}x{batch}", name), torch_s)


if __name__ == "__main__":
    main()
