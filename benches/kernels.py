#!/usr/bin/env python3
"""Our CUDA kernels by themselves, on a machine with a GPU and torch: right numbers first, then times. No Rust is needed, so a kernel can be
changed and tried there within seconds.

    LD_LIBRARY_PATH=<site-packages>/nvidia/cu13/lib python3 benches/kernels.py

Sizes are R1's. Errors are relative, against torch in float32: bf16 rounds to 2e-3. A decode step is timed as a CUDA graph of all layers, each with weights of
its own, so that they come from memory; `early` is whether a kernel may begin before the one before it has ended.
"""
import ctypes
import math
import pathlib
import sys

import torch
import torch.nn.functional as F

sys.path.append(str(pathlib.Path(__file__).parent.parent / "scripts"))
import check_kernels

DTYPE, KIND = torch.bfloat16, "bf16"
HIDDEN, HEADS, KV_HEADS, DIM, INNER, VOCAB, LAYERS = 2048, 16, 2, 128, 11_008, 151_936, 36
BLOCK, CONTEXT, ROOM = 16, 637, 400
U32 = ctypes.c_uint32
driver = ctypes.CDLL("libcuda.so.1")


def check(code, what):
    if code:
        raise SystemExit(f"{what}: error {code}")


def noise(*dims, scale=1.0):
    return (torch.randn(*dims, device="cuda") * scale).to(DTYPE)


def address(tensor):
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def loaded(files, arch):
    """A module of these files."""
    module = ctypes.c_void_p()
    ptx = check_kernels.compiled(ctypes.CDLL("libnvrtc.so.13"), files, arch, KIND)
    check(driver.cuModuleLoadData(ctypes.byref(module), ptx), f"loading {files[0]}")
    return module


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class Config(ctypes.Structure):
    _fields_ = [(name, U32) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")]
    _fields_ += [("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", U32)]


class Strides(ctypes.Structure):
    _fields_ = [(name, U32) for name in ("batch", "head", "row")]


class Sizes(ctypes.Structure):
    _fields_ = [(name, Strides) for name in ("q", "k", "v", "out")]
    _fields_ += [(name, U32) for name in ("m", "n", "d", "group", "causal")] + [("scale", ctypes.c_float)]


class Paged(ctypes.Structure):
    _fields_ = [(name, U32) for name in ("q_row", "kv_heads", "group", "columns", "block_size", "partition", "parts")]
    _fields_ += [("scale", ctypes.c_float)]


class Fresh(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("bias", "cos", "sin", "slots", "keys", "values")]


class Product(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "x", "out", "delta", "norm", "sum")]
    _fields_ += [(name, U32) for name in ("rows", "outputs", "inputs")] + [("eps", ctypes.c_float)]


class Gpu:
    def __init__(self):
        torch.zeros(1, device="cuda")
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count
        arch = "compute_90" if properties.major >= 9 else "compute_80"
        self.modules = [loaded(check_kernels.TENSOR, arch), loaded(["fused.cu"], None)]
        self.found, self.early = {}, False
        print(properties.name)

    def kernel(self, name):
        if name not in self.found:
            function = ctypes.c_void_p()
            if all(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()) for module in self.modules):
                raise SystemExit(f"there is no kernel {name}")
            self.found[name] = function
        return self.found[name]

    def launch(self, name, grid, threads, *arguments, shared=0):
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments))
        early = Attribute(id=6)
        early.value[0] = 1
        stream = torch.cuda.current_stream().cuda_stream
        config = Config(*grid, threads, 1, 1, shared, stream, ctypes.cast(ctypes.byref(early), ctypes.c_void_p), self.early)
        check(driver.cuLaunchKernelEx(ctypes.byref(config), self.kernel(name), pointers, None), name)


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def milliseconds(run, repeat=20):
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat


def milliseconds_as_graph(run):
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            run()
    return milliseconds(graph.replay, 10)


