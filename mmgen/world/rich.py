"""Scenes with more in them than the plain world's: patterns, three sizes, skies, styles, people, and layers."""

import math
from dataclasses import replace

import numpy as np

from mmgen.world.render import coverage
from mmgen.world.scene import (
    ALL_SIZES,
    BACKGROUNDS,
    EDGE,
    FIGURES,
    GROUNDS,
    LAYERS,
    PATTERNS,
    RELATED,
    SKIES,
    STYLES,
    Claim,
    Object,
    Relation,
    Scene,
    distinct,
    half_extent,
    in_reading_order,
    pick,
    place,
    random_groups,
    seen_relation,
)

RICH = ("pattern", "size", "backdrop", "style", "people", "layers")
_RICH_BASES = ("single_object", "two_object", "two_object", "position", "color_attribution", "counting")
_ALSO = 0.12  # so often a picture of one kind shows something of another
PATTERNED = ("flat", "ink", "anime")  # styles in which patterns stay legible
HIDES = (0.12, 0.42)  # the share of a thing that what lies in front of it hides


def random_rich(rng, kind: str, unseen: bool = False) -> tuple[Claim, Scene]:
    """As `random_item` for one of RICH: a claim that states the patterns, the sizes (of three), the background (of
    GROUNDS), the style, people, or which of two things is in front; a scene where it is true."""
    if kind not in RICH:
        raise ValueError(f"kind: expected one of {', '.join(RICH)}; found {kind!r}")
    while True:
        groups = random_groups(
            rng, pick(rng, _RICH_BASES) if kind != "layers" else "color_attribution", unseen
        )
        has = {name: kind == name or rng.random() < _ALSO for name in RICH}
        style = pick(rng, STYLES[1:]) if has["style"] and kind != "layers" else "flat"
        has["pattern"] &= style in PATTERNED or kind == "pattern"
        groups = [_varied(rng, group, i, has, kind == "layers", unseen) for i, group in enumerate(groups)]
        if kind == "pattern" and (style not in PATTERNED or all(g.pattern == "solid" for g in groups)):
            continue
        kinds = [replace(g, count=1) for g in groups for _ in range(g.count)]
        if kind == "layers":
            places = _overlapping(rng, kinds)
        else:
            places = next(filter(None, (place(rng, kinds, None) for _ in range(10))), None)
        if places is None:
            continue
        objects = tuple(
            Object(k.shape, k.color, k.size, x, y, k.pattern, int(kind == "layers" and i == 1))
            for i, (k, (x, y)) in enumerate(zip(kinds, places, strict=True))
        )
        background = pick(rng, GROUNDS if has["backdrop"] else BACKGROUNDS)
        relation = (
            seen_relation(groups, objects)
            if len(groups) == 2 and kind != "layers" and rng.random() < RELATED
            else None
        )
        if kind == "layers":
            groups, objects, relation = _layered(rng, groups, objects)
        elif relation is None:
            groups, objects = in_reading_order(groups, objects)
        size = kind == "size" or rng.random() < 0.25
        claim = Claim(
            tuple(
                replace(g, size=g.size if size else None, pattern=None if g.pattern == "solid" else g.pattern)
                for g in groups
            ),
            relation,
            background if kind == "backdrop" or background in SKIES else None,
            style if style != "flat" else None,
        )
        if distinct(claim.groups):
            return claim, Scene(objects, background, style)


def patterns_of(shape):
    """The patterns that a shape may have: the outline of a ring would be two rings, and people are solid."""
    if shape in FIGURES:
        return ("solid",)
    return tuple(name for name in PATTERNS if (shape, name) != ("ring", "outlined"))


def _varied(rng, group, i, has, layered, unseen):
    """A plain group with what a rich world may give it."""
    shape, size, pattern = group.shape, group.size, "solid"
    if has["people"] and not layered and not unseen and (i == 0 or rng.random() < 0.6):
        shape = pick(rng, FIGURES)
    if has["size"]:
        size = pick(rng, ALL_SIZES if group.count < 3 else ("small", "medium"))
    if has["pattern"] and not layered and shape not in FIGURES and rng.random() < 0.8:
        pattern = pick(rng, patterns_of(shape))
    return replace(group, shape=shape, size="large" if layered else size, pattern=pattern)


def _overlapping(rng, kinds):
    """Centres for two things of which the second hides a part of the first, but not too much; or None."""
    (aw, ah), (bw, bh) = half_extent(kinds[0]), half_extent(kinds[1])
    x, y = (EDGE + h + rng.random() * (1 - 2 * (EDGE + h)) for h in (aw, ah))
    turn, far = rng.random() * 2 * math.pi, 0.4 + 0.4 * rng.random()
    dx, dy = math.cos(turn) * far * (aw + bw), math.sin(turn) * far * (ah + bh)
    if not all(EDGE + h <= at <= 1 - EDGE - h for at, h in ((x + dx, bw), (y + dy, bh))):
        return None
    places = [(x, y), (x + dx, y + dy)]
    first, second = (_mask(kind, at) for kind, at in zip(kinds, places, strict=True))
    return places if HIDES[0] <= (first * second).sum() / first.sum() <= HIDES[1] else None


def _mask(kind, at, side=40):
    """What a thing covers of an image of that side: float32 [side, side]."""
    alpha, top, left = coverage(kind.shape, kind.size, at[0] * side, at[1] * side, side)
    canvas = np.zeros((side, side), np.float32)
    rows, cols = (np.arange(n) + begin for n, begin in zip(alpha.shape, (top, left), strict=True))
    keep = lambda at: (at >= 0) & (at < side)
    canvas[np.ix_(rows[keep(rows)], cols[keep(cols)])] = alpha[np.ix_(keep(rows), keep(cols))]
    return canvas


def _layered(rng, groups, objects):
    """Groups, objects (what is behind comes first) and relation of a claim about one thing in front of another."""
    name = pick(rng, LAYERS)
    order = (1, 0) if name == "in front of" else (0, 1)
    return [groups[i] for i in order], objects, Relation(name, 0, 1)
