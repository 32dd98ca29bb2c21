"""Makes real video files (H.264 in MP4) of coloured shapes with questions, from a fixed seed.

  python make_accuracy_set.py OUT                        the accuracy set: 300 seen + 200 unseen questions
  python make_accuracy_set.py OUT --seen 18 --unseen 12 --small     short small clips, as in sample/

Needs numpy and ffmpeg with libx264. 'Unseen' clips hold a colour-shape-action combination that training never showed.
Types take turns, so each has the same share. Nothing is selected afterwards.
"""
import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "train"))
import data  # noqa: E402
import text as T  # noqa: E402

SIZES = [(160, 120), (176, 144), (240, 180), (320, 240), (320, 180), (256, 256), (180, 320), (128, 128), (426, 240),
         (240, 320), (480, 270), (640, 360), (200, 200)]
SMALL = [(96, 96), (128, 96), (128, 128), (112, 80), (96, 128), (144, 80)]


def encode(scene, path, rng, crf=None, noise=None):
    """Draws every frame at full size and encodes it."""
    st = scene["style"]
    w, h, n = st["width"], st["height"], max(2, round(st["fps"] * st["seconds"]))
    crf = crf or rng.randint(18, 32)
    noise = rng.choice([0, 0, 0, rng.uniform(1, 6)]) if noise is None else noise
    nrng = np.random.default_rng(rng.randrange(1 << 30))
    cmd = ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", str(st["fps"]), "-i", "-",
           "-c:v", "libx264", "-threads", "1", "-preset", "veryfast", "-crf", str(crf), "-pix_fmt", "yuv420p",
           "-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart", str(path)]
    p = subprocess.Popen(cmd, stdin=subprocess.PIPE)
    for i in range(n):
        x = data.draw(scene, [i / (n - 1)], w, h)[0]
        if noise:
            x = x + nrng.standard_normal(x.shape, dtype=np.float32) * noise
        p.stdin.write(np.clip(np.rint(x), 0, 255).astype(np.uint8).tobytes())
    p.stdin.close()
    if p.wait():
        raise SystemExit(f"ffmpeg failed on {path}")


def one(rng, kind, split, small):
    """A scene of the split and a question of the wanted type about it."""
    while True:
        scene = data.make_scene(rng, split)
        q = T.make_question(rng, scene, kind)
        if q:
            break
    st = scene["style"]
    st["width"], st["height"] = rng.choice(SMALL if small else SIZES)
    st["fps"] = rng.choice([10, 12, 15] if small else [10, 12, 15, 20, 24, 25, 30])
    st["seconds"] = rng.uniform(2, 3) if small else rng.uniform(2, 10)
    return scene, q


def make(out, seen, unseen, seed, small=False):
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(seen + unseen):
        split = "seen" if i < seen else "unseen"
        rng = random.Random(f"{seed}-{split}-{i}")
        scene, q = one(rng, T.TYPES[i % len(T.TYPES)], split, small)
        name = f"{i:03d}.mp4"
        encode(scene, out / name, rng)
        rows.append({"video": name, "question": T.write_options(rng, q), "options": q["options"], "answer": "ABCD"[q["answer"]],
                     "type": q["type"], "split": split, "scene": T.describe(scene)})
    (out / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--seen", type=int, default=300)
    ap.add_argument("--unseen", type=int, default=200)
    ap.add_argument("--seed", type=int, default=2026)
    ap.add_argument("--small", action="store_true")
    a = ap.parse_args()
    make(a.out, a.seen, a.unseen, a.seed, a.small)
