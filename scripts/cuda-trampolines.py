#!/usr/bin/env python3
"""cuda-trampolines.py BINARY DIR: static libraries that stand for CUDA's shared ones.

For each function that BINARY takes from libcuda, libcublas, libcublasLt, libcurand and libnvrtc, DIR/lib*.a has one of
the same name, which looks for the real library at its first call and jumps there. Without that library it returns the
library's own error, "no device" or "not initialised". So a binary linked with them starts on a machine without a driver.
x86-64 only.
"""
import pathlib
import re
import subprocess
import sys
import tempfile

# Library, its functions, names to open, what a missing function returns. The first that matches takes a function.
LIBRARIES = [
    ("cublasLt", "cublasLt", ["libcublasLt.so.13", "libcublasLt.so"], 1),
    ("cublas", "cublas", ["libcublas.so.13", "libcublas.so"], 1),
    ("curand", "curand", ["libcurand.so.10", "libcurand.so"], 203),
    ("nvrtc", "nvrtc", ["libnvrtc.so.13", "libnvrtc.so"], 7),
    ("cuda", "cu[A-Z]", ["libcuda.so.1"], 100),
]

RESOLVER = """
#include <dlfcn.h>
#define HIDDEN __attribute__((visibility("hidden")))
HIDDEN void *{lib}_slots[{count}];
static const char *const names[] = {{ {names} }};
static const char *const files[] = {{ {files} }};
static long missing(void) {{ return {error}; }}
/* May run twice at the same time: both find the same. */
HIDDEN void *{lib}_resolve(unsigned long index) {{
  static void *volatile library;
  for (unsigned i = 0; !library && i < sizeof files / sizeof *files; i++)
    library = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
  void *function = library ? dlsym(library, names[index]) : 0;
  return {lib}_slots[index] = function ? function : (void *)missing;
}}
"""

# Jumps through the slot; at the first call asks the resolver, with all argument registers kept.
FUNCTION = """
.globl {name}
.type {name}, @function
{name}:
  mov {lib}_slots+{offset}(%rip), %r11
  test %r11, %r11
  jz 1f
  jmp *%r11
1: mov ${index}, %r11d
  jmp {lib}_first_call
"""
INTEGERS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9", "rax"]


def first_call(lib):
    lines = [f"{lib}_first_call:", "push %rbp", "mov %rsp, %rbp"]
    lines += [f"push %{register}" for register in INTEGERS]
    # Seven pushed words and one of padding: the stack stays aligned to 16 bytes.
    lines += ["sub $136, %rsp"]
    lines += [f"movups %xmm{i}, {16 * i}(%rsp)" for i in range(8)]
    lines += ["mov %r11, %rdi", f"call {lib}_resolve", "mov %rax, %r11"]
    lines += [f"movups {16 * i}(%rsp), %xmm{i}" for i in range(8)]
    lines += ["add $136, %rsp"]
    lines += [f"pop %{register}" for register in reversed(INTEGERS)]
    lines += ["pop %rbp", "jmp *%r11", '.section .note.GNU-stack, "", @progbits']
    return "\n".join(lines) + "\n"


def quoted(words):
    return ", ".join(f'"{word}"' for word in words) or "0"


def main():
    binary, out = sys.argv[1], pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", binary], text=True, capture_output=True, check=True).stdout
    left = {name.split("@")[0] for name in re.findall(r" U (\S+)", symbols)}
    for lib, pattern, files, error in LIBRARIES:
        names = sorted(name for name in left if re.match(pattern, name))
        left.difference_update(names)
        resolver = RESOLVER.format(
            lib=lib, count=max(len(names), 1), names=quoted(names), files=quoted(files), error=error
        )
        functions = "".join(
            FUNCTION.format(name=name, lib=lib, index=index, offset=8 * index) for index, name in enumerate(names)
        )
        archive = out / f"lib{lib}.a"
        archive.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as work:
            sources = [pathlib.Path(work, f"{lib}_resolver.c"), pathlib.Path(work, f"{lib}_functions.s")]
            sources[0].write_text(resolver)
            sources[1].write_text(".text\n" + functions + first_call(lib))
            objects = [str(source.with_suffix(".o")) for source in sources]
            for source, target in zip(sources, objects):
                subprocess.run(["cc", "-O2", "-fPIC", "-c", source, "-o", target], check=True)
            subprocess.run(["ar", "rcs", archive, *objects], check=True)


if __name__ == "__main__":
    main()
