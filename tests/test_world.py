"""The world: what is drawn is what is said, and every item is a function of its arguments."""

import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgen.world import MIXTURE, SPLITS, item
from mmgen.world.language import LANGUAGES, say
from mmgen.world.render import _summed, coverage, render
from mmgen.world.scene import (
    BACKGROUNDS,
    CATEGORIES,
    CLEAR,
    COLORS,
    EDGE,
    EXTENT,
    GAP,
    RELATIONS,
    SHAPES,
    SIZES,
    UNSEEN,
    Claim,
    Group,
    Object,
    Relation,
    Scene,
    alter,
    distinct,
    fits,
    held_out,
    holds,
    random_item,
    recolor,
    related,
)  # fmt: skip

KINDS = (*CATEGORIES, "scene", "mixed_counting")


def items(n, **options):
    """n items of every category."""
    return [item(0, "test", i, category, **options) for category in KINDS for i in range(n)]


# Items


def test_an_item_is_a_function_of_its_arguments():
    again = "from mmgen.world import item\nfor i in range(20): print(item(3, 'valid', i, None, 'zh'))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", again],
            env={"PYTHONHASHSEED": str(i), "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"},
            capture_output=True, text=True, check=True, encoding="utf-8",
        ).stdout
        for i in range(2)
    }  # fmt: skip
    assert printed == {"".join(f"{item(3, 'valid', i, None, 'zh')}\n" for i in range(20))}


def test_splits_and_seeds_are_different_streams():
    streams = [[item(seed, split, i).scene for i in range(50)] for split in SPLITS for seed in (0, 1)]
    assert not any(set(a) & set(b) for a, b in itertools.combinations(streams, 2))


def test_the_scene_does_not_depend_on_the_language():
    for i in range(20):
        en, zh = item(0, "train", i), item(0, "train", i, language="zh")
        assert (en.claim, en.scene) == (zh.claim, zh.scene)


@pytest.mark.parametrize("unseen", [False, True])
def test_every_item_is_true_and_says_one_thing(unseen):
    for sample in items(100, unseen=unseen):
        assert holds(sample.claim, sample.scene)
        assert distinct(sample.claim.groups)
        for thing in sample.scene.objects:
            assert sum(fits(thing, group) for group in sample.claim.groups) == 1


def test_categories_are_what_they_say():
    for i in range(150):
        for category in KINDS:
            sample = item(0, "test", i, category)
            groups = sample.claim.groups
            counts = [g.count for g in groups]
            assert sum(counts) == len(sample.scene.objects) <= 4
            if category in ("single_object", "colors"):
                assert counts == [1]
            if category in ("two_object", "position", "color_attribution"):
                assert counts == [1, 1] and groups[0].shape != groups[1].shape
            if category in ("colors", "color_attribution", "scene"):
                assert all(g.color for g in groups)
            if category == "color_attribution":
                assert groups[0].color != groups[1].color
            if category == "scene":
                assert sum(counts) >= 3
            if category == "mixed_counting":
                assert len(counts) == 2 and max(counts) > 1
            assert (sample.claim.relation is not None) == (category == "position")


def test_every_attribute_occurs():
    samples = items(300)
    things = [thing for s in samples for thing in s.scene.objects]
    for name, options in (("shape", SHAPES), ("color", COLORS), ("size", SIZES)):
        assert {getattr(thing, name) for thing in things} == set(options)
    assert {s.scene.background for s in samples} == set(BACKGROUNDS)
    assert {s.claim.relation.name for s in samples if s.claim.relation} == set(RELATIONS)
    counts = Counter(len(s.scene.objects) for s in samples if s.category == "counting")
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 0.1 * sum(counts.values())


def test_objects_are_inside_and_apart():
    for sample in items(100):
        halves = [[SIZES[o.size] * e / 2 for e in EXTENT[o.shape]] for o in sample.scene.objects]
        for o, (w, h) in zip(sample.scene.objects, halves, strict=True):
            assert EDGE - 1e-9 <= o.x - w and o.x + w <= 1 - EDGE + 1e-9
            assert EDGE - 1e-9 <= o.y - h and o.y + h <= 1 - EDGE + 1e-9
        for (a, p), (b, q) in itertools.combinations(zip(sample.scene.objects, halves, strict=True), 2):
            gaps = abs(a.x - b.x) - p[0] - q[0], abs(a.y - b.y) - p[1] - q[1]
            assert max(gaps) >= GAP - 1e-9


