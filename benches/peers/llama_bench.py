"""Times llama.cpp on CPU with a random GGUF of a preset's decoder: prefill, and decode steps at batch 1 and 8.

    taskset -c 0,1 python llama_bench.py --preset r1 --format q4_0 --json llama-r1-q4_0.json

The weights are random blocks with sane scales: llama.cpp's speed does not depend on them, and no number overflows.
Nothing else may run on those cores. See README.md for what each number means.
"""
import ctypes
import importlib.metadata
import statistics
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

import common

Q = gguf.GGMLQuantizationType
# Hidden, MLP, layers, heads, KV heads, vocabulary; tokens of a prompt.
PRESETS = {
    "small": ((256, 704, 6, 8, 2, 2048), 191),
    "mid": ((896, 4864, 24, 14, 2, 151_936), 319),
    "r1": ((2048, 11_008, 36, 16, 2, 151_936), 575),
}
# Matrices, and the head (which is the embedding too). The "+" ones keep the head in more bits.
FORMATS = {
    "q8_0": (Q.Q8_0, Q.Q8_0),
    "q4_0": (Q.Q4_0, Q.Q4_0),
    "q4_0+q8_0": (Q.Q4_0, Q.Q8_0),
    "q4_k": (Q.Q4_K, Q.Q4_K),
    "q4_k+q6_k": (Q.Q4_K, Q.Q6_K),
}
# Blocks of noise that all tensors repeat.
NOISE_BLOCKS = 1 << 18
WEIGHT_STD = 0.02


def parse():
    parser = common.arguments("Times llama.cpp on CPU.")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--format", choices=FORMATS, default="q8_0")
    parser.add_argument("--gguf", type=Path, help="where the model is kept [default: .data/PRESET-FORMAT.gguf]")
    parser.add_argument("--prompt-tokens", type=common.at_least_one)
    parser.add_argument("--batch", default="1,8", help="sequences decoded together")
    parser.add_argument("--decode-steps", type=common.at_least_one, default=32)
    parser.add_argument("--repeat", type=common.at_least_one, default=5)
    parser.add_argument("--ubatch", type=common.at_least_one, default=1024, help="tokens computed together; llama.cpp's own default is 512")
    parser.add_argument("--unified", action="store_true", help="one cache for all sequences, instead of llama.cpp's own default of one each")
    args = parser.parse_args()
    args.batch = [common.at_least_one(n) for n in args.batch.split(",")]
    return args


