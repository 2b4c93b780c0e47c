"""`mmgen evaluate --checkpoint DIR --out DIR [--suite world|edit|question|retrieval|classifier|tokenizer]`."""

import argparse
import time
from pathlib import Path

from mmgen.commands.common import add_sampling_flags, sampling_options, share, size
from mmgen.data.sources import open_source
from mmgen.evals import probe, report, suites, talks, towers
from mmgen.models.autoencoders import load_tokenizer
from mmgen.models.classifier import load_classifier
from mmgen.models.contrastive import load_towers
from mmgen.runtime import checkpoint, hardware
from mmgen.sampling import sampler
from mmgen.stages.tokenizer import background
from mmgen.world.render import render


def main(argv):
    """Measures a checkpoint and writes report.html and report.json. Suite world: held-out prompts of the world,
    drawn by a transformer and judged; edit, question: its pictures changed and asked about; retrieval: the towers of a contrastive run, on pairs of --data; classifier:
    on labelled images of --data; tokenizer: how well codes give back the images of --data."""
    parser = argparse.ArgumentParser("mmgen evaluate", description=main.__doc__)
    parser.add_argument("--checkpoint", required=True, help="workdir of a run")
    parser.add_argument("--out", required=True, help="folder of the reports")
    suite = ("world", *talks.SUITES, "retrieval", "classifier", "tokenizer")
    parser.add_argument("--suite", choices=suite, default="world")
    parser.add_argument("--seed", type=int, default=1)

    world = parser.add_argument_group("suites world, edit and question")
    parser.add_argument(
        "--size",
        type=size,
        help="WIDTHxHEIGHT in pixels; left out: 32x32 in suite world, else that of the training",
    )
    world.add_argument(
        "--seen", type=int, default=200, help="prompts a suite, of combinations seen in training"
    )
    world.add_argument("--unseen", type=int, default=100, help="prompts a suite, of combinations held out")
    world.add_argument("--language", default="en", help="en or zh")
    world.add_argument(
        "--split", choices=("valid", "test"), default="test", help="valid: to choose settings by"
    )
    add_sampling_flags(world)
    world.add_argument("--batch-size", type=int, default=50)
    world.add_argument(
        "--probe", type=int, default=64, help="pictures to probe the (English) words with; 0: none"
    )
    world.add_argument(
        "--towers", help="workdir of a contrastive run: adds its CLIPScore and Fréchet distance"
    )
    world.add_argument(
        "--best-of", type=int, default=1, help="draw so many a prompt, keep the --towers' favourite"
    )

    data = parser.add_argument_group("suites retrieval, classifier and tokenizer")
    data.add_argument(
        "--data",
        metavar="SPEC",
        help="source to measure on, such as world:test; left out: what the run held out",
    )
    # What is not given is as the run's config.held_out has it: split otherwise, one side has much of the other.
    data.add_argument("--documents", type=int, help="how many of it")
    data.add_argument("--languages", type=lambda text: text.split(","), help="of a world: en,zh")
    data.add_argument("--category", help="of a world: its kind of scene")
    data.add_argument(
        "--data-split", dest="split_side", choices=("train", "test", "all"), help="side of the stable split"
    )
    data.add_argument("--split-by", help="field whose equal values stay together")
    data.add_argument("--holdout", type=share, help="share of the test side")
    data.add_argument("--tile", type=int, help="of tokenizers: decode in tiles of so many codes a side")
    data.add_argument("--max-bad", type=share, help="share of bad documents to put up with")
    args = parser.parse_args(argv)

    hardware.compilation_cache()
    began = time.monotonic()
    about = dict(title=f"mmgen evaluate {args.checkpoint}", config=vars(args))
    if args.suite not in ("world", *talks.SUITES):
        if args.best_of != 1 or (args.towers and args.suite != "tokenizer"):
            raise ValueError(
                f"--best-of is for suite world, --towers for that and tokenizer, not for {args.suite}"
            )
        stage, load, measure = {
            "retrieval": ("contrastive", load_towers, towers.retrieve),
            "classifier": ("classifier", load_classifier, towers.classify),
            "tokenizer": ("tokenizer", load_tokenizer, towers.reconstruct),
        }[args.suite]
        model, run = load(args.checkpoint), checkpoint.read_config(args.checkpoint, stage)
        if args.size and args.suite != "tokenizer":
            raise ValueError(f"--size is that of the training in suite {args.suite}; leave it out")
        settings = run["held_out"] | {"size": args.size or run["data"]["source"]["size"]}
        if args.data:
            settings |= {"spec": args.data, "seed": args.seed}
        if args.suite == "tokenizer":
            settings |= background(run)
        given = {
            name: getattr(args, name)
            for name in ("documents", "languages", "category", "split_by", "holdout")
        }
        settings |= {name: value for name, value in given.items() if value is not None}
        if args.split_side:
            settings["split"] = None if args.split_side == "all" else args.split_side
        print("measured on " + ", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
        about["config"] = about["config"] | {"data": settings}
        max_bad = run["data"]["max_bad"] if args.max_bad is None else args.max_bad
        if args.tile is not None and args.suite != "tokenizer":
            raise ValueError(f"--tile is for suite tokenizer, not for {args.suite}")
        more = {"towers": load_towers(args.towers)} if args.towers else {}
        more |= {} if args.tile is None else {"tile": args.tile}
        metrics, more = measure(model, open_source(**settings), max_bad, **more)
        seconds = {"total": time.monotonic() - began}
        page = report.write(args.out, scores={}, metrics=metrics, seconds=seconds, **more, **about)
        print("\n".join(f"{name:<36}{value:.4f}" for name, value in metrics.items()))
        print(f"\nthe report is {page.resolve()}")
        return

    if args.probe < 0:
        raise ValueError(f"expected --probe of at least 0, found {args.probe}")
    if args.seen < 0 or args.unseen < 0 or not args.seen + args.unseen:
        raise ValueError(
            f"expected --seen and --unseen of at least 0 and one above, found {args.seen}, {args.unseen}"
        )
    if args.best_of < 1 or (args.best_of > 1 and not args.towers):
        raise ValueError(f"--best-of {args.best_of} needs --towers DIR to say which is best")
    args.size = args.size or (32, 32)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model = sampler.load(args.checkpoint)
    if args.suite in talks.SUITES:
        if args.towers or args.best_of > 1:
            raise ValueError(f"--towers and --best-of are for suite world, not for {args.suite}")
        counts = dict(seen=args.seen, unseen=args.unseen, split=args.split, language=args.language)
        how = dict(size=args.size, seed=args.seed, batch_size=args.batch_size, **sampling_options(args))
        cases, metrics = talks.run(model, args.suite, **counts, **how)
        scores, seconds = suites.scores(cases), {"total": time.monotonic() - began}
        page = report.write(args.out, scores=scores, metrics=metrics, seconds=seconds, cases=cases, **about)
        print(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        print(f"{suites.show(scores)}\n\nthe report is {page.resolve()}")
        return
    judges = load_towers(args.towers) if args.towers else None
    cases = suites.run(
        model,
        suites.cases(args.seed, args.seen, args.unseen, args.language, args.split),
        size=args.size,
        seed=args.seed,
        batch_size=args.batch_size,
        best_of=args.best_of,
        score=judges and judges.score,
        **sampling_options(args),
    )
    scores = suites.scores(cases)
    known = probe.run(model, args.probe, size=args.size) if args.language == "en" else {}
    metrics = {f"probe_{name}": value for name, value in known.items()}
    if judges:
        true = [render(case.item.scene, *args.size) for case in cases]
        drawn, prompts = [case.pixels for case in cases], [case.item.prompt for case in cases]
        metrics |= towers.judge(judges, drawn, prompts, true)
    page = report.write(
        args.out,
        scores=scores,
        metrics=metrics,
        seconds={"total": time.monotonic() - began},
        cases=cases,
        **about,
    )
    if metrics:
        print(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"{suites.show(scores)}\n\nthe report is {page.resolve()}")
