"""Rich scenes: what they may hold, how each style is drawn, and that the judge reads them back."""

import collections

import numpy as np
import pytest

from mmgen.world.judge import judge, parse
from mmgen.world.render import render
from mmgen.world.rich import PATTERNED, RICH, random_rich
from mmgen.world.scene import (
    ALL_SIZES,
    FIGURES,
    GROUNDS,
    PATTERNS,
    SHAPES,
    STYLES,
    Claim,
    Group,
    Object,
    Relation,
    Scene,
    alter,
    changed,
    fits,
    held_out,
    holds,
)


def items(kind, n, seed=7, unseen=False):
    rng = np.random.default_rng(seed)
    return [random_rich(rng, kind, unseen) for _ in range(n)]


@pytest.mark.parametrize("kind", RICH)
def test_claims_are_true_of_their_scenes_and_altered_ones_are_not(kind):
    rng = np.random.default_rng(0)
    assert items(kind, 20) == items(kind, 20) != items(kind, 20, seed=8)
    stated = collections.Counter()
    for claim, scene in items(kind, 60):
        assert holds(claim, scene)
        other = alter(rng, claim, scene)
        assert not holds(other, scene)
        stated[changed(claim, other)] += 1
        assert not any(held_out(thing.color, thing.shape) for thing in scene.objects)
    own = {
        "pattern": "pattern",
        "size": "size",
        "backdrop": "background",
        "style": "style",
        "people": "shape",
    }
    assert stated[own.get(kind, "relation")] > 5
    for _, scene in items(kind, 30, unseen=True):
        assert any(held_out(thing.color, thing.shape) for thing in scene.objects)


def test_everything_comes_up():
    scenes = [scene for kind in RICH for _, scene in items(kind, 120)]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.background for scene in scenes} == set(GROUNDS)
    assert {thing.pattern for thing in things} == set(PATTERNS)
    assert {thing.size for thing in things} == set(ALL_SIZES)
    assert {thing.shape for thing in things} == {*SHAPES, *FIGURES}
    assert all(
        t.pattern == "solid" for scene in scenes if scene.style not in PATTERNED for t in scene.objects
    )
    with pytest.raises(ValueError, match="expected one of pattern"):
        random_rich(np.random.default_rng(0), "glitter")


def test_what_is_in_front_hides_what_is_behind():
    things = Object("square", "red", "large", 0.4, 0.5), Object("circle", "blue", "large", 0.62, 0.5, z=1)
    picture = render(Scene(things, "white"), 64, 64)
    np.testing.assert_array_equal(picture, render(Scene(things[::-1], "white"), 64, 64))
    assert tuple(picture[32, 34]) == (24, 56, 224)
    groups = Group("circle", "blue"), Group("square", "red")
    for name, true in (("in front of", True), ("behind", False)):
        claim = Claim(groups, Relation(name, 0, 1))
        assert holds(claim, Scene(things, "white")) == judge(picture, claim).ok == true
    apart = Scene((things[0], Object("circle", "blue", "small", 0.85, 0.8, z=1)), "white")
    assert not holds(Claim(groups, Relation("in front of", 0, 1)), apart)


def test_a_group_may_state_a_pattern():
    dotted = Object("star", "red", "small", 0.5, 0.5, "dotted")
    assert fits(dotted, Group("star", pattern="dotted")) and fits(dotted, Group("star"))
    assert not fits(dotted, Group("star", pattern="striped"))


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_read_from_the_pixels(style):
    for background in GROUNDS:
        for n, size in enumerate((64, 96)):
            things = Object("heart", "red", "large", 0.3, 0.35), Object("square", "blue", "small", 0.72, 0.66)
            scene = Scene(things[n:], background, style)
            reading = parse(render(scene, size, size))
            assert not reading.faults and (reading.scene.style, reading.scene.background) == (
                style,
                background,
            )
            assert {(t.shape, t.color, t.size) for t in reading.scene.objects} == {
                (t.shape, t.color, t.size) for t in scene.objects
            }


@pytest.mark.parametrize("seed, width, height", [(126, 96, 64), (126, 64, 128), (573, 64, 128)])
def test_small_things_in_a_style_are_not_taken_for_flat_ones(seed, width, height):
    """Where most of the picture is ground, which two styles share, the things decide."""
    square = [kind for kind in RICH if kind != "layers"]
    claim, scene = random_rich(np.random.default_rng(seed), square[seed % len(square)], False)
    verdict = judge(render(scene, width, height), claim)
    assert verdict.ok, (verdict.why, scene)


@pytest.mark.parametrize(
    "kind, size, count",
    [(kind, 64, 12) for kind in RICH]
    + [pytest.param(kind, size, 1000, marks=pytest.mark.soak) for kind in RICH for size in (64, 96)],
)
def test_the_judge_of_rich_scenes(kind, size, count):
    """True renderings pass, and fail a claim with one attribute changed."""
    rng, right, wrong = np.random.default_rng(1), 0, 0
    whole = [*items(kind, count // 2), *items(kind, count // 2, seed=9, unseen=True)]
    for claim, scene in whole:
        picture = render(scene, size, size)
        verdict = judge(picture, claim)
        right += verdict.ok
        if not verdict.ok:
            print(claim, scene, verdict.why, sep="\n  ")
        wrong += judge(picture, alter(rng, claim, scene)).ok
    print(f"{kind} {size} px: {right} of {len(whole)} true ones right, {wrong} wrong ones passed")
    assert right >= 0.995 * len(whole) and wrong <= 0.005 * len(whole)
