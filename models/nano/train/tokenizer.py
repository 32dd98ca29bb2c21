"""Byte-level BPE in Qwen2's slow-tokenizer layout: trains it, writes its files, and loads them.

`python tokenizer.py` rewrites vocab.json, merges.txt and the three small json files in models/nano.
"""
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import text as T

NANO = Path(__file__).resolve().parent.parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 765  # with the special tokens; the model has 768 rows
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
MAX_LENGTH = 1024


def _wrap(model):
    tok = Tokenizer(model)
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    return tok


def load(folder=NANO):
    """The tokenizer from vocab.json + merges.txt."""
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(x.split(" ")) for x in lines if x and not x.startswith("#version")]
    tok = _wrap(models.BPE(vocab=vocab, merges=merges))
    tok.add_special_tokens(SPECIAL)
    return tok


def corpus(rng, n=4000):
    """Template text once in a while, questions and replies often, ordinary English for the rest."""
    from data import make_scene
    for _ in range(n):
        scene = make_scene(rng)
        q = T.make_question(rng, scene)
        if q:
            yield T.BEFORE_IMAGE + T.prompt_after_image(T.write_options(rng, q) + "\n" + T.OUTPUT)
            yield T.reply(scene, q)[:-len(T.EOS)]
        if rng.random() < 0.15:
            for question, answer in [T.open_pair(rng, scene), T.other_pair(rng, scene), T.chat_pair(rng)]:
                yield question + answer[:-len(T.EOS)]


def main():
    rng = random.Random(1)
    tok = _wrap(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(SPECIAL), special_tokens=[], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(corpus(rng), trainer)
    data = json.loads(tok.to_str())["model"]
    base = len(data["vocab"])
    ids = {t: base + i for i, t in enumerate(SPECIAL)}

    def put(name, x):
        (NANO / name).write_text(json.dumps(x, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    put("vocab.json", dict(sorted(data["vocab"].items(), key=lambda kv: kv[1])))
    merges = [" ".join(m) if isinstance(m, list) else m for m in data["merges"]]
    (NANO / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    put("added_tokens.json", ids)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    eos = {"content": T.EOS, **flags}
    put("special_tokens_map.json", {"additional_special_tokens": SPECIAL[1:], "eos_token": eos, "pad_token": eos,
                                    "unk_token": eos})
    put("tokenizer_config.json", {
        "add_bos_token": False, "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": t, **flags, "special": True} for t, i in ids.items()},
        "additional_special_tokens": SPECIAL[1:], "bos_token": None, "clean_up_tokenization_spaces": False,
        "eos_token": T.EOS, "errors": "replace", "extra_special_tokens": {}, "model_max_length": MAX_LENGTH,
        "pad_token": T.EOS, "padding_side": "right", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": T.EOS})


if __name__ == "__main__":
    main()
