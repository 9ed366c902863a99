#!/usr/bin/env bash
# Builds target/gpu-bundle: test and bench binaries and scripts for a machine with an NVIDIA driver, glibc and Python,
# and no Rust; and target/gpu-bundle.tar.xz, the same to be carried. There call `run.sh check`, `run.sh bench`,
# `run.sh tiles`, `run.sh peers`. The bench has Hopper's tiles that are not in use too, where their PTX can be compiled.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=target/gpu-bundle
rm -rf "$out"
mkdir -p "$out"
tests=(attention append quantized sparse layer limits cascade page_mass mla conformance conformance_sm90 cuda)
args=()
for test in "${tests[@]}"; do args+=(--test "$test"); done
bench() { cargo bench --quiet --no-run --features "$1" --bench gpu --message-format=json; }
{
  cargo test --quiet --no-run --features cuda "${args[@]}" --message-format=json
  bench alternative-tiles || { echo "skipped: tiles that are not in use" >&2; bench cuda; }
} | python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line) if line.startswith("{") else {}
    if message.get("executable"):
        shutil.copy(message["executable"], sys.argv[1] + "/" + message["target"]["name"])
' "$out"
cp benches/gpu/run.sh benches/gpu/run.py benches/gpu/peers.py "$out/"
git rev-parse HEAD >"$out/commit"
strip "$out"/{attention,append,quantized,sparse,layer,limits,cascade,page_mass,mla,conformance,conformance_sm90,cuda,gpu}
# Every binary has the same PTX in it: a window that reaches from one to the next finds it.
XZ_OPT=-9 tar --create --xz --file "$out.tar.xz" --directory target gpu-bundle
bytes=$(wc -c <"$out.tar.xz")
echo "$out.tar.xz: $bytes bytes"
[ "$bytes" -lt 30000000 ] || { echo "larger than 30 MB"; exit 1; }