def blocks(kind):
    """`[NOISE_BLOCKS, block bytes]`: random quants, scales that give weights of about `WEIGHT_STD`, mean near 0."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (NOISE_BLOCKS, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)

    def put(at, value):
        noise[:, at : at + 2] = np.full(NOISE_BLOCKS, value, np.float16).view(np.uint8).reshape(-1, 2)

    if kind == Q.Q8_0:
        put(0, WEIGHT_STD / 74)
    elif kind == Q.Q4_0:
        put(0, WEIGHT_STD / 4.6)
    elif kind == Q.Q4_K:  # scales and offsets of 6 bits each, about 32; the offset is 7.5 scales
        put(0, WEIGHT_STD / 250)
        put(2, 7.5 * WEIGHT_STD / 250)
    elif kind == Q.Q6_K:
        noise[:, 192:208] = rng.integers(4, 16, (NOISE_BLOCKS, 16), dtype=np.uint8)
        put(208, WEIGHT_STD / 185)
    return noise


def tensor(shape, kind, noise):
    """A matrix `[rows, columns]` of repeated noise, as bytes; a matrix whose rows do not fit the block falls back to `Q8_0`."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = shape
    return np.resize(noise[kind], (rows * columns // per_block, size)).reshape(rows, columns // per_block * size)


def write_gguf(path, sizes, formats):
    hidden, mlp, layers, heads, kv_heads, vocabulary = sizes
    body, head = formats
    noise = {kind: blocks(kind) for kind in {body, head, Q.Q8_0}}
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(32_768)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocabulary - 1)

    def matrix(name, rows, columns, kind):
        if columns % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Q.Q8_0
        writer.add_tensor(f"{name}.weight", tensor((rows, columns), kind, noise), raw_dtype=kind)

    def vector(name, length, value):
        writer.add_tensor(name, np.full(length, value, np.float32))

    kv = hidden // heads * kv_heads
    matrix("token_embd", vocabulary, hidden, head)
    vector("output_norm.weight", hidden, 1)
    for i in range(layers):
        at = f"blk.{i}."
        vector(at + "attn_norm.weight", hidden, 1)
        vector(at + "ffn_norm.weight", hidden, 1)
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            matrix(at + name, rows, hidden, body)
            vector(f"{at}{name}.bias", rows, 0)
        matrix(at + "attn_output", hidden, hidden, body)
        matrix(at + "ffn_gate", mlp, hidden, body)
        matrix(at + "ffn_up", mlp, hidden, body)
        matrix(at + "ffn_down", hidden, mlp, body)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Bench:
    def __init__(self, path, args, num_prompt, vocabulary):
        self.args, self.num_prompt, self.vocabulary = args, num_prompt, vocabulary
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}: delete it and run again")
        most = max(args.batch)
        context = llama_cpp.llama_context_default_params()
        each = -(-(num_prompt + args.decode_steps + 2) // 256) * 256
        context.n_ctx = each * most
        context.n_seq_max = most
        context.kv_unified = args.unified
        context.n_batch = context.n_ubatch = max(args.ubatch, most)
        context.n_threads = context.n_threads_batch = args.threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context: is there too little memory?")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(max(num_prompt, most), 0, 1)

    def compute(self, tokens, positions, sequences, wanted):
        """One call of llama_decode; the likeliest token for each index in `wanted`."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(zip(tokens, positions, sequences)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i in wanted
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")
        likeliest = []
        for i in sorted(wanted):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), (self.vocabulary,))
            likeliest.append(int(logits.argmax()))
            if not np.isfinite(logits[likeliest[-1]]):
                raise SystemExit("logits are not finite: the weights are out of scale")
        return likeliest

    def prefill(self, sequence=0):
        n = self.num_prompt
        tokens = [i * 31 % 251 for i in range(n)]
        return self.compute(tokens, range(n), [sequence] * n, {n - 1})[0]

    def fresh_prefill(self):
        llama_cpp.llama_memory_clear(self.memory, True)
        return self.prefill()

    def decode(self, batch):
        """The mean step of `decode_steps`, several times; every sequence has had the prompt."""
        llama_cpp.llama_memory_clear(self.memory, True)
        first = [self.prefill(sequence) for sequence in range(batch)]
        steps = []
        for _ in range(self.args.repeat):
            for sequence in range(batch):
                llama_cpp.llama_memory_seq_rm(self.memory, sequence, self.num_prompt, -1)
            tokens, at = first, self.num_prompt
            tokens = self.compute(tokens, [at] * batch, range(batch), set(range(batch)))  # a warm-up
            start = time.perf_counter()
            for step in range(1, self.args.decode_steps + 1):
                tokens = self.compute(tokens, [at + step] * batch, range(batch), set(range(batch)))
            steps.append((time.perf_counter() - start) / self.args.decode_steps)
        return common.milliseconds(steps) | {"tokens_per_s": round(batch / statistics.median(steps), 2)}


@llama_cpp.llama_log_callback
def quiet(_level, _text, _user_data):
    pass


def main():
    args = parse()
    sizes, num_prompt = PRESETS[args.preset]
    path = args.gguf or Path(__file__).parent / ".data" / f"{args.preset}-{args.format}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        write_gguf(part, sizes, FORMATS[args.format])
        part.rename(path)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    machine = common.machine(args.threads)
    bench = Bench(path, args, args.prompt_tokens or num_prompt, sizes[-1])
    prefill = common.seconds(bench.fresh_prefill, args.repeat)
    result = {
        "peer": "llama.cpp",
        "versions": {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")},
        "built_for": llama_cpp.llama_print_system_info().decode().strip(),
        "machine": machine,
        "model": args.preset,
        "format": args.format,
        "file_bytes": path.stat().st_size,
        "prompt_tokens": bench.num_prompt,
        "ubatch": args.ubatch,
        "unified_cache": args.unified,
        "prefill": common.milliseconds(prefill) | {"tokens_per_s": round(bench.num_prompt / statistics.median(prefill), 1)},
        "decode_step": {str(batch): bench.decode(batch) for batch in args.batch},
    }
    common.report(result, args.json)


if __name__ == "__main__":
    main()
