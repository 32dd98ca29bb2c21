"""Times the original's stack on a CPU or a GPU: encoding a video, prefilling a prompt, decode steps, whole requests one after the other.

    taskset -c 0,1 python torch_bench.py --preset small --dtype float32 --json torch-small-f32.json

Nothing else may run on those cores. See README.md for what each number means.
"""
import statistics
import time

import torch
import transformers

import common
from torch_model import IMAGE_TOKEN, NUM_FRAMES, TinyLlavaVideo, preset

# Text tokens of the prompt, so that r1's has 575, as `tinyllava bench engine` has.
TEXT_TOKENS = 63
# How often by default: the published size takes minutes a video.
REPEATS = {"small": 5, "mid": 3, "r1": 2}
REQUESTS = {"small": 8, "mid": 2, "r1": 1}


def parse():
    parser = common.arguments("Times torch and transformers.")
    parser.add_argument("--preset", choices=REPEATS, default="small", help="sizes of a model of random weights")
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint in the published layout, instead of a preset")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--trim-tower", action="store_true", help="leave out the tower's last layer, which the original computes in vain")
    parser.add_argument("--prompt-tokens", type=common.at_least_one, help="prompt with the visual tokens [default: 63 more than those]")
    parser.add_argument("--decode-steps", type=common.at_least_one, default=32)
    parser.add_argument("--max-tokens", type=common.at_least_one, default=64, help="tokens of each request's reply")
    parser.add_argument("--requests", type=int, help="requests, one after the other; 0 leaves them out [default: small 8, mid 2, r1 1]")
    parser.add_argument("--repeat", type=common.at_least_one, help="of encode, prefill and decode [default: small 5, mid 3, r1 2]")
    parser.add_argument("--warm-up", type=int, default=1, help="runs of each before those that count")
    return parser.parse_args()


class Bench:
    def __init__(self, args):
        self.args = args
        dtype = getattr(torch, args.dtype)
        if args.model:
            self.model = TinyLlavaVideo.load(args.model, dtype, args.trim_tower)
        else:
            self.model = TinyLlavaVideo.random(preset(args.preset), dtype, args.trim_tower)
        self.model.to(args.device)
        config = self.model.config
        self.size = self.model.vision_tower.config.image_size
        self.num_visual = config["num_queries"]
        self.vocabulary = self.model.language_model.config.vocab_size
        num_prompt = max(args.prompt_tokens or self.num_visual + TEXT_TOKENS, self.num_visual + 1)
        text = [i * 31 % 251 for i in range(num_prompt - self.num_visual)]
        self.prompt = [IMAGE_TOKEN] + text
        self.num_prompt = num_prompt

    def frames(self, seed):
        """A video of noise that no other seed has."""
        shape = (NUM_FRAMES, self.size, self.size, 3)
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        return frames.to(self.args.device)

    def finish(self):
        """Waits for a GPU, which works behind the program."""
        if self.args.device.startswith("cuda"):
            torch.cuda.synchronize(self.args.device)

    def times(self, function):
        return common.seconds(function, self.args.repeat, self.args.warm_up, self.finish)

    def encode_and_prefill(self):
        frames = self.frames(0)
        encode = self.times(lambda: self.model.encode(frames))
        visual = self.model.encode(frames)
        if not visual.isfinite().all():
            raise SystemExit("the visual tokens are not finite: the weights are out of scale")
        prefill = self.times(lambda: self.model.prefill(self.model.embed(self.prompt, visual)))
        return visual, {
            "encode": common.milliseconds(encode),
            "prefill": common.milliseconds(prefill)
            | {"tokens_per_s": round(self.num_prompt / statistics.median(prefill), 1)},
        }

    def decode(self, visual):
        """The mean step of `decode_steps` after a prefill, several times."""
        steps = []
        for _ in range(self.args.repeat):
            logits, cache = self.model.prefill(self.model.embed(self.prompt, visual))
            token = logits.argmax().view(1, 1)
            token = self.model.step(token, cache).argmax().view(1, 1)  # the first one is a warm-up
            self.finish()
            start = time.perf_counter()
            for _ in range(self.args.decode_steps):
                token = self.model.step(token, cache).argmax().view(1, 1)
            self.finish()
            steps.append((time.perf_counter() - start) / self.args.decode_steps)
        return {"decode_step": common.milliseconds(steps) | {"tokens_per_s": round(1 / statistics.median(steps), 2)}}

    def sequential(self):
        """Requests one after the other, as the original serves them: each with a video of its own."""
        encode = generate = 0.0
        for seed in range(1, self.args.requests + 1):
            frames = self.frames(seed)
            start = time.perf_counter()
            visual = self.model.encode(frames)
            self.finish()
            encoded = time.perf_counter()
            self.model.greedy(self.model.embed(self.prompt, visual), self.args.max_tokens)
            encode += encoded - start
            generate += time.perf_counter() - encoded
        tokens = self.args.requests * self.args.max_tokens
        return {
            "sequential": {
                "requests": self.args.requests,
                "tokens_each": self.args.max_tokens,
                "encode_s": round(encode, 4),
                "prefill_and_decode_s": round(generate, 4),
                "tokens_per_s": round(tokens / (encode + generate), 2),
                "tokens_per_s_without_encode": round(tokens / generate, 2),
            }
        }


def main():
    args = parse()
    name = args.preset if not args.model else None
    args.repeat = args.repeat or REPEATS.get(name, 3)
    args.requests = REQUESTS.get(name, 2) if args.requests is None else args.requests
    torch.set_num_threads(args.threads)
    machine = common.machine(args.threads)
    bench = Bench(args)
    result = {
        "peer": "torch",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": machine,
        "model": args.model or args.preset,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "cpu",
        "trim_tower": args.trim_tower,
        "prompt_tokens": bench.num_prompt,
    }
    visual, numbers = bench.encode_and_prefill()
    result |= numbers | bench.decode(visual)
    if args.requests:
        result |= bench.sequential()
    common.report(result, args.json)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
