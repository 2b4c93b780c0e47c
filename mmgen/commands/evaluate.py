"""`mmgen evaluate --checkpoint DIR --out DIR --suite NAME`, or `--prompts FILE` to draw for other judges."""

import argparse
import time
from pathlib import Path

from mmgen.commands.common import (
    add_loading_flags,
    add_refiner_flags,
    add_sampling_flags,
    grid_of,
    load_sampler,
    loading_options,
    refiner_flags,
    sampling_options,
    share,
    size,
    with_defaults,
    with_refiner,
)
from mmgen.data.sources import open_with_larger
from mmgen.evals import compare, probe, prompts, report, suites, talks, towers
from mmgen.models.autoencoders import load_tokenizer
from mmgen.models.classifier import load_classifier
from mmgen.models.contrastive import load_towers
from mmgen.models.refiner import load_refiner
from mmgen.runtime import checkpoint, hardware
from mmgen.runtime.released import model_folder, towers_folder
from mmgen.safety import watermark
from mmgen.sampling import sampler
from mmgen.stages.tokenizer import background
from mmgen.world.scene import CATEGORIES
from mmgen.world.tasks import LEAST

DRAWN = ("world", *talks.SUITES)  # asked of a transformer
MEASURED = {  # on images of --data: the stage of their run, and how it is loaded and measured
    "retrieval": ("contrastive", load_towers, towers.retrieve),
    "classifier": ("classifier", load_classifier, towers.classify),
    "tokenizer": ("tokenizer", load_tokenizer, towers.reconstruct),
    "refiner": ("refiner", load_refiner, towers.refine),
}


def main(argv):
    """Measures a checkpoint and writes report.html and report.json. Suite world: held-out prompts of the world, drawn
    by a transformer and judged; draw: prompts of the rich world; edit, style, reference, reason, dialogue, understanding,
    question: its pictures changed, combined, thought over, talked about, described and asked about; text (of it: sign), infographic, comic: pages with words; retrieval: the towers of a contrastive run,
    on pairs of --data; classifier: on labelled images of --data; tokenizer: how well codes give back the images of
    --data; refiner: how much nearer it comes to them, by numbers of steps; all: what a transformer was trained for, and its tokenizer. With --prompts nothing is judged: pictures for
    the prompts of a public benchmark."""
    args = _parser().parse_args(argv)
    _check(args)
    hardware.set_up()
    if args.prompts:
        return _draw(args)
    names = _covered(args.checkpoint, args.size or (32, 32)) if args.suite == "all" else [args.suite]
    baseline = None
    if args.baseline:
        if (Path(args.baseline) / "config.json").is_file():  # a run: it is asked the same
            _evaluate(args, names, args.baseline, Path(args.out) / "baseline")
            baseline = compare.read(Path(args.out) / "baseline")
        else:
            baseline = compare.read(args.baseline)
            compare.check_settings(_config(args), baseline["config"])
            asked = _categories(args) if args.suite == "world" else ()
            if lacking := [name for name in asked if name not in baseline["cases"]]:
                raise ValueError(f"--baseline {args.baseline} has no suite {', '.join(lacking)}")
    page = _evaluate(args, names, args.checkpoint, Path(args.out), baseline)
    print(f"\nthe report is {page.resolve()}")


def _evaluate(args, names, workdir, out, baseline=None):
    """Runs suites on the checkpoint of a workdir, writes the report of all, and of several each one's too -> path."""
    args = with_defaults(args, workdir)
    parts, model = {}, None
    for name in names:
        began = time.monotonic()
        if name in MEASURED:
            inside = args.suite == "all"
            part = _measure(args, name, Path(workdir) / "tokenizer" if inside else workdir, inside)
        else:
            model = model or with_refiner(sampler.load(workdir, **loading_options(args)), workdir, args)
            part = _world(args, model) if name == "world" else _talk(args, name, model)
        parts[name] = part | {"seconds": time.monotonic() - began}
        if len(names) > 1:
            print(f"suite {name}: {parts[name]['seconds']:.0f} s", flush=True)
    compared = []
    for name, part in parts.items():
        part["rows"] = compare.compare(compare.outcomes(part["cases"]), baseline["cases"]) if baseline else []
        compared += part["rows"]
        if len(names) > 1:
            _write(args, {name: part}, workdir, out / name)
    page = _write(args, parts, workdir, out)
    metrics = {name: value for part in parts.values() for name, value in part["metrics"].items()}
    print("\n".join(f"{name:<36}{value:.4f}" for name, value in metrics.items()))
    for name, (right, total) in ((n, s) for part in parts.values() for n, s in part["shares"].items()):
        low, high = compare.wilson(right, total)
        print(f"{name:<36}{right / total:.4f} [{low:.4f} {high:.4f}]")
    cases = [case for part in parts.values() for case in part["cases"]]
    if cases:
        print(f"\n{suites.show(suites.scores(cases))}")
    if compared:
        print(f"\n{compare.show(compared)}")
    return page


