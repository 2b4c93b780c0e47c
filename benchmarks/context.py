"""Ways in which an input image reaches the transformer (docs/context.md), trained on edits at one budget and judged.

python benchmarks/context.py --shards runs/shards_edit --json context.json

"codes", "cross" and "both" take every training step in turn, on the same batch and from the same seed, so that losses
can be compared batch by batch and times do not depend on what else the machine does. Printed are parameters, CPU
time a step beside that of "codes", the loss on image codes (of the batches of the last fifth, none of which was seen
before, and of held-out edits) and the edits that the judge accepts, all with 95 % intervals; differences are paired.
The shards are of `mmgen tokenize --source world:train/edit`; `--init` begins with the weights of a transformer run.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from mmgen.data.sources import open_source
from mmgen.evals import suites, talks
from mmgen.grammar import Grammar
from mmgen.models.autoencoders import load_tokenizer
from mmgen.models.transformer import CONTEXTS
from mmgen.runtime import checkpoint, hardware
from mmgen.runtime import config as configs
from mmgen.runtime import mesh as meshes
from mmgen.sampling.sampler import Sampler
from mmgen.stages import loop, program
from mmgen.text import Text


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument(
        "--shards", required=True, help="folder that `mmgen tokenize` wrote of world:train/edit"
    )
    flags.add_argument("--config", default="transformer:quickstart")
    flags.add_argument("--set", action="append", default=[], help="NAME=VALUE of the config, for all")
    flags.add_argument("--contexts", default=",".join(CONTEXTS))
    flags.add_argument("--steps", type=int, default=3000)
    flags.add_argument("--init", help="workdir of a transformer run to begin with")
    flags.add_argument("--size", type=int, default=32, help="side of the pictures in pixels")
    flags.add_argument(
        "--edits", type=int, default=200, help="held-out edits: to read, and to draw and judge"
    )
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--json", help="write the results here too, while they come")
    args = flags.parse_args()
    hardware.apply_flags(hardware.expected_platform())
    hardware.compilation_cache()
    contexts = args.contexts.split(",")
    config = configs.load(args.config, [f"data.shards={args.shards}", f"steps={args.steps}", *args.set])
    mesh = meshes.make_mesh({})
    report = vars(args) | {"load": os.getloadavg()[0]}
    with meshes.use(mesh, config.sharding):
        runs = {context: begin(args, config, context, mesh) for context in contexts}
        train(args, runs, report)
    folder = Path(args.shards)
    grammar = Grammar.from_dict(json.loads((folder / "manifest.json").read_text())["grammar"])
    around = grammar, Text(folder / "text.model"), load_tokenizer(folder / "tokenizer")
    for run in runs.values():
        sampler = Sampler(run.program.graphdef, run.state["params"], run.config, *around)
        run.nats = held_out(args, sampler)
        cases = talks.run(
            sampler, "edit", seen=args.edits, unseen=0, size=(args.size, args.size), seed=args.seed
        )
        means, flags = suites.measures(cases)
        run.shares = means | {name: count / total for name, (count, total) in flags.items()}
        run.shares["edit_ok"] = statistics.mean(case.ok for case in cases)
        run.ok = [case.ok for case in cases]
        run.ceiling = statistics.mean(case.ceiling for case in cases)
        show(args, runs, report)


def begin(args, config, context, mesh):
    """What is known of one contestant before its first step."""
    config = config.copy_and_resolve_references()
    config.model.context = context
    stage = loop.setup(config, Path("/nonexistent"))
    built = program.build(config, stage.make, stage.loss, mesh)
    state = built.init(jax.random.key(args.seed))
    if args.init:
        init = Path(args.init)
        state["params"], _ = checkpoint.restore_weights(init, state["params"], grow=stage.grow(init))
    count = sum(x.size for x in jax.tree.leaves(state["params"]))
    return SimpleNamespace(
        config=config, stage=stage, program=built, state=state, parameters=count, seconds=[], losses=[]
    )


def train(args, runs, report):
    """Takes every step with each of the runs, in turn, and notes CPU seconds and losses on image codes."""
    first = next(iter(runs.values()))
    began = time.monotonic()
    for step, batch, _ in first.stage.data.prefetch():
        if step == args.steps:
            break
        for run in runs.values():
            cpu = time.process_time()
            run.state, measured = run.program.step(run.state, batch)
            run.losses.append(float(measured["image_loss"]))  # waits for the step
            run.seconds.append(time.process_time() - cpu)
        if (step + 1) % 100 == 0:
            report["minutes"] = (time.monotonic() - began) / 60
            losses = "  ".join(f"{name} {np.mean(run.losses[-100:]):.4f}" for name, run in runs.items())
            print(
                f"step {step + 1}/{args.steps}, {report['minutes']:.1f} min: image loss {losses}", flush=True
            )
            save(args, runs, report)


def held_out(args, sampler):
    """Nats a code of the drawn image of each held-out edit: float [N]."""
    source = open_source("world:test/edit", size=(args.size, args.size), documents=args.edits, seed=args.seed)
    rows = [
        sampler.grammar.encode(d, sampler.text)
        for d in sampler.encode(map(source.__getitem__, range(args.edits)))
    ]
    answer = [
        sampler.grammar.loss_weights(row, text=0, image=1) * (row >= sampler.grammar.code_start)
        for row in rows
    ]
    return [float((n * w).sum() / w.sum()) for n, w in zip(sampler.nats(rows), answer)]


def interval(values):
    """Mean and half of its 95 % interval."""
    values = np.asarray(values, float)
    return float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5)


def save(args, runs, report):
    keep = ("parameters", "seconds", "losses", "nats", "ok", "ceiling", "shares")
    report["runs"] = {name: {k: v for k, v in vars(run).items() if k in keep} for name, run in runs.items()}
    if args.json:
        Path(args.json).write_text(json.dumps(report))


def show(args, runs, report):
    """Prints the table of the runs that are judged."""
    save(args, runs, report)
    runs = {name: run for name, run in runs.items() if hasattr(run, "ok")}
    base, last = next(iter(runs)), args.steps // 5
    text = lambda pair: f"{pair[0]:8.4f} ±{pair[1]:.4f}"
    print(
        f"\n{args.steps} steps, {args.edits} edits; load {report['load']:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    head = (
        "parameters",
        "CPU ms",
        "ratio",
        "loss, last fifth",
        "held-out nats",
        "judged",
        "changed",
        "kept",
        "copied",
    )
    print(f"{'':8}" + "".join(f"{name:>18}" for name in head))
    for name, run in runs.items():
        ratio = statistics.median(a / b for a, b in zip(run.seconds[5:], runs[base].seconds[5:]))
        cells = [f"{run.parameters:,}", f"{1e3 * statistics.median(run.seconds):.1f}", f"{ratio:.2f}"]
        cells += [text(interval(x)) for x in (run.losses[-last:], run.nats, run.ok)]
        cells += [f"{run.shares[f'edit_{k}']:.3f}" for k in ("changed", "kept", "copied")]
        print(f"{name:8}" + "".join(f"{cell:>18}" for cell in cells))
    for name, run in list(runs.items())[1:]:
        pairs = (
            (run.losses[-last:], runs[base].losses[-last:]),
            (run.nats, runs[base].nats),
            (run.ok, runs[base].ok),
        )
        less = [text(interval(np.subtract(a, b, dtype=float))) for a, b in pairs]
        print(f"{name} less {base}: loss {less[0]}, held-out nats {less[1]}, judged {less[2]}")
    print(f"of the tokenizer's own reconstructions {runs[base].ceiling:.3f} are judged right", flush=True)


if __name__ == "__main__":
    main()
