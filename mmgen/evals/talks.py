"""Suites of talks (world/tasks.py): edits and questions about pictures, asked of a model and judged."""

from dataclasses import dataclass

import numpy as np

from mmgen.document import Document, Image, Text, Turn
from mmgen.evals.suites import Case
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.world import tasks
from mmgen.world.render import render

SUITES = ("edit", "question")


@dataclass(frozen=True)
class Asked:
    """What a page of cases shows of one: the words."""

    prompt: str


def run(sampler, suite, *, seen, unseen, size, seed, split="test", language="en", batch_size=32, **options):
    """Asks `seen` and `unseen` talks of a suite -> (cases, one suite a kind of edit or question; metrics).

    size: (width, height) of the pictures in pixels; options: those of `Request`. A case's picture is the source and, of
    edits, the answer beside it. Metrics of edits are shares of all: changed, kept and copied as
    `tasks.judge_edit` says, and the mean PSNR in dB of what an edit leaves alone.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}; found {suite!r}")
    talks = [
        (tasks.talk(seed, split, i, suite, language, flag), flag)
        for flag, count in ((False, seen), (True, unseen))
        for i in range(count)
    ]
    # Of several questions about a picture the first is asked, which shows it.
    turns = [(talk.turns[0], flag) for talk, flag in talks]
    width, height = size
    patch = sampler.tokenizer.patch
    sources = [render(turn.before, width, height) for turn, _ in turns]
    codes = sampler.tokenizer.encode(np.stack(sources))
    requests = [
        Request(
            document=Document([Turn("user", [Image(source, code), Text(turn.asks[-1])])]),
            output="image" if suite == "edit" else "text",
            size=(height // patch, width // patch) if suite == "edit" else None,
            seed=draw_seed(seed, number),
            **options,
        )
        for number, ((turn, _), source, code) in enumerate(zip(turns, sources, codes))
    ]
    answers = sampler.generate(requests, batch_size)
    judge = _edits if suite == "edit" else _questions
    return judge(sampler, [turn for turn, _ in turns], [flag for _, flag in turns], sources, answers)


def _edits(sampler, turns, unseen, sources, answers):
    height, width = sources[0].shape[:2]
    true = [render(turn.after, width, height) for turn in turns]
    back = sampler.tokenizer.decode(sampler.tokenizer.encode(np.stack(true)))
    cases, verdicts = [], []
    for turn, flag, source, right, best, answer in zip(
        turns, unseen, sources, true, back, answers, strict=True
    ):
        pixels = answer.parts[0].pixels[..., :3]
        given = source, turn.task, turn.before, turn.after, right
        verdict = tasks.judge_edit(pixels, *given)
        why = verdict.why or ", ".join(
            words
            for words, there in (
                ("a copy", verdict.copied),
                ("not done", not verdict.changed),
                ("more changed", not verdict.kept),
            )
            if there
        )
        cases.append(
            Case(
                suite=f"edit:{turn.task.kind}", unseen=flag, item=Asked(turn.asks[-1]),
                pixels=np.concatenate([source, pixels], 1), ok=verdict.ok, why=why,
                ceiling=tasks.judge_edit(best[..., :3], *given).ok,
            )
        )  # fmt: skip
        verdicts.append(verdict)
    shares = {
        f"edit_{name}": float(np.mean([getattr(v, name) for v in verdicts]))
        for name in ("ok", "changed", "kept", "copied")
    }
    return cases, shares | {"edit_psnr_outside": float(np.mean([min(v.outside, 60.0) for v in verdicts]))}


def _questions(sampler, turns, unseen, sources, answers):
    cases = []
    for turn, flag, source, answer in zip(turns, unseen, sources, answers, strict=True):
        said = "".join(part.text for part in answer.parts if isinstance(part, Text)).strip()
        (expected,) = turn.says
        cases.append(
            Case(
                suite=f"question:{turn.task.kind}", unseen=flag, item=Asked(turn.asks[-1]), pixels=source,
                ok=said == expected, why=f"{said!r}, not {expected!r}", ceiling=True,
            )
        )  # fmt: skip
    return cases, {"question_ok": float(np.mean([case.ok for case in cases]))}
