"""Reads a page back from the pixels of its picture alone, and judges by what was read.

What was read is drawn again: a picture that this drawing does not explain has a fault, as one has that cannot be read.
"""

import itertools
from dataclasses import dataclass, replace

import cv2
import numpy as np

from mmgen.world import lettering
from mmgen.world.judge import SIGHT, Verdict, parse
from mmgen.world.pages import (
    HIGHEST,
    KINDS,
    LEAST,
    PALETTE,
    Bar,
    Chart,
    Comic,
    Diagram,
    Page,
    Panel,
    Part,
    Poster,
    brightness,
    ink_on,
    inks,
    kind_of,
    same,
)
from mmgen.world.pages_render import (
    BAR,
    BASE,
    CAPTION_EM,
    EMBLEM,
    FRAME,
    LABEL_EM,
    LABEL_MIDDLE,
    REACH,
    TITLE_EM,
    TITLE_MIDDLE,
    VALUE_MIDDLE,
    WORD_EM,
    alignment_shows,
    chart_slots,
    diagram_rows,
    leader,
    line_start,
    link_ends,
    panel_boxes,
    panel_window,
    poster_box,
    poster_em,
    poster_emblem,
    poster_lines,
    render_page,
)
from mmgen.world.scene import BACKGROUNDS, COLORS, Group

LOOK = 128  # pixels of the short side; larger pictures are reduced to this
NEAR = 78.0  # a color is at most so far from the named one, and at most 0.75 of the way to the next
EVEN = 55.0  # pixels of one color are so near to it, but for a tenth of them
MISFIT, WORST = 0.62, 0.8  # of a line of words and of its worst glyph
ALONG = 0.62  # the share of an arrow that is seen
SLACK = 1.5 / 128  # a thing's place is right to so much of the short side ...
UNEXPLAINED, OTHER_COLOR = (
    50.0,
    75.0,
)  # ... and a pixel to that distance, as SIGHT weighs it and in all colors ...
STRAY = 0.02  # ... but for this share of all
BLOT = 45.0  # pixels of 128 x 128 that hang together: dirt is smaller, a word or a thing too much is not


@dataclass(frozen=True)
class Reading:
    """The page in a picture, None where none was found; what could not be read."""

    page: Page | None
    faults: tuple[str, ...]


