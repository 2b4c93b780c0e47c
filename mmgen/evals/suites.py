"""Suites: held-out prompts of the world, drawn by a model and judged from the pixels.

The six categories are GenEval's (arXiv:2310.11513). Every suite has a seen part, and an unseen one
whose prompts state a colour-shape pair that training never shows.
"""

import dataclasses

import numpy as np

from mmgen import world
from mmgen.document import Document, Text, Turn
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.sampling.sampler import best_of as choose
from mmgen.world.judge import judge
from mmgen.world.render import render
from mmgen.world.scene import CATEGORIES


@dataclasses.dataclass
class Case:
    """One prompt of a suite, what was drawn for it, and what the judge says of it."""

    suite: str
    unseen: bool
    item: world.Item
    pixels: np.ndarray | None = None
    ok: bool = False
    why: str = ""
    ceiling: bool = False  # the judge's verdict on the tokenizer's reconstruction of the true picture


def cases(seed, seen, unseen, language="en", split="test"):
    """`seen` and `unseen` cases of each suite, from the world's test split, or from `valid` to choose by."""
    return [
        Case(
            suite, is_unseen, world.item(seed, split, i, category=suite, language=language, unseen=is_unseen)
        )
        for suite in CATEGORIES
        for is_unseen, count in ((False, seen), (True, unseen))
        for i in range(count)
    ]


def run(sampler, cases, *, size, seed, batch_size=32, score=None, best_of=1, **options):
    """Draws one picture a case, the best of `best_of` by `score` (see `sampler.best_of`), judges it and the
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
    truth = np.stack([render(case.item.scene, width, height) for case in cases])
    for case, back in zip(cases, sampler.tokenizer.decode(sampler.tokenizer.encode(truth))):
        case.ceiling = judge(back[..., :3], case.item.claim).ok
    return cases


def scores(cases):
    """{suite: {"seen": [right, total], "unseen": [right, total], "ceiling": share}}."""
    table = {}
    for suite in dict.fromkeys(case.suite for case in cases):
        mine = [case for case in cases if case.suite == suite]
        table[suite] = {
            name: [
                sum(case.ok for case in mine if case.unseen == flag),
                sum(case.unseen == flag for case in mine),
            ]
            for name, flag in (("seen", False), ("unseen", True))
        }
        table[suite]["ceiling"] = float(np.mean([case.ceiling for case in mine]))
    return table


def show(table):
    """The scores as lines of text."""
    lines = [f"{'suite':<20}{'seen':>16}{'unseen':>16}{'ceiling':>10}"]
    for suite, row in table.items():
        parts = [
            f"{right / total:.3f} ({total})" if total else "-"
            for right, total in (row["seen"], row["unseen"])
        ]
        lines.append(f"{suite:<20}{parts[0]:>16}{parts[1]:>16}{row['ceiling']:>10.3f}")
    return "\n".join(lines)
