"""Suites of talks (world/tasks.py): pictures that are changed, described, asked about and talked about, by a model.

All are run alike: turn n of every talk is asked at once, after what the model itself answered in the turns before.
A dialogue, in which the model draws, is judged by its own pictures: an edit is right if it is done to what the last
one shows, an answer if it is true of that.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from mmgen.document import Document, Image, Refusal, Text, Turn
from mmgen.evals.suites import Case
from mmgen.sampling.best import best_of as choose
from mmgen.sampling.dialogue import recent
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.world import captions, pages, tasks, tasks_judge
from mmgen.world import language as words
from mmgen.world.edits import only
from mmgen.world.judge import parse
from mmgen.world.scene import (
    BACKGROUNDS,
    EDGE,
    GAP,
    MARGIN,
    MOST,
    RELATIONS,
    Claim,
    Object,
    fits,
    half_extent,
    related,
)

# What `mmgen evaluate` calls a suite: the categories of `tasks.talk` that it asks. `PARTS` are of other suites.
SUITES = {
    "edit": ("edit",),
    "dialogue": ("dialogue",),
    "understanding": ("caption", "detail", "question", "compare"),
    "question": ("question",),
    "style": ("style",),
    "draw": ("draw",),
    "reference": ("mix",),
    "reason": ("reason",),
    "text": ("sign", "poster"),
    "sign": ("sign",),
    "infographic": ("chart", "diagram"),
    "comic": ("comic",),
    "refusal": ("refusal",),
}

PARTS = ("question", "sign")
DESCRIBED = ("caption", "detail")  # in words from which the picture can be drawn

UNREADABLE = "its own last picture cannot be read"
OPEN = "its own last picture has not what is named, no room for what is wished, or is so already"
NO_ROOM = "the dialogue is longer than the model's rows"


@dataclass(frozen=True)
class Verdict:
    """ok: None where it does not count. measured: flags and numbers, for `suites.measures`."""

    ok: bool | None
    why: str = ""
    measured: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What was asked: in words, and with all that the judge goes by."""

    prompt: str
    about: object


def run(sampler, suite, *, seen, unseen, size, seed, split="test", language="en", batch_size=32, **options):
    """Asks `seen` and `unseen` talks of each category of a suite -> cases, one a turn.

    size: (width, height) of the pictures in pixels, enlarged where a category needs more; options: `watermark` and `best_of` of `converse`, and those of
    `Request`, of which the guidance is for pictures alone. A turn's case is of suite "CATEGORY:KIND"; of dialogues
    there are those of suite "dialogue:turn N" too, and for each dialogue one of suite "dialogue", which is right if
    all turns are.
    """
    if suite not in SUITES:
        raise ValueError(f"suite: expected one of {', '.join(SUITES)}; found {suite!r}")
    cases = []
    for category in SUITES[suite]:
        pixels = enlarged(size, tasks.LEAST.get(category, 0))
        asked = [(i, False) for i in range(seen)] + [(i, True) for i in range(unseen)]
        if category in pages.KINDS:  # whose words are never those of the training
            asked = [(i, False) for i in range(seen + unseen)]
        talks = [tasks.talk(seed, split, i, category, language, flag, pixels) for i, flag in asked]
        flags = [flag or category in pages.KINDS for _, flag in asked]
        answers = converse(sampler, talks, size=pixels, seed=seed, batch_size=batch_size, **options)
        best = reconstructions(sampler, talks, pixels, seed)
        for talk, flag, said, right in zip(talks, flags, answers, best, strict=True):
            cases += _cases(talk, flag, said, right, pixels, language)
    return cases