def test_a_stated_relation_is_clear():
    for i in range(200):
        a, b = item(0, "test", i, "position").scene.objects
        long, short = sorted((abs(a.x - b.x), abs(a.y - b.y)), reverse=True)
        assert long >= CLEAR[0] and long >= CLEAR[1] * short


def test_bad_arguments_name_the_good_ones():
    with pytest.raises(ValueError, match="train, valid, test"):
        item(0, "dev", 0)
    with pytest.raises(ValueError, match="single_object"):
        item(0, "test", 0, "poetry")
    with pytest.raises(ValueError, match="train"):
        item(0, "train", 0, unseen=True)


# Held-out pairs


def test_about_a_tenth_is_held_out_and_spread():
    assert 6 <= len(UNSEEN) <= 7
    for pairs in zip(*UNSEEN, strict=True):
        assert max(Counter(pairs).values()) <= 2


def test_training_never_shows_a_held_out_pair():
    samples = [item(0, "train", i) for i in range(1500)] + items(100)
    assert not any(held_out(o.color, o.shape) for s in samples for o in s.scene.objects)
    assert {s.category for s in samples[:1500]} == set(MIXTURE)


def test_unseen_prompts_state_a_held_out_pair():
    for sample in items(60, unseen=True):
        assert any(g.color and held_out(g.color, g.shape) for g in sample.claim.groups)


# What a prompt states


def test_colors_and_sizes_are_stated_of_all_objects_or_of_none():
    for sample in items(60) + items(30, unseen=True):
        for name in ("color", "size"):
            assert len({getattr(g, name) is None for g in sample.claim.groups}) == 1
    share = lambda samples: np.mean([s.claim.groups[0].color is not None for s in samples])
    told = [item(0, "train", i, "two_object") for i in range(400)]
    asked = [item(0, "test", i, "two_object") for i in range(400)]
    assert 0.62 < share(told) < 0.78 and 0.42 < share(asked) < 0.58


def test_training_captions_read_from_the_top_and_prompts_in_any_order():
    def ordered(split, category):
        """Of pictures whose first two things begin at clearly different heights: is the upper one named first?"""
        out = []
        for sample in (item(0, split, i, category) for i in range(400)):
            if sample.claim.relation or sample.claim.groups[0].count > 1:
                continue
            tops = [o.y - SIZES[o.size] * EXTENT[o.shape][1] / 2 for o in sample.scene.objects]
            if abs(tops[0] - tops[1]) > 1 / 8:
                out.append(tops[0] < tops[1])
        assert len(out) > 60
        return np.mean(out)

    assert ordered("train", "two_object") == ordered("train", "color_attribution") == 1
    assert 0.4 < ordered("test", "two_object") < 0.6
    # What stands in a relation is named in any order in training too: the words alone say where.
    related = [item(0, "train", i, "two_object") for i in range(600)]
    related = Counter(s.claim.relation.name for s in related if s.claim.relation)
    assert 150 < sum(related.values()) < 350
    assert min(related[name] for name in RELATIONS) > 0.15 * sum(related.values())


# The same scene in other colours


def test_recolor_changes_colors_alone_and_draws_each():
    scene = next(s.scene for s in items(20) if len(s.scene.objects) == 4)
    rng = np.random.default_rng(0)
    painted = [recolor(rng, scene) for _ in range(200)]
    for other in painted:
        assert [replace(o, color="red") for o in other.objects] == [
            replace(o, color="red") for o in scene.objects
        ]
    assert {o.color for other in painted for o in other.objects} == set(COLORS)
    assert {other.background for other in painted} == set(BACKGROUNDS)


# Truth

# Two of each, so that objects often fit several groups.
SHAPE, COLOR, SIZE = (st.sampled_from(list(options)[:2]) for options in (SHAPES, COLORS, SIZES))
PLACE = st.floats(0, 1)
THING = st.builds(Object, SHAPE, COLOR, SIZE, PLACE, PLACE)
SCENE = st.builds(Scene, st.lists(THING, max_size=4).map(tuple), st.sampled_from(["white", "black"]))
GROUP = st.builds(Group, SHAPE, st.none() | COLOR, st.none() | SIZE, st.integers(1, 3))


