"""Synthetic clips of coloured shapes: scenes, their pixels, and training samples.

Pixels are drawn from signed distance functions at any size, so the same code makes the 64x64 training frames
and the full-size frames of real video files. Positions are fractions of the frame; radii are fractions of its
shorter side, so shapes keep their proportions in the real video and are squeezed by the model's square resize.
"""
import math
import random

import numpy as np

import text as T
from text import ACTIONS, COLOURS, SHAPES, split_by_combination

FRAMES = 16
SIZE = 64
RGB = {"red": (225, 30, 30), "green": (30, 190, 50), "blue": (40, 70, 230), "yellow": (240, 220, 40),
       "purple": (150, 45, 190), "white": (245, 245, 245)}


# ---- scenes --------------------------------------------------------------------------------

def _path(rng, action, r, span=1.0):
    """Start and end of one action: ((x, y, r), (x, y, r)), kept inside the frame."""
    rx = ry = r
    lo, hi = r * 1.05, 1 - r * 1.05
    x, y = rng.uniform(lo, hi), rng.uniform(lo, hi)
    x1, y1, r0, r1 = x, y, r, r
    if action.startswith("moves"):
        d = rng.uniform(0.28, max(0.3, hi - lo)) * span
        d = min(d, hi - lo)
        s = rng.uniform(lo, hi - d)
        drift = rng.uniform(-0.04, 0.04)
        a, b = (s, s + d) if action in ("moves right", "moves down") else (s + d, s)
        if action in ("moves left", "moves right"):
            x, x1, y1 = a, b, min(max(y + drift, lo), hi)
        else:
            y, y1, x1 = a, b, min(max(x + drift, lo), hi)
    elif action in ("grows", "shrinks"):
        k = rng.uniform(1.6, 2.4)
        big = min(0.38, max(r, 0.12 * k))
        small = max(big / k, 0.1)
        lo, hi = big * 1.05, 1 - big * 1.05
        x = x1 = rng.uniform(lo, hi)
        y = y1 = rng.uniform(lo, hi)
        r0, r1 = (small, big) if action == "grows" else (big, small)
    return (x, y, r0), (x1, y1, r1)


def _follow(rng, start, end, t0, t1):
    """Keyframes [(t, x, y, r)] from start to end within [t0, t1], with a short pause at both ends."""
    d = t1 - t0
    return [(t0 + d * rng.uniform(0, 0.12), *start), (t1 - d * rng.uniform(0, 0.12), *end)]


def at(obj, t):
    """(x, y, r) of an object at time t in 0..1, or None when it is not there yet."""
    if t < obj["from"]:
        return None
    keys = obj["keys"]
    if t <= keys[0][0]:
        return keys[0][1:]
    for a, b in zip(keys, keys[1:]):
        if t <= b[0]:
            f = (t - a[0]) / max(b[0] - a[0], 1e-6)
            if obj["ease"]:
                f = f * f * (3 - 2 * f)
            return tuple(p + (q - p) * f for p, q in zip(a[1:], b[1:]))
    return keys[-1][1:]


def _object(rng, colour, actions, big=0.3):
    o = {"colour": colour, "shape": rng.choice(SHAPES), "actions": actions, "appears": 0, "from": 0.0,
         "ease": rng.random() < 0.4, "turn": rng.uniform(-0.12, 0.12)}
    r = rng.uniform(0.13, big)
    if len(actions) == 1:
        o["keys"] = _follow(rng, *_path(rng, actions[0], r), 0, 1)
    else:
        cut = rng.uniform(0.42, 0.58)
        a = _path(rng, actions[0], r, 0.9)
        for _ in range(200):  # the second action begins where the first ends
            b = _path(rng, actions[1], a[1][2], 0.9)
            dx, dy, k = a[1][0] - b[0][0], a[1][1] - b[0][1], a[1][2] / b[0][2]
            end = (b[1][0] + dx, b[1][1] + dy, b[1][2] * k)
            if 0.09 <= end[2] <= 0.4 and all(end[2] * 0.95 <= v <= 1 - end[2] * 0.95 for v in end[:2]):
                break
        else:
            return _object(rng, colour, actions, big)
        o["keys"] = (_follow(rng, *a, 0, cut) + _follow(rng, a[1], end, cut, 1))
    return o


