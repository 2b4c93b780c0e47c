"""What a picture may contain, what a prompt may claim of it, and when the claim is true.

Places are fractions of the width and the height, from the top left. Lengths are fractions of
the image's short side, so a scene can be rendered at any size.
"""

import hashlib
import itertools
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
# Far apart from each other and from every background, in brightness where hue alone must
# tell (JPEG halves the resolution of hue): `benchmarks/judge_accuracy.py` shows the confusions.
COLORS = {
    "red": (206, 12, 28),
    "orange": (255, 132, 0),
    "yellow": (254, 212, 0),
    "green": (0, 120, 44),
    "cyan": (0, 204, 232),
    "blue": (24, 56, 224),
    "purple": (124, 20, 158),
    "pink": (255, 110, 190),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (110, 110, 110),
    "beige": (244, 226, 188),
}
# Backgrounds that change from the top (first colour) to the bottom; a meadow changes at once, at its horizon.
SKIES = {
    "sky": ((126, 176, 222), (226, 240, 250)),
    "sunset": ((88, 76, 116), (250, 206, 170)),
    "meadow": ((200, 226, 240), (146, 190, 120)),
}
HORIZON = 0.6  # of a meadow, from the top
GROUNDS = (*BACKGROUNDS, *SKIES)
SIZES = {"small": 0.285, "large": 0.41}  # times EXTENT: about 0.33 and 0.47 of the short side
ALL_SIZES = {"small": 0.285, "medium": 0.345, "large": 0.41}
# Width and height of each shape in units of its size, such that the areas are alike.
EXTENT = {
    "circle": (1.0, 1.0),
    "square": (0.90, 0.90),
    "triangle": (1.22, 1.12),
    "star": (1.28, 1.22),
    "diamond": (1.04, 1.28),
    "cross": (1.14, 1.14),
    "heart": (1.16, 1.08),
    "ring": (1.20, 1.20),
    # People: of a child's height the head is more, and they are not so slim.
    "adult": (0.72, 1.56),
    "child": (0.86, 1.30),
    "zorn": (1.10, 1.10),
    "vark": (1.06, 1.20),
}
FIGURES = ("adult", "child")
SYMBOLS = (
    "zorn",
    "vark",
)  # they mean nothing, and stand in for symbols that are not to be shown (docs/safety.md)
PATTERNS = ("solid", "striped", "dotted", "outlined")
STYLES = ("flat", "ink", "pixel", "watercolor", "anime", "night")
# The direction in which the subject lies from the object.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
LAYERS = ("in front of", "behind")  # of two that overlap
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
MOST = 4  # objects in a scene

MARGIN = 0.1  # a relation holds from this distance on, along its axis
EDGE = 0.035  # objects keep clear of the image's edge ...
GAP = 0.065  # ... and of each other: 2 pixels of 32, so that they can be told apart
CLEAR = (0.16, 1.3)  # a stated relation: this far along its axis, and this times the other axis
_LATTICE = np.arange(24)  # along each axis, of the candidate places of an object


@dataclass(frozen=True)
class Object:
    shape: str
    color: str
    size: str
    x: float
    y: float
    pattern: str = "solid"
    z: int = 0  # of two that overlap the one in front has the larger


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str
    style: str = "flat"


@dataclass(frozen=True)
class Group:
    """`count` objects of a shape; None where the prompt does not say."""

    shape: str
    color: str | None = None
    size: str | None = None
    count: int = 1
    pattern: str | None = None


@dataclass(frozen=True)
class Relation:
    """Every object of group `subject` lies on the `name` side of every one of group `object`."""

    name: str
    subject: int
    object: int


@dataclass(frozen=True)
class Claim:
    groups: tuple[Group, ...]
    relation: Relation | None = None
    background: str | None = None
    style: str | None = None


def holds(claim: Claim, scene: Scene) -> bool:
    """Whether the scene has exactly the claimed objects, in the claimed relation, place and style."""
    if claim.background not in (None, scene.background) or claim.style not in (None, scene.style):
        return False
    slots = [i for i, group in enumerate(claim.groups) for _ in range(group.count)]
    if len(slots) != len(scene.objects):
        return False
    return any(_related(claim.relation, owners) for owners in _assign(claim, slots, scene.objects))


