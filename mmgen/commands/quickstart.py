"""`mmgen quickstart`: the whole road on the embedded world, from nothing to judged pictures."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mmgen import text
from mmgen.data.sources import open_source, texts
from mmgen.evals import probe, report, suites
from mmgen.runtime import config as configs
from mmgen.runtime import hardware, memory, metrics
from mmgen.sampling import sampler
from mmgen.sampling.strategies import Strategy
from mmgen.stages import loop
from mmgen.stages.tokenize import tokenize


def main(argv):
    """Trains a tokenizer and a transformer on the embedded world, draws held-out prompts, judges them and
    writes report.html and report.json. Run again with the same --workdir, it continues where it was."""
    parser = argparse.ArgumentParser("mmgen quickstart", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", default="runs/quickstart")
    parser.add_argument("--config", default="quickstart", help="name:variant, or path.py:variant")
    args, rest = parser.parse_known_args(argv)
    config = configs.load(args.config, configs.overrides(parser, rest))
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if config.tokenizer.keep_pages or config.transformer.keep_pages:
        memory.keep_pages()  # before SentencePiece starts threads, whose heaps JAX's threads would inherit
    hardware.apply_flags(hardware.expected_platform())
    hardware.compilation_cache()
    seconds, began = {}, time.monotonic()

    def part(title):
        """Prints where the run is; `seconds` gets what the part before took."""
        nonlocal began
        now = time.monotonic()
        if seconds:
            last = next(reversed(seconds))
            seconds[last] = now - began
        if title:
            seconds[title] = 0.0
            print(f"\n== {len(seconds)}/5 {title}", flush=True)
        began = now

    part("tokenizer")
    source = open_source(**config.source)
    text_path = workdir / "text.model"
    if not text_path.exists():
        text.train(texts(source, config.text.lines), config.text.pieces, text_path)
    tokenizer_dir = workdir / "tokenizer"
    measured = loop.train(config.tokenizer, tokenizer_dir)

    part("tokenised shards")
    shards_dir = workdir / "shards"
    manifest = tokenize(source, tokenizer_dir, text_path, shards_dir, max_side=config.max_side)
    print(f"{manifest['count']} documents in {shards_dir}")

    part("transformer")
    with config.transformer.unlocked():
        config.transformer.data.shards = str(shards_dir)
    transformer_dir = workdir / "transformer"
    measured |= {f"transformer_{k}": v for k, v in loop.train(config.transformer, transformer_dir).items()}

    part("pictures and their judge")
    model = sampler.load(transformer_dir)
    cases = suites.run(
        model,
        suites.cases(config.suites.seed, config.suites.seen, config.suites.unseen),
        size=config.source.size,
        seed=config.suites.seed,
        batch_size=config.suites.batch_size,
        guidance=config.suites.guidance,
        image=Strategy(**config.suites.image),
    )
    scores = suites.scores(cases)
    known = probe.run(model, config.suites.probe, size=config.source.size)
    measured |= {f"probe_{name}": value for name, value in known.items()}

    part("report")
    previews = sorted((tokenizer_dir / "previews").glob("*.png"))
    part(None)
    page = report.write(
        workdir,
        title="mmgen quickstart",
        scores=scores,
        metrics={name: value for name, value in measured.items() if np.isfinite(value)},
        seconds={**seconds, "total": sum(seconds.values())},
        config=json.loads(config.to_json()),
        curves=[
            ("tokenizer", metrics.read(tokenizer_dir), ("loss",)),
            ("tokenizer", metrics.read(tokenizer_dir), ("batch_psnr",)),
            ("transformer", metrics.read(transformer_dir), ("image_loss",)),
        ],
        pictures=[("Held-out pictures above their reconstructions", previews[-1])] if previews else [],
        cases=cases,
    )
    print(f"\n{suites.show(scores)}\n\n{sum(seconds.values()):.0f} s in all; the report is {page.resolve()}")