def _clash(a, b):
    """Whether two objects come too near at any time."""
    for t in np.linspace(0, 1, 9):
        p, q = at(a, t), at(b, t)
        if p and q:
            if math.hypot(p[0] - q[0], p[1] - q[1]) < 1.15 * (p[2] + q[2]):
                return True
    return False


def make_scene(rng, split="seen", mix=(45, 20, 20, 15)):
    """A random scene of the wanted split ('seen' | 'unseen' | 'any'). `mix`: shares of one shape, two shapes, one shape
    with two actions, and two shapes one after the other."""
    while True:
        k = rng.choices(["one", "two", "phases", "appear"], mix)[0]
        if k == "one":
            objs = [_object(rng, rng.choice(COLOURS), [rng.choice(ACTIONS)], 0.33)]
        elif k == "phases":
            first = rng.choice([a for a in ACTIONS if a != "stays still"])
            bad = {first, {"grows": "grows", "shrinks": "shrinks"}.get(first)}
            objs = [_object(rng, rng.choice(COLOURS), [first, rng.choice([a for a in ACTIONS if a not in bad])], 0.26)]
        else:
            c = rng.sample(range(len(COLOURS)), 2)
            if k == "two":
                c.sort()  # described in the fixed order of the colours
            for _ in range(60):
                acts = [[rng.choice(ACTIONS)] if k == "two" else ["stays still"] for _ in c]
                objs = [_object(rng, COLOURS[i], a, 0.22) for i, a in zip(c, acts)]
                if k == "appear":
                    objs[1]["appears"], objs[1]["from"] = 1, rng.uniform(0.3, 0.65)
                if not _clash(*objs):
                    break
            else:
                continue
        scene = {"objects": objs}
        if split == "any" or split_by_combination(scene) == split:
            break
    scene["style"] = make_style(rng, [o["colour"] for o in objs])
    return scene


def make_style(rng, colours):
    """Everything about the looks that no question asks about."""
    light = "white" not in colours and "yellow" not in colours and rng.random() < 0.3
    level = rng.uniform(170, 235) if light else rng.choice([0, 0, rng.uniform(0, 90)])
    bg = [min(max(level + rng.uniform(-14, 14), 0), 255) for _ in range(3)] if level else [0, 0, 0]
    w, h = rng.choice([(160, 120), (176, 144), (240, 180), (320, 240), (320, 180), (256, 256), (128, 128), (96, 96),
                       (180, 320), (240, 320), (192, 108), (200, 160), (120, 160), (284, 160)])
    fps = rng.choice([10, 12, 15, 20, 24, 25, 30])
    return {"width": w, "height": h, "fps": fps, "seconds": rng.uniform(2, 10), "background": bg,
            "gradient": [rng.uniform(-25, 25), rng.uniform(-25, 25)] if rng.random() < 0.4 else [0.0, 0.0],
            "rgb": {c: [min(max(v + rng.uniform(-22, 22), 0), 255) for v in RGB[c]] for c in colours}}


# ---- pixels --------------------------------------------------------------------------------