def fits(thing: Object, group: Group) -> bool:
    """Whether an object has the attributes that the group states."""
    return (
        thing.shape == group.shape
        and group.color in (None, thing.color)
        and group.size in (None, thing.size)
        and group.pattern in (None, thing.pattern)
    )


def related(name: str, subject: Object, other: Object) -> bool:
    """Whether the subject lies at least MARGIN to that side, and more so than to any other side; or before or behind
    what it overlaps."""
    if name in LAYERS:
        near, far = (subject, other) if name == "in front of" else (other, subject)
        return near.z > far.z and overlap(near, far)
    ax, ay = RELATIONS[name]
    dx, dy = subject.x - other.x, subject.y - other.y
    along, across = ax * dx + ay * dy, abs(ay * dx) + abs(ax * dy)
    return along >= MARGIN and along > across


def overlap(a, b) -> bool:
    """Whether the boxes around two objects do."""
    (aw, ah), (bw, bh) = half_extent(a), half_extent(b)
    return abs(a.x - b.x) < aw + bw and abs(a.y - b.y) < ah + bh


def _assign(claim, slots, objects):
    """All ways to give every object to a group it fits: lists of (group index, object)."""
    if not objects:
        yield []
        return
    first, rest = objects[0], objects[1:]
    for i in sorted(set(slots)):
        if fits(first, claim.groups[i]):
            left = list(slots)
            left.remove(i)
            for owners in _assign(claim, left, rest):
                yield [(i, first), *owners]


def _related(relation, owners):
    if relation is None:
        return True
    subjects = [thing for i, thing in owners if i == relation.subject]
    others = [thing for i, thing in owners if i == relation.object]
    return all(related(relation.name, a, b) for a in subjects for b in others)


def distinct(groups) -> bool:
    """Whether no object could fit two of the groups, so that a prompt has one meaning."""
    return not any(
        a.shape == b.shape
        and (a.color is None or b.color is None or a.color == b.color)
        and (a.size is None or b.size is None or a.size == b.size)
        and (a.pattern is None or b.pattern is None or a.pattern == b.pattern)
        for a, b in itertools.combinations(groups, 2)
    )


def held_out(color: str, shape: str) -> bool:
    """Whether the pair never occurs in training: a tenth of the pairs, fixed by a hash; people are all seen.

    The salt is one of those that take no colour and no shape twice.
    """
    digest = hashlib.blake2b(f"held out 733: {color} {shape}".encode(), digest_size=4).digest()
    return shape in SHAPES and int.from_bytes(digest, "little") % 10 == 0


PAIRS = tuple(itertools.product(COLORS, SHAPES))
UNSEEN = tuple(pair for pair in PAIRS if held_out(*pair))
SEEN = tuple(pair for pair in PAIRS if not held_out(*pair))

# How often a prompt of the category states colours and sizes: those of all its objects or of none, since
# "a circle and a red star" would leave it to chance whether what is drawn first is red.
_STATED = {
    "single_object": (0.5, 0.5),
    "two_object": (0.5, 0.3),
    "counting": (0.5, 0.25),
    "colors": (1.0, 0.0),
    "position": (0.6, 0.3),
    "color_attribution": (1.0, 0.0),
    "scene": (1.0, 0.25),
    "mixed_counting": (0.5, 0.25),
}
_TOLD = (0.7, 0.6)  # at least so often in training: words that say what is seen teach their meaning sooner
RELATED = 0.5  # how often it states, of two groups, a relation that they happen to be in
_ROWS = 8  # of reading order: things that begin at about the same height are read from the left


