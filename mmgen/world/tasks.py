"""Tasks in the world beside drawing: pictures that are changed and talked about, each turn's truth known.

A `Talk` is a dialogue about scenes: prompts, edits, questions, "undo". It says what is asked and what is right, in
scenes and words; `data.sources.World` makes documents of it, and the judges below look at pixels.
"""

import functools
import math
import types
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from mmgen.world import SPLITS
from mmgen.world import language as words
from mmgen.world.judge import parse
from mmgen.world.scene import (
    BACKGROUNDS,
    COLORS,
    EDGE,
    GAP,
    MOST,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    UNSEEN,
    Group,
    Object,
    Scene,
    clearly,
    fits,
    free_place,
    half_extent,
    held_out,
    pick,
    random_item,
    related,
)

EDITS = ("recolor", "resize", "replace", "remove", "add", "move", "background")
QUESTIONS = ("count", "color", "size", "relation", "exists", "ground")
TASKS = ("caption", "question", "edit", "dialogue")
SPEECH = ("say", "ask_caption", "ask", "wish", "undo")  # of language.py
NEAR = 0.08  # a thing that stayed has its centre this close to where it was, in fractions of the image
_TRIES, _PLACES = 8, 64  # of an edit of a kind, and places that a thing may move to


@dataclass(frozen=True)
class Edit:
    """One change. `target` names the thing that changes, as only it is called (None for "add" and "background"); `value` is
    what it becomes: a colour, a size, a background, or for "replace" and "add" a Group. "add" and "move" put it to the
    `relation` side of what `anchor` names; an "add" may leave the place open."""

    kind: str
    target: Group | None = None
    value: str | Group | None = None
    relation: str | None = None
    anchor: Group | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of a scene, and the answer, a word of `words.answer`: a number, a colour, a size, a background, "yes"
    or "no"."""

    kind: str
    subject: Group | None
    answer: str | int
    relation: str | None = None
    other: Group | None = None


@dataclass(frozen=True)
class Exchange:
    """A question or a wish with its answer: `asks` and `says` are a tuple of texts and Scenes each. `task` is the Edit or
    the Question or the Claim that it is about (None for "undo"); `before` and `after` are the scene of the dialogue."""

    asks: tuple
    says: tuple
    task: object
    before: Scene | None
    after: Scene


@dataclass(frozen=True)
class Talk:
    turns: tuple[Exchange, ...]
    category: str


def talk(seed, split, i, category, language="en", unseen=False) -> Talk:
    """Talk i of a split: a pure function of its arguments. category: one of TASKS. unseen: what a wish makes, or a
    question asks for, is a colour-shape pair that is held out of training; otherwise none is in any picture."""
    if category not in TASKS:
        raise ValueError(f"category: expected one of {', '.join(TASKS)}; found {category!r}")
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; found {split!r}")
    if split == "train" and unseen:
        raise ValueError("unseen: the train split never shows held-out pairs; use valid or test")
    digest = blake2b(f"{seed} {split} {i} {category} {bool(unseen)}".encode(), digest_size=16).digest()
    # Scenes and words have a stream each, so that what happens does not depend on the language.
    rng, tongue = np.random.default_rng(int.from_bytes(digest, "little")).spawn(2)
    say = {name: functools.partial(getattr(words, name), language=language, rng=tongue) for name in SPEECH}
    say = types.SimpleNamespace(**say, answer=functools.partial(words.answer, language=language))
    make = {"caption": _caption, "question": _questions, "edit": _edit, "dialogue": _dialogue}[category]
    while True:
        turns = make(rng, say, bool(unseen))
        if turns:
            return Talk(tuple(turns), category)


# ---- talks ------------------------------------------------------------------------------------------


def _some_scene(rng, unseen=False):
    kinds = (
        "single_object",
        "two_object",
        "two_object",
        "position",
        "color_attribution",
        "counting",
        "scene",
    )
    return random_item(rng, pick(rng, kinds), unseen, told=True)


def _caption(rng, say, unseen):
    claim, scene = random_item(
        rng, pick(rng, ("colors", "two_object", "position", "scene")), unseen, told=True
    )
    asks = (scene, say.ask_caption())
    return [Exchange(asks, (say.say(claim, bare=True),), claim, scene, scene)]


def _questions(rng, say, unseen):
    """One to three questions about one picture, which is shown with the first."""
    _, scene = _some_scene(rng, unseen)
    turns = []
    for n in range(1 + int(rng.random() * 3)):
        question = random_question(rng, scene)
        shown = () if n else (scene,)
        asks = (*shown, say.ask(question))
        turns.append(Exchange(asks, (say.answer(question.answer),), question, scene, scene))
    return turns


def _edit(rng, say, unseen):
    """A picture of the user's, and what to change in it; first the kind, then a scene that has room for it."""
    kind = pick(rng, ("recolor", "replace", "add") if unseen else EDITS)
    found = None
    while not found:
        _, scene = _some_scene(rng)
        found = random_edit(rng, scene, kind, unseen)
    edit, after = found
    return [Exchange((scene, say.wish(edit)), (after,), edit, scene, after)]