def read_page(pixels: np.ndarray, kind: str) -> Reading:
    """Read a picture (uint8 [H, W, 3]) as a page of a kind, from its pixels alone; `faults` names what is no such page."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; found {kind!r}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels: expected uint8 [H, W, 3]; found {pixels.dtype} {list(pixels.shape)}")
    if min(pixels.shape[:2]) < LEAST[kind]:
        raise ValueError(
            f"pixels: expected a short side of at least {LEAST[kind]} for a {kind}; found {list(pixels.shape)}"
        )
    if min(pixels.shape[:2]) > LOOK:
        scale = LOOK / min(pixels.shape[:2])
        height, width = (round(side * scale) for side in pixels.shape[:2])
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    image = pixels.astype(np.float32)
    faults = []
    looks = {"sign": _read_sign, "poster": _read_poster, "chart": _read_chart}
    look = (looks | {"diagram": _read_diagram, "comic": _read_comic})[kind]
    page = look(image, faults)
    if page is not None and not faults:
        strange = _unexplained(image, render_page(page, image.shape[1], image.shape[0]).astype(np.float32))
        if strange.mean() > STRAY:
            faults.append(f"{strange.mean():.1%} of the picture is unlike the page that is read in it")
        count, _, boxes, middles = cv2.connectedComponentsWithStats(strange.astype(np.uint8))
        # Without what is not strange, and without lines that are not to the pixel where they were.
        thick = boxes[1:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].min(1) > 3
        areas = boxes[1:, cv2.CC_STAT_AREA] * thick
        if count > 1 and areas.max() > BLOT * (min(image.shape[:2]) / LOOK) ** 2:
            x, y = middles[1 + areas.argmax()]
            faults.append(f"something that is not of the page at ({x:.0f}, {y:.0f})")
    return Reading(page, tuple(faults))


def _unexplained(image, drawn):
    """bool [H, W]: far from every pixel of the drawing beside them, in brightness, or blurred in color."""
    fine = _far(*(cv2.GaussianBlur(pixels @ SIGHT.T, (3, 3), 0) for pixels in (image, drawn)), UNEXPLAINED)
    coarse = _far(*(cv2.blur(pixels, (5, 5)) for pixels in (image, drawn)), OTHER_COLOR)
    return fine | coarse


def _far(image, drawn, distance):
    best = np.full(image.shape[:2], np.inf, np.float32)
    padded = np.pad(drawn, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = best.shape
    for dy, dx in itertools.product(range(3), range(3)):
        off = image - padded[dy : dy + height, dx : dx + width]
        np.minimum(best, (off * off).sum(-1), out=best)
    return best > distance**2


def _name(color, names, faults, what):
    """The named color next to a color."""
    distance = {name: float(np.linalg.norm(color - np.asarray(PALETTE[name], np.float32))) for name in names}
    first, second = sorted(distance, key=distance.get)[:2]
    if distance[first] > NEAR or distance[first] > 0.75 * distance[second]:
        faults.append(f"{what}: no known color ({', '.join(f'{v:.0f}' for v in color)})")
    return first


def _plain(pixels, names, faults, what):
    """The named color that all of the pixels [n, 3] have, and the median of them."""
    color = np.median(pixels, 0)
    off = pixels - color
    if ((off * off).sum(-1) > EVEN**2).mean() > 0.1:
        faults.append(f"{what}: more than one color")
    return _name(color, names, faults, what), color


def _share(region, ground, color):
    """How far each pixel lies from the ground (0) to the named color (1): float32 [h, w]."""
    full = np.asarray(PALETTE[color], np.float32) - ground
    return np.clip((region - ground) @ (full / (full @ full)), -0.2, 1.2).astype(np.float32)


def _box(image, left, top, right, bottom):
    """The pixels of a box, and its left and top in whole pixels."""
    left, top = max(0, round(left)), max(0, round(top))
    return image[top : max(top, round(bottom)), left : max(left, round(right))], left, top


def _words(share, box, em, middle, faults, what, least=None):
    """The Line of words in a box of the ink's share, its place in the picture's pixels; None where there is none."""
    region, left, top = _box(share, *box)
    line = lettering.read(region, em, middle - top, least)
    if line is None:
        faults.append(f"{what}: no words")
        return None
    if line.misfit > MISFIT or line.worst > WORST:
        faults.append(f"{what}: looks like {line.text!r}, but is not ({line.misfit:.2f}, {line.worst:.2f})")
    return replace(line, left=line.left + left, right=line.right + left, middle=line.middle + top)


def _text(line):
    return "" if line is None else line.text


def _read_sign(image, faults):
    return _read_board(image, faults, ((1, False),))


def _read_poster(image, faults):
    return _read_board(image, faults, ((3, False), (2, False), (2, True), (1, True)))


def _read_board(image, faults, layouts):
    """A poster, of one of the layouts (lines, whether there is an emblem)."""
    height, width = image.shape[:2]
    short = min(width, height)
    (b0, b1, b2, b3), (left, top, right, bottom) = poster_box(width, height)
    edge = np.ones((height, width), bool)
    edge[round(b1) - 1 : round(b3) + 1, round(b0) - 1 : round(b2) + 1] = False
    wall, _ = _plain(image[edge], BACKGROUNDS, faults, "wall")
    edge[:] = False
    edge[round(b1 + 1) : round(b3 - 1), round(b0 + 1) : round(b2 - 1)] = True
    edge[round(top) : round(bottom), round(left) : round(right)] = False
    board, ground = _plain(image[edge], PALETTE, faults, "board")
    if faults:
        return None
    emblem = None
    if any(layout[1] for layout in layouts) and board in BACKGROUNDS:
        emblem = _thing(image, *poster_emblem(width, height), ground, board)
    layouts = [layout for layout in layouts if layout[1] == (emblem is not None)]
    if emblem:
        top += 2 * REACH * EMBLEM * short
    share = _brightest(image, (left - 1, top, right + 1, bottom), ground, board)
    if share is None:
        faults.append("no words")
        return None
    rows = (np.maximum(_box(share, left - 1, top, right + 1, bottom)[0], 0) ** 2).sum(1)
    count = next((n for n, _ in layouts if _in_slots(rows, n)), layouts[-1][0])
    middles, slot, most = poster_lines(count, emblem, width, height)
    boxes = [(left - 1, y - slot / 2, right + 1, y + slot / 2) for y in middles]
    # The size of all lines is found in the widest.
    inked = [_box(share, *box)[0] > 0.4 for box in boxes]
    first = max(range(count), key=lambda i: _span(inked[i].any(0)))
    high = _span(inked[first].any(1))
    if not high:  # what stands out is fainter than letters of any colour
        faults.append("no words")
        return None
    least, em = min(most, high / 1.02), min(1.03 * most, high / 0.66)
    found = [None] * count
    found[first] = _words(share, boxes[first], em, middles[first], faults, f"line {first + 1}", least)
    if found[first] is None:
        return None
    em = found[first].em
    for i in range(count):
        if i != first:
            found[i] = _words(share, boxes[i], em, middles[i], faults, f"line {i + 1}")
    lines = tuple(map(_text, found))
    if not all(lines):
        return None
    ink = _ink_of(image, boxes, board, found, faults)
    page = Poster(lines, ink, board, wall, "center", emblem)
    if abs(em / poster_em(lines, emblem, width, height) - 1) > 0.12:
        faults.append("words of another size than fits the board")
    return (
        page
        if len(layouts) == 1 and layouts[0] == (1, False)
        else replace(page, align=_alignment(found, left, right))
    )


def _alignment(found, left, right):
    """The alignment that the lines' places are nearest to."""

    def error(align):
        return sum(abs(line.left - line_start(align, left, right, line.right - line.left)) for line in found)

    return min(("center", "left", "right"), key=error)


