"""Draw a scene: anti-aliased shapes at any size and at sub-pixel places, flat or in one of the styles."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from mmgen.world.scene import (
    ALL_SIZES,
    BACKGROUNDS,
    COLORS,
    EXTENT,
    FIGURES,
    HORIZON,
    PATTERNS,
    SKIES,
    Scene,
)

STRIPE = 0.0625  # of the short side: a stripe's width, and half the distance of dots
LINE = 0.036  # ... the line of something outlined
FAINT = 0.55  # what stripes and dots leave free is covered by so much
INK = 0.017  # ... the contour of style ink
CELL = 32  # cells of style pixel along the short side
GRAIN = 9.0  # half the difference between the two tones of its checkered ground
PAPER = {"object": 0.85, "ground": 0.7}  # how much of its color watercolor keeps
HEAD = {"adult": 0.2, "child": 0.36}  # of a person's height
DARK = {"object": (0.8, (0, 4, 30)), "ground": (0.35, (8, 10, 34))}  # night: times, plus


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """The picture of a scene: uint8 [height, width, 3]."""
    canvas = ground(scene.background, scene.style, width, height).copy()
    for thing in sorted(scene.objects, key=lambda thing: thing.z):
        x, y = thing.x * width, thing.y * height
        paint(canvas, thing.shape, thing.size, thing.pattern, thing.color, scene.style, x, y)
    return (np.clip(canvas, 0, 255) + 0.5).astype(np.uint8)


@lru_cache(maxsize=256)
def ground(background: str, style: str, width: int, height: int) -> np.ndarray:
    """The picture of a background alone: float32 [height, width, 3], not to be written to."""
    rows = (np.arange(height, dtype=np.float32)[:, None, None] + 0.5) / height
    if background in SKIES:
        top, bottom = (np.asarray(color, np.float32) for color in SKIES[background])
        share = (rows > HORIZON) if background == "meadow" else rows
        field = top + (bottom - top) * share
    else:
        field = np.asarray(BACKGROUNDS[background], np.float32)
    field = np.broadcast_to(field, (height, width, 3))
    if style == "pixel":
        cell = 2 * cell_of(min(width, height))
        y, x = np.indices((height, width)) // cell
        field = np.clip(field, GRAIN, 255 - GRAIN) + GRAIN * (1 - 2.0 * ((x + y) % 2))[..., None]
    elif style == "watercolor":
        field = _paper(field, "ground") + 7 * _blotches(width, height)[..., None]
    elif style == "anime":
        field = np.clip(field, 24, 231) + 24 * (1 - 2 * rows)
    elif style == "night":
        times, plus = DARK["ground"]
        field = times * field + np.asarray(plus, np.float32)
    field = np.clip(field, 0, 255).astype(np.float32)
    field.setflags(write=False)
    return field


def tint(color: str, style: str) -> np.ndarray:
    """What a named colour is in a style, where nothing shades it: float32 [3]."""
    rgb = np.asarray(COLORS[color], np.float32)
    if style == "watercolor":
        return _paper(rgb, "object")
    if style == "night":
        times, plus = DARK["object"]
        return times * rgb + np.asarray(plus, np.float32)
    return rgb


def paint(canvas, shape, size, pattern, color, style, x, y, cell=None):
    """Adds one object to a canvas, float32 [H, W, 3], at a centre in pixels; cell: pixels a side of style pixel's."""
    height, width = canvas.shape[:2]
    short = min(width, height)
    rgb = tint(color, style)
    if style == "ink":
        line, top, left = coverage(shape, size, x, y, short, pattern, grown=True)
        around = canvas[min(max(int(y), 0), height - 1), min(max(int(x), 0), width - 1)]
        _blend(canvas, line, top, left, contour(around))
    if style == "pixel":
        cell = cell or cell_of(short)
        # Drawn in cells as an image of so many pixels would be, each covered or not.
        small, top, left = coverage(shape, size, x / cell, y / cell, round(short / cell), pattern)
        alpha = (small > 0.5).astype(np.float32).repeat(cell, 0).repeat(cell, 1)
        return _blend(canvas, alpha, top * cell, left * cell, rgb)
    alpha, top, left = coverage(shape, size, x, y, short, pattern)
    if style == "watercolor":
        # Wet edges: pigment gathers at the rim, and lies unevenly within.
        solid = _soft(alpha, max(1, round(short / 64)), 1)
        wash = _blotches(width, height)
        rows, cols = (
            np.clip(np.arange(n) + at, 0, m - 1)
            for n, at, m in zip(alpha.shape, (top, left), (height, width))
        )
        alpha = solid * np.clip(0.9 + 0.1 * wash[np.ix_(rows, cols)], 0, 1)
        rim = (4 * solid * (1 - solid))[..., None]
        rgb = rgb * (1 - 0.25 * rim)
    elif style == "anime":
        # Light from the upper left, across the object, and never so much that its colour would be another.
        h, w = alpha.shape
        slope = (np.arange(h)[:, None] + 0.5) / h + (np.arange(w) + 0.5) / w - 1  # -1 to 1
        rgb = np.clip(rgb - 46 * np.clip(slope * 1.6, -1, 1)[..., None], 0, 255)
    elif style == "night":
        glow = _soft(coverage(shape, size, x, y, short)[0], max(1, round(short / 24)))
        _blend(canvas, 0.14 * glow, top, left, rgb)
    _blend(canvas, alpha, top, left, rgb)


