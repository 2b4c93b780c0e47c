"""`mmgen evaluate --checkpoint DIR --out DIR`."""

import argparse
import time
from pathlib import Path

from mmgen.commands.common import size
from mmgen.evals import probe, report, suites
from mmgen.sampling import sampler
from mmgen.sampling.strategies import Strategy


def main(argv):
    """Draws held-out prompts of the world, judges the pictures and writes report.html and report.json."""
    parser = argparse.ArgumentParser("mmgen evaluate", description=main.__doc__)
    parser.add_argument("--checkpoint", required=True, help="workdir of a transformer run on the world")
    parser.add_argument("--out", required=True, help="folder of the reports")
    parser.add_argument("--size", type=size, default=(32, 32), help="WIDTHxHEIGHT in pixels")
    parser.add_argument(
        "--seen", type=int, default=200, help="prompts a suite, of combinations seen in training"
    )
    parser.add_argument("--unseen", type=int, default=100, help="prompts a suite, of combinations held out")
    parser.add_argument("--language", default="en", help="en or zh")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--split", choices=("valid", "test"), default="test", help="valid: to choose settings by"
    )
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--keep-mode", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument(
        "--probe", type=int, default=64, help="pictures to probe the (English) words with; 0: none"
    )
    args = parser.parse_args(argv)
    if args.probe < 0:
        raise ValueError(f"expected --probe of at least 0, found {args.probe}")
    if args.seen < 0 or args.unseen < 0 or not args.seen + args.unseen:
        raise ValueError(
            f"expected --seen and --unseen of at least 0 and one above, found {args.seen}, {args.unseen}"
        )
    began = time.monotonic()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model = sampler.load(args.checkpoint)
    cases = suites.run(
        model,
        suites.cases(args.seed, args.seen, args.unseen, args.language, args.split),
        size=args.size,
        seed=args.seed,
        batch_size=args.batch_size,
        guidance=args.guidance,
        image=Strategy(args.temperature, args.top_k, args.top_p, args.keep_mode),
    )
    scores = suites.scores(cases)
    known = probe.run(model, args.probe, size=args.size) if args.language == "en" else {}
    page = report.write(
        args.out,
        title=f"mmgen evaluate {args.checkpoint}",
        scores=scores,
        metrics={f"probe_{name}": value for name, value in known.items()},
        seconds={"total": time.monotonic() - began},
        config=vars(args),
        cases=cases,
    )
    if known:
        print("probe: " + ", ".join(f"{name} {value:.3f}" for name, value in known.items()))
    print(f"{suites.show(scores)}\n\nthe report is {page.resolve()}")
