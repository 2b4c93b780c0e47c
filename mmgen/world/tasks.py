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
from mmgen.world.edits import (
    EDITS,
    RICH_EDITS,
    RICH_SHARE,
    Edit,
    Question,
    apart,
    named,
    only,
    random_edit,
    random_question,
    replaced,
    several_questions,
)
from mmgen.world.pages_render import render_page
from mmgen.world.render import render
from mmgen.world.rich import PATTERNED, RICH, random_rich
from mmgen.world.scene import (
    BACKGROUNDS,
    COLORS,
    FIGURES,
    GROUNDS,
    MOST,
    SEEN,
    STYLES,
    SYMBOLS,
    UNSEEN,
    Claim,
    Group,
    Scene,
    fits,
    held_out,
    pick,
    random_item,
)

SPEECH = (  # of language.py
    "like", "refuse", "say", "ask_caption", "ask_detail", "ask", "wish", "undo", "first", "correct", "mix", "remain",
)  # fmt: skip


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
_QUIZ = ("exists", "exists", "count", "count", "relation", "relation", "color", "size", "pattern")
_MANY = 10  # questions of a quiz
_UNCLEAR = 0.025  # so near to a border of the thirds no word for a place is given


def _some_scene(rng, rich, unseen=False):
    if rich and rng.random() < RICH_SHARE:
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
        if any(not apart(thing, objects[:n]) for n, thing in enumerate(objects)):
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
    if rich and rng.random() < RICH_SHARE:
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


def _quiz(rng, say, unseen, rich):
    """Many questions about one picture, to learn from: the picture is most of a document, and an answer one token. What
    is learned last is asked most."""
    _, scene = _some_scene(rng, rich, unseen)
    turns = []
    for question in several_questions(rng, scene, _QUIZ if rich else _QUIZ[:-1], _MANY):
        asks = ((scene,) if not turns else ()) + (say.ask(question),)
        turns.append(Exchange(asks, (say.answer(question.answer),), question, scene, scene, question.kind))
    return turns


def _primer(rng, say, unseen, rich):
    """A sign that is read aloud and asked about, several times, to learn from."""
    page, tongue = pages.random_page(rng, "sign", say.held_out), (say.language, say.rng)
    turns = [
        Exchange(
            (page, say.ask_caption()),
            (page_words.describe_page(page, *tongue),),
            page,
            page,
            page,
            "sign_read",
        )
    ]
    for question, reply in list({page_words.ask_page(page, *tongue): None for _ in range(9)})[:3]:
        turns.append(Exchange((question,), (reply,), page, page, page, "sign_ask"))
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
        if held_out(thing.color, shape) or held_out(color, two.objects[0].shape) or not apart(thing, ()):
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
        if any(not apart(thing, objects[:n]) for n, thing in enumerate(objects)):
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
            before, scene, it = scene, replaced(scene, thing, replace(thing, color=edit.value)), None
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
    "quiz": _quiz,
    "primer": _primer,
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
LEAST = {"style": RICH_FROM, "guarded": RICH_FROM, "primer": pages.LEAST["sign"]} | pages.LEAST


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
