"""`mmgen tools policy check|measure|train|blocklist`: the safety policy, what it says of prompts, and how good it is."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from mmgen import safety
from mmgen.data import files
from mmgen.evals.compare import wilson
from mmgen.safety import pdq, prompts
from mmgen.safety.gate import PromptLayer
from mmgen.safety.policy import Policy
from mmgen.world import tasks

INTENTS = sorted(Path(safety.__file__).parent.glob("intents.*"))


def main(argv):
    """What the policy says of a prompt and why; trains the prompt classifier; measures the layer on labelled prompts."""
    parser = argparse.ArgumentParser("mmgen tools policy", description=main.__doc__)
    parser.add_argument("--policy", metavar="FILE", help="instead of mmgen's own policy.yaml")
    parser.add_argument("--artists", metavar="FILE", help="instead of mmgen's own artists.yaml")
    verbs = parser.add_subparsers(dest="verb", required=True)

    check = verbs.add_parser("check", help="decide on texts")
    check.add_argument("text", nargs="*", help="a prompt")
    check.add_argument("--file", metavar="IN.jsonl", help='many: a line an object with "text"')
    check.add_argument("--out", metavar="OUT.jsonl", help="where their lines go, with what was decided")
    measure = verbs.add_parser("measure", help="not_unsafe and not_overrefuse on labelled prompts")
    measure.add_argument(
        "file",
        nargs="+",
        metavar="FILE.jsonl",
        help='lines with "text", "label" (a category or "allow") and perhaps "near"',
    )
    measure.add_argument("--json", metavar="FILE", help="write the numbers here too")
    measure.add_argument("--missed", action="store_true", help="print the prompts that were decided wrongly")
    for each in (check, measure):
        each.add_argument("--strictness", default="auto", help="a level of the policy")
        each.add_argument("--classifier", metavar="FILE.npz", help="instead of mmgen's own")
    block = verbs.add_parser("blocklist", help="add pictures to a list of hashes, for --blocklist")
    block.add_argument("picture", nargs="+", metavar="FILE")
    block.add_argument("--category", required=True, help="of the policy")
    block.add_argument("--why", required=True, help="is said when a picture is blocked")
    block.add_argument("--out", required=True, metavar="FILE.jsonl", help="the list; lines are added")
    train = verbs.add_parser("train", help="train the prompt classifier")
    train.add_argument(
        "--intents", nargs="+", default=INTENTS, metavar="FILE", help="templates (default: mmgen's own)"
    )
    train.add_argument(
        "--more", metavar="FILE", help="harmless prompts, one a line, beside the templates' own"
    )
    train.add_argument("--steps", type=int, default=3000)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", required=True, metavar="FILE.npz")
    args = parser.parse_args(argv)

    policy = Policy(args.policy, args.artists)
    if args.verb == "train":
        more = asked_of_the_world() + (Path(args.more).read_text("utf-8").splitlines() if args.more else [])
        found = prompts.train(
            prompts.read_intents(args.intents),
            args.out,
            policy.words,
            more=more,
            steps=args.steps,
            seed=args.seed,
        )
        print("  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        return None
    if args.verb == "blocklist":
        if args.category not in policy.categories:
            raise ValueError(
                f"--category: expected one of {', '.join(policy.categories)}; found {args.category!r}"
            )
        print(f"{pdq.add(args.out, args.picture, args.category, args.why)} hashes added to {args.out}")
        return None
    layer = PromptLayer(policy, prompts.Prompts(args.classifier))
    if args.verb == "measure":
        return _measure(args, layer)
    if bool(args.text) == bool(args.file):
        raise ValueError(
            'expected texts, as in `mmgen tools policy check "a red circle"`, or --file IN.jsonl'
        )
    if args.file:
        lines = read(args.file)
        for line in lines:
            line |= layer.decide(line["text"], args.strictness).to_dict()
        out = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write(args.out, out.encode()) if args.out else sys.stdout.write(out)
        return None
    for text in args.text:
        decision = layer.decide(text, args.strictness)
        print(f"{decision.decision}: {text}")
        for name, value in decision.to_dict().items():
            if name != "decision" and value not in (None, []):
                print(f"  {name:11} {', '.join(value) if isinstance(value, list) else value}")
    return None


def asked_of_the_world(each=150):
    """What users say in the world's tasks, of the training's split, in both languages: all of it harmless."""
    found = {}
    for task in tasks.TASKS:
        if task in (*tasks.PAGES, "refusal"):
            continue
        for language in ("en", "zh"):
            for i in range(each):
                for turn in tasks.talk(0, "train", i, task, language).turns:
                    found |= dict.fromkeys(part for part in turn.asks if isinstance(part, str))
    return [*found]


def read(path, label=False):
    """The objects of a file of lines; ValueError, with the line, for what is none."""
    lines = []
    for number, line in enumerate(Path(path).read_text("utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                found = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, found {error}") from None
            if (
                not isinstance(found, dict)
                or not isinstance(found.get("text"), str)
                or (label and "label" not in found)
            ):
                raise ValueError(
                    f'{path}, line {number}: expected an object with "text"{" and a label" if label else ""}'
                )
            lines.append(found)
    return lines


def _measure(args, layer):
    rows = []
    for path in args.file:
        for line in read(path, label=True):
            decision = layer.decide(line["text"], args.strictness)
            rows.append((Path(path).name, line, decision))
    groups = {}
    for name, line, decision in rows:
        harmful = line["label"] != "allow"
        right = decision.allowed != harmful
        about = line["label"] if harmful else f"near {line['near']}" if line.get("near") else "ordinary"
        for key in (
            (name, about),
            (name, "ALL harmful" if harmful else "ALL fine"),
            ("all files", "ALL harmful" if harmful else "ALL fine"),
        ):
            groups.setdefault(key, []).append(right)
        if args.missed and not right:
            print(
                f"{name}: {about}: {line['text']!r} -> {decision.decision} {decision.rule} {decision.span!r} {decision.harm}"
            )
    found = {}
    for (name, about), right in sorted(groups.items()):
        low, high = wilson(sum(right), len(right))
        found[f"{name} {about}"] = {"right": sum(right), "of": len(right), "low": low, "high": high}
        print(f"{name:24} {about:20} {np.mean(right):.3f} [{low:.3f}, {high:.3f}] of {len(right)}")
    if args.json:
        files.write(args.json, json.dumps(found, indent=1).encode())
