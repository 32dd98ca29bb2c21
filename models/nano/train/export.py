"""Writes training checkpoints as ../model.safetensors in float16, with the published tensor names.

  python export.py work/vision.pt work/language.pt      tower and connector of the first, decoder of the last
  python export.py work/joint.pt

The unused tensors of the layout (last tower layer, post_layernorm, head) keep their random values on purpose:
a program that wrongly runs them gets wrong answers instead of the same ones.
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

NANO = Path(__file__).resolve().parent.parent


def main():
    state = torch.load(sys.argv[1])["model"]
    state.update({k: v for k, v in torch.load(sys.argv[-1])["model"].items() if k.startswith("language_model")})
    big = max(v.abs().max().item() for v in state.values())
    assert big < 60000, big  # float16's range
    save_file({k: v.to(torch.float16).contiguous() for k, v in sorted(state.items())}, NANO / "model.safetensors", {"format": "pt"})
    print(f"{sum(v.numel() for v in state.values()):,} parameters, {(NANO / 'model.safetensors').stat().st_size:,} bytes, largest value {big:.1f}")


if __name__ == "__main__":
    main()
