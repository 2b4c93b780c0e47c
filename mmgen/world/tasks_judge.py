"""Whether answers of talks are right: edits by what stayed and what changed, pictures by what is read, texts by their words."""

import math
from dataclasses import dataclass, replace

import numpy as np

from mmgen.world.edits import Edit, only
from mmgen.world.judge import judge, parse
from mmgen.world.pages import Page, kind_of, strings
from mmgen.world.pages_judge import judge_page, read_page
from mmgen.world.scene import ALL_SIZES, Claim, Group, Scene, fits, related
from mmgen.world.tasks import Exchange


@dataclass(frozen=True)
class EditVerdict:
    """changed: what was asked for happened. kept: all else is as it was, whatever became of what was to change. copied:
    the picture is the source again, by what is read in it. outside: PSNR in dB against the source, of the pixels that
    the true edit leaves alone. why: what could not be read."""

    changed: bool
    kept: bool
    copied: bool
    outside: float
    why: str = ""

    @property
    def ok(self):
        return self.changed and self.kept


def judge_edit(pixels, source, edit: Edit, before: Scene, true) -> EditVerdict:
    """Whether a picture is the source, which shows `before`, with the edit done to it, from its pixels alone. pixels,
    source and `true`, a rendering of what is right: uint8 [H, W, 3] of one size. Without the last two `outside` is
    infinite."""
    same = None if source is None else np.abs(source.astype(int) - true).max(-1) == 0
    error = np.zeros(0) if source is None else np.square(pixels.astype(float) - source)[same]
    outside = 10 * math.log10(255**2 / max(float(error.mean()), 1e-3)) if error.size else math.inf
    reading = parse(pixels)
    changed, kept = done(edit, before, reading.scene, reading.unread)
    copied = not reading.faults and alike(before, reading.scene)
    return EditVerdict(changed, kept, copied, outside, ", ".join(reading.faults))


@dataclass(frozen=True)
class Found:
    """Whether an answer is right, and why not; of edits the EditVerdict, of pictures the scene that was read."""

    ok: bool
    why: str = ""
    edit: EditVerdict | None = None
    scene: Scene | None = None


def judge_answer(exchange: Exchange, answer, source=None, true=None) -> Found:
    """Judges an answer to an exchange: a text is right if it is the very one (of a page that is read, if it has all of its
    words in their order), a picture (uint8 [H, W, 3]) if it shows
    what is asked, by what is read in it. source, true: of edits, the picture that was to be changed and a rendering of
    `after`, of the answer's size."""
    if isinstance(answer, str) and exchange.kind.endswith("_read"):
        at = 0
        for string in strings(exchange.after):
            at = answer.find(string, at) + len(string)
            if at < len(string):
                return Found(False, f"{string!r} is not in {answer!r}, or not in its place")
        return Found(True)
    if isinstance(answer, str):
        expected = "".join(part for part in exchange.says if isinstance(part, str))
        return Found(
            answer.strip() == expected,
            "" if answer.strip() == expected else f"{answer.strip()!r}, not {expected!r}",
        )
    if isinstance(exchange.after, Page):
        verdict = judge_page(answer, exchange.after)
        copied = exchange.before is not None and judge_page(answer, exchange.before).ok
        return Found(verdict.ok, "a copy" if copied else verdict.why, None, verdict.scene)
    if isinstance(exchange.task, Claim):
        verdict = judge(answer, exchange.task)
        return Found(verdict.ok, verdict.why, None, verdict.scene)
    if isinstance(exchange.task, Edit):
        verdict = judge_edit(answer, source, exchange.task, exchange.before, true)
        parts = (
            (verdict.why, verdict.why),
            ("a copy", verdict.copied),
            ("not done", not verdict.changed),
            ("more changed", not verdict.kept),
        )
        return Found(verdict.ok, ", ".join(text for text, there in parts if there), verdict)
    reading = parse(answer)
    if reading.faults:
        return Found(False, "; ".join(reading.faults), None, reading.scene)
    ok = alike(exchange.after, reading.scene)
    return Found(ok, "" if ok else "another scene", None, reading.scene)


