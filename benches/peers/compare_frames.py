#!/usr/bin/env python3
"""Compares the 16 frames that this server takes from each video with decord's, byte by byte, before any resize.

  compare_frames.py --server ../../target/release/tinyllava FILE...

decord made the frames that the model was trained on, so every difference must have an explanation. Prints a Markdown row
for each file: the frames that decord counts, and the largest difference of a color value. Exits with 1 if a file that both
decode has another size or other bytes.
"""
import argparse, os, subprocess, sys, tempfile
from collections import Counter

import numpy
from safetensors.numpy import load_file

NUM_FRAMES = 16
DECORD = """
import sys, decord, numpy
reader = decord.VideoReader(sys.argv[1], num_threads=1)
total, n = len(reader), int(sys.argv[2])
step = (total - 1) / (n - 1)
indices = [int(i * step) for i in range(n)]
indices[-1] = total - 1
numpy.savez(sys.argv[3], total=total, frames=reader.get_batch(indices).asnumpy())
"""


def decords_frames(path, folder):
    """Frames counted and `[16, height, width, 3]` by decord, in a process of its own: some files crash it."""
    out = os.path.join(folder, "decord.npz")
    command = [sys.executable, "-c", DECORD, path, str(NUM_FRAMES), out]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return None, None, "does not end within 120 s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return None, None, lines[-1][-100:] if lines else f"ends with {done.returncode}"
    with numpy.load(out) as arrays:
        return int(arrays["total"]), arrays["frames"], None


def servers_frames(server, path, folder):
    """`[16, height, width, 3]` by this server."""
    out = os.path.join(folder, "ours.safetensors")
    command = [server, "trace", "--model", "nano", "--video", path, "--prompt", "What?", "--max-tokens", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1][-160:] if lines else f"ends with {done.returncode}"
    return load_file(out)["frames_u8"], None


def compared(ours, theirs):
    """A word for the outcome, and what the table says."""
    if ours.shape != theirs.shape:
        return "size", f"{ours.shape[2]}x{ours.shape[1]} against {theirs.shape[2]}x{theirs.shape[1]}"
    difference = numpy.abs(ours.astype(numpy.int16) - theirs.astype(numpy.int16))
    if difference.max() == 0:
        return "equal", "equal, every byte"
    changed = [index for index in range(len(difference)) if difference[index].max() > 0]
    return "bytes", f"color differs by up to {difference.max()} (mean {difference.mean():.3f}) in {len(changed)} of {NUM_FRAMES} frames"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the tinyllava binary")
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    outcomes = Counter()
    print("| file | frames | result |\n|---|---|---|")
    for path in args.files:
        with tempfile.TemporaryDirectory() as folder:
            total, theirs, their_fault = decords_frames(path, folder)
            ours, our_fault = servers_frames(args.server, path, folder)
        if ours is not None and theirs is not None:
            outcome, text = compared(ours, theirs)
        elif ours is not None:
            outcome, text = "decord fails", f"decord: {their_fault}"
        elif theirs is not None:
            outcome, text = "refused", our_fault
        else:
            outcome, text = "both fail", our_fault
        outcomes[outcome] += 1
        print(f"| {os.path.basename(path)} | {total or ''} | {text} |", flush=True)
    print("\n" + ", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())))
    return 1 if outcomes["bytes"] or outcomes["size"] else 0


if __name__ == "__main__":
    sys.exit(main())
