"""Read a picture back into a scene, from its pixels alone, and judge a claim by what was read.

Analysis by synthesis: the background is the named colour that fills most of the image; what
stands out from it falls into connected pieces; each piece is the shape, size and colour whose
own rendering at that sub-pixel place comes closest. A piece that nothing renders closely is a
fault, and a picture with a fault follows no prompt.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from mmgen.world.render import coverage
from mmgen.world.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Claim, Object, Scene, holds

# Distances are Euclidean in RGB, 0 to 442. The closest two colours are 80 apart and the closest
# colour to a background 103; a good small tokenizer (30 dB) is off by 14 a pixel.
ENOUGH = 48  # pixels of the short side; larger images are reduced to this
GROUND_NEAR = 48.0  # a pixel that close is background
GROUND_LEAST = 0.55  # the share of such pixels; four objects leave more than 0.7
CONTRAST = 45.0  # what stands out less from the background is no object
EDGE_SHARE = 0.42  # a pixel belongs to a piece from this share of its brightest neighbour's contrast
COLOR_NEAR = 78.0  # a piece's colour is at most so far from the named one ...
COLOR_RATIO = 0.75  # ... and at most this share of the distance to the next
MISFIT = 0.32  # root of squared coverage error over squared coverage: above, it is not the shape
UNEVEN = 22.0  # a half of another colour pulls by a quarter of the distance between the two
CORE = 55.0  # the inside's colour is so near to the named one and the whole's: after JPEG too, but 1 in 6,000
CLEAN = 0.15  # below, the first look is enough
SPECK = 0.18  # pieces below this share of a small object's area are dirt, which is forgiven ...
DIRT = 0.4  # ... up to this share in all
# Shapes are read from brightness (row 0), and a little from hue, which JPEG blurs.
SIGHT = np.array(((0.299, 0.587, 0.114), (-0.034, -0.066, 0.1), (0.1, -0.084, -0.016)), np.float32)
NUDGES = tuple((dx / 4, dy / 4) for dx in (-1, 0, 1) for dy in (-1, 0, 1))
KINDS = tuple((shape, size) for shape in SHAPES for size in SIZES)


@dataclass(frozen=True)
class Reading:
    """The scene in a picture; each object's misfit (0 is exact); what could not be read."""

    scene: Scene
    misfits: tuple[float, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    ok: bool
    why: str
    scene: Scene


def judge(pixels: np.ndarray, claim: Claim) -> Verdict:
    """Whether a picture (uint8 [H, W, 3]) shows exactly what is claimed, and why not."""
    reading = parse(pixels)
    if reading.faults:
        return Verdict(False, "; ".join(reading.faults), reading.scene)
    if not holds(claim, reading.scene):
        return Verdict(False, f"found {_told(reading.scene)}", reading.scene)
    return Verdict(True, "", reading.scene)


def _told(scene):
    things = [f"a {o.size} {o.color} {o.shape} at ({o.x:.2f}, {o.y:.2f})" for o in scene.objects]
    return f"{', '.join(things) or 'nothing'} on {scene.background}"


def parse(pixels: np.ndarray) -> Reading:
    """Read a picture (uint8 [H, W, 3]) into a scene; `faults` names what no scene explains."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels: expected uint8 [H, W, 3]; found {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[:2]
    if min(height, width) > ENOUGH:
        scale = ENOUGH / min(height, width)
        height, width = round(height * scale), round(width * scale)
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
    image = pixels.astype(np.float32)
    short = min(height, width)
    background, ground = _ground(image)
    if background is None:
        return Reading(Scene((), "unknown"), (), ("no plain background of a known colour",))
    offset = image - ground
    seen = offset @ SIGHT.T
    labels, boxes = _pieces(_stands_out(offset, seen))
    if len(boxes) > 40:  # no use to look at each
        return Reading(Scene((), background), (), (f"{len(boxes)} pieces",))
    small = min(area for area, _, _ in _masses(short).values())
    objects, misfits, faults, dirt = [], [], [], 0
    for label, (*box, area) in enumerate(boxes, 1):
        if area < SPECK * small:
            dirt += area
            continue
        thing, misfit, fault = _read(offset, seen, labels, label, box, ground, short)
        if fault:
            faults.append(fault)
        else:
            shape, color, size, x, y = thing
            objects.append(Object(shape, color, size, x / width, y / height))
            misfits.append(misfit)
    if dirt > DIRT * small:
        faults.append(f"{dirt} stray pixels")
    return Reading(Scene(tuple(objects), background), tuple(misfits), tuple(faults))


def _ground(image):
    """The named background that fills the image and its colour there, or (None, None)."""
    best = None, None
    most = GROUND_LEAST * image.shape[0] * image.shape[1]
    for name, color in BACKGROUNDS.items():
        offset = image - np.asarray(color, np.float32)
        near = (offset * offset).sum(-1) < GROUND_NEAR**2
        count = np.count_nonzero(near)
        if count >= most:
            most, best = count, (name, image[near].mean(0))
    return best


def _stands_out(offset, seen):
    """bool [H, W]: the pixels of objects; judged beside their neighbours, so that edges stay thin."""
    contrast = np.sqrt((seen * seen).sum(-1))
    padded = np.pad(contrast, 1)
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    around = np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return ((offset * offset).sum(-1) > CONTRAST**2) & (contrast > EDGE_SHARE * around)


def _pieces(mask):
    """4-connected pieces: labels int32 [H, W] (0 outside) and (top, bottom, left, right, area) of each."""
    height, width = mask.shape
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8).ravel())
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    row, first = (a.tolist() for a in np.divmod(starts, width + 2))
    last = (ends % (width + 2)).tolist()
    parent = list(range(len(row)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0  # the first run of the previous row that may still touch
    for i in range(len(row)):
        while row[above] < row[i] - 1 or (row[above] == row[i] - 1 and last[above] <= first[i]):
            above += 1
        j = above
        while j < i and row[j] == row[i] - 1 and first[j] < last[i]:
            parent[root(i)] = root(j)
            j += 1
    labels = np.zeros((height, width), np.int32)
    boxes, names = [], {}
    for i in range(len(row)):
        name = names.setdefault(root(i), len(names) + 1)
        labels[row[i], first[i] : last[i]] = name
        if name > len(boxes):
            boxes.append([row[i], row[i] + 1, first[i], last[i], 0])
        box = boxes[name - 1]
        box[1] = row[i] + 1
        box[2], box[3] = min(box[2], first[i]), max(box[3], last[i])
        box[4] += last[i] - first[i]
    return labels, boxes


def _read(offset, seen, labels, label, box, ground, short):
    """One piece as ((shape, color, size, x, y), misfit, fault)."""
    top, bottom, left, right = box
    where = f"at ({(left + right) / 2:.0f}, {(top + bottom) / 2:.0f})"
    top, left = max(top - 2, 0), max(left - 2, 0)
    window = slice(top, bottom + 2), slice(left, right + 2)
    inside = labels[window] == label
    ours = (inside | (labels[window] == 0))[..., None]
    misfit, shape, size, x, y, mass = _match(_share(seen[window] * ours, inside), top, left, short)
    if misfit > CLEAN:  # noise drowns brightness where the brightness is nearly the background's
        other = _match(_share(offset[window] * ours, inside), top, left, short)
        misfit, shape, size, x, y, mass = min((misfit, shape, size, x, y, mass), other)
    if misfit > MISFIT:
        return None, misfit, f"something unlike any shape {where}"
    there = offset[window] * ours
    color = there.sum((0, 1)) / mass  # blur moves colour but keeps its sum
    name, fault = _name(ground + color, where)
    if fault:
        return None, misfit, fault
    alpha = _window(shape, size, x - left, y - top, short, inside.shape)
    core, depth = _core(there, alpha, short)
    # The sum hides a rim of another colour. In thin shapes blur alone moves the inside, so more is allowed.
    if max(np.linalg.norm(core - c) for c in (color, COLORS[name] - ground)) > CORE / depth:
        fault = f"the inside is of another colour {where}"
    error = there - alpha[..., None] * color
    # The sums of the error's four sides: a side of another colour shows, a blurred edge does not.
    rows, cols = error.sum(1), error.sum(0)
    i, j = round(y - top), round(x - left)
    sides = np.array((rows[:i].sum(0), rows[i:].sum(0), cols[:j].sum(0), cols[j:].sum(0)))
    if (sides * sides).sum(-1).max() > (UNEVEN * mass) ** 2:
        fault = f"more than one colour {where}"
    return (shape, name, size, x, y), misfit, fault


def _share(sight, inside):
    """How far each pixel lies from the background (0) to the piece's own colour (1): [h, w]."""
    strength = (sight * sight).sum(-1) * inside
    core = sight[strength > 0.7 * strength.max()].mean(0)
    share = np.clip(sight @ (core / max(core @ core, 1.0)), 0, 1)
    share[share < 0.1] = 0
    return share


def _core(there, alpha, short):
    """The colour farthest inside, and how deep that is: the share of the surroundings that is covered."""
    reach = round(short / 16)
    around = sliding_window_view(np.pad(alpha, reach), (2 * reach + 1, 2 * reach + 1)).mean((2, 3))
    deep = alpha * around
    inmost = deep >= 0.9 * deep.max()
    return there[inmost].sum(0) / alpha[inmost].sum(), deep.max()


def _name(color, where):
    """The named colour, or a fault."""
    table = np.asarray(tuple(COLORS.values()), np.float32)
    distance = np.sqrt(((table - color) ** 2).sum(-1))
    first, second = np.partition(distance, 1)[:2]
    if first > COLOR_NEAR or first > COLOR_RATIO * second:
        return None, f"no known colour ({', '.join(f'{v:.0f}' for v in color)}) {where}"
    return tuple(COLORS)[int(distance.argmin())], None


def _match(share, top, left, short):
    """The kind whose coverage is closest to the observed one: (misfit, shape, size, x, y, area)."""
    mass = share.sum()
    rows, cols = np.arange(share.shape[0]) + 0.5, np.arange(share.shape[1]) + 0.5
    y, x = (share.sum(1) @ rows) / mass, (share.sum(0) @ cols) / mass
    found = []
    for (shape, size), (area, dx, dy) in _masses(short).items():
        if 0.6 < mass / area < 1.6:
            alpha = _window(shape, size, x - dx, y - dy, short, share.shape)
            found.append((_misfit(share, alpha, area), shape, size, x - dx, y - dy, area))
    found.sort()
    best = (9.0, "", "", 0.0, 0.0, 1.0)
    for misfit, shape, size, x, y, area in found[:3]:
        if misfit > 1.6 * found[0][0]:
            break
        for dx, dy in NUDGES:
            alpha = _window(shape, size, x + dx, y + dy, short, share.shape)
            best = min(best, (_misfit(share, alpha, area), shape, size, left + x + dx, top + y + dy, area))
    return best


def _misfit(share, alpha, area):
    """Root of the squared error over the shape's area; what falls outside the window counts in full."""
    error = share - alpha
    return float(np.sqrt((np.vdot(error, error) + max(0.0, area - alpha.sum())) / area))


def _window(shape, size, x, y, short, extent):
    """A kind's coverage inside a window of that extent: float32 [h, w]."""
    alpha, top, left = coverage(shape, size, x, y, short)
    out = np.zeros(extent, np.float32)
    rows = slice(max(top, 0), max(0, top + alpha.shape[0]))
    cols = slice(max(left, 0), max(0, left + alpha.shape[1]))
    part = out[rows, cols]
    part[:] = alpha[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]]
    return out


@lru_cache(maxsize=64)
def _masses(short):
    """Each kind's area in pixels, and where its centre of mass lies from its centre (x, y)."""
    masses = {}
    for shape, size in KINDS:
        alpha, top, left = coverage(shape, size, 0.0, 0.0, short)
        rows, cols = np.arange(alpha.shape[0]) + top + 0.5, np.arange(alpha.shape[1]) + left + 0.5
        area = float(alpha.sum())
        masses[shape, size] = area, float(alpha.sum(0) @ cols) / area, float(alpha.sum(1) @ rows) / area
    return masses
