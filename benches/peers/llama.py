#!/usr/bin/env python3
"""Times ferroflash-serve and llama.cpp on the same GGUF file, one after the other.

    python3 benches/peers/llama.py models/SmolLM2-135M-Instruct.Q4_1.gguf

Needs llama-cpp-python and a release build of ferroflash-serve. Both get the same token ids and all cores;
llama.cpp runs without flash attention, which is faster here. Best of three each.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from llama_cpp import Llama

ROOT = Path(__file__).resolve().parents[2]
THREADS = len(os.sched_getaffinity(0))


def prompt(n: int, shift: int = 0) -> list[int]:
    return [(i * 37 + shift) % 40_000 + 100 for i in range(n)]


def ours(model: str, requests: list[dict]) -> tuple[float, float]:
    """Tokens per second of prefill and of decoding: the best of three runs' summaries."""
    lines = "".join(json.dumps(r) + "\n" for r in requests)
    best = (0.0, 0.0)
    for _ in range(3):
        args = [ROOT / "target/release/ferroflash-serve", "--model", model, "--threads", str(THREADS)]
        log = subprocess.run(args, input=lines, text=True, capture_output=True, check=True).stderr
        prefill, decode = map(float, re.search(r"prefill (\d+) tok/s, decode (\d+) tok/s; \d+ preemptions", log).groups())
        best = (max(best[0], prefill), max(best[1], decode))
    return best


def main() -> None:
    model = sys.argv[1]
    llama = Llama(model, n_ctx=4096, n_threads=THREADS, n_threads_batch=THREADS, n_batch=512, flash_attn=False, verbose=False)

    def eval_rate(ids: list[int]) -> float:
        llama.reset()
        start = time.perf_counter()
        llama.eval(ids)
        return len(ids) / (time.perf_counter() - start)

    def decode_rate(depth: int) -> float:
        llama.reset()
        llama.eval(prompt(depth))
        start = time.perf_counter()
        for i in range(64):
            llama.eval([100 + i])
        return 64 / (time.perf_counter() - start)

    print(f"| {THREADS} threads, tok/s | ferroflash | llama.cpp | ratio |\n|---|---|---|---|")

    def row(name: str, our: float, their: float) -> None:
        print(f"| {name} | {our:.0f} | {their:.0f} | **{our / their:.2f}** |", flush=True)

    for n in (512, 2048):
        our, _ = ours(model, [{"prompt": prompt(n), "max_tokens": 1, "ignore_eos": True}])
        row(f"prompt of {n}", our, max(eval_rate(prompt(n)) for _ in range(3)))
    for depth in (512, 4096 - 128):
        _, our = ours(model, [{"prompt": prompt(depth), "max_tokens": 96, "ignore_eos": True}])
        row(f"decode at {depth}", our, max(decode_rate(depth) for _ in range(3)))
    _, our = ours(model, [{"prompt": prompt(512, s), "max_tokens": 96, "ignore_eos": True} for s in range(8)])
    print(f"| decode at 512, eight together | {our:.0f} | not offered by llama-cpp-python | |")


if __name__ == "__main__":
    main()
