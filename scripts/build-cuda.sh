#!/usr/bin/env bash
# The release binary for GPUs, target/cuda/release/tinyllava. Without CUDA_HOME a toolkit is fetched into
# target/cuda-toolkit. CUDA_COMPUTE_CAP chooses the card: 90 (Hopper) by default, 80 for Ampere.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${CUDA_HOME:-}" ]; then
  scripts/cuda-toolkit.sh target/cuda-toolkit
  # shellcheck disable=SC1091
  source target/cuda-toolkit/env.sh
fi
export CUDA_HOME CUDA_PATH="${CUDA_PATH:-$CUDA_HOME}" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}"
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER="$PWD/scripts/cuda-linker.sh"
cargo build --locked --release --features cuda --target-dir "${CUDA_TARGET_DIR:-target/cuda}"

binary="${CUDA_TARGET_DIR:-target/cuda}/release/tinyllava"
needed=$(readelf -d "$binary" | grep -E 'NEEDED.*lib(cu|nv)' || true)
[ -z "$needed" ] || { echo "$binary would not start without CUDA:" "$needed" >&2; exit 1; }
ls -l "$binary"