def _blend(canvas, alpha, top, left, rgb):
    """Covers a part of the canvas by so much of a colour: alpha [h, w], rgb [3] or [h, w, 3]."""
    rows = slice(max(top, 0), max(0, top + alpha.shape[0]))
    cols = slice(max(left, 0), max(0, left + alpha.shape[1]))
    patch = canvas[rows, cols]
    cut = (
        slice(max(-top, 0), max(-top, 0) + patch.shape[0]),
        slice(max(-left, 0), max(-left, 0) + patch.shape[1]),
    )
    patch += alpha[cut][..., None] * ((rgb if rgb.ndim == 1 else rgb[cut]) - patch)


def contour(behind):
    """The colour of style ink's contours, dark on what is light and light on what is dark: float32 [3]."""
    return np.full(3, 24.0 if behind.mean() > 64 else 236.0, np.float32)


def cell_of(short):
    """Pixels a side of a cell of style pixel, in an image of that short side."""
    return max(2, round(short / CELL))


def _paper(rgb, what):
    return 255 - PAPER[what] * (255 - np.asarray(rgb, np.float32))


@lru_cache(maxsize=64)
def _blotches(width, height):
    """Waves that are the same on every sheet: float32 [height, width], -1 to 1."""
    y, x = np.meshgrid(
        (np.arange(height) + 0.5) / min(width, height),
        (np.arange(width) + 0.5) / min(width, height),
        indexing="ij",
    )
    wave = np.sin(17 * x + 5 * y + 1) + np.sin(7 * x - 19 * y + 2) + np.sin(-11 * x + 13 * y)
    return (wave / 3).astype(np.float32)


def _soft(alpha, reach, times=2):
    """A mask blurred by a box of 2 reach + 1 pixels; what would leave the patch is lost."""
    for _ in range(times):
        for axis in (0, 1):
            total = np.cumsum(
                np.pad(alpha, [(reach + 1, reach) if a == axis else (0, 0) for a in (0, 1)]), axis
            )
            n = alpha.shape[axis]
            ends = np.take(total, range(2 * reach + 1, n + 2 * reach + 1), axis)
            alpha = (ends - np.take(total, range(n), axis)) / (2 * reach + 1)
    return alpha.astype(np.float32)


def coverage(shape, size, x, y, short, pattern="solid", grown=False) -> tuple[np.ndarray, int, int]:
    """The share of each pixel that a shape covers: float32 [h, w], and the patch's top and left.

    x, y: the centre in pixels (the corner of the first pixel is 0, 0); short: the image's short side; grown: the
    contour of INK around it instead.
    """
    fine = _fine(short)
    total, n = _summed(shape, size, short, pattern, grown)
    # Samples are counted in a summed-area table, so every sub-pixel place costs four slices.
    left, phase_x = divmod(round(x * fine), fine)
    top, phase_y = divmod(round(y * fine), fine)
    cols = slice(fine - phase_x, None, fine)
    rows = slice(fine - phase_y, None, fine)
    edges = total[rows, cols]
    alpha = (edges[1:, 1:] - edges[:-1, 1:] - edges[1:, :-1] + edges[:-1, :-1]) * (1 / fine**2)
    return alpha, top - n, left - n


