#!/usr/bin/env bash
# Installs the peers from PyPI into .venv beside this file: about 8 GB, and llama.cpp built for this very processor (10 to 25
# minutes). Needs Python 3.11 or 3.12 with venv, and a C++ compiler (with GCC 12 and AMX: clang). Run again it only does what is
# missing. JOBS: compilers at once.
set -euo pipefail
cd "$(dirname "$0")"

llama=llama_cpp_python
version=0.3.36
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# GCC 12 leaves out most of what the tile unit of Intel's processors (AMX) is set up with, and llama.cpp then crashes.
if grep -qs amx_int8 /proc/cpuinfo && [ -z "${CC:-}" ] && [ "$(cc -dumpversion)" = 12 ]; then
  command -v clang >/dev/null || { echo "for this processor llama.cpp needs clang: apt-get install clang libomp-dev" >&2; exit 1; }
  export CC=clang CXX=clang++
fi

# Its wheels are for any processor, so it is built here: with AVX-512 where there is any, threads by OpenMP, and the
# fast products that llama.cpp has for repacked weights.
if ! ls .wheels/$llama-$version-*.whl >/dev/null 2>&1; then
  CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON -DGGML_CPU_REPACK=ON -DLLAVA_BUILD=OFF" \
    CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-1}" pip wheel --no-deps --no-binary llama-cpp-python -w .wheels "llama-cpp-python==$version"
fi
pip install -r requirements.txt .wheels/$llama-$version-*.whl