def enlarged(size, least):
    """The size, times what its short side lacks of `least`."""
    times = -(-least // min(size)) or 1
    return size[0] * times, size[1] * times


def draws(turn) -> bool:
    """Whether a picture answers this Exchange, rather than words."""
    return not isinstance(turn.says[-1], str)


def converse(sampler, talks, *, size, seed, batch_size=32, watermark=None, best_of=1, **options):
    """A model's answers to talks -> for each talk a list, of each turn uint8 [H, W, 3] or a text.

    Turn n of all talks is one batch. Whether to draw or to speak is told, and the size of pictures. Words are
    answered without guidance, and may take twice as many tokens as the longest right answer. Where a talk has grown longer
    than the model's rows its oldest turns are not seen (`dialogue.recent`); where one turn is, its answer and further ones are None. ValueError where all are from the first turn on.
    best_of: so many descriptions of a picture, of which that is kept from which the model itself would likeliest draw it.
    watermark: a function of pixels uint8 [H, W, 3], through which the user's pictures go before they are shown.
    """
    width, height = size
    grid = height // sampler.tokenizer.patch, width // sampler.tokenizer.patch
    texts = [text for talk in talks for turn in talk.turns for text in turn.says if isinstance(text, str)]
    most = 2 * max((len(sampler.text.encode(text)) for text in texts), default=0) + 4
    plain = dict(guidance=1.0, image_guidance=1.0, max_tokens=most)
    documents, answers = [Document()] * len(talks), [[] for _ in talks]
    for n in range(max(len(talk.turns) for talk in talks)):
        asked = [i for i, talk in enumerate(talks) if n < len(talk.turns)]
        going = [i for i in asked if not n or answers[i][-1] is not None]
        grown = [Document((*documents[i].turns, _user(talks[i].turns[n], size, watermark))) for i in going]
        requests = {}
        for i, document in zip(going, sampler.encode(grown, batch_size)):
            may_refuse = talks[i].category == "refusal"
            drawn, both = (
                draws(talks[i].turns[n]) or may_refuse,
                len(talks[i].turns[n].says) > 1 and not may_refuse,
            )
            how = ({"refusals": 0.0} if may_refuse else {}) | options | ({} if drawn else plain)
            request = Request(
                document=document,
                output="any" if both else "image" if drawn else "text",
                size=grid if drawn else None,
                seed=draw_seed(draw_seed(seed, i), n),
                **how,
            )
            request = recent(sampler, request)
            if _fits(sampler, request):
                documents[i], requests[i] = document, request
        if not (n or requests):  # a suite that this model cannot do
            sampler.room(request, sampler.prompts(request)[0])
        described = [i for i in requests if best_of > 1 and talks[i].category in DESCRIBED]
        several = [requests.pop(i) for i in described]
        turns = sampler.generate(list(requests.values()), batch_size) if requests else []
        said = dict(zip(requests, turns, strict=True))
        if several:
            said |= zip(described, choose(sampler, several, best_of, "drawing", batch_size)[0])
        for i in asked:
            refused = i in said and said[i].parts and isinstance(said[i].parts[0], Refusal)
            drawn = not refused and (draws(talks[i].turns[n]) or talks[i].category == "refusal")
            answers[i].append(_answer(said[i], drawn, size) if i in said else None)
        for i, turn in said.items():
            documents[i] = Document((*documents[i].turns, turn))
    return answers


def _user(turn, size, watermark=None):
    marked = watermark or (lambda pixels: pixels)
    shown = lambda part: Text(part) if isinstance(part, str) else Image(marked(tasks.picture(part, *size)))
    return Turn("user", tuple(map(shown, turn.asks)))


def _fits(sampler, request):
    try:
        sampler.room(request, sampler.prompts(request)[0])
        return True
    except ValueError:
        return False


def _answer(turn, drawn, size):
    if drawn:
        pictures = [part.pixels[..., :3] for part in turn.parts if isinstance(part, Image)]
        return (
            pictures[-1] if pictures else np.zeros((*size[::-1], 3), np.uint8)
        )  # a black one is never right
    return "".join(part.text for part in turn.parts if isinstance(part, Text)).strip()


def reconstructions(sampler, talks, size, seed=0):
    """Right answers as their codes give them back: the same lists as `converse`, for the ceiling."""
    true = [tasks.picture(turn.says[-1], *size) for talk in talks for turn in talk.turns if draws(turn)]
    back = iter(sampler.reconstruct(np.stack(true), seed) if true else ())
    return [[next(back)[..., :3] if draws(turn) else turn.says[-1] for turn in talk.turns] for talk in talks]


# ---- judges -----------------------------------------------------------------------------------------


def judge_answer(turn, answer, source=None, language="en") -> Verdict:
    """Whether an answer, uint8 [H, W, 3] or a text, is right in an Exchange. source: the picture that was to be
    changed, where it shows `turn.before` as the world draws it; it adds the PSNR in dB of what an edit leaves alone."""
    task = turn.task
    if isinstance(answer, str) and turn.kind == "comic_ask":  # what a panel shows can be said in other words
        said, right = (captions.parse(text, language) for text in (answer, turn.says[-1]))
        if said and right and sorted(map(str, said.groups)) == sorted(map(str, right.groups)):
            rest = [(each.background, each.relation, each.style) for each in (said, right)]
            return Verdict(rest[0] == rest[1], f"{answer!r}, not {turn.says[-1]!r}")
    if isinstance(answer, str) and isinstance(task, Claim):
        found = captions.judge(answer, turn.after, language)
        return Verdict(found["complete"], f"{answer!r}, not {turn.says[-1]!r}", found)
    edited = isinstance(task, tasks.Edit) and source is not None
    true = tasks.picture(turn.after, *source.shape[1::-1]) if edited else None
    found, measured = tasks_judge.judge_answer(turn, answer, source, true), {}
    if found.edit:
        measured = {name: getattr(found.edit, name) for name in ("changed", "kept", "copied")}
    if edited:
        measured["psnr_outside"] = min(found.edit.outside, 60.0)
    return Verdict(found.ok, found.why, measured)


def judge_talk(talk, answers, size, language="en"):
    """A Verdict for each answer of a talk, and the picture that it was about or None."""
    if talk.category == "dialogue":
        return _judge_dialogue(talk, answers, language)
    if talk.category == "refusal":
        refused, should = isinstance(answers[0], str), not draws(talk.turns[0])
        why = "" if refused == should else "was drawn" if should else f"was refused: {answers[0]!r}"
        return [(Verdict(refused == should, why), None)]
    found, source = [], None
    for turn, answer in zip(talk.turns, answers, strict=True):
        shown = [part for part in turn.asks if not isinstance(part, str)]
        # As large as the answer, which a refiner may have enlarged.
        at = answer.shape[1::-1] if isinstance(answer, np.ndarray) else size
        source = tasks.picture(shown[-1], *at) if shown else source
        verdict = Verdict(False, NO_ROOM) if answer is None else judge_answer(turn, answer, source, language)
        found.append((verdict, source))
    return found


def _judge_dialogue(talk, answers, language):
    """A turn that makes no sense after the model's last picture is wrong if an earlier turn was. If all was right, it
    is about what the dialogue had left open (such as a size never said), and does not count."""
    found, fine, last = [], True, None
    now, history, edit = None, [], None  # scenes as read, of the last picture and of those before each change
    for turn, answer in zip(talk.turns, answers, strict=True):
        back = {"undo": history[-1:], "first": history[:1], "correct": history[-1:]}.get(turn.kind, [None])[0]
        asked = as_read(turn, now, back, edit, language)
        if answer is None:
            verdict = Verdict(False, NO_ROOM)
        elif isinstance(asked, str):
            verdict = Verdict(None if asked is OPEN and fine else False, asked)
        else:
            verdict = judge_answer(asked, answer, language=language)
        fine = fine and verdict.ok is not False
        more = {"not_counted": verdict.ok is None, "no_room": answer is None}
        found.append((replace(verdict, measured=verdict.measured | more), last))
        if draws(turn):
            history = {"undo": history[:-1], "first": []}.get(turn.kind, history)
            if isinstance(turn.task, tasks.Edit):
                history, edit = [*history, now], turn.task
            reading = None if answer is None else parse(answer)
            now, last = None if reading is None or reading.faults else reading.scene, answer
    return found


def as_read(turn, now, back=None, edit=None, language="en"):
    """The Exchange, about the scene `now` that was read in the model's own last picture: what is right then. back: the
    scene that the turn goes back to; edit: the last one, which the turn may correct. Scenes are None where they could
    not be read. Where it makes no sense: why, as a text."""
    task = turn.task
    if isinstance(task, Claim):
        return turn
    if turn.kind == "correct":  # the same change of what was before it, to another colour
        (color,) = {thing.color for thing in turn.after.objects if thing not in turn.before.objects}
        task, now = replace(edit, value=color), back
    elif task is None:
        return UNREADABLE if back is None else replace(turn, before=now, after=back)
    if now is None:
        return UNREADABLE
    if isinstance(task, tasks.Edit):
        named = all(only(group, now) for group in (task.target, task.anchor) if group)
        if not named or not _has_room(task, now) or tasks_judge.done(task, now, now)[0]:
            return OPEN
        if task.kind == "resize" and only(task.target, now).size == task.value:
            return OPEN  # it is as large, or as small, as things are already
        return replace(turn, task=task, before=now)
    answer = right_answer(task, now)
    if answer is None:
        return OPEN
    says = (words.answer(answer, language),)
    return replace(turn, says=says, task=replace(task, answer=answer), before=now, after=now)


def right_answer(question, scene):
    """What is right of a tasks.Question in this scene; None where it cannot be asked there."""
    subject = question.subject
    if question.kind == "ground":
        plain = scene.background in BACKGROUNDS and scene.style in ("flat", "ink")
        return scene.background if plain else None
    if question.kind == "style":
        return scene.style
    if question.kind in ("count", "exists"):
        count = sum(fits(thing, subject) for thing in scene.objects)
        if question.kind == "exists":
            return "yes" if count else "no"
        return count if count <= MOST else None
    thing = only(subject, scene)
    if thing is None:
        return None
    if question.kind == "relation":
        other = only(question.other, scene)
        if not other:
            return None
        ax, ay = RELATIONS[question.relation]
        along = ax * (thing.x - other.x) + ay * (thing.y - other.y)
        if related(question.relation, thing, other):
            return "yes"
        return "no" if along < MARGIN else None  # to that side too, but less than to another
    found = getattr(thing, question.kind)  # color, size or pattern
    return None if found == "medium" else found


def _has_room(edit, scene):
    """Whether what an edit adds or moves can be put where it says, the rest left in place: on 64 by 64 places."""
    if edit.kind not in ("add", "move"):
        return True
    moved = edit.target and only(edit.target, scene)
    kind = moved or replace(edit.value, size=edit.value.size or "small")
    halves = half_extent(kind)
    xs, ys = (EDGE + half + np.linspace(0, 1, 64) * (1 - 2 * (EDGE + half)) for half in halves)
    free = np.ones((64, 64), bool)
    for thing in (thing for thing in scene.objects if thing is not moved):
        apart = [half + other + GAP for half, other in zip(halves, half_extent(thing))]
        free &= (abs(xs - thing.x) >= apart[0]) | (abs(ys - thing.y) >= apart[1])[:, None]
    anchor = edit.anchor and only(edit.anchor, scene)
    places = (Object(kind.shape, kind.color, kind.size, xs[x], ys[y]) for y, x in np.argwhere(free))
    return any(anchor is None or related(edit.relation, place, anchor) for place in places)


# ---- cases ------------------------------------------------------------------------------------------


def _kind(turn, category):
    if category != "caption":
        return turn.kind.removeprefix(f"{category}_")
    count = len(turn.after.objects)
    return f"{count} object{'s' * (count > 1)}"


def _cases(talk, unseen, answers, best, size, language):
    """The cases of one talk, from its answers and from the best that the tokenizer could give."""
    found, cases = judge_talk(talk, answers, size, language), []
    ceilings = [verdict.ok for verdict, _ in judge_talk(talk, best, size, language)]
    dialogue = talk.category == "dialogue"
    prompts = [turn.asks[-1] for turn in talk.turns]
    for n, (turn, answer, (verdict, source)) in enumerate(zip(talk.turns, answers, found, strict=True)):
        drawn = draws(turn)
        case = Case(
            suite=f"{talk.category}:{_kind(turn, talk.category)}",
            # Of a dialogue the last turn alone may show a held-out pair.
            unseen=unseen and (not dialogue or n == len(talk.turns) - 1),
            item=Asked(prompts[n], turn),
            pixels=answer
            if isinstance(answer, np.ndarray)
            else np.full((*size[::-1], 3), 128, np.uint8)
            if talk.category == "refusal"
            else source,
            ok=verdict.ok,
            why=verdict.why,
            ceiling=bool(ceilings[n]),
            source=source if drawn else None,
            truth=tasks.picture(turn.says[-1], *size) if drawn and not dialogue else None,
            measured=verdict.measured,
        )
        cases.append(case)
        if dialogue:
            cases.append(replace(case, suite=f"dialogue:turn {n + 1}", pixels=None, measured={}))
    if dialogue:
        wrong = [f"turn {n}: {verdict.why}" for n, (verdict, _) in enumerate(found, 1) if verdict.ok is False]
        drawn = [answer for turn, answer in zip(talk.turns, answers) if draws(turn) and answer is not None]
        whole = Case(
            suite="dialogue",
            unseen=unseen,
            item=Asked(" / ".join(prompts), talk),
            pixels=np.concatenate(drawn, 1),
            ok=not wrong,
            why="; ".join(wrong[:1]),
            ceiling=False not in ceilings,
        )
        cases.append(whole)
    return cases
