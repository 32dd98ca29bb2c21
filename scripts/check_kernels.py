#!/usr/bin/env python3
"""check_kernels.py DIR: compiles our CUDA kernels with NVRTC, as the server does when it first needs them, on a machine without GPU, driver or
toolkit. NVRTC comes from a pip wheel (50 MB) to DIR. `src/model/device/cuda/launch.rs` has the same sources and options; `benches/kernels.py` takes
them from here.
"""
import ctypes
import os
import pathlib
import re
import subprocess
import sys

WHEEL = "nvidia-cuda-nvrtc==13.0.88"
KERNELS = pathlib.Path(__file__).parent.parent / "src/model/device/cuda/kernels"
OPTIONS = ["-default-device"]
TYPES = {"f32": "-DONLY=32", "f16": "-DONLY=16", "bf16": "-DONLY=0"}
TENSOR = ("tensor_cores.cu", "attention.cu", "products.cu")
# Files that are one source, what they are compiled for, and in which types.
SOURCES = [
    (("fused.cu",), None, TYPES),
    (("largest.cu",), None, ("f32",)),
    (TENSOR, "compute_80", ("f16", "bf16")),
    (TENSOR, "compute_90", ("f16", "bf16")),
]


def library(folder):
    """NVRTC; it finds the rest of itself by the loader's path only, so this program starts anew with that."""
    found = next(folder.glob("**/libnvrtc.so.*"), None)
    if found is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, WHEEL], check=True)
        found = next(folder.glob("**/libnvrtc.so.*"))
    path = os.environ.get("LD_LIBRARY_PATH", "")
    if str(found.parent) not in path:
        os.environ["LD_LIBRARY_PATH"] = f"{found.parent}:{path}"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return ctypes.CDLL(str(found))


def ptx(nvrtc, source, options, headers={}):
    """PTX of a source; `headers` are those that it may include beside files."""
    texts = [(ctypes.c_char_p * len(headers))(*(text.encode() for text in part)) for part in (headers.values(), headers)]
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, len(headers), *texts)
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    what = "ProgramLog" if failed else "PTX"
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    if failed:
        raise SystemExit(text.value.decode())
    return text.value


def compiled(nvrtc, files, arch, kind):
    """PTX of these files as one source, for a type; `arch` is what it is compiled for, or None for any card."""
    source = "".join((KERNELS / file).read_text() for file in files)
    return ptx(nvrtc, source, OPTIONS + [TYPES[kind]] + ([f"--gpu-architecture={arch}"] if arch else []))


def main():
    folder = pathlib.Path(sys.argv[1]).absolute()
    nvrtc = library(folder)
    for files, arch, types in SOURCES:
        for kind in types:
            names = re.findall(rb"\.entry (\w+)\(", compiled(nvrtc, files, arch, kind))
            if not names:
                raise SystemExit(f"{files[0]} has no kernels in {kind}")
            print(f"{' '.join(files)} for {arch or 'any card'} in {kind}: {len(names)} kernels")


if __name__ == "__main__":
    main()
