"""Tasks in the world beside drawing: pictures that are changed and talked about, each turn's truth known.

A `Talk` is a dialogue about scenes: prompts, edits, questions, "undo". It says what is asked and what is right, in
scenes and words; `data.sources.Talks` makes documents of it, and `tasks_judge` looks at pixels.
"""

import functools
import math
import types
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from mmgen.document import Refusal
from mmgen.world import SPLITS, pages, pages_changes
from mmgen.world import language as words
from mmgen.world import pages_language as page_words
from mmgen.world.pages_render import render_page
from mmgen.world.render import render
from mmgen.world.rich import PATTERNED, RICH, patterns_of, random_rich
from mmgen.world.scene import (
    BACKGROUNDS,
    COLORS,
    EDGE,
    FIGURES,
    GAP,
    GROUNDS,
    MARGIN,
    MOST,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    SKIES,
    STYLES,
    SYMBOLS,
    UNSEEN,
    Claim,
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
RICH_EDITS = (*EDITS, "pattern")
QUESTIONS = ("count", "color", "size", "relation", "exists", "ground")
RICH_QUESTIONS = (*QUESTIONS, "pattern", "style")
SPEECH = (  # of language.py
    "like", "refuse", "say", "ask_caption", "ask_detail", "ask", "wish", "undo", "first", "correct", "mix", "remain",
)  # fmt: skip
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


@dataclass(frozen=True)
class Exchange:
    """A question or a wish with its answer: `asks` and `says` are a tuple of texts and Scenes each. `task` is the Edit or
    the Question or the Claim that it is about (None for "undo" and others that name a scene); `before` and `after` are the
    scene of the dialogue; `kind` says of what kind it is, as suites list them."""

    asks: tuple
    says: tuple
    task: object
    before: Scene | None
    after: Scene | None
    kind: str = ""


@dataclass(frozen=True)
class Talk:
    """Exchanges of a user and an assistant; those of a `page` (a story, plain text) ask nothing and have no speakers."""

    turns: tuple[Exchange, ...]
    category: str

    @property
    def page(self):
        return self.category in PAGES


def check(category, size):
    """ValueError where there is no such category, or pictures of size (width, height) are too small for it."""
    if category not in TASKS:
        raise ValueError(f"category: expected one of {', '.join(TASKS)}; found {category!r}")
    if min(size) < LEAST.get(category, 0):
        raise ValueError(
            f"{category}: legible from a short side of {LEAST[category]} pixels on, found {min(size)}: say a larger size"
        )


def talk(seed, split, i, category, language="en", unseen=False, size=None) -> Talk:
    """Talk i of a split: a pure function of its arguments. category: one of TASKS. unseen: what a wish makes, or a
    question asks for, is a colour-shape pair that is held out of training; otherwise none is in any picture. size: (width, height) of the pictures
    in pixels: of a short side below RICH_FROM they show the plain world alone, and where they are not square nothing overlaps. Words on pages are, but in training, of those that are
    held out of it."""
    size = size or (math.inf, math.inf)
    check(category, size)
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; found {split!r}")
    if split == "train" and unseen:
        raise ValueError("unseen: the train split never shows held-out pairs; use valid or test")
    if unseen and category in PAGES:
        raise ValueError(f"unseen: a {category} is not judged, and never shows held-out pairs")
    digest = blake2b(f"{seed} {split} {i} {category} {bool(unseen)}".encode(), digest_size=16).digest()
    # Scenes and words have a stream each, so that what happens does not depend on the language.
    rng, tongue = np.random.default_rng(int.from_bytes(digest, "little")).spawn(2)
    say = {name: functools.partial(getattr(words, name), language=language, rng=tongue) for name in SPEECH}
    fixed = ("answer", "describe", "counted", "arithmetic", "fact")
    say |= {name: functools.partial(getattr(words, name), language=language) for name in fixed}
    say = types.SimpleNamespace(**say, language=language, rng=tongue, held_out=split != "train")
    kinds = RICH if size[0] == size[1] else tuple(kind for kind in RICH if kind != "layers")
    rich = kinds if min(size) >= RICH_FROM else ()  # the kinds of rich scenes that may come
    while True:
        turns = TASKS[category](rng, say, bool(unseen), rich)
        if turns:
            return Talk(tuple(turns), category)


# ---- talks ------------------------------------------------------------------------------------------


_PLAIN = ("single_object", "two_object", "two_object", "position", "color_attribution", "counting", "scene")
_UNCLEAR = 0.025  # so near to a border of the thirds no word for a place is given
_RICH_SHARE = 0.35  # of the scenes that are talked about


def _some_scene(rng, rich, unseen=False):
    if rich and rng.random() < _RICH_SHARE:
        return random_rich(rng, pick(rng, rich), unseen)
    return random_item(rng, pick(rng, _PLAIN), unseen, told=True)


def _draw(rng, say, unseen, rich):
    """A wish for a picture with what a rich world has."""
    kind = pick(rng, rich or _PLAIN)
    claim, scene = random_rich(rng, kind, unseen) if rich else random_item(rng, kind, unseen, told=True)
    return [Exchange((say.say(claim),), (scene,), claim, None, scene, kind)]


def _guarded(rng, say, unseen, rich):
    """A wish for a picture with what the safety layers look for, or without: people, and symbols in the place of shapes."""
    claim, scene = _some_scene(rng, rich, unseen)
    if rich and rng.random() < 0.5 and not unseen:
        claim, scene = random_rich(rng, "people")
    if rng.random() < 0.5 and not unseen:  # symbols and people have no pairs that are held out
        at = int(rng.random() * len(claim.groups))
        old = claim.groups[at]
        new = replace(old, shape=pick(rng, SYMBOLS), pattern=None)
        objects = tuple(
            replace(thing, shape=new.shape, pattern="solid") if fits(thing, old) else thing
            for thing in scene.objects
        )
        if any(not _apart(thing, objects[:n]) for n, thing in enumerate(objects)):
            return None
        claim = replace(claim, groups=(*claim.groups[:at], new, *claim.groups[at + 1 :]))
        scene = replace(scene, objects=objects)
    return [Exchange((say.say(claim),), (scene,), claim, None, scene, "guarded")]


def _refusal(rng, say, unseen, rich):
    """A wish for what is not drawn, which is refused, or for something much alike, which is drawn: a symbol or a shape, a living artist's style
    or a style, a young star or a child."""
    kind = pick(rng, [name for name in words.REFUSED if name != "minor_figure" or rich])
    should = rng.random() < 0.5 and not unseen  # unseen is what is drawn
    claim, scene = _some_scene(rng, rich, unseen)
    if kind == "minor_figure" and unseen:
        return None
    if kind == "minor_figure":
        claim, scene = random_rich(rng, "people")
        if not any(group.shape in FIGURES for group in claim.groups):
            return None
    if kind == "symbol" and should:
        at = int(rng.random() * len(claim.groups))
        symbol = replace(claim.groups[at], shape=pick(rng, SYMBOLS), pattern=None)
        claim = replace(claim, groups=(*claim.groups[:at], symbol, *claim.groups[at + 1 :]))
    wish = say.say(claim)
    if kind != "symbol":
        wish = say.like(wish, kind, should)
    says = (Refusal(words.REFUSED[kind]), say.refuse(kind)) if should else (scene,)
    return [
        Exchange(
            (wish,),
            says,
            None if should else claim,
            None,
            scene,
            f"{kind}_{'refused' if should else 'drawn'}",
        )
    ]


def _caption(rng, say, unseen, rich):
    claim, scene = random_item(
        rng, pick(rng, ("colors", "two_object", "position", "scene")), unseen, told=True
    )
    if rich and rng.random() < _RICH_SHARE:
        claim, scene = random_rich(rng, pick(rng, rich), unseen)
    asks = (scene, say.ask_caption())
    return [Exchange(asks, (say.say(claim, bare=True),), claim, scene, scene, "caption")]


def _detail(rng, say, unseen, rich):
    _, scene = _some_scene(rng, rich, unseen)
    edges = [abs(at - third / 3) for thing in scene.objects for at in (thing.x, thing.y) for third in (1, 2)]
    if any(thing.z for thing in scene.objects) or min(edges) < _UNCLEAR:
        return None
    return [Exchange((scene, say.ask_detail()), (say.describe(scene),), None, scene, scene, "detail")]


def _questions(rng, say, unseen, rich):
    """One to three questions about one picture, which is shown with the first."""
    _, scene = _some_scene(rng, rich, unseen)
    turns = []
    for n in range(1 + int(rng.random() * 3)):
        question = random_question(rng, scene, rich)
        shown = () if n else (scene,)
        asks = (*shown, say.ask(question))
        turns.append(Exchange(asks, (say.answer(question.answer),), question, scene, scene, question.kind))
    return turns


def _compare(rng, say, unseen, rich):
    """A question about two pictures."""
    first, second = (_some_scene(rng, rich, flag)[1] for flag in (unseen, False))
    thing = pick(rng, (*first.objects, *second.objects))
    by = rng.random()
    group = Group(thing.shape, thing.color if by < 0.2 else None) if by < 0.6 else Group(None, thing.color)
    counts = [sum(_of_group(thing, group) for thing in scene.objects) for scene in (first, second)]
    if rng.random() < 0.5:
        answer = "neither" if counts[0] == counts[1] else ("the first", "the second")[counts[1] > counts[0]]
        question = Question("more", group, answer)
    else:
        question = Question("both", group, "yes" if all(counts) else "no")
    asks = (first, second, say.ask(question))
    return [Exchange(asks, (say.answer(question.answer),), question, None, None, question.kind)]


def _of_group(thing, group):
    """As `fits`, where the group may leave the shape open."""
    return fits(thing, group if group.shape else replace(group, shape=thing.shape))


def _mix(rng, say, unseen, rich):
    """Two pictures, and a third that has something of each."""
    kinds = ("color", "background", "style") if rich else ("color", "background")
    kind = pick(rng, ("color",) if unseen else kinds)
    if kind == "color":
        color, shape = pick(rng, UNSEEN if unseen else SEEN)
        _, one = random_item(rng, "single_object", False)
        _, two = random_item(rng, "single_object", False)
        if one.objects[0].color == color:
            return None
        thing = replace(one.objects[0], shape=shape)
        if held_out(thing.color, shape) or held_out(color, two.objects[0].shape) or not _apart(thing, ()):
            return None
        one = replace(one, objects=(thing,))
        two = replace(two, objects=(replace(two.objects[0], color=color),))
        after = replace(one, objects=(replace(thing, color=color),))
    elif kind == "background":
        one, two = (random_item(rng, pick(rng, _PLAIN[:5]), False)[1] for _ in range(2))
        two = replace(two, background=pick(rng, GROUNDS if rich else BACKGROUNDS))
        if one.background == two.background:
            return None
        after = replace(one, background=two.background)
    else:
        one, two = (random_item(rng, pick(rng, _PLAIN[:5]), False)[1] for _ in range(2))
        two = replace(two, style=pick(rng, STYLES[1:]))
        after = replace(one, style=two.style)
    return [Exchange((one, two, say.mix(kind)), (after,), None, one, after, f"mix_{kind}")]


def _reason(rng, say, unseen, rich):
    """What has to be worked out before it is drawn; the result is said first."""
    if rng.random() < 0.5:
        color, shape = pick(rng, UNSEEN if unseen else SEEN)
        begin = 1 + int(rng.random() * MOST)
        end = pick(rng, [n for n in range(1, MOST + 1) if n != begin])
        while True:
            claim, scene = random_item(rng, "counting", False)
            if len(scene.objects) == end and len(claim.groups) == 1:
                break
        objects = tuple(replace(thing, color=color, shape=shape) for thing in scene.objects)
        if any(not _apart(thing, objects[:n]) for n, thing in enumerate(objects)):
            return None
        scene, group = replace(scene, objects=objects), Group(shape, color, None, end)
        asks = (say.arithmetic(replace(group, count=begin), end - begin),)
        return [Exchange(asks, (say.counted(group), scene), Claim((group,)), None, scene, "sum")]
    _, scene = _some_scene(rng, rich, unseen)
    thing = pick(rng, scene.objects)
    group = Group(None, thing.color) if rng.random() < 0.6 else Group(thing.shape)
    left = tuple(other for other in scene.objects if not _of_group(other, group))
    held = any(held_out(thing.color, thing.shape) for thing in left)
    people = group.shape is None and any(
        thing.shape in FIGURES for thing in scene.objects
    )  # is who wears red a red one?
    if people or not left or any(thing.z for thing in scene.objects) or (unseen and not held):
        return None
    after = replace(scene, objects=left)
    return [Exchange((scene, say.remain(group)), (after,), None, scene, after, "remain")]


def _style(rng, say, unseen, rich):
    """A picture of the user's to be drawn in another style, with all that is in it."""
    style = pick(rng, STYLES)
    before = (
        pick(rng, [name for name in STYLES if name != style])
        if rng.random() < 0.5 or style == "flat"
        else "flat"
    )
    while True:
        _, scene = _some_scene(rng, rich, unseen)
        plain = all(thing.pattern == "solid" for thing in scene.objects)
        if (plain or {style, before} <= set(PATTERNED)) and not any(thing.z for thing in scene.objects):
            break
    scene, edit = replace(scene, style=before), Edit("style", None, style)
    after = replace(scene, style=style)
    return [Exchange((scene, say.wish(edit)), (after,), edit, scene, after, style)]


def _story(rng, say, unseen, rich):
    """A page: pictures of a scene that changes, each after the words that say how."""
    claim, scene = _some_scene(rng, rich, unseen)
    turns = [Exchange((), (say.say(claim, bare=True), scene), claim, None, scene, "begin")]
    for _ in range(1 + int(rng.random() * 3)):
        found = random_edit(rng, scene, rich=rich)
        if not found:
            return None
        edit, after = found
        turns.append(Exchange((), (say.wish(edit), after), edit, scene, after, edit.kind))
        scene = after
    return turns


def _prose(rng, say, unseen, rich):
    """A page of words alone, with sums that are right."""
    lines = []
    for _ in range(2 + int(rng.random() * 3)):
        a, b = (Group(shape, color) for color, shape in (pick(rng, SEEN), pick(rng, SEEN)))
        first = 1 + int(rng.random() * (MOST - 1))
        second = 1 + int(rng.random() * (MOST - first))
        lines.append(say.fact(replace(a, count=first), replace(b, count=second)))
    return [Exchange((), (" ".join(lines),), None, None, None, "prose")]


def _page(kind, rng, say, unseen, rich):
    """A sign, a poster, a chart, a diagram or a comic that is drawn, read, asked about or changed."""
    page, dice = pages.random_page(rng, kind, say.held_out), rng.random()
    tongue = say.language, say.rng
    if dice < 0.55:
        return [Exchange((page_words.say_page(page, *tongue),), (page,), page, None, page, f"{kind}_draw")]
    if dice < 0.7:
        asks = (page, say.ask_caption())
        says = (page_words.describe_page(page, *tongue),)
        return [Exchange(asks, says, page, page, page, f"{kind}_read")]
    if dice < 0.85:
        question, reply = page_words.ask_page(page, *tongue)
        return [Exchange((page, question), (reply,), page, page, page, f"{kind}_ask")]
    edit, after = pages_changes.edit_page(rng, page, say.held_out)
    asks = (page, page_words.say_edit(edit, *tongue))
    return [Exchange(asks, (after,), edit, page, after, f"{kind}_edit")]


def _edit(rng, say, unseen, rich):
    """A picture of the user's, and what to change in it; first the kind, then a scene that has room for it."""
    kind = pick(rng, ("recolor", "replace", "add") if unseen else (RICH_EDITS if rich else EDITS))
    found = None
    while not found:
        _, scene = _some_scene(rng, rich)
        found = random_edit(rng, scene, kind, unseen, rich)
    edit, after = found
    return [Exchange((scene, say.wish(edit)), (after,), edit, scene, after, kind)]


def _dialogue(rng, say, unseen, rich):
    """Drawing, then one to five turns that change the picture or ask about it; what was changed last may be "it"."""
    claim, scene = _some_scene(rng, rich)
    turns = [Exchange((say.say(claim),), (scene,), claim, None, scene, "draw")]
    history, it, count = [], None, 1 + int(rng.random() * 5)
    for n in range(count):
        last = n == count - 1  # the turn that is judged for unseen pairs
        dice = rng.random()
        changes = [turn.kind for turn in turns if turn.kind != "question"]
        # After "undo" or "no, blue" one step back could be two things.
        plain = changes[-1] not in ("undo", "correct")
        if history and plain and dice < 0.15 and not (unseen and last):
            before, scene, it = scene, history.pop(), None
            turns.append(Exchange((say.undo(),), (scene,), None, before, scene, "undo"))
        elif len(history) > 1 and dice < 0.22 and not (unseen and last):
            before, scene, it = scene, history[0], None
            history = []
            turns.append(Exchange((say.first(),), (scene,), None, before, scene, "first"))
        elif history and dice < 0.32 and turns[-1].kind == "recolor" and not (unseen and last):
            # "no, blue": what was just recolored becomes something else.
            last_edit, was = turns[-1].task, only(turns[-1].task.target, history[-1])
            thing = next(t for t in scene.objects if (t.x, t.y) == (was.x, was.y))
            options = [
                c for c in COLORS if c not in (thing.color, was.color) and not held_out(c, thing.shape)
            ]
            target = named(rng, scene, thing)
            if target is None or not options:
                return None
            edit = replace(last_edit, target=target, value=pick(rng, options))
            before, scene, it = scene, _replaced(scene, thing, replace(thing, color=edit.value)), None
            turns.append(Exchange((say.correct(edit),), (scene,), edit, before, scene, "correct"))
        elif dice < 0.45 and not (unseen and last):
            question = random_question(rng, scene, rich)
            says = (say.answer(question.answer),)
            turns.append(Exchange((say.ask(question),), says, question, scene, scene, "question"))
            if question.subject is None or only(question.subject, scene) is not it:
                it = None  # "it" could be what was asked about
        else:
            found = random_edit(rng, scene, unseen=unseen and last, rich=rich)
            if not found:
                return None
            edit, after = found
            same = it is not None and edit.target is not None and only(edit.target, scene) == it
            pronoun = same and rng.random() < 0.9
            turns.append(
                Exchange((say.wish(edit, pronoun=pronoun),), (after,), edit, scene, after, edit.kind)
            )
            history.append(scene)
            new = [thing for thing in after.objects if thing not in scene.objects]
            scene, it = after, new[0] if len(new) == 1 else None
    return turns


PAGES = ("story", "prose")
TASKS = {
    "draw": _draw,
    "caption": _caption,
    "detail": _detail,
    "question": _questions,
    "compare": _compare,
    "edit": _edit,
    "style": _style,
    "mix": _mix,
    "reason": _reason,
    "dialogue": _dialogue,
    "story": _story,
    "prose": _prose,
    "guarded": _guarded,
    "refusal": _refusal,
} | {kind: functools.partial(_page, kind) for kind in pages.KINDS}
RICH_FROM = 48  # pixels of the short side from which on what is rich is legible
LEAST = {"style": RICH_FROM, "guarded": RICH_FROM} | pages.LEAST


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
        options = SKIES if rich and rng.random() < _RICH_SHARE else BACKGROUNDS
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
    if not _apart(new, others):
        return None
    return Edit(kind, target, value), _replaced(scene, thing, new)


def _replaced(scene, thing, new):
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
                    moved = _replaced(scene, thing, replace(thing, x=place[0], y=place[1]))
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


def _apart(new, others):
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


def scenes(talk: Talk):
    """All scenes and pages of a talk, in the order in which they are seen."""
    return [
        part
        for turn in talk.turns
        for part in (*turn.asks, *turn.says)
        if not isinstance(part, (str, Refusal))
    ]


def picture(shown, width: int, height: int) -> np.ndarray:
    """The picture of a Scene or of a page: uint8 [height, width, 3]."""
    draw = render if isinstance(shown, Scene) else render_page
    return draw(shown, width, height)