def alike(a: Scene, b: Scene) -> bool:
    """Whether two scenes show the same: things of the same kinds at about the same places, background and style."""
    return (
        len(a.objects) == len(b.objects)
        and not _matched(a.objects, b.objects)
        and (a.background, a.style) == (b.background, b.style)
    )


def shows(pixels, shown) -> dict[str, bool]:
    """Whether a picture (uint8 [H, W, 3]) shows a Scene or a page: "right", all of it; of a page with "words" those that
    are in it, each letter, whatever else is wrong."""
    if isinstance(shown, Scene):
        reading = parse(pixels)
        return {"right": not reading.faults and alike(reading.scene, shown)}
    said = sorted(strings(shown))
    page = read_page(pixels, kind_of(shown)).page
    found = {"right": judge_page(pixels, shown).ok}
    return found | ({"words": page is not None and sorted(strings(page)) == said} if said else {})


def done(edit: Edit, before: Scene, found: Scene, faults: int = 0) -> tuple[bool, bool]:
    """(the asked change is in the scene that was found, all else is as it was). With faults, so many things beside those of
    the scene that could not be read, the change is not there; but a thing that was to be changed may be one."""
    target = only(edit.target, before) if edit.target else None
    stay = [thing for thing in before.objects if thing is not target]
    missing = _matched(stay, found.objects)
    rest = _matched(found.objects, stay)  # what no thing that stays accounts for
    ground = found.background == (edit.value if edit.kind == "background" else before.background)
    styled = found.style == (edit.value if edit.kind == "style" else before.style)
    kept = not missing and (ground or edit.kind == "background") and (styled or edit.kind == "style")
    others = len(rest) + faults
    if edit.kind == "style":
        return styled and not faults, kept and not others
    if edit.kind == "background":
        return ground and not faults, kept and not others
    if edit.kind == "remove":
        gone = not faults and not any(_same(target, thing) for thing in rest)
        return gone, kept and others == (0 if gone else 1)
    expected = {
        "recolor": lambda thing: (
            _near(thing, target) and fits(thing, replace(_group(target), color=edit.value))
        ),
        "resize": lambda thing: (
            _near(thing, target)
            and fits(thing, replace(_group(target), size=None))
            and thing.size != target.size
            and (ALL_SIZES[thing.size] > ALL_SIZES[target.size]) == (edit.value == "large")
        ),
        "replace": lambda thing: _near(thing, target) and fits(thing, edit.value),
        "pattern": lambda thing: (
            _near(thing, target) and fits(thing, replace(_group(target), pattern=edit.value))
        ),
        "add": lambda thing: fits(thing, edit.value) and _stands(edit, thing, before),
        "move": lambda thing: fits(thing, _group(target)) and _stands(edit, thing, before),
    }[edit.kind]
    right = [thing for thing in rest if expected(thing)]
    return bool(right) and not faults, kept and others <= 1


def _stands(edit, thing, before):
    return edit.relation is None or related(edit.relation, thing, only(edit.anchor, before))


def _group(thing):
    return Group(thing.shape, thing.color, thing.size, 1, thing.pattern)


NEAR = 0.08  # a thing that stayed has its centre this close to where it was, in fractions of the image


def _near(a, b):
    return math.dist((a.x, a.y), (b.x, b.y)) <= NEAR


def _same(a, b):
    return _near(a, b) and _group(a) == _group(b)


def _matched(things, among):
    """Those of `things` that have no partner of their own `among` the others."""
    left, alone = list(among), []
    for thing in things:
        partner = next((other for other in left if _same(thing, other)), None)
        if partner is None:
            alone.append(thing)
        else:
            left.remove(partner)
    return alone
