#!/usr/bin/env bash
# run.sh check|bench|tiles|peers [OUT]: writes OUT/check.json, and so on (OUT: results).
exec python3 "$(dirname "$0")/run.py" "$@"
