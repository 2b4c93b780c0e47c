"""Talks about scenes: what is asked can be done, what is said is so, and the judges see the difference."""

import collections
import pickle

import numpy as np
import pytest

from mmgen.data.sources import open_source
from mmgen.document import Image, Text
from mmgen.world import pages, tasks, tasks_judge
from mmgen.world.edits import RICH_EDITS, RICH_QUESTIONS, random_edit
from mmgen.world.render import render
from mmgen.world.scene import BACKGROUNDS, SHAPES, SIZES, Group, Scene, fits, held_out, related
from tests.conftest import config_of, mmgen


def talks(category, n, split="valid", unseen=False, language="en"):
    return [tasks.talk(5, split, i, category, language, unseen) for i in range(n)]


WRITTEN = (*pages.KINDS, "primer")  # tasks of pages, whose words are any


def pairs(scene):
    return {(thing.color, thing.shape) for thing in scene.objects}


@pytest.mark.parametrize("category", tasks.TASKS)
def test_a_talk_is_a_function_of_its_arguments_and_happens_in_any_language(category):
    english, chinese = talks(category, 40), talks(category, 40, language="zh")
    assert english == talks(category, 40) and english != talks(category, 40, split="test")
    for a, b in zip(english, chinese):
        assert [(t.task, t.before, t.after) for t in a.turns] == [
            (t.task, t.before, t.after) for t in b.turns
        ]
    said = [
        part
        for t in chinese
        for turn in t.turns
        for part in (*turn.asks, *turn.says)
        if isinstance(part, str)
    ]
    assert all(
        (any("\u3000" < c for c in words) or category in WRITTEN) and "None" not in words and "{" not in words
        for words in said
    )
    said = [
        part
        for t in english
        for turn in t.turns
        for part in (*turn.asks, *turn.says)
        if isinstance(part, str)
    ]
    assert all(
        (words.isascii() or category in WRITTEN)
        and "None" not in words
        and "{" not in words
        and "  " not in words
        for words in said
    )


@pytest.mark.parametrize("category", [name for name in tasks.TASKS if name not in (*tasks.PAGES, *WRITTEN)])
def test_held_out_pairs_are_there_where_they_are_asked_for_alone(category):
    for talk in talks(category, 60, "train"):
        assert not any(held_out(*pair) for scene in tasks.scenes(talk) for pair in pairs(scene))
    for talk in talks(category, 60, unseen=True):
        found = [
            any(
                held_out(*pair)
                for part in (*turn.asks, *turn.says)
                if isinstance(part, Scene)
                for pair in pairs(part)
            )
            for turn in talk.turns
        ]
        asked = category in ("question", "quiz")  # of which the picture is shown with the first
        assert found[-1] or (asked and found[0])
        assert asked or not any(found[:-1])
    with pytest.raises(ValueError, match="never shows"):
        tasks.talk(0, "train", 0, category, unseen=True)


def test_every_kind_comes_up():
    edits = collections.Counter(t.turns[0].task.kind for t in talks("edit", 300))
    assert set(edits) == set(RICH_EDITS) and min(edits.values()) > 12
    for category in tasks.TASKS:
        plain = (
            [tasks.talk(5, "valid", i, category, size=(32, 32)) for i in range(30)]
            if category not in tasks.LEAST
            else []
        )
        for scene in (scene for talk in plain for scene in tasks.scenes(talk)):
            assert scene.style == "flat" and scene.background in BACKGROUNDS
            assert all(t.pattern == "solid" and t.size in SIZES and t.shape in SHAPES for t in scene.objects)
    with pytest.raises(ValueError, match="48 pixels"):
        tasks.talk(0, "train", 0, "style", size=(32, 32))
    with pytest.raises(ValueError, match="not judged"):
        tasks.talk(0, "valid", 0, "story", unseen=True)
    questions = collections.Counter(turn.task.kind for t in talks("question", 200) for turn in t.turns)
    assert set(questions) == set(RICH_QUESTIONS)
    answers = [
        turn.task.answer for t in talks("question", 300) for turn in t.turns if turn.task.kind == "exists"
    ]
    assert 0.35 < np.mean([answer == "yes" for answer in answers]) < 0.7
    quizzes = talks("quiz", 100)
    assert all(len(turns) == len({turn.task for turn in turns}) <= 10 for turns in (t.turns for t in quizzes))
    assert np.mean([len(t.turns) for t in quizzes]) > 7
    kinds = collections.Counter(turn.task.kind for t in quizzes for turn in t.turns)
    assert (
        kinds.keys() == set(RICH_QUESTIONS) - {"ground", "style"} and kinds.most_common(1)[0][0] == "exists"
    )
    primers = talks("primer", 50)
    assert {turn.kind for t in primers for turn in t.turns} == {"sign_read", "sign_ask"}
    assert all(len(t.turns) > 2 and t.turns[0].asks[0] == t.turns[0].before for t in primers)
    lengths = collections.Counter(len(t.turns) for t in talks("dialogue", 200))
    assert set(lengths) == set(range(2, 7))