def _in_slots(rows, count):
    """Whether the ink of the rows lies in so many lines."""
    slot = len(rows) / count
    at = np.arange(len(rows)) + 0.5
    total = rows.sum() + 1e-6
    between = np.abs(at / slot - np.rint(at / slot)) < 0.08
    between &= (at > slot / 2) & (at < len(rows) - slot / 2)
    filled = [rows[(at > i * slot) & (at < (i + 1) * slot)].sum() > 0.03 * total for i in range(count)]
    return rows[between].sum() < 0.02 * total and all(filled)


def _span(mask):
    """From the first to the last True."""
    at = np.flatnonzero(mask)
    return at[-1] + 1.0 - at[0] if len(at) else 0.0


def _brightest(image, box, ground, board):
    """The letters' share of every pixel, from brightness alone: float32 [H, W]; None where nothing stands out."""
    off = image @ SIGHT[0] - SIGHT[0] @ ground
    inside = _box(off, *box)[0]
    if inside.sum() < 0:
        off, inside = -off, -inside
    full = float(np.sort(inside.ravel())[-max(12, inside.size // 100) :].mean())
    if full < 45:
        return None
    full = min(
        (abs(brightness(c) - brightness(board)) for c in inks(board)), key=lambda v: abs(v - full / 0.95)
    )
    return np.clip(off / full, -0.2, 1.2)


def _ink_of(image, boxes, board, found, faults):
    """The named color of the lines: how each one's pixels, much blurred, follow from the share that letters cover,
    because blur moves color but keeps its sum."""
    names = set()
    for box, line in zip(boxes, found, strict=True):
        region, left, top = _box(image, *box)
        drawn = lettering.write(line.text, line.em, line.left - left, line.middle - top, region.shape[:2])
        seen, alpha = cv2.blur(region, (7, 7)), cv2.blur(drawn, (7, 7))
        off = alpha - alpha.mean()
        if not off.any():
            faults.append("letters out of place")
            continue
        slope = (off[..., None] * seen).sum((0, 1)) / (off * off).sum()
        names.add(_name(seen.mean((0, 1)) + (1 - alpha.mean()) * slope, inks(board), faults, "letters"))
    if len(names) > 1:
        faults.append(f"letters of more than one color ({', '.join(sorted(names))})")
    return min(names, default=inks(board)[0])


def _parse(pixels):
    """parse() of a picture so small that it is taken for one of the plain world."""
    height, width = pixels.shape[:2]
    scale = min(1.0, 36 / min(height, width))
    size = round(width * scale), round(height * scale)
    return parse(cv2.resize(np.rint(pixels).astype(np.uint8), size, interpolation=cv2.INTER_AREA))


def _thing(image, x, y, side, ground, name):
    """The shape and color of the one thing at a place, as it is in a square scene of that side; None if there is none."""
    reach = REACH * side
    window, left, top = _box(image, x - reach, y - reach, x + reach, y + reach)
    frame = np.concatenate([window[0], window[-1], window[:, 0], window[:, -1]]) - ground
    if ((frame * frame).sum(-1) > EVEN**2).mean() > 0.15:
        return None
    square = np.empty((round(side), round(side), 3), np.float32)
    square[:] = ground
    at = round(side / 2 - reach)
    square[at : at + window.shape[0], at : at + window.shape[1]] = window
    reading = _parse(square)
    if reading.faults or len(reading.scene.objects) != 1 or reading.scene.background != name:
        return None
    thing = reading.scene.objects[0]
    if thing.size != "small" or max(abs(thing.x - 0.5), abs(thing.y - 0.5)) > 0.08:
        return None
    return Group(thing.shape, thing.color)


def _runs(mask):
    """(first, end) of every run of True."""
    steps = np.diff(np.pad(mask.astype(np.int8), 1))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


def _read_chart(image, faults):
    height, width = image.shape[:2]
    short = min(width, height)
    edge = round(0.025 * short)
    border = np.concatenate(
        [
            image[:edge].reshape(-1, 3),
            image[-edge:].reshape(-1, 3),
            image[:, :edge].reshape(-1, 3),
            image[:, -edge:].reshape(-1, 3),
        ]
    )
    name, ground = _plain(border, BACKGROUNDS, faults, "ground")
    foot = height - BASE * short
    low = image[round(foot - 0.04 * short) : round(foot - 0.012 * short)].mean(0) - ground
    runs = _runs((low * low).sum(-1) > EVEN**2)
    runs = [run for run in runs if run[1] - run[0] > 0.04 * short]
    if not 2 <= len(runs) <= 5:
        faults.append(f"{len(runs)} bars")
    if faults:
        return None
    middles, slot, foot, unit = chart_slots(len(runs), width, height)
    share = _share(image, ground, ink_on(name))
    bars = []
    for i, (run, x) in enumerate(zip(runs, middles, strict=True), 1):
        half = BAR / 2 * slot
        if max(abs(run[0] - x + half), abs(run[1] - x - half)) > 2 * SLACK * short:
            faults.append(f"bar {i} is not at its place")
        core = image[: int(foot) - 1, round(x - 0.7 * half) : round(x + 0.7 * half)].mean(1)
        color = core[round(foot - 0.045 * short) : round(foot - 0.012 * short)].mean(0)
        bar = _name(color, COLORS, faults, f"bar {i}")
        full = (core - ground) @ ((color - ground) / max((color - ground) @ (color - ground), 1.0))
        bare = np.flatnonzero(full < 0.5)
        last = int(bare[-1]) if len(bare) else 0
        top = last + 1 - float(np.clip(full[max(last - 1, 0) : last + 1], 0, 1).sum())
        value = (foot - top) / unit
        box = (x - slot / 2, top - (VALUE_MIDDLE + 0.07) * short, x + slot / 2, top - 0.018 * short)
        line = _words(share, box, LABEL_EM * short, top - VALUE_MIDDLE * short, faults, f"value {i}")
        if not 1 <= round(value) <= HIGHEST or abs(value - round(value)) > 0.35:
            faults.append(f"bar {i} is {value:.2f} high")
        elif _text(line) != str(round(value)):
            faults.append(f"bar {i} is {value:.2f} high, and says {_text(line)!r}")
        box = (x - slot / 2, foot + 0.022 * short, x + slot / 2, height)
        middle = height - LABEL_MIDDLE * short
        line = _words(share, box, LABEL_EM * short, middle, faults, f"label {i}")
        bars.append(Bar(_text(line), round(value), bar))
    box = (0, (TITLE_MIDDLE - 0.07) * short, width, (TITLE_MIDDLE + 0.07) * short)
    title = None
    if (_box(share, *box)[0] > 0.5).sum() > 0.0005 * short * short:
        title = _words(share, box, TITLE_EM * short, TITLE_MIDDLE * short, faults, "title")
    return None if faults else Chart(tuple(bars), name, title and title.text)


def _read_diagram(image, faults):
    height, width = image.shape[:2]
    short = min(width, height)
    edge = round(0.025 * short)
    border = np.concatenate([image[:, :edge].reshape(-1, 3), image[:, -edge:].reshape(-1, 3)])
    name, ground = _plain(border, BACKGROUNDS, faults, "ground")
    if faults:
        return None
    ink = ink_on(name)
    count = _things(image, ground, ink)
    if not 2 <= count <= 4:
        faults.append(f"{count} things in the left column")
        return None
    x, word, rows, side = diagram_rows(count, width, height)
    things = [_thing(image, x, y, side, ground, name) for y in rows]
    if not all(things):
        faults.append(f"thing {things.index(None) + 1} is no known shape at its place")
        return None
    share = _share(image, ground, ink)
    labels = []
    for slot, y in enumerate(rows):
        box = (word - 0.015 * short, y - 0.08 * short, width, y + 0.08 * short)
        labels.append(_words(share, box, WORD_EM * short, y, faults, f"words {slot + 1}"))
    seen = np.array([
        [_along(share, *leader(row, slot, x, word, rows, side, short)) for row in range(count)] for slot in range(count)
    ])  # fmt: skip
    target = seen.argmax(1).tolist()
    if sorted(target) != list(range(count)) or seen.max(1).min() < ALONG:
        faults.append("not one arrow from each words to each thing")
        return None
    link = None
    for first in range(count - 1):
        (_, a), (_, b) = link_ends((first, first + 1), x, rows, side, short)
        if count < 4 and _along(share, (x, a), (x, b)) > ALONG:
            if link:
                faults.append("more than one arrow between things")
            column = _box(share, x - 0.05 * short, a, x + 0.05 * short, b)[0].sum(1)
            half = len(column) // 2
            down = column[-half:].sum() > column[:half].sum()
            link = (first, first + 1) if down else (first + 1, first)
    if faults:
        return None
    parts = tuple(
        Part(thing.shape, thing.color, labels[target.index(row)].text, target.index(row))
        for row, thing in enumerate(things)
    )
    return Diagram(parts, name, link)


def _things(image, ground, ink):
    """How many colored things stand one below the other in the left third; words and lines have no hue."""
    off = image[:, : image.shape[1] // 3] - ground
    full = np.asarray(PALETTE[ink], np.float32) - ground
    hue = off - (off @ (full / (full @ full)))[..., None] * full
    rows = ((hue * hue).sum(-1) > 40.0**2).sum(1) >= 0.02 * min(image.shape[:2])
    return sum(end - first > 0.06 * min(image.shape[:2]) for first, end in _runs(rows))


def _along(share, start, end):
    """The share of a line between two places that is inked; the ends are left out."""
    at = np.linspace(0.12, 0.88, 40)
    x, y = (np.rint(a + (b - a) * at - 0.5).astype(int) for a, b in zip(start, end, strict=True))
    best = np.max([share[np.clip(y + dy, 0, None), x + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)], 0)
    return float((best > 0.45).mean())


def _read_comic(image, faults):
    height, width = image.shape[:2]
    short = min(width, height)
    bright = image @ np.array((0.299, 0.587, 0.114), np.float32)
    grid = next(
        (g for g in ((2, 2), (3, 1), (2, 1), (1, 2)) if _gutters(bright, g, width, height) < 75), None
    )
    if grid is None:
        faults.append("no panels in a grid")
        return None
    share = np.clip(1 - bright / 255, 0, 1)
    panels = []
    for i, (left, top, right, bottom, strip) in enumerate(panel_boxes(grid, width, height), 1):
        pixels = image[panel_window(left, top, right, strip, short, inside=1)]
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        whole = np.empty((pixels.shape[0] + 2, pixels.shape[1] + 2, 3), np.float32)
        whole[:] = np.median(border, 0)
        whole[1:-1, 1:-1] = pixels  # without the frame's blur
        reading = _parse(whole)
        faults += [f"panel {i}: {fault}" for fault in reading.faults]
        frame = FRAME * short
        box = (left + 2 * frame, strip + 0.6 * frame, right - 2 * frame, bottom - 1.6 * frame)
        middle = (strip + bottom - frame) / 2
        line = _words(share, box, CAPTION_EM * short, middle, faults, f"caption {i}")
        panels.append(Panel(reading.scene, _text(line)))
    return None if faults else Comic(tuple(panels), grid)


def _gutters(bright, grid, width, height):
    """How far a picture is, in brightness, from the white between the panels of a grid and their black frames."""
    frame = FRAME * min(width, height)
    boxes = list(panel_boxes(grid, width, height))
    expected = np.full(bright.shape, 255, np.float32)
    for left, top, right, bottom, _ in boxes:
        expected[round(top) : round(bottom), round(left) : round(right)] = 0
    errors = [0.0]
    for axis, edges in (
        (1, sorted({(b[0], b[2]) for b in boxes})),
        (0, sorted({(b[1], b[3]) for b in boxes})),
    ):
        spans = [(round(a[1] - frame), round(b[0] + frame)) for a, b in itertools.pairwise(edges)]
        spans += [(0, round(edges[0][0] + frame)), (round(edges[-1][1] - frame), bright.shape[axis])]
        for first, end in spans:
            seen = np.take(bright, range(first, end), axis).mean(1 - axis)
            errors.append(
                float(np.abs(seen - np.take(expected, range(first, end), axis).mean(1 - axis)).mean())
            )
    return max(errors)


def judge_page(pixels: np.ndarray, page: Page) -> Verdict:
    """Whether a picture (uint8 [H, W, 3]) shows exactly the page, and why not; `scene` of the verdict is the page read."""
    reading = read_page(pixels, kind_of(page))
    if reading.faults:
        return Verdict(False, "; ".join(reading.faults), reading.page)
    found = reading.page
    if isinstance(page, Poster) and not alignment_shows(page, *pixels.shape[1::-1]):
        found = replace(found, align=page.align)
    if not same(page, found):
        return Verdict(False, f"found {reading.page}", reading.page)
    return Verdict(True, "", reading.page)
