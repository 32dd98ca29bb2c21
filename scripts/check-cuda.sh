#!/usr/bin/env bash
# Type check and clippy of everything behind the feature `cuda`, tests included, and our kernels through NVRTC, on a machine without
# GPU and toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/no-cuda/env.sh

cargo clippy --locked --features cuda --all-targets -- -D warnings
scripts/check_kernels.py "$NVRTC_DIR"