def test_edits_do_what_they_say_and_leave_the_rest():
    """By hand, from the two scenes."""
    for talk in talks("edit", 300) + talks("edit", 100, unseen=True):
        (turn,) = talk.turns
        edit, before, after = turn.task, turn.before, turn.after
        gone, new = set(before.objects) - set(after.objects), set(after.objects) - set(before.objects)
        assert (before.background == after.background) == (edit.kind != "background")
        assert (len(gone), len(new)) == {"remove": (1, 0), "add": (0, 1), "background": (0, 0)}.get(
            edit.kind, (1, 1)
        )
        if edit.target:
            (old,) = gone
            assert [thing for thing in before.objects if fits(thing, edit.target)] == [old]
        if new:
            (thing,) = new
            if edit.relation:
                anchors = [other for other in before.objects if fits(other, edit.anchor)]
                assert len(anchors) == 1 and related(edit.relation, thing, anchors[0])
            if edit.kind in ("add", "replace"):
                assert fits(thing, edit.value)
            if edit.kind == "move":
                assert (thing.shape, thing.color, thing.size) == (old.shape, old.color, old.size)
                assert not related(edit.relation, old, anchors[0])
            if edit.kind in ("recolor", "resize", "replace"):
                assert (thing.x, thing.y) == (old.x, old.y)


def test_answers_are_counted_from_the_scene():
    for talk in talks("question", 200):
        scene = tasks.scenes(talk)[0]
        for turn in talk.turns:
            q = turn.task
            matching = [t for t in scene.objects if q.subject and fits(t, q.subject)]
            expected = {
                "count": lambda: len(matching),
                "exists": lambda: "yes" if matching else "no",
                "color": lambda: {t.color for t in matching}.pop(),
                "size": lambda: {t.size for t in matching}.pop(),
                "ground": lambda: scene.background,
                "style": lambda: scene.style,
                "pattern": lambda: {t.pattern for t in matching}.pop(),
                "relation": lambda: (
                    "yes"
                    if related(q.relation, matching[0], *[t for t in scene.objects if fits(t, q.other)])
                    else "no"
                ),
            }[q.kind]()
            assert q.answer == expected


def test_dialogues_hang_together():
    undone, called_it, corrected = 0, 0, 0
    for talk in talks("dialogue", 200):
        scenes, it = [], None
        for turn in talk.turns:
            assert turn.before == (scenes[-1] if scenes else None)
            if turn.kind == "first":
                del scenes[1:]
            if turn.kind == "undo":
                scenes.pop()
                undone += 1
            if turn.task is None:
                assert turn.after == scenes[-1]
                it = None
                continue
            if turn.kind == "correct":  # of the last change, which cannot be taken back by itself then
                assert turn.after != turn.before and len(turn.after.objects) == len(turn.before.objects)
                scenes[-1], it = turn.after, None
                corrected += 1
                continue
            if isinstance(turn.task, tasks.Edit):
                if {"it", "its"} & set(turn.asks[0].split()):
                    called_it += 1
                    assert fits(it, turn.task.target)
                new = set(turn.after.objects) - set(turn.before.objects)
                it = new.pop() if len(new) == 1 else None
            if turn.after != turn.before:
                scenes.append(turn.after)
    assert undone > 10 and called_it > 20 and corrected > 5


@pytest.mark.parametrize(
    "side, count, unseen",
    [(32, 250, False), (64, 25, True)]
    + [
        pytest.param(side, 1200, unseen, marks=pytest.mark.soak)
        for side in (32, 64)
        for unseen in (False, True)
    ],
)
def test_the_judge_of_edits(side, count, unseen):
    """True renderings pass, the source is a copy, and a picture with one more thing changed fails."""
    right, wrong, rng = [], [], np.random.default_rng(0)
    for i in range(count):
        (turn,) = tasks.talk(5, "valid", i, "edit", "en", unseen, (side, side)).turns
        edit, before, after = turn.task, turn.before, turn.after
        source, true = (render(scene, side, side) for scene in (before, after))
        verdict = tasks_judge.judge_edit(true, source, edit, before, true)
        right.append(verdict.ok and not verdict.copied and verdict.outside > 70)
        verdict = tasks_judge.judge_edit(source, source, edit, before, true)
        wrong.append(verdict.ok or not verdict.copied)
        other, beyond = random_edit(rng, after, rich=side >= tasks.RICH_FROM)
        # A second change of the same thing may be another right answer where the place was open.
        open_place = edit.kind in ("add", "move") and other.kind == "move"
        if not open_place and not _undoes(edit, other, before, beyond):
            verdict = tasks_judge.judge_edit(render(beyond, side, side), source, edit, before, true)
            wrong.append(verdict.ok)
    print(f"{sum(right)} of {len(right)} true edits right, {sum(wrong)} of {len(wrong)} wrong ones passed")
    assert np.mean(right) >= 0.995 and np.mean(wrong) <= 0.005 and len(wrong) > 1.6 * count