def _dialogue(rng, say, unseen):
    """Drawing, then one to five turns that change the picture or ask about it; what was changed last may be "it"."""
    claim, scene = _some_scene(rng)
    turns = [Exchange((say.say(claim),), (scene,), claim, None, scene)]
    history, it, count = [], None, 1 + int(rng.random() * 5)
    for n in range(count):
        last = n == count - 1  # the turn that is judged for unseen pairs
        dice = rng.random()
        if history and dice < 0.15 and not (unseen and last):
            before, scene, it = scene, history.pop(), None
            turns.append(Exchange((say.undo(),), (scene,), None, before, scene))
        elif dice < 0.3 and not (unseen and last):
            question = random_question(rng, scene)
            says = (say.answer(question.answer),)
            turns.append(Exchange((say.ask(question),), says, question, scene, scene))
        else:
            found = random_edit(rng, scene, unseen=unseen and last)
            if not found:
                return None
            edit, after = found
            same = it is not None and edit.target is not None and _only(edit.target, scene) == it
            pronoun = same and rng.random() < 0.7
            turns.append(Exchange((say.wish(edit, pronoun=pronoun),), (after,), edit, scene, after))
            history.append(scene)
            new = [thing for thing in after.objects if thing not in scene.objects]
            scene, it = after, new[0] if len(new) == 1 else None
    return turns


# ---- edits ------------------------------------------------------------------------------------------


def named(rng, scene: Scene, thing: Object) -> Group | None:
    """Words that fit this thing alone, rather few than many; None where nothing tells it from another."""
    options = [
        Group(thing.shape, color, size)
        for color in (None, thing.color)
        for size in (None, thing.size)
        if sum(fits(other, Group(thing.shape, color, size)) for other in scene.objects) == 1
    ]
    return (options[0] if rng.random() < 0.5 else pick(rng, options)) if options else None


def _only(group, scene):
    """The one thing that fits, or None."""
    found = [thing for thing in scene.objects if fits(thing, group)]
    return found[0] if len(found) == 1 else None


def random_edit(rng, scene: Scene, kind=None, unseen=False):
    """An Edit that can be done in this scene, and the scene after it; None where there is none of the kind. unseen: the
    pair that it makes is held out of training, and otherwise no pair in the new scene is."""
    kinds = [kind] if kind else rng.permutation(("recolor", "replace", "add") if unseen else EDITS)
    for chosen in kinds:
        for _ in range(_TRIES):
            found = _try_edit(rng, scene, str(chosen), unseen)
            if found:
                return found
    return None


def _try_edit(rng, scene, kind, unseen):
    if kind == "background":
        value = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        return Edit(kind, value=value), replace(scene, background=value)
    if kind == "add":
        return _try_add(rng, scene, unseen)
    if not scene.objects:
        return None
    thing = pick(rng, scene.objects)
    target = named(rng, scene, thing)
    if target is None:
        return None
    others = tuple(other for other in scene.objects if other is not thing)
    if kind == "remove":
        return (Edit(kind, target), Scene(others, scene.background)) if others else None
    if kind == "recolor":
        options = [c for c in COLORS if c != thing.color and held_out(c, thing.shape) == unseen]
        if not options:
            return None
        value = pick(rng, options)
        new = replace(thing, color=value)
    elif kind == "resize":
        value = pick(rng, [size for size in SIZES if size != thing.size])
        new = replace(thing, size=value)
    elif kind == "replace":
        color, shape = pick(rng, UNSEEN if unseen else SEEN)
        if shape == thing.shape:
            return None
        value = Group(shape, color)
        new = replace(thing, shape=shape, color=color)
    else:
        return _try_move(rng, scene, thing, target, others)
    if not _apart(new, others):
        return None
    objects = tuple(new if other is thing else other for other in scene.objects)
    return Edit(kind, target, value), Scene(objects, scene.background)


