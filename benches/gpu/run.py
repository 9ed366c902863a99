"""Runs the bundle's binaries on a GPU machine and writes JSON. Standard library only.

check   instruction conformance, all kernel cases, graph replay; compute-sanitizer's memcheck and racecheck over a
        small set, where it is installed
bench   times of our kernels
tiles   times of Hopper's prefill tiles, those in use and others
peers   times of torch's, FlexAttention's and FlashInfer's kernels on the same shapes
"""

import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
TESTS = ["conformance", "conformance_sm90", "cuda", "attention", "append", "quantized", "sparse", "layer", "limits", "cascade", "page_mass", "mla"]
# Small, and together every family.
SANITIZED = [
    ("attention", "empty_rows"),
    ("quantized", "attention_reads"),
    ("append", "append"),
    ("layer", "merging"),
    ("layer", "embedding"),
]
LIMIT_S = 470


def header():
    """What every result file says of where it comes from."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        gpu = f"no nvidia-smi: {error}"
    commit = (HERE / "commit").read_text().strip()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"commit": commit, "gpu": gpu, "date": date}


def call(command, limit_s, env=None):
    """Return code and output of a command; 124 where it ran too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=env)
        return done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return 124, text.decode() if isinstance(text, bytes) else text


def check():
    start = time.monotonic()
    env = dict(os.environ, FERROFLASH_TEST_DEVICES="cuda", RUST_BACKTRACE="0")
    results = []

    def run(name, command):
        left = LIMIT_S - (time.monotonic() - start)
        if left < 5:
            results.append({"name": name, "skipped": "no time left"})
            return
        began = time.monotonic()
        code, text = call(command, left, env)
        result = {"name": name, "ok": code == 0, "seconds": round(time.monotonic() - began, 2)}
        if "skipped: no CUDA device" in text:
            result["skipped"] = "no CUDA device"
        result["output"] = text[-4000:] if code else text[-600:]
        results.append(result)
        print(name, "ok" if code == 0 else f"FAILED ({code})\n{text[-3000:]}", flush=True)

    for test in TESTS:
        run(test, [str(HERE / test), "--nocapture"])
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in ["memcheck", "racecheck"]:
        for test, name in SANITIZED:
            label = f"{tool} {test} {name}"
            if not os.path.exists(sanitizer):
                results.append({"name": label, "skipped": "no compute-sanitizer"})
                continue
            run(label, [sanitizer, "--tool", tool, "--error-exitcode", "9", str(HERE / test), name])
    return {"ok": all(r.get("ok", True) for r in results), "results": results}


def timed(*command):
    code, text = call(command, LIMIT_S)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    if code:
        print(text[-3000:])
    skipped = [line for line in text.splitlines() if line.startswith("skipped")]
    return {"ok": code == 0, "rows": rows, "skipped": skipped, "said": "" if code == 0 else text[-3000:]}


def main():
    verbs = {
        "check": check,
        "bench": lambda: timed(str(HERE / "gpu"), "--bench"),
        "tiles": lambda: timed(str(HERE / "gpu"), "--bench", "tiles"),
        "peers": lambda: timed(sys.executable, str(HERE / "peers.py")),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(f"usage: run.sh {'|'.join(verbs)} [OUT]")
    out = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else "results")
    out.mkdir(parents=True, exist_ok=True)
    result = {**header(), **verbs[sys.argv[1]]()}
    path = out / f"{sys.argv[1]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