def random_item(rng, category: str, unseen: bool, told: bool = False) -> tuple[Claim, Scene]:
    """A claim of the category, or of "scene" (3-4 mixed objects) or "mixed_counting", and a scene where it is true.

    rng: numpy Generator. unseen: some stated colour-shape pair is held out; otherwise no
    held-out pair is anywhere in the scene, stated or not. told: the claim says more, for training, and
    unless it states a relation it names what is seen in reading order.
    """
    if category not in _STATED:
        raise ValueError(f"category: expected one of {', '.join(_STATED)}; found {category!r}")
    while True:
        groups = random_groups(rng, category, unseen)
        relation = Relation(pick(rng, RELATIONS), 0, 1) if category == "position" else None
        background = pick(rng, BACKGROUNDS)
        kinds = [replace(g, count=1) for g in groups for _ in range(g.count)]
        places = next(filter(None, (place(rng, kinds, relation) for _ in range(30))), None)
        if places is None:  # too crowded
            continue
        objects = tuple(
            Object(k.shape, k.color, k.size, x, y) for k, (x, y) in zip(kinds, places, strict=True)
        )
        if told and relation is None:
            if len(groups) == 2 and rng.random() < RELATED:
                relation = seen_relation(groups, objects)
            if relation is None:
                groups, objects = in_reading_order(groups, objects)
        claim = Claim(
            _state(rng, groups, category, unseen, told),
            relation,
            background if category == "colors" and rng.random() < 0.3 else None,
        )
        if distinct(claim.groups):
            return claim, Scene(objects, background)


def recolor(rng, scene: Scene) -> Scene:
    """The scene with every colour drawn anew."""
    objects = tuple(replace(thing, color=pick(rng, COLORS)) for thing in scene.objects)
    return replace(scene, objects=objects, background=pick(rng, BACKGROUNDS))


def pick(rng, options):
    options = tuple(options)
    return options[int(rng.random() * len(options))]


def _counts(rng, category):
    """How many objects each group of a new claim has."""
    if category in ("single_object", "colors"):
        return (1,)
    if category == "scene":
        return pick(rng, ((1, 1, 1), (2, 1), (1, 2), (1, 1, 1, 1), (2, 1, 1), (1, 1, 2), (2, 2), (3, 1)))
    if category == "mixed_counting":  # the part of counting that takes most learning: which group is complete
        return pick(rng, ((2, 1), (3, 1), (2, 2)))
    if category == "counting":
        if rng.random() < 0.7:
            return (1 + int(rng.random() * MOST),)
        return pick(rng, ((1, 2), (2, 1), (1, 3), (3, 1), (2, 2)))
    return (1, 1)


def random_groups(rng, category, unseen):
    """Groups with every attribute decided; if `unseen`, one of them is a held-out pair."""
    counts = _counts(rng, category)
    room = {3: 2, 4: 1}.get(sum(counts), sum(counts))  # more large objects hardly fit
    one_shape_each = category in ("two_object", "position", "color_attribution")
    special = int(rng.random() * len(counts)) if unseen else -1
    groups = []
    for i, count in enumerate(counts):
        while True:
            color, shape = pick(rng, UNSEEN if i == special else SEEN)
            if (color, shape) in [(g.color, g.shape) for g in groups]:
                continue
            if one_shape_each and shape in [g.shape for g in groups]:
                continue
            if category == "color_attribution" and color in [g.color for g in groups]:
                continue
            break
        size = "large" if count <= room and rng.random() < 0.5 else "small"
        room -= count * (size == "large")
        groups.append(Group(shape, color, size, count))
    return groups


def _state(rng, groups, category, unseen, told):
    """The groups as the prompt states them: colours or sizes left out."""
    color, size = (max(p, at_least) for p, at_least in zip(_STATED[category], _TOLD if told else (0, 0)))
    color, size = rng.random() < color or unseen, rng.random() < size
    return tuple(replace(g, color=g.color if color else None, size=g.size if size else None) for g in groups)


def place(rng, kinds, relation):
    """Centres for the objects: inside the image, apart, and clearly in the relation; or None."""
    halves = [half_extent(kind) for kind in kinds]
    places = {}
    # The largest first, because the last one finds the least room.
    for i in sorted(range(len(kinds)), key=lambda i: -halves[i][0] * halves[i][1]):
        places[i] = free_place(rng, halves[i], [(*place, *halves[j]) for j, place in places.items()])
        if places[i] is None:
            return None
    if relation and not clearly(relation.name, places[0], places[1]):
        return None
    return [places[i] for i in range(len(kinds))]


def half_extent(kind):
    """Half of the width and of the height of an object, or of what a Group with a size states."""
    return tuple(ALL_SIZES[kind.size] * extent / 2 for extent in EXTENT[kind.shape])


