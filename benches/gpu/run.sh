#!/usr/bin/env bash
# run.sh check|bench|peers [OUT]: writes OUT/check.json, bench.json or peers.json (OUT: results).
exec python3 "$(dirname "$0")/run.py" "$@"