def attend(gpu, batch, heads, kv_heads, m, n, d, causal):
    width = 64 if d <= 64 else 80 if d <= 80 else 128
    q, k, v = (noise(batch, rows, h, d).transpose(1, 2) for rows, h in ((m, heads), (n, kv_heads), (n, kv_heads)))
    out = torch.full((batch, m, heads, d), float("nan"), device="cuda", dtype=DTYPE).transpose(1, 2)
    strides = [Strides(*x.stride()[:3]) for x in (q, k, v, out)]
    sizes = Sizes(*strides, m, n, d, heads // kv_heads, causal, math.log2(math.e) / math.sqrt(d))
    tile = 64 if width == 128 else 128
    grid = (-(-m // tile), heads, batch)
    run = lambda: gpu.launch(f"attend_{KIND}_{width}", grid, 128, *map(address, (q, k, v, out)), sizes)
    run()
    own = slice(0, 2)
    mask = torch.ones(m, n, device="cuda", dtype=torch.bool).tril(n - m) if causal else None
    shared = [x[own].float().repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q[own].float(), *shared, attn_mask=mask)
    ms = milliseconds(run)
    rate = 4 * batch * heads * m * n * d / (2 if causal and m == n else 1) / ms / 1e9
    print(f"attend {batch} x {heads}/{kv_heads} heads x {m} x {n} x {d}: error {error(out[own], expected):.1e}, {ms:.3f} ms, {rate:.0f} TFLOP/s")


class Decoder:
    """A decoder of R1's sizes, fewer layers if wanted, and a cache with a context for each row."""

    def __init__(self, gpu, layers, rows, vocab):
        self.gpu, self.rows = gpu, rows
        qkv = (HEADS + 2 * KV_HEADS) * DIM
        layer = lambda: {
            "norm": 1 + noise(HIDDEN, scale=0.05), "qkv": noise(qkv, HIDDEN, scale=HIDDEN**-0.5), "bias": noise(qkv, scale=0.02),
            "o": noise(HIDDEN, HEADS * DIM, scale=HIDDEN**-0.5), "norm2": 1 + noise(HIDDEN, scale=0.05),
            "gate_up": noise(2 * INNER, HIDDEN, scale=HIDDEN**-0.5), "down": noise(HIDDEN, INNER, scale=INNER**-0.5),
        }
        self.layers = [layer() for _ in range(layers)]
        self.head, self.norm = noise(vocab, HIDDEN, scale=HIDDEN**-0.5), 1 + noise(HIDDEN, scale=0.05)
        self.columns = -(-(CONTEXT + ROOM) // BLOCK)
        blocks = rows * self.columns
        self.table = torch.randperm(blocks, device="cuda").view(rows, self.columns).int()
        self.lens = CONTEXT - torch.arange(rows, device="cuda", dtype=torch.int32)
        last = self.lens.long() - 1
        self.slots = self.table.gather(1, (last // BLOCK)[:, None]).squeeze(1).long() * BLOCK + last % BLOCK
        self.keys = [noise(blocks, KV_HEADS, DIM // 8, BLOCK, 8) for _ in range(layers)]
        self.values = [noise(blocks, KV_HEADS, DIM, BLOCK) for _ in range(layers)]
        rates = 1e6 ** (-torch.arange(0, DIM, 2, device="cuda").float() / DIM)
        angles = torch.arange(CONTEXT + ROOM, device="cuda").float()[:, None] * rates
        self.cos, self.sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        empty = lambda *dims: torch.empty(*dims, device="cuda", dtype=DTYPE)
        self.x, self.sums = noise(rows, HIDDEN), [empty(rows, HIDDEN) for _ in range(2)]
        self.qkv, self.attended, self.delta = empty(rows, qkv), empty(rows, HEADS * DIM), empty(rows, HIDDEN)
        self.inner, self.logits = empty(rows, INNER), empty(rows, vocab)
        longest = self.columns * BLOCK
        parts = max(1, min(512 // (rows * KV_HEADS), -(-longest // 64)))
        self.partition = -(-(-(-longest // parts)) // 64) * 64
        self.parts = -(-longest // self.partition)
        self.scratch = torch.empty(rows * KV_HEADS * self.parts * 8 * (DIM + 4), device="cuda")
        self.counters = torch.zeros(rows * KV_HEADS, device="cuda", dtype=torch.int32)
        torch.cuda.synchronize()

    def product(self, weight, x, out, delta=None, norm=None, total=None, gated=False):
        outputs, inputs = weight.shape
        name, warps, tile = ("product", 16, 16) if norm is None else ("normed_gated_product", 8, 8) if gated else ("normed_product", 8, 16)
        places = [address(t) for t in (weight, x, out, delta, norm, total)]
        blocks = min((outputs // 2 if gated else outputs) // tile, self.gpu.multiprocessors * 16 // warps)
        shared = self.rows * (inputs + 8) * 2 if norm is not None else 0
        self.gpu.launch(f"{name}_{KIND}", (blocks, 1, 1), warps * 32, Product(*places, self.rows, outputs, inputs, 1e-6), shared=shared)

    def attend(self, index):
        fresh = Fresh(*map(address, (self.layers[index]["bias"], self.cos, self.sin, self.slots, self.keys[index], self.values[index])))
        scale = math.log2(math.e) / math.sqrt(DIM)
        sizes = Paged(self.qkv.stride(0), KV_HEADS, HEADS // KV_HEADS, self.columns, BLOCK, self.partition, self.parts, scale)
        tensors = (self.qkv, self.keys[index], self.values[index], self.table, self.lens, self.attended, self.scratch, self.counters)
        self.gpu.launch(f"attend_fresh_{KIND}_{DIM}", (self.parts, KV_HEADS, self.rows), 128, *map(address, tensors), sizes, fresh)

    def step(self):
        x, delta, own = self.x, None, 0
        for index, layer in enumerate(self.layers):
            self.product(layer["qkv"], x, self.qkv, delta, layer["norm"], self.sums[own])
            if delta is not None:
                x, own = self.sums[own], 1 - own
            self.attend(index)
            self.product(layer["o"], self.attended, self.delta)
            delta = self.delta
            self.product(layer["gate_up"], x, self.inner, delta, layer["norm2"], self.sums[own], gated=True)
            x, own = self.sums[own], 1 - own
            self.product(layer["down"], self.inner, self.delta)
        self.product(self.head, x, self.logits, delta, self.norm, self.sums[own])

    def expected(self):
        """The step in float32."""
        norm = lambda x, weight: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight.float()
        x, position = self.x.float(), self.lens.long() - 1
        cos, sin = self.cos.float()[position][:, None], self.sin.float()[position][:, None]
        for index, layer in enumerate(self.layers):
            qkv = norm(x, layer["norm"]) @ layer["qkv"].float().T + layer["bias"].float()
            qkv = qkv.view(self.rows, HEADS + 2 * KV_HEADS, DIM)
            low, high = qkv[:, : HEADS + KV_HEADS].chunk(2, -1)
            turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
            attended = []
            for row, length in enumerate(self.lens.tolist()):
                blocks = self.table[row].long()
                keys = self.keys[index][blocks].float().permute(0, 3, 1, 2, 4).reshape(-1, KV_HEADS, DIM)[:length].clone()
                values = self.values[index][blocks].float().permute(0, 3, 1, 2).reshape(-1, KV_HEADS, DIM)[:length].clone()
                keys[-1], values[-1] = turned[row, HEADS:], qkv[row, HEADS + KV_HEADS :]
                keys, values = (side.repeat_interleave(HEADS // KV_HEADS, 1) for side in (keys, values))
                scores = torch.einsum("hd,nhd->hn", turned[row, :HEADS], keys) / math.sqrt(DIM)
                attended.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values).flatten())
            x = x + torch.stack(attended) @ layer["o"].float().T
            gate, up = (norm(x, layer["norm2"]) @ layer["gate_up"].float().T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ layer["down"].float().T
        return norm(x, self.norm) @ self.head.float().T

    def parts_of_a_layer(self):
        """Each kernel over all layers."""
        each = lambda run: lambda: [run(index, layer) for index, layer in enumerate(self.layers)]
        own = self.sums[0]
        return {
            "q, k, v": each(lambda _, l: self.product(l["qkv"], self.x, self.qkv, self.delta, l["norm"], own)),
            "attention": each(lambda index, _: self.attend(index)),
            "its output": each(lambda _, l: self.product(l["o"], self.attended, self.delta)),
            "gate and up": each(lambda _, l: self.product(l["gate_up"], self.x, self.inner, self.delta, l["norm2"], own, gated=True)),
            "down": each(lambda _, l: self.product(l["down"], self.inner, self.delta)),
        }


def rows_between_products(gpu):
    for rows, width in ((11_664, 1152), (700, 2048), (33, 768), (9, 4096), (7, 1154)):
        x, residual, bias, shift, weight = noise(rows, width), noise(rows, width), noise(width), noise(width), 1 + noise(width, scale=0.1)
        total, out = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        name = f"layer_norm_{KIND}" + ("" if width % 8 else "_wide")
        places = map(address, (x, bias, residual, total, weight, shift, out))
        arguments = [*places, U32(rows), U32(width), ctypes.c_float(1e-6)]
        run = lambda: gpu.launch(name, (-(-rows // 8), 1, 1), 256, *arguments)
        run()
        expected = x.float() + bias.float() + residual.float()
        normed = F.layer_norm(expected.to(DTYPE).float(), (width,), weight.float(), shift.float(), 1e-6)
        print(f"sum and norm of {rows} x {width}: error {error(total, expected):.1e}, {error(out, normed):.1e}, {milliseconds(run) * 1e3:.0f} us")
    x, bias = noise(11_664, 4304) * 8, noise(4304)
    out = torch.empty_like(x)
    arguments = [*map(address, (x, bias, None, out)), U32(len(x)), U32(x.shape[1]), U32(1)]
    run = lambda: gpu.launch(f"finish_rows_{KIND}_wide", (-(-x.numel() // 2048), 1, 1), 256, *arguments)
    run()
    expected = F.gelu(x.float() + bias.float(), approximate="tanh")
    print(f"bias and GELU of {len(x)} x {x.shape[1]}: error {error(out, expected):.1e}, {milliseconds(run) * 1e3:.0f} us")


def main():
    torch.backends.cuda.matmul.allow_tf32 = False
    gpu = Gpu()
    rows_between_products(gpu)
    for sizes in ((16, 16, 16, 729, 729, 72, 0), (16, 8, 8, 32, 761, 64, 0), (1, 16, 2, 600, 600, 128, 1), (1, 16, 2, 88, 600, 128, 1), (2, 4, 4, 5, 7, 72, 0)):
        attend(gpu, *sizes)
    for rows in (1, 3, 8):
        for gpu.early in (0, 1):
            small = Decoder(gpu, 3, rows, 4096)
            expected = small.expected()
            small.logits.fill_(float("nan"))
            small.step()
            print(f"three layers, {rows} rows, early {gpu.early}: error {error(small.logits, expected):.1e}")
    for rows in (1, 2, 4, 8):
        decoder = Decoder(gpu, LAYERS, rows, VOCAB)
        matrices = [m for layer in decoder.layers for m in layer.values()] + [decoder.head]
        num_bytes = sum(2 * m.numel() for m in matrices)
        for gpu.early in (0, 1):
            ms = milliseconds_as_graph(decoder.step)
            each = {name: milliseconds_as_graph(run) / LAYERS * 1e3 for name, run in decoder.parts_of_a_layer().items()}
            print(f"a step of {rows} rows, early {gpu.early}: {ms:.3f} ms, {num_bytes / ms / 1e9:.2f} TB/s; a layer, us: ", end="")
            print(", ".join(f"{name} {us:.1f}" for name, us in each.items()))
        del decoder, matrices
        torch.cuda.empty_cache()
    large = torch.randn(1 << 28, device="cuda")
    print(f"a sum over memory: {4 * large.numel() / milliseconds(lambda: large.sum()) / 1e9:.2f} TB/s")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