def _write(args, parts, workdir, out):
    """The report of some suites' parts -> its path."""
    joined = lambda name: {key: value for part in parts.values() for key, value in part[name].items()}
    cases = [case for part in parts.values() for case in part["cases"]]
    seconds = {name: part["seconds"] for name, part in parts.items()}
    return report.write(
        out,
        title=f"mmgen evaluate {workdir}",
        scores=suites.scores(cases),
        metrics=joined("metrics"),
        shares=joined("shares"),
        seconds=seconds | {"total": sum(seconds.values())},
        config=_config(args) | {"checkpoint": str(workdir)} | joined("config"),
        cases=cases,
        examples=args.examples,
        comparison=[row for part in parts.values() for row in part["rows"]],
        **joined("shown"),
    )


def _part(cases=(), metrics={}, shares={}, shown={}, config={}):
    """What a suite gives to the report; shown: more options of `report.write`."""
    return dict(cases=list(cases), metrics=metrics, shares=shares, shown=shown, config=config)


def _config(args):
    """The flags as a report keeps them."""
    pictures = {"size": args.size or (32, 32)} if args.suite in (*DRAWN, "all") else {}
    return vars(args) | pictures


def _asked(args):
    """What the suites of a transformer have in common."""
    return dict(
        size=args.size or (32, 32), seed=args.seed, batch_size=args.batch_size, **sampling_options(args)
    )  # fmt: skip


def _categories(args):
    """Of suite world: all, or those of --category; of `all` that flag is the tokenizer's."""
    return tuple(args.category.split(",")) if args.suite == "world" and args.category else CATEGORIES


def _world(args, model):
    judges = load_towers(args.towers) if args.towers else None
    cases = suites.run(
        model,
        suites.cases(args.seed, args.seen, args.unseen, args.language, args.split, _categories(args)),
        best_of=args.best_of,
        score=judges and judges.score,
        **_asked(args),
    )
    whole = args.language == "en" and _categories(args) == CATEGORIES
    known = probe.run(model, args.probe, size=args.size or (32, 32)) if whole else {}
    metrics = {f"probe_{name}": value for name, value in known.items()}
    if judges:
        drawn, asked = [case.pixels for case in cases], [case.item.prompt for case in cases]
        metrics |= towers.judge(judges, drawn, asked, [case.truth for case in cases])
    return _part(cases, metrics)


def _talk(args, suite, model):
    counts = dict(seen=args.seen, unseen=args.unseen, split=args.split, language=args.language)
    key = b"evaluate"
    kept = lambda pixels: watermark.embed_where_it_lasts(pixels, key)
    shown = {"kept": kept, "removed": lambda pixels: watermark.remove(kept(pixels), key)}.get(args.marked)
    best_of = args.best_of if suite == args.suite else 1  # of `all` it is for suite world
    cases = talks.run(model, suite, watermark=shown, best_of=best_of, **counts, **_asked(args))
    return _part(cases, *suites.measures(cases))


