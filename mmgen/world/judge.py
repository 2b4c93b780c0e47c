"""Read a picture back into a scene, from its pixels alone, and judge a claim by what was read.

Analysis by synthesis: the background is the named colour that fills most of the image; what
stands out from it falls into connected pieces; each piece is the shape, size and colour whose
own rendering at that sub-pixel place comes closest. A piece that nothing renders closely is a
fault, and a picture with a fault follows no prompt.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from mmgen.world.render import cell_of, contour, coverage, ground, paint, render, tint
from mmgen.world.scene import (
    ALL_SIZES,
    BACKGROUNDS,
    COLORS,
    FIGURES,
    GROUNDS,
    PATTERNS,
    SHAPES,
    SIZES,
    STYLES,
    Claim,
    Object,
    Scene,
    holds,
)

# Distances are Euclidean in RGB, 0 to 442. The closest two colours are 80 apart and the closest
# colour to a background 103; a good small tokenizer (30 dB) is off by 14 a pixel.
ENOUGH = 48  # pixels of the short side; larger images are reduced to this ...
STYLED = 64  # ... and where they have a style, whose contours and soft edges are fine, to this
LARGE = (
    128  # no picture is looked at larger than almost twice this, if a whole number of its pixels makes one
)
GROUND_NEAR = 48.0  # a pixel that close is background
GROUND_LEAST = 0.47  # the share of such pixels; four medium squares with ink contours leave 0.48
CONTRAST = 45.0  # what stands out less from the background is no object
EDGE_SHARE = 0.42  # a pixel belongs to a piece from this share of its brightest neighbour's contrast
COLOR_NEAR = 78.0  # a piece's colour is at most so far from the named one ...
COLOR_RATIO = 0.75  # ... and at most this share of the distance to the next
MISFIT = 0.32  # root of squared coverage error over squared coverage: above, it is not the shape
UNEVEN = 22.0  # a half of another colour pulls by a quarter of the distance between the two
MOTTLED = 0.305  # root of squared error over squared colour: above, there are two. Small pictures are too blurred for it
CORE = 55.0  # the inside's colour is so near to the named one and the whole's: after JPEG too, but 1 in 6,000
CLOSE = 30.0  # mean squared error of a picture below which no other style is tried
OTHER = 0.5  # a thing is in another style if that is so much closer, in squared error
EXACT = 0.08  # no other kind will be closer
CLEAN = 0.15  # below, the first look is enough
SPECK = 0.18  # pieces below this share of a small object's area are dirt, which is forgiven ...
DIRT = 0.4  # ... up to this share in all
# Shapes are read from brightness (row 0), and a little from hue, which JPEG blurs.
SIGHT = np.array(((0.299, 0.587, 0.114), (-0.034, -0.066, 0.1), (0.1, -0.084, -0.016)), np.float32)
NUDGES, FAR = (tuple((dx / 4, dy / 4) for dx in range(-n, n + 1) for dy in range(-n, n + 1)) for n in (1, 3))
ROUNDS = 4  # of nudging what is thin: its centre of mass tells its place less well
PLAIN = 40  # smaller pictures are read as the plain world: two sizes, no patterns, people, skies or styles
CONTOUR = 200.0  # a contour counts for no more contrast than that, lest what is inside should not stand out beside it
GROUND_MARGIN = 120.0  # a style whose ground fits worse by so much, in squared distance, is not looked at
TRIED = 10  # kinds that are painted in a style to see which is closest
REFINED = 3  # of these with their colours, whose place is looked for
HIDDEN = 0.4  # of two that overlap, the one behind shows at least so much of itself
PLAIN_KINDS = tuple((shape, size, "solid") for shape in SHAPES for size in SIZES)
KINDS = tuple(
    (shape, size, pattern)
    for shape in (*SHAPES, *FIGURES)
    for size in ALL_SIZES
    for pattern in (PATTERNS if shape in SHAPES else ("solid",))
)


@dataclass(frozen=True)
class Reading:
    """The scene in a picture; each object's misfit (0 is exact); what could not be read. pieces: how many there are where
    these are too many to be read one by one."""

    scene: Scene
    misfits: tuple[float, ...]
    faults: tuple[str, ...]
    pieces: int = 0

    @property
    def unread(self):
        """How many things could not be read."""
        return self.pieces or len(self.faults)


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
    pattern = lambda o: "" if o.pattern == "solid" else f"{o.pattern} "
    things = [f"a {o.size} {pattern(o)}{o.color} {o.shape} at ({o.x:.2f}, {o.y:.2f})" for o in scene.objects]
    style = "" if scene.style == "flat" else f", {scene.style}"
    return f"{', '.join(things) or 'nothing'} on {scene.background}{style}"


def parse(pixels: np.ndarray) -> Reading:
    """Read a picture (uint8 [H, W, 3]) into a scene; `faults` names what no scene explains."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels: expected uint8 [H, W, 3]; found {pixels.dtype} {list(pixels.shape)}")
    if min(pixels.shape[:2]) < 2:
        return Reading(Scene((), "unknown"), (), ("a line of pixels",))
    pixels = _handy(pixels)
    shape = pixels.shape[:2]
    grounds = _grounds(pixels, shape)
    if not grounds:
        return Reading(Scene((), "unknown"), (), ("no plain background of a known colour",))
    readings, whole = [], _reduced(pixels)
    # How far a scene as read, drawn again, is from the picture.
    away = lambda scene: float(np.square(whole - _reduced(render(scene, shape[1], shape[0]))).mean())
    for background, style, field in grounds:
        reading = _parse(_reduced(pixels, style), background, style, field)
        if style == "flat" and reading.faults and min(shape) >= PLAIN:
            layered = _parse(_reduced(pixels, style), background, style, field, layers=True)
            reading = min(reading, layered, key=lambda r: r.unread)
        if min(shape) < PLAIN:
            return reading
        if len(grounds) == 1:
            return _one_style(reading, pixels)
        if style == "flat" and not reading.faults and away(reading.scene) < CLOSE:
            reading = _one_style(reading, pixels)
            if not reading.faults:
                return reading
        readings.append(reading)
    # Which style it is, the whole picture says: that in which the scene as read comes closest.
    return _one_style(min(readings, key=lambda r: (r.unread, away(r.scene))), pixels)


