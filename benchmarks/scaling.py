"""A fitted line of transformers' held-out losses, from runs of several sizes: what more parameters and more tokens bring.

python benchmarks/scaling.py runs/scaling/*/config.json --predict 13.5e6,8.5e8 --json scaling.json

For codes and for text apart, loss = E + A / N^a + B / D^b (arXiv:2203.15556) is fitted to the logarithms of all points by
Huber's loss from many beginnings; N are the parameters that a token is multiplied with, D the tokens seen. The spread of a
prediction is that of fits to runs left out one at a time.
"""

import argparse
import itertools
import json
from pathlib import Path

import ml_collections
import numpy as np
from flax import nnx
from scipy.optimize import least_squares

from mmgen.grammar import Grammar
from mmgen.models import transformer
from mmgen.runtime import hardware


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("configs", nargs="+", help="config.json of each run, measured by config.held_out")
    flags.add_argument("--first", type=float, default=1e6, help="tokens before which a run is not looked at")
    flags.add_argument(
        "--predict",
        action="append",
        default=[],
        metavar="N,D",
        help="parameters and tokens to tell the loss of",
    )
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    wanted = [tuple(map(float, text.split(","))) for text in args.predict]
    runs = [points(Path(path).parent, args.first) for path in args.configs]
    found = {}
    for kind in ("image", "text"):
        table = [[[row[name] for name in ("N", "D", kind)] for row in run] for run in runs]
        rows = [np.array(run) for run in table]
        fit = fitted(np.concatenate(rows))
        others = (
            [fitted(np.concatenate(rows[:k] + rows[k + 1 :])) for k in range(len(rows))]
            if len(rows) > 2
            else []
        )
        E, A, a, B, b = fit
        error = np.concatenate([np.log(told(fit, run)) - np.log(run[:, 2]) for run in rows])
        print(
            f"{kind}: {E:.3f} + {A:.3g} / N^{a:.3f} + {B:.3g} / D^{b:.3f}, off by {100 * np.sqrt(np.mean(error**2)):.1f} %"
        )
        found[kind] = {"E": E, "A": A, "a": a, "B": B, "b": b, "points": table, "predicted": []}
        for path, run in zip(args.configs, rows):
            n, d, last = run[-1]
            print(
                f"  {Path(path).parent.name:<8}{n / 1e6:8.2f} M parameters {d / 1e6:8.2f} M tokens: {last:.4f}, the line {told(fit, run[-1:])[0]:.4f}"
            )
        for n, d in wanted:
            at = np.array([[n, d, 0]])
            spread = [float(told(other, at)[0]) for other in others]
            value = float(told(fit, at)[0])
            print(
                f"  {n / 1e6:.2f} M and {d / 1e6:.0f} M: {value:.3f}"
                + (f" ({min(spread):.3f} to {max(spread):.3f})" if spread else "")
            )
            found[kind]["predicted"].append({"N": n, "D": d, "loss": value, "spread": spread})
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2))


def points(workdir, first):
    """A run's measurements as a structured array of N, D, image, text: nats a code and a piece."""
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    vocabulary = json.loads((workdir / "vocabulary.json").read_text())
    vocab = Grammar.from_dict(vocabulary["grammar"]).vocab_size
    make = lambda: transformer.of_codes(config.model, vocabulary, vocab, nnx.Rngs(0))
    N = hardware.parameters(nnx.to_pure_dict(nnx.split(nnx.eval_shape(make))[1]))[1]
    each = config.data.batch_size * config.data.row_length
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [
        (N, line["step"] * each, line["held_out_image_loss"], line["held_out_text_loss"])
        for line in lines
        if "held_out_loss" in line and line["step"] * each >= first
    ]
    if not rows:
        raise ValueError(
            f"{workdir}: nothing was measured after {first:.0f} tokens; train with config.held_out.shards"
        )
    return np.array(rows, [(name, float) for name in ("N", "D", "image", "text")])


def told(fit, rows):
    """The losses that a fit tells of rows [n, 3] of N, D and anything."""
    E, A, a, B, b = fit
    return E + A / rows[:, 0] ** a + B / rows[:, 1] ** b


def fitted(rows):
    """(E, A, a, B, b) for rows [n, 3] of N, D, loss."""
    logs = np.log(rows)

    def off(x):
        e, n, a, d, b = x
        parts = np.stack([np.full(len(logs), e), n - a * logs[:, 0], d - b * logs[:, 1]])
        return np.logaddexp.reduce(parts) - logs[:, 2]

    low, high = [-8, -5, 0.05, -5, 0.05], [1, 15, 1.2, 25, 1.2]
    starts = itertools.product((-3.0, -1.0), (2.0, 6.0), (0.2, 0.5), (4.0, 10.0), (0.3, 0.7))
    fits = [least_squares(off, x, bounds=(low, high), loss="huber", f_scale=0.01) for x in starts]
    e, n, a, d, b = min(fits, key=lambda fit: fit.cost).x
    return float(np.exp(e)), float(np.exp(n)), float(a), float(np.exp(d)), float(b)


if __name__ == "__main__":
    main()