def _try_add(rng, scene, unseen):
    if len(scene.objects) >= MOST:
        return None
    color, shape = pick(rng, UNSEEN if unseen else SEEN)
    size = "small" if len(scene.objects) > 1 else pick(rng, SIZES)
    place = free_place(rng, half_extent(Group(shape, color, size)), _taken(scene.objects))
    if place is None:
        return None
    new = Object(shape, color, size, *place)
    told = Group(shape, color, size if rng.random() < 0.4 else None)
    relation, anchor = _beside(rng, scene, new) if rng.random() < 0.6 else (None, None)
    edit = Edit("add", None, told, relation, anchor)
    return edit, Scene((*scene.objects, new), scene.background)


def _try_move(rng, scene, thing, target, others):
    # Places anywhere in the image, of which the first that will do is taken: few scenes have much room.
    (w, h), count = half_extent(thing), _PLACES
    x = EDGE + w + rng.random(count) * (1 - 2 * (EDGE + w))
    y = EDGE + h + rng.random(count) * (1 - 2 * (EDGE + h))
    clear = np.ones(count, bool)
    for ox, oy, ow, oh in _taken(others):
        clear &= (abs(x - ox) >= w + ow + GAP) | (abs(y - oy) >= h + oh + GAP)
    for place in zip(x[clear].tolist(), y[clear].tolist()):
        for other in others:
            anchor = named(rng, scene, other)
            for name in RELATIONS:
                # What is asked must not be so already, or nothing would be the right answer.
                new = anchor and not related(name, thing, other) and clearly(name, place, (other.x, other.y))
                if new:
                    moved = replace(thing, x=place[0], y=place[1])
                    objects = tuple(moved if each is thing else each for each in scene.objects)
                    return Edit("move", target, None, name, anchor), Scene(objects, scene.background)
    return None


def _beside(rng, scene, new):
    """A relation in which `new` clearly stands to one of the scene's things, and that thing's name; or (None, None)."""
    options = [
        (name, other)
        for other in scene.objects
        for name in RELATIONS
        if clearly(name, (new.x, new.y), (other.x, other.y))
    ]
    if not options:
        return None, None
    relation, other = pick(rng, options)
    anchor = named(rng, scene, other)
    return (relation, anchor) if anchor else (None, None)


def _taken(objects):
    return [(thing.x, thing.y, *half_extent(thing)) for thing in objects]


def _apart(new, others):
    """Whether a thing that takes another's place keeps clear of the rest and of the image's edge."""
    w, h = half_extent(new)
    inside = all(EDGE + half <= at <= 1 - EDGE - half for at, half in ((new.x, w), (new.y, h)))
    clear = (abs(new.x - x) >= w + a + GAP or abs(new.y - y) >= h + b + GAP for x, y, a, b in _taken(others))
    return inside and all(clear)


# ---- questions --------------------------------------------------------------------------------------


def random_question(rng, scene: Scene) -> Question:
    """A question that has one right answer in this scene."""
    while True:
        found = _try_question(rng, scene, pick(rng, QUESTIONS))
        if found:
            return found


