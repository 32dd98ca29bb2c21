"""The TinyLLaVA-Video model in compact PyTorch, parameter names exactly as in the published checkpoints.

`python model.py GOLDEN_FOLDER` proves it against recorded numbers of the original implementation.
"""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

INNER, HEADS = 512, 8  # the resampler's attention is 8 heads x 64 whatever the width


def load_config(path):
    """config.json with the class defaults it leaves out, as one flat namespace."""
    c = json.loads(Path(path).read_text())
    t, v = c["text_config"], c["vision_config"]
    return SimpleNamespace(
        group=c["group"], queries=c["num_queries"], res_layers=c["num_resampler_layers"],
        dim=t.get("hidden_size", 4096), ff=t.get("intermediate_size", 22016), layers=t.get("num_hidden_layers", 32),
        heads=t.get("num_attention_heads", 32), kv=t.get("num_key_value_heads", 32), vocab=t.get("vocab_size", 151936),
        eps=t.get("rms_norm_eps", 1e-6), theta=t.get("rope_theta", 10000.0),
        vdim=v.get("hidden_size", 768), vff=v.get("intermediate_size", 3072), vlayers=v.get("num_hidden_layers", 12),
        vheads=v.get("num_attention_heads", 12), image=v.get("image_size", 224), patch=v.get("patch_size", 16))


class Box(nn.Module):
    """A named bag of submodules and parameters, so that key paths match the checkpoint."""

    def __init__(self, **parts):
        super().__init__()
        for k, v in parts.items():
            setattr(self, k, v)


# ---- vision tower (SigLIP) -----------------------------------------------------------------

