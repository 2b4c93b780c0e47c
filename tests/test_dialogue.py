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


def test_the_oldest_turns_are_not_seen_and_the_last_picture_of_them_is_shown(sampler, images):
    a, b, c, d, _ = images
    begin = Turn("system", (Text("be brief"),))
    turns = (
        begin,
        user("a star"),
        drawn(a),
        user("red"),
        drawn(b),
        user("blue"),
        drawn(c),
        user("green"),
        drawn(d),
    )
    asked = lambda *turns, **more: Request(Document(turns), **(DRAW | more))
    short = asked(*turns[:3], user("x"))
    assert recent(sampler, short) is short
    for n, last in ((7, c), (9, d)):
        request = asked(*turns[:n], user("larger"), seed=4)
        with pytest.raises(ValueError, match="too long"):
            sampler.room(request, sampler.prompts(request)[0])
        found = recent(sampler, request)
        # As few turns as it takes: with one more it would not fit.
        kept = found.document.turns
        assert kept[0] == begin and kept[-1] == user("larger") and drawn(last) in kept[1:-1]
        first = turns.index(kept[2])  # the first answer that is seen
        assert (
            kept[1] == user(turns[first - 2].parts[0], *turns[first - 1].parts)
            and kept[2:-1] == turns[first:n]
        )
        assert dataclasses.replace(found, document=request.document) == request
        sampler.room(found, sampler.prompts(found)[0])
        more = user(turns[first - 4].parts[0], *turns[first - 3].parts) if first > 4 else turns[1]
        longer = dataclasses.replace(found, document=Document((begin, more, *turns[first - 2 : n], kept[-1])))
        with pytest.raises(ValueError, match="too long"):
            sampler.room(longer, sampler.prompts(longer)[0])
    # Whoever shows a picture of their own is not shown another; and words need less room.
    own = asked(*turns[:7], user(a, "larger"))
    alone = recent(sampler, own).document.turns
    assert alone[-1] == user(a, "larger") and len(Document(alone[-1:]).images()) == 1
    words = asked(*turns[:7], user("what?"), output="text", size=None, max_tokens=3)
    assert recent(sampler, words) is words
    # The size of a picture that the model chooses is taken to be that of the last.
    free = asked(*turns[:7], user("larger"), output="any", size=None)
    assert recent(sampler, free).document == recent(sampler, asked(*turns[:7], user("larger"))).document
    # Where there is nothing to forget the model says why it cannot.
    long = asked(user("larger " * 200))
    assert recent(sampler, long) is long


def test_a_dialogue_goes_on_and_on(sampler):
    dialogue = Dialogue(sampler, seed=2, **DRAW)
    full = []
    for n in range(7):
        full.append(dialogue.full)
        turn = dialogue.say(Text(f"the {n}th star"))
        assert turn.parts[0].codes.shape == (6, 6)
    assert full == sorted(full) and full[0] is False and full[-1] is True
    # All of it is kept, and read again it goes on alike.
    assert len(dialogue.document.images()) == 7 == dialogue.turns
    again = Dialogue(sampler, dialogue.document, seed=2, **DRAW)
    assert again.say(Text("blue")) == dialogue.say(Text("blue"))
    dialogue.rewind(1)
    assert not dialogue.full


def test_an_evaluation_asks_on(sampler):
    size = (24, 24)
    scene = tasks.talk(0, "test", 0, "edit", size=(32, 32)).turns[0].before
    turns = tuple(tasks.Exchange((f"wish {n}",), (scene,), None, scene, scene, "draw") for n in range(6))
    (answers,) = talks.converse(
        sampler, [tasks.Talk(turns, "dialogue")], size=size, seed=0, batch_size=4, image=Strategy(0.5)
    )
    assert [answer.shape for answer in answers] == [(24, 24, 3)] * 6
