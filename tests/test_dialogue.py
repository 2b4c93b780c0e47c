"""Dialogues that are longer than a model's rows (sampling/dialogue.py)."""

import dataclasses

import numpy as np
import pytest

from mmgen.document import Document, Image, Text, Turn
from mmgen.evals import talks
from mmgen.sampling.dialogue import Dialogue, recent
from mmgen.sampling.sampler import Request
from mmgen.sampling.strategies import Strategy
from mmgen.world import tasks

DRAW = dict(output="image", size=(6, 6), image=Strategy(0.5))


def user(*parts):
    return Turn("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def drawn(image):
    return Turn("assistant", (image,))


@pytest.fixture
def images(sampler):
    rng = np.random.default_rng(0)
    return [Image(codes=rng.integers(0, sampler.grammar.codes, (6, 6))) for _ in range(5)]


def length(sampler, request):
    return len(sampler.prompts(request)[0])


def test_the_oldest_turns_are_not_seen_and_the_last_picture_of_them_is_shown(sampler, images):
    a, b, c, d, _ = images
    turns = (user("a star"), drawn(a), user("red"), drawn(b), user("blue"), drawn(c), user("green"), drawn(d))
    asked = lambda *turns, **more: Request(Document(turns), **(DRAW | more))
    short = asked(*turns[:2], user("x"))
    assert recent(sampler, short) is short
    for n, last in ((6, c), (8, d)):
        request = asked(*turns[:n], user("larger"), seed=4)
        with pytest.raises(ValueError, match="too long"):
            sampler.room(request, sampler.prompts(request)[0])
        found = recent(sampler, request)
        # As few turns as it takes: with one more it would not fit.
        kept = found.document.turns
        assert kept[-1] == user("larger") and drawn(last) in kept[1:-1]
        first = turns.index(kept[1])  # the first answer that is seen
        assert (
            kept[0] == user(turns[first - 2].parts[0], *turns[first - 1].parts)
            and kept[1:-1] == turns[first:n]
        )
        assert dataclasses.replace(found, document=request.document) == request
        assert sampler.longest - 49 < length(sampler, found) + 42 <= sampler.longest
    # Whoever shows a picture of their own is not shown another.
    own = asked(*turns[:6], user(a, "larger"))
    alone = recent(sampler, own).document.turns
    assert alone[-1] == user(a, "larger") and len(Document(alone[-1:]).images()) == 1
    # The size of a picture that the model chooses is taken to be that of the last.
    free = asked(*turns[:6], user("larger"), output="any", size=None)
    assert recent(sampler, free).document == recent(sampler, asked(*turns[:6], user("larger"))).document
    # Where there is nothing to forget the model says why it cannot.
    long = asked(user("larger " * 200))
    assert recent(sampler, long) is long


def test_room_for_words(sampler, images):
    """An eighth of a row, or as many as they may be; after a picture that is larger than half of a row too."""
    turns = [
        turn
        for n in range(12)
        for turn in (user(f"say {n} again"), Turn("assistant", (Text(f"what {n} was"),)))
    ]
    ask = lambda n, **more: Request(Document((*turns[:n], user("x"))), output="text", **more)
    whole = [n for n in range(0, 24, 2) if recent(sampler, ask(n)).document == ask(n).document]
    assert whole == list(range(0, len(whole) * 2, 2)) and 0 < len(whole) < 12
    for n in (whole[-1] + 2, 22):
        found = recent(sampler, ask(n))
        assert found.document.turns == ask(n).document.turns[-len(found.document.turns) :]
        assert length(sampler, found) <= sampler.longest - sampler.longest // 8
    longer = [Request(Document((*turns[: whole[-1]], user("x " * k))), output="text") for k in range(1, 40)]
    between = next(each for each in longer if length(sampler, each) > sampler.longest - sampler.longest // 8)
    assert recent(sampler, between) is not between
    few = dataclasses.replace(between, max_tokens=2)
    assert recent(sampler, few) is few
    large = Image(codes=np.zeros((10, 10), int))
    said = (user(large, "what?"), Turn("assistant", (Text("a"),)), user("x"))
    for n, output in ((3, "any"), (3, "text"), (1, "any")):
        request = Request(Document(said[-n:] if n > 1 else said[:1]), output=output)
        assert (
            recent(sampler, request) is request
        )  # no cut has room for another such picture: words it may be
        sampler.room(request, sampler.prompts(request)[0])


def test_what_the_system_said_last_stays(sampler, images):
    system = lambda words: Turn("system", (Text(words),))
    a, b, c, *_ = images
    drawings = (user("a star"), drawn(a), user("red"), drawn(b), user("green"), drawn(c))
    turns = (system("brief"), *drawings, system("in German"), user("blau"))
    found = recent(sampler, Request(Document((*turns[:7], turns[8])), **DRAW)).document.turns
    assert found == (system("brief"), user(b, "green"), drawn(c), user("blau"))
    short = dict(DRAW, size=(10, 10))  # with room for the last wish alone
    found = recent(sampler, Request(Document(turns), **short)).document.turns
    assert found == (system("in German"), user(c, "blau"))


def test_a_dialogue_goes_on_and_on(sampler):
    dialogue = Dialogue(sampler, seed=2, **DRAW)
    cut = []
    for n in range(7):
        turn = dialogue.say(Text(f"the {n}th star"))
        cut.append(dialogue.cut)
        assert turn.parts[0].codes.shape == (6, 6)
    assert cut == sorted(cut) and cut[0] is False and cut[-1] is True
    # All of it is kept, and read again it goes on alike.
    assert len(dialogue.document.images()) == 7 == dialogue.turns
    again = Dialogue(sampler, dialogue.document, seed=2, **DRAW)
    again.warm()
    assert again.say(Text("blue")) == dialogue.say(Text("blue")) and again.cut
    dialogue.rewind(1)
    assert not dialogue.cut


def test_an_evaluation_asks_on(sampler):
    size = (24, 24)
    scene = tasks.talk(0, "test", 0, "edit", size=(32, 32)).turns[0].before
    turns = tuple(tasks.Exchange((f"wish {n}",), (scene,), None, scene, scene, "draw") for n in range(6))
    (answers,) = talks.converse(
        sampler, [tasks.Talk(turns, "dialogue")], size=size, seed=0, batch_size=4, image=Strategy(0.5)
    )
    assert [answer.shape for answer in answers] == [(24, 24, 3)] * 6
