"""FSQ, VQ and LFQ side by side: one network, one set of pictures, equal steps, codebooks of 2^8 to 2^14 codes.

python benchmarks/quantizers.py --data 'tars:data/*/*.tar' --out runs/quantizers

PSNR of held-out pictures, and of all pictures the share of codes used and their perplexity (the held-out alone have too
few codes to use 2^14), as a table (table.md) and a plot (plot.svg). Each run has a workdir under --out and goes on where
it was stopped, so that the same command again ends with the same numbers.
"""

import argparse
import json
from pathlib import Path

from mmgen.data.sources import open_source
from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import config as configs
from mmgen.runtime import metrics
from mmgen.stages import loop
from mmgen.stages.tokenizer import reconstructed, usage

# As the FSQ paper has them (arXiv:2309.15505, appendix): close to the power of two.
LEVELS = {8: (8, 6, 5), 10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5)}
KINDS = {
    "fsq": lambda bits: {"kind": "fsq", "levels": LEVELS[bits]},
    "vq": lambda bits: {"kind": "vq", "codes": 2**bits, "channels": 8},
    "lfq": lambda bits: {"kind": "lfq", "bits": bits},
}
COLORS = dict(zip(KINDS, ("#1560bd", "#c2410c", "#15803d")))
SHOWN = {"psnr": "PSNR, dB", "code_usage": "codes used", "code_perplexity": "perplexity"}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--data", default="tars:data/*/*.tar", help="source of pictures (%(default)s)")
    flags.add_argument("--out", default="runs/quantizers", help="folder of the runs and of what is written")
    flags.add_argument("--kinds", default=",".join(KINDS), help="some of the default, with commas")
    flags.add_argument("--bits", default=",".join(map(str, LEVELS)), help="some of the default, with commas")
    flags.add_argument("--steps", type=int, default=1000, help="of each run (%(default)s)")
    flags.add_argument("--documents", type=int, default=1000, help="held out (%(default)s)")
    flags.add_argument("--size", type=int, default=64, help="of the pictures, in pixels (%(default)s)")
    args = flags.parse_args()
    out, rows = Path(args.out), []
    for bits in map(int, args.bits.split(",")):
        for kind in args.kinds.split(","):
            workdir = out / f"{kind}-{bits}"
            loop.train(config_of(args, KINDS[kind](bits)), workdir)
            last = [line for line in metrics.read(workdir) if "psnr" in line][-1]
            tokenizer = load_tokenizer(workdir)
            _, codes, _ = reconstructed(tokenizer, open_source(args.data, (args.size, args.size)))
            rows.append({"kind": kind, "bits": bits, "psnr": last["psnr"]} | usage(codes, tokenizer.levels))
            (out / "rows.json").write_text(json.dumps(rows, indent=1))
            (out / "table.md").write_text(table(rows))
            (out / "plot.svg").write_text(plot(rows))
    print(table(rows))


def config_of(args, quantizer):
    """One network for all: towers of convolutions on patches of 8 pixels, nothing but the pictures' error."""
    config = configs.load("tokenizer:photos")
    with config.unlocked():
        config.model.patch = 8
        config.model.quantizer.update(quantizer)
        split = dict(spec=args.data, size=(args.size, args.size), seed=0, split_by="key")
        config.data.source, config.data.augment = dict(split, split="train"), True
        config.held_out = dict(split, split="test", documents=args.documents)
        config.steps = config.evaluate_every = args.steps
    return config


def table(rows):
    lines = ["| codes | quantizer | " + " | ".join(SHOWN.values()) + " |", "| --- " * (2 + len(SHOWN)) + "|"]
    for row in rows:
        lines.append(
            f"| 2^{row['bits']} | {row['kind'].upper()} | {row['psnr']:.2f} | {row['code_usage']:.1%} | "
            f"{row['code_perplexity']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, side=240):
    """PSNR and usage over bits, a line for each quantizer."""
    panels = []
    for k, name in enumerate(("psnr", "code_usage")):
        values = [row[name] for row in rows]
        low, high = (min(values) - 0.1, max(values) + 0.1) if name == "psnr" else (0.0, 1.0)
        x = lambda row: k * side + 30 + (side - 50) * (row["bits"] - 8) / 6
        y = lambda row: side - 25 - (side - 60) * (row[name] - low) / (high - low)
        panels.append(f"<text x='{k * side + 30}' y='16'>{SHOWN[name]}, {low:.1f} to {high:.1f}</text>")
        panels += [f"<text x='{x({'bits': b}) - 8}' y='{side - 6}'>2^{b}</text>" for b in LEVELS]
        for kind, color in COLORS.items():
            mine = [row for row in rows if row["kind"] == kind]
            points = " ".join(f"{x(row):.1f},{y(row):.1f}" for row in mine)
            panels.append(f"<polyline fill='none' stroke='{color}' stroke-width='2' points='{points}'/>")
            panels += [f"<circle cx='{x(row):.1f}' cy='{y(row):.1f}' r='3' fill='{color}'/>" for row in mine]
    legend = "".join(f"<tspan fill='{color}'>{kind.upper()} </tspan>" for kind, color in COLORS.items())
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{2 * side}' height='{side + 20}' font-family='sans-serif' "
        f"font-size='11'>{''.join(panels)}<text x='30' y='{side + 14}'>{legend}</text></svg>\n"
    )


if __name__ == "__main__":
    main()