def _undoes(edit, other, before, beyond):
    """Whether two edits together are what the first asks for: by the scenes, as `done` is what is tested."""
    sized = edit.kind == "add" and edit.value.size is not None
    free = {"replace": ("resize", "pattern"), "add": ("pattern",) if sized else ("resize", "pattern")}
    return other.kind in free.get(edit.kind, ())


def test_what_is_done_by_scenes():
    _, scene = tasks.random_item(np.random.default_rng(1), "two_object", False)
    a, b = scene.objects
    target = Group(a.shape, a.color)
    moved = lambda thing, **change: tasks.replace(thing, **change)
    recolor = tasks.Edit("recolor", target, "pink")
    done = lambda edit, *objects, ground=scene.background, faults=0: tasks_judge.done(
        edit, scene, Scene(objects, ground), faults
    )
    assert done(recolor, moved(a, color="pink"), b) == (True, True)
    assert done(recolor, a, b) == (False, True)
    assert done(recolor, moved(a, color="pink"), moved(b, shape="heart")) == (True, False)
    assert done(recolor, moved(a, color="pink"), b, ground="other") == (True, False)
    assert done(recolor, moved(a, color="pink")) == (True, False)
    assert done(recolor, moved(a, color="pink", x=a.x + 0.2), b) == (False, True)
    remove = tasks.Edit("remove", target)
    assert done(remove, b) == (True, True) and done(remove, a, b) == (False, True)
    assert done(remove) == (True, False) and done(remove, b, moved(b, x=0.5)) == (True, False)
    ground = tasks.Edit("background", value="other")
    assert done(ground, a, b, ground="other") == (True, True) and done(ground, a, b) == (False, True)
    assert done(ground, b, ground="other") == (True, False)
    # What cannot be read may be what was to change, and nothing else.
    assert done(recolor, b, faults=1) == done(remove, b, faults=1) == (False, True)
    assert done(recolor, b) == (False, True)  # nor is what vanished
    assert done(recolor, moved(a, color="pink"), faults=1) == done(recolor, b, faults=2) == (False, False)
    assert done(ground, a, b, ground="other", faults=1) == (False, False)
    add = tasks.Edit("add", None, Group("heart", "red"), "above", Group(b.shape, b.color))
    heart = moved(b, shape="heart", color="red", y=b.y - 0.3)
    assert done(add, a, b, heart) == (True, True) and done(add, a, b) == (False, True)
    assert done(add, a, b, moved(heart, y=b.y + 0.3)) == (False, True)
    assert done(add, a, b, faults=1) == (False, True) and done(add, a, b, heart, faults=1) == (False, False)


@pytest.mark.parametrize("category", tasks.TASKS)
def test_a_source_of_talks(category):
    side = max(48, tasks.LEAST.get(category, 0))
    source = open_source(f"world:train/{category}", (side, side), 3, documents=12, languages=("en", "zh"))
    again = pickle.loads(pickle.dumps(source))
    assert source.several_images and len(source) == 12 and source.fingerprint == again.fingerprint
    assert {source.language(i) for i in range(12)} == {"en", "zh"}
    for i in range(12):
        document = source[i]
        roles = [turn.role for turn in document.turns]
        assert document == again[i]
        assert roles == (["page"] if category in tasks.PAGES else ["user", "assistant"] * (len(roles) // 2))
        shown = [part for turn in document.turns for part in turn.parts if isinstance(part, Image)]
        assert source.count_images(i) == len(shown)
        for which, image in enumerate(shown):
            np.testing.assert_array_equal(source.pixels(i, which), image.pixels)
        assert source.texts(i) == [
            p.text for turn in document.turns for p in turn.parts if isinstance(p, Text)
        ]
        assert source.fields(i)["task"] == category and source.alternatives(i, 3) == [document]
    with pytest.raises(ValueError, match="expected one of draw, caption"):
        open_source("world:train/film", (32, 32), documents=2)[0]
    with pytest.raises(ValueError, match="leave category out"):
        open_source(f"world:train/{category}", (32, 32), documents=2, category="colors")
    with pytest.raises(IndexError):
        source[12]


def test_talks_are_tokenised_and_trained_on(space, tmp_path):
    from mmgen.stages import loop

    world = (
        "--source",
        "edits=world:train/edit",
        "--source",
        "asked=world:train/question",
        "--documents",
        12,
    )
    flags = (*world, "--tokenizer", space.tokenizer, "--text", space.text, "--out", tmp_path / "shards")
    assert mmgen("tokenize", *flags) == 0
    given = [flag for flag in space.transformer_flags if "data.shards" not in flag]
    config = config_of(
        [*given, f"--config.data.shards={tmp_path / 'shards'}", "--config.data.row_length=320"]
    )
    loop.train(config, tmp_path / "run", stop_at=2)
    assert (tmp_path / "run" / "vocabulary.json").exists()