def free_place(rng, half, taken):
    """A centre for something of that half extent, inside the image and apart from what is taken, (x, y, half width,
    half height) each; None where there is no room."""
    # Candidates on a lattice that lies anywhere: each centre is as likely as any other that is free.
    n = len(_LATTICE) if taken else 1
    xs, ys = (EDGE + h + (_LATTICE[:n] + rng.random()) * ((1 - 2 * (EDGE + h)) / n) for h in half)
    choice = 0
    if taken:
        free = True
        for x, y, w, h in taken:
            beside, above = abs(xs - x) >= half[0] + w + GAP, abs(ys - y) >= half[1] + h + GAP
            free = free & (beside | above[:, None])
        choices = np.flatnonzero(free)
        if not len(choices):
            return None
        choice = int(choices[int(rng.random() * len(choices))])
    return float(xs[choice % n]), float(ys[choice // n])


def clearly(name, subject, other):
    ax, ay = RELATIONS[name]
    dx, dy = subject[0] - other[0], subject[1] - other[1]
    along, across = ax * dx + ay * dy, abs(ay * dx) + abs(ax * dy)
    return along >= max(CLEAR[0], CLEAR[1] * across)


def alter(rng, claim: Claim, scene: Scene) -> Claim:
    """The claim with one stated attribute changed, such that it is false of the scene."""
    others = [c for c in _neighbours(claim, _is_rich(scene)) if distinct(c.groups) and not holds(c, scene)]
    # First the attribute, then its value: else shapes and colours would crowd out the rest.
    kinds = sorted({changed(claim, c) for c in others})
    kind = pick(rng, kinds)
    return pick(rng, [c for c in others if changed(claim, c) == kind])


def _is_rich(scene):
    things = any(
        o.size == "medium" or o.pattern != "solid" or o.shape in FIGURES or o.z for o in scene.objects
    )
    return things or scene.background in SKIES or scene.style != "flat"


def _members(groups, objects):
    """The objects of each group: those of a new scene stand in the order of its groups."""
    rest = iter(objects)
    return [[next(rest) for _ in range(group.count)] for group in groups]


def seen_relation(groups, objects):
    """The relation in which every object of the first group clearly stands to every one of the second, or None."""
    places = [[(thing.x, thing.y) for thing in members] for members in _members(groups, objects)]
    for name in RELATIONS:
        if all(clearly(name, a, b) for a in places[0] for b in places[1]):
            return Relation(name, 0, 1)
    return None


def in_reading_order(groups, objects):
    """Groups and objects by where the first of each group begins: from the top, and in a row from the left."""

    def begins(thing):
        w, h = half_extent(thing)
        return int(_ROWS * (thing.y - h)), thing.x - w

    parts = zip(groups, _members(groups, objects), strict=True)
    parts = sorted(parts, key=lambda part: min(map(begins, part[1])))
    return [group for group, _ in parts], tuple(thing for _, members in parts for thing in members)


def _neighbours(claim, rich):
    """Every claim that differs from this one in a single stated attribute; `rich`: with the values of a rich world."""
    for i, group in enumerate(claim.groups):
        room = MOST - sum(g.count for g in claim.groups) + group.count
        values = {
            "shape": FIGURES if group.shape in FIGURES else SHAPES,
            "color": COLORS,
            "size": ALL_SIZES if rich else SIZES,
            "count": range(1, room + 1),
            "pattern": PATTERNS,
        }
        for name, options in values.items():
            for value in options:
                if getattr(group, name) not in (None, value):
                    groups = list(claim.groups)
                    groups[i] = replace(group, **{name: value})
                    yield replace(claim, groups=tuple(groups))
    if claim.relation:
        for name in LAYERS if claim.relation.name in LAYERS else RELATIONS:
            if name != claim.relation.name:
                yield replace(claim, relation=replace(claim.relation, name=name))
    for name in GROUNDS if rich else BACKGROUNDS:
        if claim.background not in (None, name):
            yield replace(claim, background=name)
    for name in STYLES:
        if claim.style not in (None, name):
            yield replace(claim, style=name)


def changed(a, b):
    """The name of the attribute in which two claims differ that are alike but for one, as those of `alter`."""
    for g, h in zip(a.groups, b.groups, strict=True):
        for name in ("shape", "color", "size", "count", "pattern"):
            if getattr(g, name) != getattr(h, name):
                return name
    return next(name for name in ("relation", "background", "style") if getattr(a, name) != getattr(b, name))
