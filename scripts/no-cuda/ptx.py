#!/usr/bin/env python3
"""ptx.py SOURCE OUT: what `nvcc --ptx` would write, by the NVRTC and the headers that `fetch` has put into NVRTC_DIR."""
import os
import pathlib
import subprocess
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import check_kernels

# cuda_fp16.h and its like, and the C++ library they include.
HEADERS = ["nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85", "nvidia-cuda-crt==13.0.88"]
# A compiler without a C library.
OWN = {
    "stdint.h": "#include <cuda/std/cstdint>",
    "cmath": "#include <math.h>",
    "math.h": """#pragma once
#define INFINITY __int_as_float(0x7f800000)
#define M_PI 3.14159265358979323846
#define M_2_SQRTPI 1.12837916709551257390
#define M_SQRT1_2 0.70710678118654752440""",
}


def fetch(folder):
    """NVRTC and headers, from pip wheels (55 MB)."""
    check_kernels.library(folder)
    if not next(folder.glob("**/cuda_fp16.h"), None):
        # A folder of their own: pip adds nothing to one that is there.
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "headers"]
        subprocess.run(pip + HEADERS, check=True)


def main():
    folder = pathlib.Path(os.environ["NVRTC_DIR"]).absolute()
    if sys.argv[1:] == ["fetch"]:
        return fetch(folder)
    source, out = map(pathlib.Path, sys.argv[1:])
    include = next(folder.glob("**/cuda_fp16.h")).parent
    paths = [source.parent, include, include / "cccl"]
    options = [*check_kernels.OPTIONS, "--gpu-architecture=compute_90", "-std=c++17", *(f"-I{path}" for path in paths)]
    out.write_bytes(check_kernels.ptx(check_kernels.library(folder), source.read_text(), options, OWN))


if __name__ == "__main__":
    main()
