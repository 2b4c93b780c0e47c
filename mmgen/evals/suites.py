"""Suites: held-out prompts of the world, drawn by a model and judged from the pixels.

The six categories are GenEval's (arXiv:2310.11513). Every suite has a seen part, and an unseen one
whose prompts state a colour-shape pair that training never shows.
"""

import dataclasses
import json
import re

import numpy as np

from mmgen import world
from mmgen.data import files
from mmgen.data.images import BadImage
from mmgen.document import Document, Text, Turn
from mmgen.evals.compare import wilson
from mmgen.sampling.best import best_of as choose
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.world.judge import judge
from mmgen.world.render import render
from mmgen.world.scene import CATEGORIES


@dataclasses.dataclass
class Case:
    """One thing asked of a model, what it answered, and what the judge says of that."""

    suite: str  # a kind of another suite is called "SUITE:KIND"
    unseen: bool
    item: object  # what was asked, with its words as .prompt; a world.Item or a talks.Asked
    pixels: np.ndarray | None = None  # the answer, or what is asked about
    ok: bool | None = False  # None: not counted
    why: str = ""
    ceiling: bool = False  # the judge's verdict on what codes give back of the true picture
    source: np.ndarray | None = None  # the picture that was to be changed
    truth: np.ndarray | None = None  # a right answer
    measured: dict = dataclasses.field(default_factory=dict)  # more about it: flags and numbers


def cases(seed, seen, unseen, language="en", split="test", categories=CATEGORIES):
    """`seen` and `unseen` cases of each suite, or of these `categories` alone, from the world's test split, or from `valid` to choose by."""
    return [
        Case(
            suite, is_unseen, world.item(seed, split, i, category=suite, language=language, unseen=is_unseen)
        )
        for suite in categories
        for is_unseen, count in ((False, seen), (True, unseen))
        for i in range(count)
    ]


def run(sampler, cases, *, size, seed, batch_size=32, score=None, best_of=1, **options):
    """Draws one picture a case, the best of `best_of` by `score` (see `sampling.best.best_of`), judges it and the
    ceiling. `size` is (width, height) in pixels; `options` are those of `Request` (guidance, image strategy)."""
    width, height = size
    patch = sampler.tokenizer.patch
    requests = [
        Request(
            document=Document((Turn("user", (Text(case.item.prompt),)),)),
            size=(height // patch, width // patch),
            seed=draw_seed(seed, number),
            **options,
        )
        for number, case in enumerate(cases)
    ]
    if best_of > 1:
        turns, _ = choose(sampler, requests, best_of, score, batch_size)
    else:
        turns = sampler.generate(requests, batch_size)
    for case, turn in zip(cases, turns):
        case.pixels = turn.parts[0].pixels
        verdict = judge(case.pixels[..., :3], case.item.claim)
        case.ok, case.why = verdict.ok, verdict.why
        case.truth = render(case.item.scene, *case.pixels.shape[1::-1])  # which a refiner may have enlarged
    true = np.stack([render(case.item.scene, width, height) for case in cases])
    back = sampler.reconstruct(true, seed)
    for case, back in zip(cases, back):
        case.ceiling = judge(back[..., :3], case.item.claim).ok
    return cases


def trained_on(config):
    """The tasks of the world (mmgen/world/tasks.py; "world" for plain prompts with their pictures) in the shards that a
    transformer run's config names; None where these are not there any more, or hold nothing of the world."""
    found = []
    for folder in config["data"].get("shards", "").split(","):
        try:
            manifest = json.loads(files.read(files.join(folder, "manifest.json")))
        except BadImage:
            return None
        found += re.findall(r"world:\w+(?:/([\w+]+))?", manifest["source"])
    return {task or "world" for tasks in found for task in tasks.split("+")} or None


def scores(cases):
    """{suite: {"seen": [right, total], "unseen": [right, total], "ceiling": share}}; before the kinds of a suite, which
    are called "SUITE:KIND", comes that of all of them."""
    table, names = {}, list(dict.fromkeys(case.suite for case in cases))
    wholes = [name.partition(":")[0] for name in names]
    for suite in sorted(names, key=lambda name: (wholes.index(name.partition(":")[0]), name)):
        whole = suite.partition(":")[0]
        if whole not in table and not any(case.suite == whole for case in cases):
            table[whole] = _score([case for case in cases if case.suite.startswith(f"{whole}:")])
        table[suite] = _score([case for case in cases if case.suite == suite])
    return table


def _score(cases):
    counted = [case for case in cases if case.ok is not None]
    table = {
        name: [
            sum(bool(case.ok) for case in counted if case.unseen == flag),
            sum(case.unseen == flag for case in counted),
        ]
        for name, flag in (("seen", False), ("unseen", True))
    }
    return table | {"ceiling": float(np.mean([case.ceiling for case in counted])) if counted else 0.0}


def measures(cases):
    """What cases measure beside being right -> ({"SUITE_NAME": mean}, of numbers; {"SUITE_NAME": [cases, all]}, of
    flags)."""
    values = {}
    for case in cases:
        for name, value in case.measured.items():
            values.setdefault(f"{case.suite.partition(':')[0]}_{name}", []).append(value)
    flags = {name for name, found in values.items() if isinstance(found[0], bool)}
    means = {name: float(np.mean(found)) for name, found in values.items() if name not in flags}
    return means, {name: [sum(values[name]), len(values[name])] for name in values if name in flags}


def intervals(table):
    """The 95 % intervals [low, high] of `scores`, of the same form."""
    found = {}
    for suite, row in table.items():
        total = row["seen"][1] + row["unseen"][1]
        parts = {name: row[name] for name in ("seen", "unseen")}
        parts["ceiling"] = [round(row["ceiling"] * total), total]
        found[suite] = {name: list(wilson(*part)) for name, part in parts.items()}
    return found


def show(table):
    """The scores as lines of text, each share with its 95 % interval."""
    lines = [f"{'suite':<24}{'seen':>27}{'unseen':>27}{'ceiling':>9}"]
    for suite, row in table.items():
        parts = []
        for right, total in (row["seen"], row["unseen"]):
            low, high = wilson(right, total)
            parts.append(f"{right / total:.3f} [{low:.3f} {high:.3f}] ({total})" if total else "-")
        lines.append(f"{suite:<24}{parts[0]:>27}{parts[1]:>27}{row['ceiling']:>9.3f}")
    return "\n".join(lines)
