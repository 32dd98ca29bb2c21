"""Asks a running server the questions of a folder made by make_accuracy_set.py, and prints the share of right answers by type.

  tinyllava serve &
  python measure.py FOLDER [--url http://127.0.0.1:8000] [--concurrency 4] [--out answers.json]

Real files over HTTP, greedy, nothing but the standard library. A reply is well formed when, with its tags, it is
`<think>…</think> <answer>X</answer>` and nothing else, and ends by itself.
"""
import argparse
import collections
import concurrent.futures
import json
import re
import sys
import urllib.request
import uuid
from pathlib import Path

FORM = re.compile(r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*<answer>([A-D])</answer>\s*", re.S)


def ask(url, clip, question):
    """The raw reply, tags included, and its finish reason."""
    request = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 400, "reasoning_format": "none"}
    boundary = uuid.uuid4().hex
    body = b"".join([
        f'--{boundary}\r\ncontent-disposition: form-data; name="request"\r\n\r\n{json.dumps(request)}\r\n'.encode(),
        f'--{boundary}\r\ncontent-disposition: form-data; name="video"; filename="clip.mp4"\r\n\r\n'.encode(),
        clip.read_bytes(), f"\r\n--{boundary}--\r\n".encode()])
    call = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": f"multipart/form-data; boundary={boundary}"})
    with urllib.request.urlopen(call, timeout=600) as response:
        choice = json.load(response)["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def share(cells):
    return f"{sum(cells)}/{len(cells)} ({100 * sum(cells) / len(cells):.1f} %)" if cells else "–"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("--url", default="http://127.0.0.1:8000")
    ap.add_argument("--concurrency", type=int, default=4)
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    rows = json.loads((a.folder / "questions.json").read_text())
    with concurrent.futures.ThreadPoolExecutor(a.concurrency) as pool:
        replies = list(pool.map(lambda r: ask(a.url, a.folder / r["video"], r["question"]), rows))
    table, formed, described = collections.defaultdict(list), 0, 0
    for row, (text, finish) in zip(rows, replies):
        form = FORM.fullmatch(text)
        formed += bool(form) and finish == "stop"
        described += row["scene"] in text
        row.update(reply=text, finish_reason=finish, right=bool(form) and form.group(1) == row["answer"])
        for kind in (row["type"], "all"):
            table[kind, row["split"]].append(row["right"])
    print("| type | seen | unseen |\n|---|---|---|")
    for kind in sorted({k for k, _ in table} - {"all"}) + ["all"]:
        print(f"| {kind} | {share(table[kind, 'seen'])} | {share(table[kind, 'unseen'])} |")
    print(f"\nWell formed: {formed} of {len(rows)}. Scene described exactly right: {described} of {len(rows)}.")
    for row in rows:
        if not row["right"]:
            print(f"wrong: {row['video']} {row['type']} {row['split']} | {row['scene']} | {row['reply']!r}", file=sys.stderr)
    if a.out:
        a.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
