#!/usr/bin/env bash
# The CUDA code at work on a machine without GPU, driver or toolkit: kernels are compiled by NVRTC, and run by tests/gpu, which stands for
# the driver. See docs/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/no-cuda/env.sh

gpu=(--locked --release --manifest-path tests/gpu/Cargo.toml --target-dir "$target/gpu")
cargo fmt --check --manifest-path tests/gpu/Cargo.toml
cargo clippy "${gpu[@]}" --all-targets -- -D warnings
cargo build "${gpu[@]}"
cargo test "${gpu[@]}"
libraries=$(realpath "$target/gpu/release")
for library in cuda.so.1 cublas.so.13 cublasLt.so.13 curand.so.10; do ln -sf libgpu_for_tests.so "$libraries/lib$library"; done
nvrtc=$(find "$NVRTC_DIR" -name 'libnvrtc.so.*' | head -1)
export LD_LIBRARY_PATH=$libraries:$(dirname "$nvrtc")

# Tests that found no GPU, or that are none, have shown nothing.
tests() {
  cargo test --locked --features cuda "$@" -- --show-output | tee "$target/test-cuda.log"
  grep -q '^running [1-9]' "$target/test-cuda.log"
  if grep 'skipped: no GPU' "$target/test-cuda.log"; then exit 1; fi
}
tests --lib where_there_is_a_gpu
tests --test integration gpu::