def _fine(short):
    """Samples along each side of a pixel: fewer in large images, where edges are few."""
    return max(2, min(8, 1024 // short))


@lru_cache(maxsize=1024)
def _summed(shape, size, short, pattern, grown):
    """Summed-area table of a shape drawn finely, centred, with a pixel of slack; half its side in pixels."""
    fine = _fine(short)
    w, h = (e * ALL_SIZES[size] * short for e in EXTENT[shape])
    contour = max(1, round(INK * short * fine)) if grown else 0  # in samples
    n = math.ceil(max(w, h) / 2 + contour / fine) + 1
    side = 2 * n * fine
    crossed = np.zeros((side, side + 1), np.int32)
    for outline in _outlines(shape):
        points = [(side / 2 + px * w * fine, side / 2 + py * h * fine) for px, py in outline]
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            # A sample is inside if an odd number of edges lies to its left; holes follow from that.
            rows = np.arange(math.ceil(min(y0, y1) - 0.5), math.ceil(max(y0, y1) - 0.5))
            if len(rows):
                x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                crossed[rows, np.ceil(x - 0.5).astype(int)] += 1
    mask = crossed.cumsum(1)[:, :-1] % 2
    if shape in FIGURES:
        mask = np.minimum(mask + _head(shape, side, w * fine, h * fine), 1)
    mask = _patterned(mask, pattern, short * fine)
    if grown:
        mask = (_dilated(mask, contour) > 0) & (mask == 0)
    total = mask.cumsum(0).cumsum(1)
    total = np.pad(total, ((fine + 1, 0), (fine + 1, 0)))
    return np.pad(total, ((0, fine), (0, fine)), mode="edge"), n


def _patterned(mask, pattern, short):
    """How much of each sample of a mask is covered; `short` is the image's short side in samples."""
    if pattern == "solid":
        return mask
    if pattern == "outlined":
        return mask & ~_eroded(mask, max(1, round(LINE * short)))
    y, x = np.indices(mask.shape) + 0.5 - mask.shape[0] / 2
    step = STRIPE * short
    if pattern == "striped":
        full = np.floor(y / step + 0.5) % 2 == 0
    elif pattern == "dotted":
        full = np.hypot(*(v - 2 * step * np.round(v / (2 * step)) for v in (x, y))) < 0.72 * step
    else:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}; found {pattern!r}")
    return mask * np.where(full, 1.0, FAINT)


def _dilated(mask, reach):
    """The largest value within `reach` samples, in an octagon."""
    image = Image.fromarray((np.asarray(mask, np.float32) * 200).astype(np.uint8))
    out = np.asarray(image)
    wide = 2 * round(0.7 * reach) + 1
    for size in (
        wide,
        2 * (reach - wide // 2) + 1,
    ):  # a square and a diamond would be an octagon; two squares do
        if size > 1:
            out = np.asarray(Image.fromarray(out).filter(ImageFilter.MaxFilter(size)))
    return out / np.float32(200)


def _eroded(mask, reach):
    return 1 - (_dilated(1 - mask, reach) > 0.5).astype(mask.dtype)


def _head(shape, side, w, h):
    """Samples of a person's head, a circle at the top."""
    r = HEAD[shape] * h / 2
    y, x = np.indices((side, side)) + 0.5 - side / 2
    return (np.hypot(x, y + h / 2 - r) < r).astype(np.int64)


def _outlines(shape):
    """Polygons in a box from -0.5 to 0.5, y down: the outline, then the hole if there is one."""
    if shape == "circle":
        return [_round()]
    if shape == "ring":
        circle = _round()
        return [circle, [(0.5 * x, 0.5 * y) for x, y in circle]]
    if shape == "square":
        return [[(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]]
    if shape == "triangle":
        return [[(0, -0.5), (0.5, 0.5), (-0.5, 0.5)]]
    if shape == "diamond":
        return [[(0, -0.5), (0.5, 0), (0, 0.5), (-0.5, 0)]]
    if shape == "star":
        turns = [math.pi * i / 5 for i in range(10)]
        radii = [1, 0.45] * 5
        points = [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]
        return [_boxed(points)]
    if shape == "cross":
        a = 0.18  # half the arm's width
        corner = [(a, -0.5), (a, -a), (0.5, -a)]
        turns = ((1, 0), (0, 1), (-1, 0), (0, -1))
        return [[(x * c - y * s, x * s + y * c) for c, s in turns for x, y in corner]]
    if shape == "heart":
        turns = [2 * math.pi * i / 64 for i in range(64)]
        x = [16 * math.sin(t) ** 3 for t in turns]
        y = [5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t) for t in turns]
        return [_boxed(list(zip(x, y, strict=True)))]
    if shape == "zorn":  # a comb of three teeth
        teeth = [
            (x, y)
            for k in (-0.5, -0.1, 0.3)
            for x, y in ((k, 0.24), (k, -0.5), (k + 0.2, -0.5), (k + 0.2, 0.24))
        ]
        return [[(-0.5, 0.5), *teeth, (0.5, 0.5)]]
    if shape == "vark":  # an hourglass
        return [[(-0.5, -0.5), (0.5, -0.5), (0.08, 0), (0.5, 0.5), (-0.5, 0.5), (-0.08, 0)]]
    if shape in FIGURES:
        neck = HEAD[shape] - 0.53
        hip, arm, leg = neck + 0.45 * (0.5 - neck), 0.30 if shape == "adult" else 0.34, 0.13
        left = [
            (-0.5, hip),
            (-0.5, hip - 0.06),
            (-arm, neck + 0.02),
            (arm, neck + 0.02),
            (0.5, hip - 0.06),
            (0.5, hip),
        ]
        return [
            [*left, (arm - 0.04, neck + 0.14), (arm, 0.5), (0.05, 0.5), (0.03, hip + leg)]
            + [(-0.03, hip + leg), (-0.05, 0.5), (-arm, 0.5), (-arm + 0.04, neck + 0.14)]
        ]
    raise ValueError(f"shape: expected one of {', '.join(EXTENT)}; found {shape!r}")


def _round():
    turns = [2 * math.pi * i / 96 for i in range(96)]
    return [(0.5 * math.cos(t), 0.5 * math.sin(t)) for t in turns]


def _boxed(points):
    """Points moved and scaled to fill the box."""
    spans = [(min(axis), max(axis)) for axis in zip(*points, strict=True)]
    return [tuple((v - a) / (b - a) - 0.5 for v, (a, b) in zip(p, spans, strict=True)) for p in points]