def _measure(args, suite, workdir, inside):
    """A suite on images. inside: of the tokenizer within a transformer's run, where --size is not meant for it."""
    stage, load, measure = MEASURED[suite]
    model, run = load(workdir), checkpoint.read_config(workdir, stage)
    wanted = None if inside else args.size
    settings = run["held_out"] | {"size": wanted or run["data"]["source"]["size"]}
    if args.data:
        settings |= {"spec": args.data, "seed": args.seed}
        settings.pop("larger", None)
    if suite in ("tokenizer", "refiner"):  # what the tokenizer saw behind transparent parts
        settings |= background(
            run if suite == "tokenizer" else checkpoint.read_config(Path(workdir) / "tokenizer")
        )
    given = {
        name: getattr(args, name) for name in ("documents", "languages", "category", "split_by", "holdout")
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    if args.split_side:
        settings["split"] = None if args.split_side == "all" else args.split_side
    print("measured on " + ", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    more = {"towers": load_towers(args.towers)} if args.towers and not inside else {}
    more |= {} if args.tile is None else {"tile": args.tile}
    more |= {"temperature": args.refine_temperature} if suite == "refiner" else {}
    max_bad = run["data"]["max_bad"] if args.max_bad is None else args.max_bad
    metrics, shown = measure(model, open_with_larger(**settings), max_bad, **more)
    ranks = [name for name in metrics if name.startswith(("text_r", "image_r"))]  # shares of the pairs
    pairs = int(metrics.get("pairs", 0))
    shares = {name: [round(metrics.pop(name) * pairs), pairs] for name in ranks}
    return _part((), metrics, shares, shown, {"data": settings})


def _covered(workdir, size):
    """The suites that a transformer's training covers (of an unknown one all whose pictures may have `size`), and that
    of its tokenizer."""
    trained = suites.trained_on(checkpoint.read_config(workdir, "transformer", "reinforce"))
    tasks = {"world": ("world", "dialogue")} | {k: v for k, v in talks.SUITES.items() if k not in talks.PARTS}
    if trained is None:  # what needs larger pictures may need longer rows than the model has
        trained = {task for names in tasks.values() for task in names if LEAST.get(task, 0) <= min(size)}
    names = [name for name in tasks if trained & set(tasks[name])]
    if left := [name for name in tasks if name not in names]:
        print(f"left out: {', '.join(left)} (--suite NAME runs one)")
    return [*names, "tokenizer"]


def _draw(args):
    args, records = with_defaults(args, args.checkpoint), prompts.read(args.prompts)
    model = with_refiner(load_sampler(args), args.checkpoint, args)
    grid = grid_of(args.size, model) if args.size else None
    how = dict(n=args.n, seed=args.seed, size=grid, batch_size=args.batch_size, **sampling_options(args))
    drawn = prompts.draw(model, records, args.out, **how)
    print(f"{drawn} new of {args.n * len(records)} pictures for {len(records)} prompts in {args.out}")


def _check(args):
    """ValueError for flags that do not go together, before anything is loaded."""
    drawn = args.suite in (*DRAWN, "all")
    if args.best_of < 1:
        raise ValueError(f"expected --best-of of at least 1, found {args.best_of}")
    if args.best_of != 1 and (args.suite not in ("world", "understanding", "all") or args.prompts):
        raise ValueError(
            f"--best-of is for the suites world and understanding, not for {args.prompts or args.suite}"
        )
    if args.towers and (args.suite not in ("world", "tokenizer", "refiner", "all") or args.prompts):
        raise ValueError(
            f"--towers is for the suites world, tokenizer and refiner, not for {args.prompts or args.suite}"
        )
    measured = ["--refine-temperature"] if args.suite == "refiner" else []  # which is asked of it alone
    if set(refiner_flags(args)) - set(measured) and not (drawn or args.prompts):
        raise ValueError(
            f"{', '.join(refiner_flags(args))}: for what a transformer draws, not for suite {args.suite}"
        )
    if args.size and args.suite in ("retrieval", "classifier", "refiner"):
        raise ValueError(f"--size is that of the training in suite {args.suite}; leave it out")
    if args.tile is not None and args.suite not in ("tokenizer", "all"):
        raise ValueError(f"--tile is for suite tokenizer, not for {args.suite}")
    if drawn and args.probe < 0:
        raise ValueError(f"expected --probe of at least 0, found {args.probe}")
    if drawn and (args.seen < 0 or args.unseen < 0 or not args.seen + args.unseen):
        raise ValueError(
            f"expected --seen and --unseen of at least 0 and one above, found {args.seen}, {args.unseen}"
        )
    if args.marked and (args.suite not in (*talks.SUITES, "all") or args.prompts):
        raise ValueError(
            f"--marked is for suites in which pictures are shown, not for {args.prompts or args.suite}"
        )
    if args.marked and min(args.size or (32, 32)) < watermark.LEAST:
        raise ValueError(
            f"--marked: there is a watermark from a --size of {watermark.LEAST}x{watermark.LEAST} on"
        )
    if (args.int8 or args.int8_cache or args.tensor > 1) and not (drawn or args.prompts):
        raise ValueError(
            f"--int8, --int8-cache and --tensor are for transformers, not for suite {args.suite}"
        )
    if args.category and (args.suite in talks.SUITES or args.prompts):
        raise ValueError(
            f"--category is for suite world and those on --data, not for {args.prompts or args.suite}"
        )
    suites.cases(0, 1, 0, categories=_categories(args))  # raises for what is none
    if args.baseline and (not drawn or args.prompts):
        what = "--prompts" if args.prompts else f"suite {args.suite}"
        raise ValueError(f"--baseline compares cases that a judge has scored; {what} has none")
    if min(args.examples, args.batch_size) < 1:
        raise ValueError(
            f"expected --examples and --batch-size of at least 1, found {args.examples}, {args.batch_size}"
        )


def _parser():
    parser = argparse.ArgumentParser("mmgen evaluate", description=main.__doc__)
    parser.add_argument(
        "--checkpoint", type=model_folder, default="reference",
        help="workdir of a run; left out, or `reference`: the model that comes with mmgen",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder of the reports, or of pictures")
    parser.add_argument("--suite", choices=(*DRAWN, *MEASURED, "all"), default="world")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--baseline",
        metavar="DIR",
        help="an earlier report, or the workdir of another run to ask the same: which suites differ?",
    )
    parser.add_argument(
        "--examples", type=int, default=16, help="pictures shown a suite: so many wrong ones, so many right"
    )

    drawn = parser.add_argument_group(f"suites {', '.join(DRAWN)}")
    drawn.add_argument(
        "--size",
        type=size,
        help="WIDTHxHEIGHT in pixels, before --upscale; left out: 32x32, of --data that of the training, of --prompts the model's choice",
    )
    drawn.add_argument(
        "--seen", type=int, default=200, help="prompts a suite, of combinations seen in training"
    )
    drawn.add_argument("--unseen", type=int, default=100, help="prompts a suite, of combinations held out")
    drawn.add_argument("--language", default="en", help="en or zh")
    drawn.add_argument(
        "--split", choices=("valid", "test"), default="test", help="valid: to choose settings by"
    )
    add_loading_flags(drawn)
    add_sampling_flags(drawn)
    add_refiner_flags(drawn)
    parser.set_defaults(text_temperature=0.0)  # one answer is judged: the likeliest
    drawn.add_argument(
        "--marked",
        nargs="?",
        const="kept",
        choices=("kept", "removed"),
        help="pictures that the user shows have a watermark, as drawn ones that are shown again; `removed`: had one that was taken off",
    )
    drawn.add_argument("--batch-size", type=int, default=50)
    drawn.add_argument(
        "--probe", type=int, default=64, help="pictures to probe the (English) words with; 0: none"
    )
    drawn.add_argument(
        "--towers",
        type=towers_folder,
        help="workdir of a contrastive run, or `reference`: adds its CLIPScore and Fréchet distance",
    )
    drawn.add_argument(
        "--best-of",
        type=int,
        default=1,
        help="draw so many a prompt, keep the --towers' favourite, or the likeliest; of suite understanding so many descriptions, the one from "
        "which the model itself would likeliest draw the picture",
    )

    files = parser.add_argument_group("pictures for other judges (docs/evaluation.md)")
    files.add_argument(
        "--prompts",
        metavar="FILE",
        help="GenEval's .jsonl, PartiPrompts' .tsv, or a .txt with a prompt a line",
    )
    files.add_argument("--n", type=int, default=4, help="pictures a prompt")

    data = parser.add_argument_group(f"suites {', '.join(MEASURED)}")
    data.add_argument(
        "--data",
        metavar="SPEC",
        help="source to measure on, such as world:test; left out: what the run held out",
    )
    # What is not given is as the run's config.held_out has it: split otherwise, one side has much of the other.
    data.add_argument("--documents", type=int, help="how many of it")
    data.add_argument("--languages", type=lambda text: text.split(","), help="of a world: en,zh")
    data.add_argument(
        "--category",
        help="of a world: its kind of scene; of suite world, some of its suites, such as counting,position",
    )
    data.add_argument(
        "--data-split", dest="split_side", choices=("train", "test", "all"), help="side of the stable split"
    )
    data.add_argument("--split-by", help="field whose equal values stay together")
    data.add_argument("--holdout", type=share, help="share of the test side")
    data.add_argument("--tile", type=int, help="of tokenizers: decode in tiles of so many codes a side")
    data.add_argument("--max-bad", type=share, help="share of bad documents to put up with")
    return parser