def _try_question(rng, scene, kind):
    thing = pick(rng, scene.objects)
    if kind == "ground":
        return Question(kind, None, scene.background)
    if kind == "count":
        shape = thing.shape if rng.random() < 0.85 else pick(rng, SHAPES)
        color = thing.color if rng.random() < 0.4 else None
        subject = Group(shape, color)
        return Question(kind, subject, sum(fits(other, subject) for other in scene.objects))
    if kind == "exists":
        color, shape = thing.color, thing.shape
        if rng.random() < 0.5:  # one word is wrong, as a picture that has neither would be too easy
            if rng.random() < 0.5:
                color = pick(rng, COLORS)
            else:
                shape = pick(rng, SHAPES)
        subject = Group(shape, color)
        there = any(fits(other, subject) for other in scene.objects)
        return Question(kind, subject, "yes" if there else "no")
    if kind == "color":
        subject = Group(thing.shape)
        return Question(kind, subject, thing.color) if _only(subject, scene) else None
    if kind == "size":
        options = [Group(thing.shape, color) for color in (None, thing.color)]
        options = [group for group in options if _only(group, scene)]
        return Question(kind, pick(rng, options), thing.size) if options else None
    others = [other for other in scene.objects if other is not thing]
    subject = named(rng, scene, thing)
    other = named(rng, scene, pick(rng, others)) if others else None
    if subject is None or other is None:
        return None
    a, b = _only(subject, scene), _only(other, scene)
    clear = [name for name in RELATIONS if clearly(name, (a.x, a.y), (b.x, b.y))]
    if not clear:
        return None
    asked = clear[0] if rng.random() < 0.5 else pick(rng, RELATIONS)
    return Question("relation", subject, "yes" if asked in clear else "no", asked, other)


# ---- judges -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditVerdict:
    """changed: what was asked for happened. kept: all else is as it was. copied: the picture is the source again, by what
    is read in it. outside: PSNR in dB against the source, of the pixels that the true edit leaves alone."""

    changed: bool
    kept: bool
    copied: bool
    outside: float
    why: str = ""

    @property
    def ok(self):
        return self.changed and self.kept


def judge_edit(pixels, source, edit: Edit, before: Scene, after: Scene, true) -> EditVerdict:
    """Whether a picture is the source with the edit done to it, from its pixels alone. pixels, source and `true`, a
    rendering of `after`: uint8 [H, W, 3] of one size."""
    same = np.abs(source.astype(int) - true).max(-1) == 0
    error = np.square(pixels.astype(float) - source)[same]
    outside = 10 * math.log10(255**2 / max(float(error.mean()), 1e-3)) if error.size else math.inf
    reading = parse(pixels)
    if reading.faults:
        return EditVerdict(False, False, False, outside, "; ".join(reading.faults))
    changed, kept = done(edit, before, reading.scene)
    copied = _matched(before.objects, reading.scene.objects) == [] and len(before.objects) == len(
        reading.scene.objects
    )
    copied = copied and before.background == reading.scene.background
    return EditVerdict(changed, kept, copied, outside)


def done(edit: Edit, before: Scene, found: Scene) -> tuple[bool, bool]:
    """(the asked change is in the scene that was found, all else is as it was)."""
    target = _only(edit.target, before) if edit.target else None
    stay = [thing for thing in before.objects if thing is not target]
    missing = _matched(stay, found.objects)
    rest = _matched(found.objects, stay)  # what no thing that stays accounts for
    ground = found.background == (edit.value if edit.kind == "background" else before.background)
    kept = not missing and (ground or edit.kind == "background")
    if edit.kind == "background":
        return ground, kept and not rest
    if edit.kind == "remove":
        gone = not any(_same(target, thing) for thing in rest)
        return gone, kept and len(rest) == (0 if gone else 1)
    expected = {
        "recolor": lambda thing: (
            _near(thing, target) and fits(thing, replace(_group(target), color=edit.value))
        ),
        "resize": lambda thing: (
            _near(thing, target) and fits(thing, replace(_group(target), size=edit.value))
        ),
        "replace": lambda thing: _near(thing, target) and fits(thing, edit.value),
        "add": lambda thing: fits(thing, edit.value) and _stands(edit, thing, before),
        "move": lambda thing: fits(thing, _group(target)) and _stands(edit, thing, before),
    }[edit.kind]
    right = [thing for thing in rest if expected(thing)]
    return bool(right), kept and (len(rest) == 1 or (edit.kind == "add" and not rest))


def _stands(edit, thing, before):
    return edit.relation is None or related(edit.relation, thing, _only(edit.anchor, before))


def _group(thing):
    return Group(thing.shape, thing.color, thing.size)


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


def scenes(talk: Talk):
    """All scenes of a talk, in the order in which they are seen."""
    return [part for turn in talk.turns for part in (*turn.asks, *turn.says) if isinstance(part, Scene)]
