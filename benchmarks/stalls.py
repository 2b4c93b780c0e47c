"""What a training run waits for: data read from disk, and a checkpoint every so many steps.

python benchmarks/stalls.py --shards runs/shards --json stalls.json

Runs the loop of `mmgen train` on tokenised shards (`mmgen tokenize` makes them), in processes of its own, in turn
with checkpoints and without: the quickstart's transformer unless other settings are given. Seconds are those that
the run itself accounts for in goodput.json, from the end of the first step on: "data" is waiting for a batch,
"save" is waiting for checkpoints, the last of which is waited for until it counts, "step" is the rest. What is written
in the background takes no wait but CPU time, so a step with saving is also compared to one without.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--shards", required=True, help="folder that `mmgen tokenize` wrote")
    flags.add_argument("--config", default="transformer:quickstart")
    flags.add_argument("--steps", type=int, default=600)
    flags.add_argument("--every", type=int, default=100, help="steps a checkpoint")
    flags.add_argument("--rounds", type=int, default=2, help="of a run with checkpoints and one without")
    flags.add_argument("--folder", help="on the disk to measure (default: a temporary one)")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    runs = {"with checkpoints": args.every, "without": 0}
    found = {name: [] for name in runs}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for round in range(args.rounds):
            for name, every in runs.items():
                workdir = Path(folder) / f"{round}-{every}"
                found[name].append(train(args, workdir, every))
    step = {name: [run["step"] / (args.steps - 1) for run in each] for name, each in found.items()}
    ratios = [a / b for a, b in zip(*step.values())]
    print(f"{args.config}, {args.steps} steps, a checkpoint every {args.every}; load {load:.1f} before, "
          f"{os.getloadavg()[0]:.1f} after\n")  # fmt: skip
    print(f"{'':18}{'ms a step':>10}{'data s':>8}{'save s':>8}{'stalls':>8}{'CPU ms a step':>15}")
    rows = {}
    for name, each in found.items():
        median = lambda of: statistics.median(map(of, each))
        rows[name] = {
            "step_seconds": statistics.median(step[name]), "data_seconds": median(lambda r: r["data"]),
            "save_seconds": median(lambda r: r["save"]),
            "stalls": median(lambda r: (r["data"] + r["save"]) / r["step"]),
            "cpu_seconds": median(lambda r: r["cpu"]) / args.steps,
        }  # fmt: skip
        a, b, c, d, e = rows[name].values()
        print(f"{name:18}{1e3 * a:10.1f}{b:8.2f}{c:8.2f}{d:8.2%}{1e3 * e:15.1f}")
    print(f"a step with checkpoints takes {statistics.median(ratios):.3f} times one without")
    if args.json:
        report = {"machine": platform.processor() or platform.machine(), "load": load, "rows": rows}
        Path(args.json).write_text(json.dumps(report | {"ratios": ratios, "runs": found} | vars(args), indent=1))


def train(args, workdir, every):
    """{cause: seconds} of a run, its CPU seconds as "cpu"; only the last step is saved where `every` is 0."""
    settings = {
        "data.shards": args.shards, "steps": args.steps, "save_every": every or args.steps,
        "evaluate_every": args.steps * 10, "log_every": 100,
    }  # fmt: skip
    command = [sys.executable, "-m", "mmgen", "train", "--config", args.config, "--workdir", str(workdir)]
    before = os.times()
    subprocess.run(
        [*command, *(f"--config.{name}={value}" for name, value in settings.items())],
        check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},  # else the first alone would compile
    )  # fmt: skip
    after = os.times()
    seconds = json.loads((workdir / "goodput.json").read_text())[-1]["seconds"]
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"data": 0.0, "save": 0.0, "cpu": cpu} | seconds


if __name__ == "__main__":
    main()
