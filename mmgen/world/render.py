"""Draw a scene: flat shapes, anti-aliased, at any size and at sub-pixel places."""

import math
from functools import lru_cache

import numpy as np

from mmgen.world.scene import BACKGROUNDS, COLORS, EXTENT, SIZES, Scene


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """The picture of a scene: uint8 [height, width, 3]."""
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        x, y = thing.x * width, thing.y * height
        alpha, top, left = coverage(thing.shape, thing.size, x, y, min(width, height))
        rows = slice(max(top, 0), top + alpha.shape[0])
        cols = slice(max(left, 0), left + alpha.shape[1])
        patch = canvas[rows, cols]
        alpha = alpha[max(-top, 0) :, max(-left, 0) :][: patch.shape[0], : patch.shape[1], None]
        patch += alpha * (np.asarray(COLORS[thing.color], np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


def coverage(shape: str, size: str, x: float, y: float, short: int) -> tuple[np.ndarray, int, int]:
    """The share of each pixel that a shape covers: float32 [h, w], and the patch's top and left.

    x, y: the centre in pixels (the corner of the first pixel is 0, 0); short: the image's short side.
    """
    fine = _fine(short)
    total, n = _summed(shape, size, short)
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


@lru_cache(maxsize=256)
def _summed(shape, size, short):
    """Summed-area table of a shape drawn finely, centred, with a pixel of slack; half its side in pixels."""
    fine = _fine(short)
    w, h = (e * SIZES[size] * short for e in EXTENT[shape])
    n = math.ceil(max(w, h) / 2) + 1
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
    total = mask.cumsum(0).cumsum(1)
    total = np.pad(total, ((fine + 1, 0), (fine + 1, 0)))
    return np.pad(total, ((0, fine), (0, fine)), mode="edge"), n


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
    raise ValueError(f"shape: expected one of {', '.join(EXTENT)}; found {shape!r}")


def _round():
    turns = [2 * math.pi * i / 96 for i in range(96)]
    return [(0.5 * math.cos(t), 0.5 * math.sin(t)) for t in turns]


def _boxed(points):
    """Points moved and scaled to fill the box."""
    spans = [(min(axis), max(axis)) for axis in zip(*points, strict=True)]
    return [tuple((v - a) / (b - a) - 0.5 for v, (a, b) in zip(p, spans, strict=True)) for p in points]