def _sdf(shape, u, v):
    """Signed distance (negative inside) in units of the radius; v points down."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - 0.95
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.84
    if shape == "triangle":
        return np.maximum(v - 0.62, 0.866 * np.abs(u) - 0.5 * v - 0.52)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1, b - 0.33), np.maximum(b - 1, a - 0.33))
    # five-pointed star: fold the plane into one point's wedge
    ang = np.arctan2(u, -v)
    rad = np.sqrt(u * u + v * v)
    wedge = 2 * math.pi / 5
    a = np.abs((ang + wedge / 2) % wedge - wedge / 2)
    px, py = rad * np.sin(a), rad * np.cos(a)  # the tip is at (0, 1.08)
    ix, iy = 0.45 * math.sin(wedge / 2), 0.45 * math.cos(wedge / 2)
    nx, ny = 1.08 - iy, ix  # normal of the edge from the tip to the inner corner
    n = math.hypot(nx, ny)
    return (px * nx + (py - 1.08) * ny) / n


def draw(scene, times, w, h, aspect=None, soft=1.0, owner=None):
    """Frames [T, h, w, 3] in float 0..255. `aspect` is that of the video (w/h when not squeezed).
    `owner` [T, h, w], when given, receives 1 + the index of the object at each pixel."""
    st = scene["style"]
    aspect = aspect or w / h
    kx, ky = max(aspect, 1.0), max(1 / aspect, 1.0)  # frame size in units of its shorter side
    xs = ((np.arange(w, dtype=np.float32) + 0.5) / w)[None, :]
    ys = ((np.arange(h, dtype=np.float32) + 0.5) / h)[:, None]
    shade = (xs - 0.5) * st["gradient"][0] + (ys - 0.5) * st["gradient"][1]
    base = np.clip(np.array(st["background"], np.float32) + shade[..., None], 0, 255)
    out = np.repeat(base[None], len(times), 0)
    pixel = soft * math.sqrt((kx / w) * (ky / h))
    for n, o in enumerate(scene["objects"]):
        rgb = np.array(st["rgb"][o["colour"]], np.float32)
        c, s = math.cos(o["turn"]), math.sin(o["turn"])
        for i, t in enumerate(times):
            p = at(o, t)
            if p is None:
                continue
            x, y, r = p
            # margins: positions were drawn for a square frame, so they stay inside on both axes
            x0, x1 = max(int((x - 1.2 * r / kx) * w) - 2, 0), min(int((x + 1.2 * r / kx) * w) + 3, w)
            y0, y1 = max(int((y - 1.2 * r / ky) * h) - 2, 0), min(int((y + 1.2 * r / ky) * h) + 3, h)
            if x1 <= x0 or y1 <= y0:
                continue
            du, dv = (xs[:, x0:x1] - x) * (kx / r), (ys[y0:y1] - y) * (ky / r)
            d = _sdf(o["shape"], c * du + s * dv, c * dv - s * du)
            alpha = np.clip(0.5 - d * (r / pixel), 0, 1)[..., None]
            box = out[i, y0:y1, x0:x1]
            box += alpha * (rgb - box)
            if owner is not None:
                owner[i, y0:y1, x0:x1][alpha[..., 0] > 0.5] = n + 1
    return out


def sample_times(style):
    """Where the reference's 16 frame indices lie in the clip, as fractions of its length."""
    total = max(2, int(round(style["fps"] * style["seconds"])))
    step = (total - 1) / (FRAMES - 1)
    idx = [math.floor(i * step) for i in range(FRAMES)]
    idx[-1] = total - 1
    return [i / (total - 1) for i in idx]


def degrade(x, nrng):
    """What encoding, chroma subsampling and resizing do to a 64x64 frame, roughly. Float 0..255 in and out."""
    n = x.shape[0]
    if nrng.random() < 0.5:  # blur of all channels
        k = nrng.uniform(0.02, 0.22)
        x = x * (1 - 2 * k) + k * (np.roll(x, 1, 1) + np.roll(x, -1, 1))
        x = x * (1 - 2 * k) + k * (np.roll(x, 1, 2) + np.roll(x, -1, 2))
    if nrng.random() < 0.5:  # blur of the colour only
        y = x.mean(-1, keepdims=True)
        c = x - y
        k = nrng.uniform(0.05, 0.3)
        c = c * (1 - 2 * k) + k * (np.roll(c, 1, 1) + np.roll(c, -1, 1))
        c = c * (1 - 2 * k) + k * (np.roll(c, 1, 2) + np.roll(c, -1, 2))
        x = y + c
    if nrng.random() < 0.5:  # sharpening overshoot, as bicubic resizing leaves
        k = nrng.uniform(0.02, 0.12)
        x = x * (1 + 4 * k) - k * (np.roll(x, 1, 1) + np.roll(x, -1, 1) + np.roll(x, 1, 2) + np.roll(x, -1, 2))
    gain, offset = nrng.uniform(0.9, 1.08), nrng.uniform(-8, 8)
    x = x * gain + offset
    if nrng.random() < 0.6:
        x = x + nrng.standard_normal(x.shape, dtype=np.float32) * nrng.uniform(0.5, 6)
    if nrng.random() < 0.3:  # coarse blocks that stay a while
        b = nrng.standard_normal((n, 8, 8, 3), dtype=np.float32) * nrng.uniform(1, 5)
        x = x + np.repeat(np.repeat(b, 8, 1), 8, 2)
    return x


def clip_frames(scene, nrng):
    """The 16 frames as the model sees them, u8 [16, 64, 64, 3]."""
    st = scene["style"]
    x = draw(scene, sample_times(st), SIZE, SIZE, st["width"] / st["height"], soft=nrng.uniform(0.8, 1.6))
    return np.clip(np.rint(degrade(x, nrng)), 0, 255).astype(np.uint8)