@st.composite
def claims(draw):
    groups = tuple(draw(st.lists(GROUP, min_size=1, max_size=3)))
    relation = None
    if len(groups) > 1 and draw(st.booleans()):
        name, pair = draw(st.sampled_from(list(RELATIONS))), draw(st.permutations(range(len(groups))))
        relation = Relation(name, *pair[:2])
    return Claim(groups, relation, draw(st.none() | st.sampled_from(["white", "black"])))


def brute_force(claim, scene):
    """`holds`, by trying every order of the objects."""
    slots = [i for i, g in enumerate(claim.groups) for _ in range(g.count)]
    if len(slots) != len(scene.objects) or claim.background not in (None, scene.background):
        return False
    for order in itertools.permutations(scene.objects):
        fit = all(
            o.shape == claim.groups[i].shape
            and claim.groups[i].color in (None, o.color)
            and claim.groups[i].size in (None, o.size)
            for i, o in zip(slots, order, strict=True)
        )
        pairs = [
            (a, b)
            for i, a in zip(slots, order, strict=True)
            for j, b in zip(slots, order, strict=True)
            if claim.relation and (i, j) == (claim.relation.subject, claim.relation.object)
        ]
        if fit and all(related(claim.relation.name, a, b) for a, b in pairs):
            return True
    return False


@settings(deadline=None, max_examples=300)
@given(claims(), SCENE)
def test_holds_agrees_with_brute_force(claim, scene):
    assert holds(claim, scene) == brute_force(claim, scene)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.permutations(range(4)))
def test_truth_ignores_the_order_of_objects_and_nothing_else(seed, category, order):
    claim, scene = random_item(np.random.default_rng(seed), category, False)
    things = scene.objects
    shuffled = tuple(things[i] for i in order if i < len(things))
    assert holds(claim, Scene(shuffled, scene.background))
    assert not holds(claim, Scene(things[1:], scene.background))
    assert not holds(claim, Scene((*things, things[0]), scene.background))


@given(THING, THING)
def test_an_object_is_on_one_side_of_another_at_most(a, b):
    sides = [name for name in RELATIONS if related(name, a, b)]
    assert len(sides) <= 1
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert [opposite[name] for name in sides] == [name for name in RELATIONS if related(name, b, a)]


def test_relations_point_the_right_way():
    a, b = Object("circle", "red", "small", 0.2, 0.5), Object("star", "blue", "small", 0.8, 0.5)
    assert related("left of", a, b) and related("right of", b, a)
    a, b = Object("circle", "red", "small", 0.5, 0.2), Object("star", "blue", "small", 0.5, 0.8)
    assert related("above", a, b) and related("below", b, a)
    assert not related("above", a, Object("star", "blue", "small", 0.5, 0.25))


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.booleans())
def test_an_altered_claim_is_false_and_differs_in_one_stated_attribute(seed, category, unseen):
    rng = np.random.default_rng(seed)
    claim, scene = random_item(rng, category, unseen)
    wrong = alter(rng, claim, scene)
    assert not holds(wrong, scene)
    attributes = [
        [claim.relation and claim.relation.name, claim.background],
        [wrong.relation and wrong.relation.name, wrong.background],
    ]
    for mine, c in zip(attributes, (claim, wrong), strict=True):
        mine += [v for g in c.groups for v in (g.shape, g.color, g.size, g.count)]
    changed = [(a, b) for a, b in zip(*attributes, strict=True) if a != b]
    assert len(changed) == 1 and None not in changed[0]


# Language


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_prompt_has_one_meaning(language):
    meaning = {}
    for i in range(400):
        for category in KINDS:
            sample = item(1, "train", i, category, language)
            assert meaning.setdefault(sample.prompt, sample.claim) == sample.claim, sample.prompt