def _handy(pixels):
    """The picture, or a smaller one: squares of whole pixels as their mean, so that cells of style pixel stay cells."""
    height, width = pixels.shape[:2]
    short = min(height, width)

    def fits(n):
        return not (height % n or width % n) and cell_of(short) == n * cell_of(short // n)

    n = next(n for n in range(max(1, short // LARGE), 0, -1) if n == 1 or fits(n))
    squares = pixels.reshape(height // n, n, width // n, n, 3)
    return pixels if n == 1 else np.rint(squares.mean((1, 3))).astype(np.uint8)


def _one_style(reading, pixels):
    """The reading, with a fault instead of each thing that is in another style than its ground: painted in that, it is
    closer."""
    scene, faults, right = reading.scene, [], []
    if reading.faults or any(thing.z for thing in scene.objects):
        return reading
    height, width = pixels.shape[:2]
    field, found = ground(scene.background, scene.style, width, height), {}
    for thing, misfit in zip(scene.objects, reading.misfits, strict=True):
        right.append((thing, misfit))
        if thing.pattern == "outlined":  # a thin line is never quite in place
            continue
        x, y, reach = thing.x * width, thing.y * height, 0.36 * min(height, width)
        rows, cols = (slice(max(int(at - reach), 0), int(at + reach) + 1) for at in (y, x))
        near = np.hypot(*np.ogrid[rows.start - y : rows.stop - y, cols.start - x : cols.stop - x])
        for style in STYLES:
            canvas = field.copy()
            paint(canvas, thing.shape, thing.size, thing.pattern, thing.color, style, x, y)
            error = np.square(canvas[rows, cols] - pixels[rows, cols]).sum(-1)
            found[style] = float(
                error[near[: error.shape[0], : error.shape[1]] < 0.26 * min(height, width)].mean()
            )
        closest = min(found, key=found.get)
        if found[closest] < OTHER * found[scene.style] and found[scene.style] > CLOSE:
            faults.append(f"in style {closest} on {scene.style} at ({x:.0f}, {y:.0f})")
            right.pop()
    objects, misfits = zip(*right, strict=True) if right else ((), ())
    return Reading(replace(scene, objects=objects), misfits, tuple(faults))


def _reduced(pixels, style="flat"):
    """float32 [h, w, 3] of a short side that is enough for a style; in style pixel a pixel is a cell."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    enough = {"flat": ENOUGH, "pixel": round(short / cell_of(short))}.get(style, STYLED)
    if short <= enough:
        return pixels.astype(np.float32)
    scale = enough / short
    size = round(width * scale), round(height * scale)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX)).astype(np.float32)


@lru_cache(maxsize=256)
def _field(background, style, height, width):
    return _reduced((ground(background, style, width, height) + 0.5).astype(np.uint8), style)


def _grounds(pixels, shape):
    """What may be behind the objects: (background, style, ground float32 [h, w, 3]) for each style that may be."""
    plain, found = min(shape) < PLAIN, []
    for style in STYLES[:1] if plain else STYLES:
        image, best = _reduced(pixels, style), None
        least = GROUND_LEAST * image.shape[0] * image.shape[1]
        for background in BACKGROUNDS if plain else GROUNDS:
            field = _field(background, style, *shape)
            offset = image - field
            distance = (offset * offset).sum(-1)
            near = distance < GROUND_NEAR**2
            if np.count_nonzero(near) >= least:
                far = float(np.minimum(distance, GROUND_NEAR**2).mean())
                if best is None or far < best[0]:
                    best = far, background, style, field + offset[near].mean(0)
        if best:
            found.append(best)
    closest = min((far for far, *_ in found), default=0.0)
    return [rest for far, *rest in found if far <= closest + GROUND_MARGIN]


def _parse(image, background, style, field, layers=False):
    """The Reading of a reduced picture in a style on a ground; layers: a piece may be two things that overlap."""
    height, width = image.shape[:2]
    short = min(height, width)
    offset = image - field
    seen = offset @ SIGHT.T
    if style == "ink" or layers:
        mask = _stands_out(offset, offset, CONTOUR)
    else:
        mask = _stands_out(offset, seen, np.inf)
    labels, boxes = _pieces(mask)
    if len(boxes) > 40:  # no use to look at each
        return Reading(Scene((), background, style), (), (f"{len(boxes)} pieces",), len(boxes))
    small = min(area for area, _, _ in _masses(short, True).values())
    objects, misfits, faults, dirt = [], [], [], 0
    for label, (*box, area) in enumerate(boxes, 1):
        if area < SPECK * small:
            dirt += area
            continue
        if style == "flat" and background in BACKGROUNDS:
            thing, misfit, fault = _read(offset, seen, labels, label, box, field, short)
        else:
            thing, misfit, fault = _fit(image, field, labels, label, box, style)
        pair = _read_pair(image, field, labels == label, short) if fault and layers else None
        if pair:
            objects += pair[1]
            misfits += [pair[0]] * 2
        elif fault:
            faults.append(fault)
        else:
            objects.append(thing)
            misfits.append(misfit)
    if dirt > DIRT * small:
        faults.append(f"{dirt} stray pixels")
    objects = tuple(replace(thing, x=thing.x / width, y=thing.y / height) for thing in objects)
    return Reading(Scene(objects, background, style), tuple(misfits), tuple(faults))


def _stands_out(offset, seen, most):
    """bool [H, W]: the pixels of objects; judged beside their neighbours, so that edges stay thin. most: contrast above
    which a neighbour does not count for more."""
    contrast = np.minimum(np.sqrt((seen * seen).sum(-1)), most)
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


def _read(offset, seen, labels, label, box, field, short):
    """One piece of a flat picture as (Object in pixels, misfit, fault)."""
    top, bottom, left, right = box
    where = f"at ({(left + right) / 2:.0f}, {(top + bottom) / 2:.0f})"
    top, left = max(top - 2, 0), max(left - 2, 0)
    window = slice(top, bottom + 2), slice(left, right + 2)
    inside = labels[window] == label
    ours = (inside | (labels[window] == 0))[..., None]
    misfit, kind, x, y, mass = _match(_share(seen[window] * ours, inside), top, left, short)
    if misfit > CLEAN:  # noise drowns brightness where the brightness is nearly the background's
        other = _match(_share(offset[window] * ours, inside), top, left, short)
        misfit, kind, x, y, mass = min((misfit, kind, x, y, mass), other)
    if misfit > MISFIT:
        return None, misfit, f"something unlike any shape {where}"
    there = offset[window] * ours
    color = there.sum((0, 1)) / mass  # blur moves colour but keeps its sum
    alpha = _window(kind, x - left, y - top, short, inside.shape)
    ground = (field[window] * alpha[..., None]).sum((0, 1)) / max(alpha.sum(), 1e-6)
    name, fault = _name(ground + color, where)
    if fault:
        return None, misfit, fault
    core, depth = _core(there, alpha, short)
    # The sum hides a rim of another colour. In thin shapes blur alone moves the inside, so more is allowed.
    if max(np.linalg.norm(core - c) for c in (color, COLORS[name] - ground)) > CORE / depth:
        fault = f"the inside is of another colour {where}"
    error = there - alpha[..., None] * color
    if short >= PLAIN and np.vdot(error, error) > MOTTLED**2 * np.vdot(color, color) * np.vdot(alpha, alpha):
        fault = f"a mottled color {where}"
    # The sums of the error's four sides: a side of another colour shows, a blurred edge does not.
    rows, cols = error.sum(1), error.sum(0)
    i, j = round(y - top), round(x - left)
    sides = np.array((rows[:i].sum(0), rows[i:].sum(0), cols[:j].sum(0), cols[j:].sum(0)))
    if (sides * sides).sum(-1).max() > (UNEVEN * mass) ** 2:
        fault = f"more than one colour {where}"
    shape, size, pattern = kind
    return Object(shape, name, size, x, y, pattern), misfit, fault


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


def _name(color, where, style="flat"):
    """The named colour, or a fault."""
    distance = np.sqrt(((_palette(style) - color) ** 2).sum(-1))
    first, second = np.partition(distance, 1)[:2]
    if first > COLOR_NEAR or first > COLOR_RATIO * second:
        return None, f"no known colour ({', '.join(f'{v:.0f}' for v in color)}) {where}"
    return tuple(COLORS)[int(distance.argmin())], None


@lru_cache(maxsize=8)
def _palette(style):
    return np.stack([tint(color, style) for color in COLORS])


def _match(share, top, left, short):
    """The kind whose coverage is closest to the observed one: (misfit, kind, x, y, area)."""
    mass = share.sum()
    rows, cols = np.arange(share.shape[0]) + 0.5, np.arange(share.shape[1]) + 0.5
    y, x = (share.sum(1) @ rows) / mass, (share.sum(0) @ cols) / mass
    found = []
    for kind, (area, dx, dy) in _masses(short, short < PLAIN).items():
        if 0.6 < mass / area < 1.6:
            alpha = _window(kind, x - dx, y - dy, short, share.shape)
            found.append((_misfit(share, alpha, area), kind, x - dx, y - dy, area))
    found.sort()
    best = (9.0, ("", "", ""), 0.0, 0.0, 1.0)
    for misfit, kind, x, y, area in found[:3]:
        if misfit > 1.6 * found[0][0]:
            break
        miss = lambda px, py: _misfit(share, _window(kind, px, py, short, share.shape), area)
        misfit, px, py = _nearest(miss, x, y, 1 if kind[2] == "solid" else ROUNDS)
        best = min(best, (misfit, kind, left + px, top + py, area))
    return best


def _nearest(miss, x, y, rounds, nudges=NUDGES):
    """The place around (x, y) at which `miss` is least: (miss, x, y)."""
    best = (9.0, x, y)
    for _ in range(rounds):
        last = best
        best = min(
            best, *((miss(last[1] + dx, last[2] + dy), last[1] + dx, last[2] + dy) for dx, dy in nudges)
        )
        nudges = NUDGES
        if best == last:
            break
    return best


def _fit(image, field, labels, label, box, style):
    """One piece of a picture in a style as (Object in pixels, misfit, fault): which kind, painted in that style, comes closest."""
    short = min(labels.shape)
    top, bottom, left, right = box
    where = f"at ({(left + right) / 2:.0f}, {(top + bottom) / 2:.0f})"
    window = slice(max(top - 3, 0), bottom + 3), slice(max(left - 3, 0), right + 3)
    origin = window[0].start, window[1].start
    mask = labels[window] == label
    ours = _widened(mask) & (mask | (labels[window] == 0))
    offset, extent = (image - field)[window], ours.shape
    there = observed = offset * ours[..., None]
    # Pixels that stand out, weighed alike: brightness would favour the contour, or the side where the light falls.
    share = mask.astype(np.float32)
    mass = share.sum()
    y, x = (np.indices(extent) + 0.5).reshape(2, -1) @ share.ravel() / mass
    found = []
    for kind, (area, dx, dy) in _masses(short, False).items():
        outer = area if kind[2] in ("solid", "outlined") else _masses(short, False)[(*kind[:2], "solid")][0]
        if not 0.4 < outer / mass < 1.7:
            continue
        alpha = _window(kind, x - dx, y - dy, short, extent)[..., None]
        if style == "ink":
            rim = _window(kind, x - dx, y - dy, short, extent, grown=True)[..., None]
            there = (offset - rim * (contour(field[window].mean((0, 1))) - field[window])) * ours[..., None]
        weight = max(float((alpha * alpha).sum()), 1e-6)
        rgb = (alpha * there).sum((0, 1)) / weight
        error = np.square(there - alpha * rgb).sum() + np.square(rgb).sum() * max(0.0, area - alpha.sum())
        found.append((float(error), kind, rgb, x - dx, y - dy))
    found.sort(key=lambda each: each[0])
    palette, tries = _palette(style), []
    for _, kind, rgb, x, y in found[:TRIED]:
        alpha = _window(kind, x, y, short, extent)[..., None]
        behind = (alpha * field[window]).sum((0, 1)) / max(alpha.sum(), 1e-6)
        for index in np.argsort(((palette - behind - rgb) ** 2).sum(-1))[:2]:
            miss = _painter(kind, tuple(COLORS)[index], style, field, observed, ours, origin)
            tries.append((miss(x, y), kind, tuple(COLORS)[index], x, y, miss))
    tries.sort(key=lambda each: each[0])
    best = 9.0, None
    for misfit, (shape, size, pattern), color, x, y, miss in tries[:REFINED]:
        if best[0] < EXACT or misfit > 3 * best[0]:
            break
        misfit, px, py = _nearest(miss, x, y, ROUNDS, FAR if style == "pixel" else NUDGES)
        if misfit < best[0]:
            best = misfit, Object(shape, color, size, origin[1] + px, origin[0] + py, pattern)
    misfit, thing = best
    fault = "" if misfit <= MISFIT else f"something unlike any shape {where}"
    return thing, misfit, fault


def _painter(kind, color, style, field, observed, ours, origin):
    """The function of a place, in the window at `origin`, that says how far from what is observed a thing painted there is."""
    rows, cols = (slice(begin, begin + n) for begin, n in zip(origin, ours.shape))
    shape, size, pattern = kind

    def miss(x, y):
        canvas = field.copy()
        paint(canvas, shape, size, pattern, color, style, origin[1] + x, origin[0] + y, cell=1)
        canvas -= field
        made = canvas[rows, cols] * ours[..., None]
        energy = max(float(np.vdot(canvas, canvas)), 1.0)
        error = float(np.square(observed - made).sum()) + energy - float(np.vdot(made, made))
        return (max(error, 0.0) / energy) ** 0.5

    return miss


def _widened(mask):
    """A mask with all that is within three pixels of it."""
    padded = np.pad(mask, 3)
    return sliding_window_view(padded, (7, 7)).any((2, 3))


def _read_pair(image, field, mask, short):
    """Two things that overlap, as (misfit, [behind, in front] in pixels); or None."""
    height, width = mask.shape
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = slice(max(rows[0] - 2, 0), rows[-1] + 3), slice(max(cols[0] - 2, 0), cols[-1] + 3)
    origin = window[0].start, window[1].start
    ours, inside = _widened(mask)[window], mask[window]
    there, behind = image[window], field[window]
    names, palette = tuple(COLORS), _palette("flat")
    distance = ((there[:, :, None] - palette) ** 2).sum(-1)  # [h, w, colors]
    close = inside & (distance.min(-1) < COLOR_NEAR**2)
    counts = np.bincount(distance.argmin(-1)[close], minlength=len(names))
    first, second = np.argsort(-counts)[:2]
    if counts[second] < HIDDEN * 0.5 * min(area for area, _, _ in _masses(short, True).values()):
        return None
    best = (MISFIT, None)
    for a, b in ((first, second), (second, first)):
        share, other_share = _unmixed(there - behind, palette[a] - behind, palette[b] - behind, ours)
        misfit, kind, x, y, area = _match(share, 0, 0, short)
        if misfit > MISFIT or kind[2] != "solid":
            continue
        alpha = _window(kind, x, y, short, share.shape)
        for other, bx, by in _behind(other_share, 1 - alpha, short):
            under = _window(other, bx, by, short, share.shape)[..., None]
            made = behind + under * (palette[b] - behind)
            made += alpha[..., None] * (palette[a] - made)
            error = np.square((there - made) * ours[..., None]).sum()
            energy = np.square((made - behind)).sum()
            seen = (under[..., 0] * (1 - alpha)).sum() / under.sum()
            total = float(np.sqrt(error / energy))
            if seen >= HIDDEN and total < best[0]:
                pair = [
                    Object(k[0], names[c], k[1], origin[1] + px, origin[0] + py, z=z)
                    for k, c, px, py, z in ((other, b, bx, by, 0), (kind, a, x, y, 1))
                ]
                best = total, pair
    return best if best[1] else None


def _unmixed(offset, first, second, ours):
    """How much of two colours, as offsets [h, w, 3] from the ground, is in each pixel's: two of float32 [h, w], 0 to 1."""
    dot = lambda a, b: (a * b).sum(-1)
    aa, ab, bb = dot(first, first), dot(first, second), dot(second, second)
    oa, ob = dot(offset, first), dot(offset, second)
    scale = np.maximum(aa * bb - ab * ab, 1.0)
    shares = (bb * oa - ab * ob) / scale, (aa * ob - ab * oa) / scale
    return [np.clip(share, 0, 1) * ours for share in shares]


@lru_cache(maxsize=8)
def _stamps(short):
    """The coverage of each solid kind at a whole pixel: (kind, float32 [h, w], top, left)."""
    return [(kind, *coverage(*kind[:2], 0.0, 0.0, short)) for kind in KINDS if kind[2] == "solid"]


def _behind(share, weight, short, keep=4):
    """The solid kinds, and their places, that come closest to what is seen of something: [(kind, x, y)].

    share: what is seen of it in each pixel, weight: how much something else lets through, float32 [h, w].
    """
    # All places at once: correlations with each kind's coverage, as products of spectra.
    side = max(share.shape) + 2 * max(stamp.shape[0] for _, stamp, *_ in _stamps(short))
    spectrum = lambda image: np.fft.rfft2(image, (side, side))
    seen, open_ = spectrum(weight * share), spectrum(1 - weight**2)
    found = []
    for kind, stamp, top, left in _stamps(short):
        conj = np.conj(spectrum(stamp)), np.conj(spectrum(stamp * stamp))
        shared = np.fft.irfft2(seen * conj[0], (side, side))
        covered = (stamp * stamp).sum() - np.fft.irfft2(open_ * conj[1], (side, side))
        error = covered - 2 * shared
        i, j = np.unravel_index(error.argmin(), error.shape)
        i, j = ((n + side // 2) % side - side // 2 for n in (i, j))  # before the window's start: negative
        found.append((float(error.min()), kind, j - left, i - top))
    found.sort(key=lambda each: each[0])
    places = []
    for _, kind, x, y in found[:keep]:
        tries = [(x + dx, y + dy) for dx in np.arange(-0.75, 1, 0.25) for dy in np.arange(-0.75, 1, 0.25)]
        miss = lambda at: np.square(share - weight * _window(kind, *at, short, share.shape)).sum()
        places.append((kind, *map(float, min(tries, key=miss))))
    return places


def _misfit(share, alpha, area):
    """Root of the squared error over the shape's area; what falls outside the window counts in full."""
    error = share - alpha
    return float(np.sqrt((np.vdot(error, error) + max(0.0, area - alpha.sum())) / area))


def _window(kind, x, y, short, extent, grown=False):
    """A kind's coverage, or that of its contour, inside a window of that extent: float32 [h, w]."""
    shape, size, pattern = kind
    alpha, top, left = coverage(shape, size, x, y, short, pattern, grown)
    out = np.zeros(extent, np.float32)
    rows = slice(max(top, 0), max(0, top + alpha.shape[0]))
    cols = slice(max(left, 0), max(0, left + alpha.shape[1]))
    part = out[rows, cols]
    part[:] = alpha[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]]
    return out


@lru_cache(maxsize=64)
def _masses(short, plain):
    """Each kind's area in pixels, and where its centre of mass lies from its centre (x, y)."""
    masses = {}
    for shape, size, pattern in PLAIN_KINDS if plain else KINDS:
        alpha, top, left = coverage(shape, size, 0.0, 0.0, short, pattern)
        rows, cols = np.arange(alpha.shape[0]) + top + 0.5, np.arange(alpha.shape[1]) + left + 0.5
        area = float(alpha.sum())
        masses[shape, size, pattern] = (
            area,
            float(alpha.sum(0) @ cols) / area,
            float(alpha.sum(1) @ rows) / area,
        )
    return masses
