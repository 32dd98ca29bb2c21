"""Answers the questions of a folder made by make_accuracy_set.py, greedily, and prints a table by type.

  python evaluate.py FOLDER [--model ..] [--out answers.json] [--dtype f16|bf16]

Frames: ffmpeg decodes every frame, 16 indices by the reference rule, Pillow's bicubic resize to 64x64.
"""
import argparse
import collections
import json
import math
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import text as T
import tokenizer
from model import load

ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>")
FORM = re.compile(r"\s*<think>.+</think>\s*<answer>[A-D]</answer>", re.S)


def decode(path, n=16, size=64):
    """u8 [n, size, size, 3] of a video file."""
    probe = subprocess.run(["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", "stream=width,height", "-of", "csv=p=0",
                            str(path)], capture_output=True, text=True, check=True).stdout
    w, h = map(int, probe.strip().strip(",").split(","))
    raw = subprocess.run(["ffmpeg", "-v", "error", "-threads", "1", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
                         capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, h, w, 3)
    step = (len(frames) - 1) / (n - 1)
    idx = [math.floor(i * step) for i in range(n)]
    idx[-1] = len(frames) - 1
    return np.stack([np.asarray(Image.fromarray(frames[i]).resize((size, size), Image.BICUBIC)) for i in idx])


class Answerer:
    def __init__(self, folder):
        self.model, self.tok = load(folder), tokenizer.load()
        self.eos = self.tok.token_to_id(T.EOS)
        with torch.no_grad():
            _, self.past = self.model.llm(self.embed(T.BEFORE_IMAGE))

    def embed(self, s):
        return self.model.llm.embed_tokens(torch.tensor([self.tok.encode(s).ids]))

    @torch.no_grad()
    def see(self, frames):
        """Frames -> cache that holds system text and visual tokens."""
        m = self.model
        return m.llm(m.visual_tokens(m.features(torch.from_numpy(frames)[None])), self.past)[1]

    def answer(self, past, question, output=True, limit=200):
        q = question + "\n" + T.OUTPUT if output else question
        ids = self.model.generate(self.embed(T.prompt_after_image(q)), self.eos, limit, past)[0].tolist()
        return self.tok.decode([i for i in ids if i != self.eos]), ids[-1] == self.eos


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--model", type=Path, default=Path(__file__).resolve().parent.parent)
    ap.add_argument("--every", type=int, default=1, help="only every n-th question")
    ap.add_argument("--out", type=Path)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--dtype", choices=["f16", "bf16"], default="f16", help="round the weights further")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    model = Answerer(a.model)
    if a.dtype == "bf16":
        for p in model.model.parameters():
            p.data = p.data.bfloat16().float()
    rows, table = json.loads((a.folder / "questions.json").read_text())[::a.every], collections.defaultdict(list)
    formed = described = 0
    for r in rows:
        text, ended = model.answer(model.see(decode(a.folder / r["video"])), r["question"])
        m = ANSWER.search(text)
        r["reply"], r["right"] = text, bool(m) and m.group(1) == r["answer"]
        formed += bool(FORM.fullmatch(text)) and ended
        described += r.get("scene", "\0") in text
        table[r.get("type", "all"), r.get("split", "-")].append(r["right"])
    splits = sorted({k[1] for k in table})
    print("| type | " + " | ".join(splits) + " |")
    for t in sorted({k[0] for k in table}):
        cells = [table.get((t, s), []) for s in splits]
        print(f"| {t} | " + " | ".join(f"{sum(c)}/{len(c)} ({100*sum(c)/max(len(c),1):.1f} %)" for c in cells) + " |")
    cells = [[x for k, v in table.items() if k[1] == s for x in v] for s in splits]
    print("| all | " + " | ".join(f"{sum(c)}/{len(c)} ({100*sum(c)/len(c):.1f} %)" for c in cells) + " |")
    print(f"well formed {formed}/{len(rows)}, scene described exactly right {described}/{len(rows)}")
    for r in rows:
        if not r["right"]:
            print("wrong:", r["video"], r.get("type"), "| true:", r.get("scene"), "| reply:", r["reply"][:160].replace("\n", " "))
    if a.out:
        a.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
