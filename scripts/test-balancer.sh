#!/usr/bin/env bash
# Three servers behind the shipped configurations of HAProxy and nginx. Arguments go to Python's unittest.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/need-ffmpeg.sh
scripts/need-balancers.sh
[ -x target/debug/tinyllava ] || cargo build --locked --bin tinyllava
cd tests/balancer
exec python3 -B -m unittest "${@:-test_balancers}"
