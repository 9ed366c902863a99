#!/usr/bin/env bash
# Reproduces shim/tiny/model/ on a Debian machine: the text from its packages, the trainer's libraries from pip.
set -euo pipefail
cd "$(dirname "$0")"
command -v bible >/dev/null || { apt-get update && apt-get install -y bible-kjv; }
[ -d ../../target/train-venv ] || python3 -m venv ../../target/train-venv
../../target/train-venv/bin/pip install --quiet torch==2.15.0 tokenizers==0.23.3 safetensors numpy
exec ../../target/train-venv/bin/python train.py "$@"
