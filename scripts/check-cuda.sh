#!/usr/bin/env bash
# Type check and clippy of everything behind the feature `cuda`, tests included, and our kernels through NVRTC, on a machine without
# GPU and toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."

export PATH="$PWD/scripts/no-cuda:$PATH" CUDA_COMPUTE_CAP=90
# The stand-in's empty kernels must not get into a real build.
cargo clippy --locked --features cuda --lib --bins --target-dir target/check-cuda -- -D warnings
cargo clippy --locked --features cuda --lib --profile test --target-dir target/check-cuda -- -D warnings
scripts/check_kernels.py target/nvrtc
