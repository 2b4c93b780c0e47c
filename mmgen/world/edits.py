"""Changes of a scene and questions about it: each with words that fit one thing alone, and one right outcome."""

from dataclasses import dataclass, replace

import numpy as np

from mmgen.world.rich import PATTERNED, patterns_of
from mmgen.world.scene import (
    BACKGROUNDS,
    COLORS,
    EDGE,
    FIGURES,
    GAP,
    MARGIN,
    MOST,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    SKIES,
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
    related,
)

EDITS = ("recolor", "resize", "replace", "remove", "add", "move", "background")
RICH_EDITS = (*EDITS, "pattern")
QUESTIONS = ("count", "color", "size", "relation", "exists", "ground")
RICH_QUESTIONS = (*QUESTIONS, "pattern", "style")
RICH_SHARE = 0.35  # of the scenes that are talked about, and of the backgrounds that are wished for
_TRIES, _PLACES = 8, 64  # of an edit of a kind, and places that a thing may move to


@dataclass(frozen=True)
class Edit:
    """One change. `target` names the thing that changes, as only it is called (None for "add", "background" and
    "style"); `value` is what it becomes: a colour, a size, a background, a pattern, a style, or for "replace" and "add" a
    Group. "add" and "move" put it to the `relation` side of what `anchor` names; an "add" may leave the place open."""

    kind: str
    target: Group | None = None
    value: str | Group | None = None
    relation: str | None = None
    anchor: Group | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of a scene, and the answer, a word of `words.answer`: a number, a colour, a size, a background, a
    pattern, a style, "yes" or "no", "the first", "the second" or "neither"."""

    kind: str
    subject: Group | None
    answer: str | int
    relation: str | None = None
    other: Group | None = None


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


def only(group, scene):
    """The one thing that fits, or None."""
    found = [thing for thing in scene.objects if fits(thing, group)]
    return found[0] if len(found) == 1 else None


def random_edit(rng, scene: Scene, kind=None, unseen=False, rich=True):
    """An Edit that can be done in this scene, and the scene after it; None where there is none of the kind. unseen: the
    pair that it makes is held out of training, and otherwise no pair in the new scene is."""
    every = RICH_EDITS if rich else EDITS
    kinds = [kind] if kind else rng.permutation(("recolor", "replace", "add") if unseen else every)
    for chosen in kinds:
        for _ in range(_TRIES):
            found = _try_edit(rng, scene, str(chosen), unseen, rich)
            if found:
                return found
    return None


def _try_edit(rng, scene, kind, unseen, rich):
    if kind == "background":
        options = SKIES if rich and rng.random() < RICH_SHARE else BACKGROUNDS
        value = pick(rng, [name for name in options if name != scene.background])
        return Edit(kind, value=value), replace(scene, background=value)
    if kind == "add":
        return _try_add(rng, scene, unseen)
    if not scene.objects or any(thing.z for thing in scene.objects):
        return None
    thing = pick(rng, scene.objects)
    target = named(rng, scene, thing)
    if target is None or (thing.shape in FIGURES and kind == "recolor"):
        return None
    others = tuple(other for other in scene.objects if other is not thing)
    if kind == "remove":
        return (Edit(kind, target), replace(scene, objects=others)) if others else None
    if kind == "recolor":
        options = [c for c in COLORS if c != thing.color and held_out(c, thing.shape) == unseen]
        if not options:
            return None
        value = pick(rng, options)
        new = replace(thing, color=value)
    elif kind == "resize":
        if thing.size not in SIZES:  # "bigger" would say neither medium nor large
            return None
        value = pick(rng, [size for size in SIZES if size != thing.size])
        new = replace(thing, size=value)
    elif kind == "replace":
        color, shape = pick(rng, UNSEEN if unseen else SEEN)
        if shape == thing.shape:
            return None
        value = Group(shape, color)
        new = replace(thing, shape=shape, color=color, pattern="solid")
    elif kind == "pattern":
        options = [name for name in patterns_of(thing.shape) if name != thing.pattern]
        if not options or scene.style not in PATTERNED:
            return None
        value = pick(rng, options)
        new = replace(thing, pattern=value)
    else:
        return _try_move(rng, scene, thing, target, others)
    if not apart(new, others):
        return None
    return Edit(kind, target, value), replaced(scene, thing, new)


def replaced(scene, thing, new):
    """The scene with `new` in the place of a thing."""
    return replace(scene, objects=tuple(new if other is thing else other for other in scene.objects))


def _try_add(rng, scene, unseen):
    if len(scene.objects) >= MOST or any(thing.z for thing in scene.objects):
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
    return edit, replace(scene, objects=(*scene.objects, new))


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
                    moved = replaced(scene, thing, replace(thing, x=place[0], y=place[1]))
                    return Edit("move", target, None, name, anchor), moved
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


def apart(new, others):
    """Whether a thing that takes another's place keeps clear of the rest and of the image's edge."""
    w, h = half_extent(new)
    inside = all(EDGE + half <= at <= 1 - EDGE - half for at, half in ((new.x, w), (new.y, h)))
    clear = (abs(new.x - x) >= w + a + GAP or abs(new.y - y) >= h + b + GAP for x, y, a, b in _taken(others))
    return inside and all(clear)


# ---- questions --------------------------------------------------------------------------------------


def random_question(rng, scene: Scene, rich=True) -> Question:
    """A question that has one right answer in this scene."""
    while True:
        found = _try_question(rng, scene, pick(rng, RICH_QUESTIONS if rich else QUESTIONS))
        if found:
            return found


def several_questions(rng, scene, kinds, count):
    """At most `count` questions of some `kinds` about one scene, no two the same."""
    found = {}
    for _ in range(3 * count):
        question = _try_question(rng, scene, pick(rng, kinds))
        if question and len(found) < count:
            found.setdefault(question)
    return list(found)


def _try_question(rng, scene, kind):
    thing = pick(rng, scene.objects)
    if kind == "ground":
        # By night white is gray, and on paper black is.
        plain = scene.background in BACKGROUNDS and scene.style in ("flat", "ink")
        return Question(kind, None, scene.background) if plain else None
    if kind == "style":
        return Question(kind, None, scene.style) if scene.style != "flat" or rng.random() < 0.1 else None
    if kind == "pattern":
        patterned = any(thing.pattern != "solid" for thing in scene.objects)
        subject = Group(thing.shape)
        ok = patterned and only(subject, scene) and thing.shape not in FIGURES
        return Question(kind, subject, thing.pattern) if ok else None
    if kind == "count":
        shape = thing.shape if rng.random() < 0.85 else pick(rng, SHAPES)
        color = thing.color if rng.random() < 0.4 else None
        subject = Group(shape, color)
        count = sum(fits(other, subject) for other in scene.objects)
        return Question(kind, subject, count) if count or not _hidden(subject) else None
    if kind == "exists":
        color, shape = thing.color, thing.shape
        if rng.random() < 0.5:  # one word is wrong, as a picture that has neither would be too easy
            if rng.random() < 0.5:
                color = pick(rng, COLORS)
            else:
                shape = pick(rng, FIGURES if shape in FIGURES else SHAPES)
        subject = Group(shape, color)
        there = any(fits(other, subject) for other in scene.objects)
        return Question(kind, subject, "yes" if there else "no") if there or not _hidden(subject) else None
    if kind == "color":
        subject = Group(thing.shape)
        return Question(kind, subject, thing.color) if only(subject, scene) else None
    if kind == "size":
        if thing.size not in SIZES:
            return None
        options = [Group(thing.shape, color) for color in (None, thing.color)]
        options = [group for group in options if only(group, scene)]
        return Question(kind, pick(rng, options), thing.size) if options else None
    others = [other for other in scene.objects if other is not thing]
    subject = named(rng, scene, thing)
    other = named(rng, scene, pick(rng, others)) if others else None
    if subject is None or other is None:
        return None
    a, b = only(subject, scene), only(other, scene)
    clear = [name for name in RELATIONS if clearly(name, (a.x, a.y), (b.x, b.y))]
    if not clear:
        return None
    asked = clear[0] if rng.random() < 0.5 else pick(rng, RELATIONS)
    ax, ay = RELATIONS[asked]
    if asked not in clear and ax * (a.x - b.x) + ay * (a.y - b.y) >= MARGIN:
        return None  # to that side too, but less than to another
    return Question("relation", subject, "yes" if asked in clear else "no", asked, other)


def _hidden(group):
    """Whether a group names a held-out pair: training must not say that there is none, either."""
    return group.color is not None and held_out(group.color, group.shape)
