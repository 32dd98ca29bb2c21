#!/usr/bin/env bash
# Links for cargo. What comes out needing CUDA's libraries is linked again, with functions that look for them when they are
# first called: the program then starts on a machine without a driver too. See cuda-trampolines.py.
set -euo pipefail

cc "$@"
previous= output=
for argument in "$@"; do
  [ "$previous" != -o ] || output=$argument
  previous=$argument
done
readelf -d "$output" 2>/dev/null | grep -q 'NEEDED.*\[libcuda\.so' || exit 0

libraries=$(mktemp -d)
trap 'rm -rf "$libraries"' EXIT
"$(dirname "$0")/cuda-trampolines.py" "$output" "$libraries"
cp "$CUDA_HOME/lib/libcudart_static.a" "$libraries/libcudart.a"
cc "-L$libraries" "$@" -ldl -lrt -lpthread
