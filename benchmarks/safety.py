"""How the prompt layer stands up to disguises, and how long it takes.

python benchmarks/safety.py benchmarks/safety/heldout.en.jsonl benchmarks/safety/heldout.zh.jsonl --json safety.json

Twelve ways to write a text so that people read it and matching does not, each alone and each after each other one, on the prompts of the
files that are to be stopped: recall, and its share of that of the plain texts. And seconds a prompt, median and 99th percentile.
"""

import argparse
import itertools
import json
import random
import re
import time
from pathlib import Path

import numpy as np

from mmgen.safety.gate import PromptLayer

ALIKE = dict(zip("aceopxyijsBHKMT", "асеорхуіјѕВНКМТ"))  # Cyrillic
LEET = dict(zip("aeiost", "431057"))
MARKS = "\u0301\u0323\u0308\u0330"
PICTURES = "🔪🌸✨🙂"


def letters(text, change, rng, share=1.0):
    """The text with letters changed one by one."""
    return "".join(change(c) if c.isalpha() and rng.random() < share else c for c in text)


def between(text, sign, rng, share=0.5):
    """Signs between the letters of some words (of Chinese, between characters)."""

    def spelled(found):
        return sign.join(found[0]) if rng.random() < share else found[0]

    return re.sub(r"[A-Za-z]{4,}|[\u4e00-\u9fff]{2,}", spelled, text)


def traditional(text):
    import opencc

    return opencc.OpenCC("s2t").convert(text)


KINDS = {
    "capitals": lambda t, r: letters(t, lambda c: c.upper() if r.random() < 0.5 else c.lower(), r),
    "full width": lambda t, r: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
    "math letters": lambda t, r: "".join(chr(0x1D400 + ord(c) - 65) if "A" <= c <= "Z" else chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in t),
    "circled": lambda t, r: "".join(chr(0x24D0 + ord(c) - 97) if "a" <= c <= "z" else c for c in t.lower()),
    "zero width": lambda t, r: "\u200b".join(t),
    "right to left": lambda t, r: f"\u202e{t[::-1]}\u202c",
    "marks": lambda t, r: letters(t, lambda c: c + r.choice(MARKS), r, 0.5),
    "other letters": lambda t, r: "".join(ALIKE.get(c, c) for c in t),
    "digits": lambda t, r: letters(t, lambda c: LEET.get(c.lower(), c), r, 0.6),
    "separated": lambda t, r: between(t, r.choice(".-_*"), r),
    "pictures": lambda t, r: between(t, r.choice(PICTURES), r),
    "repeated or traditional": lambda t, r: traditional(re.sub(r"[A-Za-z]{4,}", lambda f: "".join(c * r.choice((1, 1, 3)) for c in f[0]), t)),
}  # fmt: skip


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("file", nargs="+", help='lines with "text" and "label"')
    flags.add_argument("--strictness", default="auto")
    flags.add_argument("--each", type=int, default=100, help="prompts of a pair of kinds")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    layer, found = PromptLayer(), {}
    lines = [json.loads(line) for file in args.file for line in Path(file).read_text("utf-8").splitlines()]
    texts = [line["text"] for line in lines if line["label"] != "allow"]
    stopped = lambda texts: float(
        np.mean([not layer.decide(text, args.strictness).allowed for text in texts])
    )
    plain = found["plain"] = stopped(texts)
    print(f"{len(texts)} prompts, recall {plain:.3f}")
    rng = random.Random(0)
    for name, change in KINDS.items():
        found[name] = stopped([change(text, rng) for text in texts])
        print(f"{name:24} {found[name]:.3f}, {found[name] / plain:.3f} of the plain", flush=True)
    pairs = {}
    for (a, first), (b, second) in itertools.permutations(KINDS.items(), 2):
        chosen = rng.sample(texts, min(args.each, len(texts)))
        changed = [second(first(text, rng), rng) for text in chosen]
        pairs[f"{a}, then {b}"] = stopped(changed) / max(stopped(chosen), 1e-9)
    worst = sorted(pairs, key=pairs.get)[:8]
    found["pairs"] = float(np.mean([*pairs.values()]))
    print(
        f"pairs: {found['pairs']:.3f} of the plain; the worst: "
        + "; ".join(f"{name} {pairs[name]:.2f}" for name in worst)
    )
    seconds = []
    for line in lines:
        began = time.perf_counter()
        layer.decide(line["text"], args.strictness)
        seconds.append(time.perf_counter() - began)
    found["ms"] = {
        "median": 1000 * float(np.median(seconds)),
        "p99": 1000 * float(np.quantile(seconds, 0.99)),
    }
    print("ms a prompt: " + ", ".join(f"{name} {value:.2f}" for name, value in found["ms"].items()))
    if args.json:
        Path(args.json).write_text(json.dumps(found | {"each pair": pairs}, indent=1))


if __name__ == "__main__":
    main()
