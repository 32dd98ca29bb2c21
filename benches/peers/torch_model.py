"""TinyLLaVA-Video on the original's stack: torch, and transformers' own SigLIP and Qwen2.

The tower and the language model are the classes the original uses; the group resampler is stated anew. As in the original
all frames of a video go through the tower as one batch, and all of its layers run although the one before the last is what
is used. What only makes torch faster was added: fused attention everywhere, and the resampler's equal chunks as one batch.

Used by torch_bench.py. Run as a program it proves itself against golden numbers of the original:

    python torch_model.py --check ../../tests/golden/tiny
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

try:
    from transformers.modeling_utils import no_init_weights
except ImportError:  # since 5
    from transformers.initialization import no_init_weights

IMAGE_TOKEN = -200
# The published proportions, in every preset.
NUM_FRAMES = 16


def preset(name):
    """The config.json of a preset."""
    # Vision: hidden, MLP, layers, heads, image, patch. Text: hidden, MLP, layers, heads, KV heads, vocabulary.
    vision, num_queries, text = {
        "small": ((288, 1076, 6, 4, 112, 14), 128, (256, 704, 6, 8, 2, 2048)),
        "mid": ((768, 3072, 12, 12, 224, 16), 256, (896, 4864, 24, 14, 2, 151_936)),
        "r1": ((1152, 4304, 27, 16, 384, 14), 512, (2048, 11_008, 36, 16, 2, 151_936)),
    }[name]
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {
        "group": 16,
        "num_queries": num_queries,
        "num_resampler_layers": 3,
        "hidden_size": text[0],
        "vision_hidden_size": vision[0],
        "vision_config": dict(zip(sizes + ("image_size", "patch_size"), vision)),
        "text_config": dict(zip(sizes + ("num_key_value_heads", "vocab_size"), text))
        | {"rope_theta": 1e6, "max_position_embeddings": 32_768, "tie_word_embeddings": True},
    }


class ResamplerAttention(nn.Module):
    """Latents look at a chunk's features and at themselves: 8 heads of 64, whatever the dimension."""

    HEADS, HEAD_DIM = 8, 64

    def __init__(self, dim):
        super().__init__()
        inner = self.HEADS * self.HEAD_DIM
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, chunks, latents):
        latents = self.norm_latents(latents)
        seen = torch.cat([self.norm_media(chunks), latents], dim=1)
        keys, values = self.to_kv(seen).chunk(2, dim=-1)
        heads = [x.unflatten(-1, (self.HEADS, self.HEAD_DIM)).transpose(1, 2) for x in (self.to_q(latents), keys, values)]
        return self.to_out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class GroupResampler(nn.Module):
    """Features of all frames to `num_queries` visual tokens: each of `group` chunks is summed up by its own latents."""

    def __init__(self, config):
        super().__init__()
        dim = config["hidden_size"]
        self.group = config["group"]
        self.latents = nn.Parameter(torch.empty(config["num_queries"] // self.group, dim))
        self.linear = nn.Linear(config["vision_hidden_size"], dim)
        self.norm = nn.LayerNorm(dim)
        feed_forward = lambda: nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(dim), feed_forward()]) for _ in range(config["num_resampler_layers"])
        )

    def forward(self, features):
        """`[tokens, vision dim]` to `[num_queries, dim]`."""
        chunks = self.linear(features).tensor_split(self.group)
        if len({chunk.shape for chunk in chunks}) == 1:
            latents = self.sum_up(torch.stack(chunks))
        else:
            latents = torch.cat([self.sum_up(chunk[None]) for chunk in chunks])
        latents = latents.flatten(0, 1)
        return latents + position_table(*latents.shape).to(latents)

    def sum_up(self, chunks):
        latents = self.latents.expand(len(chunks), -1, -1)
        for attention, feed_forward in self.layers:
            latents = attention(chunks, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents)


def position_table(length, dim):
    """Sines in even columns, cosines in odd ones, rounded to float16."""
    rates = torch.exp(torch.arange(0, dim, 2).float() * (-math.log(10_000) / dim))
    angles = torch.arange(length).float()[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).half()