def targets(scene, times):
    """What the throw-away heads learn: [T, 2, 6] of (colour, shape, x, y, log size, present), a slot an object,
    ordered by colour. Class 0 means nothing there."""
    out = np.zeros((len(times), 2, 6), np.float32)
    for i, t in enumerate(times):
        seen = sorted((COLOURS.index(o["colour"]), SHAPES.index(o["shape"]), at(o, t)) for o in scene["objects"]
                      if at(o, t) is not None)
        for k, (c, s, (x, y, r)) in enumerate(seen[:2]):
            out[i, k] = (c + 1, s + 1, 2 * x - 1, 2 * y - 1, 2.5 * math.log(r / 0.2), 1)
    return out


# ---- batches for training ------------------------------------------------------------------

def frame_scene(rng):
    """A still picture of none, one or two shapes anywhere, for training the tower frame by frame."""
    while True:
        objs = []
        for i in rng.sample(range(len(COLOURS)), rng.choices([0, 1, 2], [3, 45, 52])[0]):
            r = rng.uniform(0.09, 0.4) if rng.random() < 0.4 else rng.uniform(0.11, 0.26)
            m = r * rng.uniform(0.6, 1.05)
            p = (rng.uniform(m, 1 - m), rng.uniform(m, 1 - m), r)
            objs.append({"colour": COLOURS[i], "shape": rng.choice(SHAPES), "actions": ["stays still"], "from": 0.0,
                         "keys": [(0.0, *p)], "ease": False, "turn": rng.uniform(-0.15, 0.15)})
        if len(objs) < 2 or not _clash(*objs):
            return {"objects": objs, "style": make_style(rng, [o["colour"] for o in objs])}


def frame_batch(rng, nrng, n, patch=8):
    """n pictures u8 [n, 64, 64, 3], slot targets [n, 2, 6], and patch targets [n, N, 6] whose last entry is the
    weight: a patch belongs to the object that covers an eighth of it, and patches less covered don't count."""
    g = SIZE // patch
    frames, slots, dense = np.zeros((n, SIZE, SIZE, 3), np.uint8), np.zeros((n, 2, 6), np.float32), np.zeros((n, g * g, 6), np.float32)
    for i in range(n):
        scene = frame_scene(rng)
        st = scene["style"]
        owner = np.zeros((1, SIZE, SIZE), np.uint8)
        x = draw(scene, [0], SIZE, SIZE, st["width"] / st["height"], nrng.uniform(0.8, 1.6), owner)
        frames[i] = np.clip(np.rint(degrade(x, nrng)), 0, 255).astype(np.uint8)[0]
        slots[i] = targets(scene, [0])[0]
        tiles = owner[0].reshape(g, patch, g, patch).transpose(0, 2, 1, 3).reshape(g * g, -1)
        dense[i, :, 5] = 1
        for k, o in enumerate(scene["objects"]):
            cover = (tiles == k + 1).mean(1)
            c, s, (x, y, r) = COLOURS.index(o["colour"]), SHAPES.index(o["shape"]), at(o, 0)
            dense[i, cover >= 0.125] = (c + 1, s + 1, 2 * x - 1, 2 * y - 1, 2.5 * math.log(r / 0.2), 1)
            dense[i, (cover > 0) & (cover < 0.125), 5] = 0
    return frames, slots, dense


def text_pairs(rng, scene, n, special=0.12):
    """n (text after the image, reply) pairs about one clip; some are open or unrelated, some have a second turn."""
    out = []
    while len(out) < n:
        x = rng.random()
        if x < special:
            q, a = rng.choice([T.open_pair, T.other_pair])(rng, scene)
        else:
            mc = T.make_question(rng, scene)
            if mc is None:
                continue
            q, a = T.write_options(rng, mc), T.reply(scene, mc)
        if rng.random() < 0.9 and q:
            q += "\n" + T.OUTPUT
        out.append((T.prompt_after_image(q), a))
    return out


def clip_batch(rng, nrng, clips, questions, pixels=True, scenes=None):
    """Frames [B, 16, 64, 64, 3] (or None), slot targets [B, 16, 2, 6], and questions a clip as text pairs."""
    scenes = scenes or [make_scene(rng) for _ in range(clips)]
    frames = np.stack([clip_frames(s, nrng) for s in scenes]) if pixels else None
    slots = np.stack([targets(s, sample_times(s["style"])) for s in scenes])
    return frames, slots, [text_pairs(rng, s, questions) for s in scenes]