class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.vdim
        self.heads = c.vheads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, 1e-6), nn.LayerNorm(d, 1e-6)
        self.self_attn = Box(q_proj=nn.Linear(d, d), k_proj=nn.Linear(d, d), v_proj=nn.Linear(d, d), out_proj=nn.Linear(d, d))
        self.mlp = Box(fc1=nn.Linear(d, c.vff), fc2=nn.Linear(c.vff, d))

    def forward(self, x):
        b, n, d = x.shape
        a, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (p(y).view(b, n, self.heads, -1).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
        x = x + a.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class VisionModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        n = (c.image // c.patch) ** 2
        self.embeddings = Box(patch_embedding=nn.Conv2d(3, c.vdim, c.patch, c.patch), position_embedding=nn.Embedding(n, c.vdim))
        self.encoder = Box(layers=nn.ModuleList(VisionLayer(c) for _ in range(c.vlayers)))
        self.post_layernorm = nn.LayerNorm(c.vdim, 1e-6)  # never used, part of the layout
        self.head = Box(probe=nn.Parameter(torch.zeros(1, 1, c.vdim)), attention=nn.MultiheadAttention(c.vdim, c.vheads),
                        layernorm=nn.LayerNorm(c.vdim, 1e-6), mlp=Box(fc1=nn.Linear(c.vdim, c.vff), fc2=nn.Linear(c.vff, c.vdim)))

    def forward(self, x):
        """Normalised frames [T, 3, S, S] -> every patch of hidden_states[-2], [T, N, D]."""
        e = self.embeddings
        p = e.patch_embedding.kernel_size[0]
        s = x.shape[2] // p * p
        t, w = x.shape[0], e.patch_embedding.weight  # the strided convolution as one matrix product
        x = x[:, :, :s, :s].reshape(t, 3, s // p, p, s // p, p).permute(0, 2, 4, 1, 3, 5).reshape(t, -1, 3 * p * p)
        x = F.linear(x, w.flatten(1), e.patch_embedding.bias) + e.position_embedding.weight
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        return x


# ---- connector (group resampler) -----------------------------------------------------------

def heads(x, h):
    return x.view(x.shape[0], x.shape[1], h, -1).transpose(1, 2)


class ResamplerAttention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(d), nn.LayerNorm(d)
        self.to_q, self.to_kv = nn.Linear(d, INNER, bias=False), nn.Linear(d, 2 * INNER, bias=False)
        self.to_out = nn.Linear(INNER, d, bias=False)

    def forward(self, x, lat):
        lat = self.norm_latents(lat)
        k, v = self.to_kv(torch.cat([self.norm_media(x), lat], 1)).chunk(2, -1)
        o = F.scaled_dot_product_attention(heads(self.to_q(lat), HEADS), heads(k, HEADS), heads(v, HEADS))
        return self.to_out(o.transpose(1, 2).flatten(2))


def position_table(n, d):
    """Sinusoidal positions, rounded to float16 as the original does."""
    k = np.arange(0, d, 2, dtype=np.float32)
    div = np.exp((k * np.float32(-math.log(10000.0) / d)).astype(np.float64)).astype(np.float32)
    a = (np.arange(n, dtype=np.float32)[:, None] * div).astype(np.float32).astype(np.float64)
    out = np.zeros((n, d), np.float32)
    out[:, 0::2], out[:, 1::2] = np.sin(a), np.cos(a)
    return torch.from_numpy(out.astype(np.float16).astype(np.float32))


class Resampler(nn.Module):
    def __init__(self, c):
        super().__init__()
        d = c.dim
        self.group = c.group
        self.latents = nn.Parameter(torch.randn(c.queries // c.group, d))
        self.linear, self.norm = nn.Linear(c.vdim, d), nn.LayerNorm(d)
        self.layers = nn.ModuleList(nn.ModuleList([ResamplerAttention(d), nn.Sequential(
            nn.LayerNorm(d), nn.Linear(d, 4 * d, bias=False), nn.GELU(), nn.Linear(4 * d, d, bias=False))])
            for _ in range(c.res_layers))
        self.register_buffer("table", position_table(c.queries, d), persistent=False)

    def chunk(self, x):
        """Groups [B, n, vdim] -> latents [B, queries/group, dim]; no group sees another."""
        x = self.linear(x)
        lat = self.latents.expand(x.shape[0], -1, -1)
        for attn, ff in self.layers:
            lat = attn(x, lat) + lat
            lat = ff(lat) + lat
        return self.norm(lat)

    def forward(self, x):
        """Features of whole clips [B, T*N, vdim] -> visual tokens [B, queries, dim]."""
        b, n, d = x.shape
        if n % self.group == 0:
            lat = self.chunk(x.reshape(b * self.group, n // self.group, d)).view(b, -1, self.table.shape[1])
        else:  # the first groups get one token more
            sizes = [n // self.group + (i < n % self.group) for i in range(self.group)]
            lat = torch.cat([self.chunk(p) for p in x.split(sizes, 1)], 1)
        return lat + self.table


# ---- language model (Qwen2) ----------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, h = c.dim, c.dim // c.heads
        self.heads, self.kv = c.heads, c.kv
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d, c.eps), RMSNorm(d, c.eps)
        self.self_attn = Box(q_proj=nn.Linear(d, d), k_proj=nn.Linear(d, c.kv * h), v_proj=nn.Linear(d, c.kv * h),
                             o_proj=nn.Linear(d, d, bias=False))
        self.mlp = Box(gate_proj=nn.Linear(d, c.ff, bias=False), up_proj=nn.Linear(d, c.ff, bias=False),
                       down_proj=nn.Linear(c.ff, d, bias=False))

    def forward(self, x, rope, mask, past):
        a, y = self.self_attn, self.input_layernorm(x)
        q, k = rotate(heads(a.q_proj(y), self.heads), *rope), rotate(heads(a.k_proj(y), self.kv), *rope)
        v = heads(a.v_proj(y), self.kv)
        if past is not None:  # earlier tokens, possibly shared by several rows of the batch
            r = k.shape[0] // past[0].shape[0]
            k, v = (torch.cat([p.repeat_interleave(r, 0), n], 2) for p, n in zip(past, (k, v)))
        kept = (k, v)
        g = self.heads // self.kv
        k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + a.o_proj(o.transpose(1, 2).flatten(2))
        y, m = self.post_attention_layernorm(x), self.mlp
        return x + m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y)), kept


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.eps)

    def forward(self, x, past=None):
        """Embeddings [B, n, D] after `past` (a (k, v) a layer) -> normed states [B, n, D], new past."""
        n, p = x.shape[1], 0 if past is None else past[0][0].shape[2]
        h = self.c.dim // self.c.heads
        inv = self.c.theta ** (-torch.arange(0, h, 2).float() / h)
        ang = torch.outer(torch.arange(p, p + n).float(), inv).repeat(1, 2)
        rope = ang.cos(), ang.sin()
        mask = None if n == 1 else torch.ones(n, p + n, dtype=torch.bool).tril(p)
        kept = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, rope, mask, past[i] if past else None)
            kept.append(kv)
        return self.norm(x), kept


# ---- the whole model -----------------------------------------------------------------------

def normalise(frames):
    """u8 [..., S, S, 3] -> f32 [..., 3, S, S]: x/255 in f64, then (x-0.5)/0.5."""
    table = torch.tensor(((np.arange(256) * 0.00392156862745098).astype(np.float32) - np.float32(0.5)) / np.float32(0.5))
    return table[frames.long()].movedim(-1, -3).contiguous()


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.language_model = Box(model=Decoder(c))
        self.vision_tower = Box(_vision_tower=Box(vision_model=VisionModel(c)))
        self.connector = Box(_connector=Resampler(c))

    @property
    def llm(self):
        return self.language_model.model

    @property
    def tower(self):
        return self.vision_tower._vision_tower.vision_model

    @property
    def resampler(self):
        return self.connector._connector

    def features(self, frames):
        """u8 [B, T, S, S, 3] -> tower output of every patch [B, T, N, vdim]."""
        b, t = frames.shape[:2]
        x = self.tower(normalise(frames).flatten(0, 1))
        return x.view(b, t, *x.shape[1:])

    def visual_tokens(self, feats):
        """The 'patch' strategy leaves out the first patch of every frame."""
        return self.resampler(feats[:, :, 1:].flatten(1, 2))

    def logits(self, x):
        return F.linear(x, self.llm.embed_tokens.weight)

    @torch.no_grad()
    def generate(self, embeds, stop, limit, past=None):
        """Greedy decoding of a batch whose rows have equal length -> ids [B, <= limit]."""
        ids, ended = [], None
        for _ in range(limit):
            x, past = self.llm(embeds, past)
            nxt = self.logits(x[:, -1]).argmax(-1)
            ids.append(nxt)
            ended = (nxt == stop) if ended is None else ended | (nxt == stop)
            if ended.all():
                break
            embeds = self.llm.embed_tokens(nxt)[:, None]
        return torch.stack(ids, 1)


def load(folder, config=None):
    from safetensors.torch import load_file
    folder = Path(folder)
    m = Model(load_config(config or folder / "config.json"))
    state = {}
    for f in sorted(folder.glob("model*.safetensors")):
        state.update({k: v.float() for k, v in load_file(f).items()})
    m.load_state_dict(state)
    return m.eval()


def check(folder):
    from safetensors.torch import load_file
    folder = Path(folder)
    g = load_file(folder / "golden.safetensors")
    m = load(folder)

    def diff(name, ours, theirs):
        d = (ours - theirs.float()).abs().max().item()
        print(f"{name:24s} {d:.2e}")
        assert d < 1e-4, name

    with torch.no_grad():
        px = normalise(g["resized_u8"])
        diff("pixel_values", px, g["pixel_values"])
        feats = m.tower(px)
        diff("vision_features", feats[:, 1:], g["vision_features"])
        diff("position table", m.resampler.table, g["pos_table_f16"])
        vis = m.visual_tokens(feats[None])
        diff("connector_out", vis[0], g["connector_out"])
        diff("connector_rem_out", m.resampler(g["connector_rem_in"][None])[0], g["connector_rem_out"])
        ids = g["input_ids"].tolist()
        cut = ids.index(-200)
        e = m.llm.embed_tokens
        x = torch.cat([e(torch.tensor(ids[:cut])), vis[0], e(torch.tensor(ids[cut + 1:]))])[None]
        diff("inputs_embeds", x[0], g["inputs_embeds"])
        h, _ = m.llm(x)
        diff("logits_all", m.logits(h)[0], g["logits_all"])
        _, past = m.llm(x[:, :100])
        ours = m.generate(x[:, 100:], -1, 24, past)[0].tolist()
        assert ours == g["greedy_ids"].tolist(), ours
        print("greedy ids equal")


if __name__ == "__main__":
    check(sys.argv[1])