class TinyLlavaVideo(nn.Module):
    """The whole model; made by `random` or `load`, on CPU."""

    def __init__(self, config, trim_tower=False):
        """`trim_tower` leaves out the tower's last layer, which the original computes and never uses."""
        super().__init__()
        vision = SiglipVisionConfig(**config["vision_config"])
        if trim_tower:
            vision.num_hidden_layers -= 1
            vision.vision_use_head = False
        self.feature_layer = -1 if trim_tower else -2
        vision._attn_implementation = "sdpa"
        text = Qwen2Config(**config["text_config"])
        text._attn_implementation = "sdpa"
        self.config = config
        self.vision_tower = SiglipVisionModel(vision)
        self.connector = GroupResampler(config)
        self.language_model = Qwen2ForCausalLM(text)

    @classmethod
    def empty(cls, config, dtype, trim_tower):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with no_init_weights():
                model = cls(config, trim_tower)
        finally:
            torch.set_default_dtype(default)
        model.language_model.tie_weights()
        return model.eval().requires_grad_(False)

    @classmethod
    def random(cls, config, dtype, trim_tower=False):
        """Weights of a size at which no activation grows or vanishes; the same numbers repeat, which costs no accuracy here."""
        model = cls.empty(config, dtype, trim_tower)
        noise = torch.randn((1 << 22) + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat, scale = weight.view(-1), weight[0].numel() ** -0.5
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                torch.mul(noise[: part.numel()], scale, out=part)
        return model

    @classmethod
    def load(cls, folder, dtype, trim_tower=False):
        """A checkpoint in the published layout, in one file or in shards."""
        folder = Path(folder)
        model = cls.empty(json.loads((folder / "config.json").read_text()), dtype, trim_tower)
        prefixes = {
            "language_model.": "language_model.",
            "vision_tower._vision_tower.": "vision_tower.",
            "connector._connector.": "connector.",
        }
        wanted, found = dict(model.named_parameters()), set()
        for shard in sorted(folder.glob("*.safetensors")):
            if not shard.name.startswith("model"):
                continue
            for name, tensor in load_file(shard).items():
                prefix = next(p for p in prefixes if name.startswith(p))
                name = prefixes[prefix] + name[len(prefix) :]
                if name not in wanted:  # transformers since 5
                    name = name.replace(".vision_model.", ".")
                if name in wanted:
                    wanted[name].copy_(tensor)
                    found.add(name)
        # The tower's unused end may be absent from a checkpoint.
        missing = {n for n in wanted.keys() - found if ".head." not in n and "post_layernorm" not in n}
        if missing:
            raise SystemExit(f"{folder} lacks {len(missing)} tensors, among them {sorted(missing)[0]}")
        return model

    @property
    def dtype(self):
        return self.connector.latents.dtype

    def pixels(self, frames):
        """`[T, S, S, 3]` u8, already resized, to `[T, 3, S, S]`."""
        return ((frames.permute(0, 3, 1, 2).float() * (1 / 255) - 0.5) / 0.5).to(self.dtype)

    def features(self, frames):
        """`[T, patches - 1, vision dim]`: the layer before the last, without its first patch."""
        states = self.vision_tower(self.pixels(frames), output_hidden_states=True).hidden_states
        return states[self.feature_layer][:, 1:]

    def encode(self, frames):
        """`[T, S, S, 3]` u8 to `[num_queries, dim]` visual tokens."""
        return self.connector(self.features(frames).flatten(0, 1))

    def embed(self, token_ids, visual):
        """Puts the visual tokens where `IMAGE_TOKEN` stands; `[1, tokens, dim]`."""
        at = token_ids.index(IMAGE_TOKEN)
        embed = lambda ids: self.language_model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=visual.device))
        return torch.cat([embed(token_ids[:at]), visual, embed(token_ids[at + 1 :])])[None]

    def prefill(self, embeddings):
        """The last position's logits, and the cache."""
        cache = DynamicCache()
        out = self.language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1], cache

    def step(self, token, cache):
        """One token further, at batch 1: `token` is `[1, 1]`."""
        return self.language_model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1]

    def greedy(self, embeddings, num_tokens):
        """What `generate` does without sampling, less what it does around it; end tokens are ignored."""
        logits, cache = self.prefill(embeddings)
        ids = [logits.argmax()]
        while len(ids) < num_tokens:
            ids.append(self.step(ids[-1].view(1, 1), cache).argmax())
        return [int(i) for i in ids]


def check(folder):
    """Every golden number this model can be asked for, with the tolerance float32 itself needs."""
    folder = Path(folder)
    golden = load_file(folder / "golden.safetensors")
    model = TinyLlavaVideo.load(folder, torch.float32)
    trimmed = TinyLlavaVideo.load(folder, torch.float32, trim_tower=True)
    frames, ids = golden["resized_u8"], golden["input_ids"].tolist()
    visual = model.encode(frames)
    embeddings = model.embed(ids, visual)
    logits, _ = model.prefill(embeddings)
    uneven = model.connector(golden["connector_rem_in"])
    compared = {
        "pixel_values": (model.pixels(frames), 1e-6),
        "vision_features": (model.features(frames), 2e-5),
        "vision_features, trimmed": (trimmed.features(frames), 2e-5),
        "connector_out": (visual, 2e-5),
        "connector_rem_out": (uneven, 2e-5),
        "inputs_embeds": (embeddings[0], 2e-5),
        "logits_last": (logits, 1e-4),
    }
    wrong = 0
    for name, (ours, tolerance) in compared.items():
        theirs = golden[name.split(",")[0]]
        difference = (ours.float() - theirs.reshape(ours.shape)).abs().max().item()
        good = difference <= tolerance
        wrong += not good
        print(f"{'ok   ' if good else 'WRONG'} {name}: largest difference {difference:.2e}, allowed {tolerance:.0e}")
    wanted = golden["greedy_ids"].tolist()
    generated = model.language_model.generate(
        inputs_embeds=embeddings, attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=len(wanted), do_sample=False, eos_token_id=None, pad_token_id=0,
    )[0].tolist()
    for name, got in {"greedy loop": model.greedy(embeddings, len(wanted)), "generate": generated}.items():
        wrong += got != wanted
        print(f"{'ok   ' if got == wanted else 'WRONG'} {name}: {len(wanted)} tokens")
    return wrong == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compares the restated model with golden numbers of the original.")
    parser.add_argument("--check", metavar="FOLDER", required=True, help="a checkpoint with golden.safetensors")
    with torch.inference_mode():
        raise SystemExit(0 if check(parser.parse_args().check) else 1)