def test_english_states_the_claim_and_no_more():
    for sample in items(100):
        words = sample.prompt.replace(",", "").split()
        colors = {g.color for g in sample.claim.groups} | {sample.claim.background}
        assert {w for w in words if w in COLORS or w in BACKGROUNDS} == colors - {None}
        sizes = {"small": "small", "little": "small", "large": "large", "big": "large"}
        assert {sizes[w] for w in words if w in sizes} == {g.size for g in sample.claim.groups} - {None}
        assert 2 <= len(words) <= 24
        for article, noun in itertools.pairwise(words):
            assert article not in ("a", "an") or (article == "an") == (noun[0] in "aeiou"), sample.prompt
        for i, word in enumerate(words):
            if word in ("two", "three", "four"):
                nouns = [w for w in words[i:] if w.startswith(SHAPES)]
                assert nouns[0].endswith("s") and nouns[0] != "cross", sample.prompt


def test_the_plain_phrase_comes_about_half_of_the_time():
    circle, star = Group("circle", "red", "large"), Group("star", "blue", "small")
    claim = Claim((circle, star), Relation("above", 0, 1))
    rng = np.random.default_rng(0)
    said = Counter(say(claim, "en", rng) for _ in range(400))
    plain = "a large red circle above a small blue star"
    assert said.most_common(1)[0][0] == plain and len(said) >= 8


def test_chinese_uses_measure_words():
    rng = np.random.default_rng(0)
    said = {say(Claim((Group("star", "blue", "small", 2),)), "zh", rng) for _ in range(50)}
    assert "两颗蓝色的小星星" in said and len(said) >= 4
    assert all(ord(c) > 127 for s in items(30, language="zh") for c in s.prompt)


def test_an_unknown_language_names_the_known_ones():
    with pytest.raises(ValueError, match="en, zh"):
        say(Claim((Group("star"),)), "fr", np.random.default_rng(0))


# Pictures


@pytest.mark.parametrize("width, height", [(32, 32), (33, 70), (70, 33), (128, 64), (8, 8), (1, 5)])
def test_render_any_size(width, height):
    for sample in items(3):
        picture = render(sample.scene, width, height)
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8


def test_colors_are_flat_and_exact():
    for shape, color, background in itertools.product(set(SHAPES) - {"ring"}, COLORS, BACKGROUNDS):
        picture = render(Scene((Object(shape, color, "large", 0.5, 0.5),), background), 64, 64)
        assert tuple(picture[32, 32]) == COLORS[color]
        assert tuple(picture[0, 0]) == tuple(picture[-1, -1]) == BACKGROUNDS[background]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_picture_is_the_large_one_reduced(shape, monkeypatch):
    scene = Scene((Object(shape, "blue", "large", 105 / 256, 17 / 32),), "white")
    large = render(scene, 256, 256).reshape(32, 8, 32, 8, 3).mean((1, 3))
    # Edges are moved to the nearest sample: by up to 1/16 pixel where a pixel is 8 samples wide, and 1/64 of
    # the same way in the large picture. At a corner two edges are moved. 231 lies between blue and white.
    assert np.abs(render(scene, 32, 32) - large).max() < 2 * (1 / 16 + 1 / 64) * 231
    monkeypatch.setattr("mmgen.world.render._fine", lambda short: 1024 // short)
    monkeypatch.setattr("mmgen.world.render._summed", _summed.__wrapped__)
    assert np.abs(render(scene, 32, 32) - large).max() < 1  # with as many samples: rounding alone


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_alike_areas_and_clear_sizes(shape):
    small, large = (coverage(shape, size, 64, 64, 128)[0].sum() / (128 * SIZES[size]) ** 2 for size in SIZES)
    assert 0.55 < small < 0.90
    assert abs(small - large) < 0.03


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHAPES), st.sampled_from(list(SIZES)), st.floats(0.3, 0.6), st.floats(0.3, 0.6))
def test_moving_an_object_by_whole_pixels_moves_its_picture(shape, size, x, y):
    x, y = round(x * 256) / 256, round(y * 256) / 256  # whole samples, so that rounding agrees
    picture = render(Scene((Object(shape, "red", size, x, y),), "black"), 32, 32)
    moved = render(Scene((Object(shape, "red", size, x + 2 / 32, y - 1 / 32),), "black"), 32, 32)
    assert np.array_equal(np.roll(picture, (-1, 2), (0, 1)), moved)
