#!/usr/bin/env bash
# cuda-toolkit.sh DIR: puts a CUDA 13.0 toolkit into DIR from pip wheels (about 700 MB), so that the feature `cuda`
# builds on a machine without GPU, driver or toolkit. Afterwards: source DIR/env.sh
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: cuda-toolkit.sh DIR" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-curand==10.4.0.35 nvidia-cublas==13.0.2.14)

# No wheel has libcuda, which comes with a driver: a stub whose every call answers 100, "no device".
stub_driver() {
  mkdir -p "$1/stubs"
  {
    grep -ohE '\bcu[A-Z][A-Za-z0-9_]*' "$dir/toolkit/include/cuda.h"
    cat "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-*/src/driver/sys/mod.rs 2>/dev/null |
      grep -oE '\bcu[A-Z][A-Za-z0-9_]*' || true
  } | sort -u | awk '{ print "int " $1 "(void) { return 100; }" }' >"$1/stubs/stub.c"
  cc -shared -fPIC -w -fno-builtin -Wl,-soname,libcuda.so.1 -o "$1/stubs/libcuda.so" "$1/stubs/stub.c"
  rm "$1/stubs/stub.c"
}

if [ ! -e "$dir/toolkit/lib/stubs/libcuda.so" ]; then
  rm -rf "$dir/unpacked" "$dir/toolkit"
  python3 -m pip download -q --no-deps -d "$dir/wheels" "${wheels[@]}"
  for wheel in "$dir"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$dir/unpacked"; done
  mv "$dir/unpacked/nvidia/cu13" "$dir/toolkit"
  rm -rf "$dir/unpacked" "$dir/wheels"
  chmod +x "$dir"/toolkit/bin/* "$dir"/toolkit/nvvm/bin/*
  ln -s lib "$dir/toolkit/lib64"
  for library in cublas.so.13 cublasLt.so.13 cudart.so.13 curand.so.10 nvrtc.so.13; do
    ln -s "lib$library" "$dir/toolkit/lib/lib${library%.so.*}.so"
  done
  stub_driver "$dir/toolkit/lib"
fi

cat >"$dir/env.sh" <<ENV
export CUDA_HOME=$dir/toolkit CUDA_PATH=$dir/toolkit PATH=$dir/toolkit/bin:\$PATH
export CUDA_COMPUTE_CAP=\${CUDA_COMPUTE_CAP:-90}
ENV
"$dir/toolkit/bin/nvcc" --version | tail -1
