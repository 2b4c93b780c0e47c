"""How pages look: where what is on them lies, and drawing it.

A layout follows from what a page says and from the picture's size alone, so that `pages_judge` looks where things must be.
Lengths are in units of the short side unless they say pixels.
"""

import itertools

import numpy as np

from mmgen.world import lettering
from mmgen.world.pages import (
    HIGHEST,
    LEAST,
    PALETTE,
    Chart,
    Comic,
    Diagram,
    Page,
    Poster,
    ink_on,
    kind_of,
)
from mmgen.world.render import coverage, render

# ---- layouts, in pixels -----------------------------------------------------------------------------

_WALL, _PAD = 0.05, 0.05  # around the board of a poster, and within it
EMBLEM = 0.68  # the side of the square scene in which a shape is small
REACH = 0.22  # half of the window of a small shape, in sides of its scene


def poster_box(width, height):
    """Left, top, right and bottom of the board, and of what is inside it."""
    wall, pad = _WALL * min(width, height), (_WALL + _PAD) * min(width, height)
    return (wall, wall, width - wall, height - wall), (pad, pad, width - pad, height - pad)


def poster_lines(count, emblem, width, height):
    """The middles of the lines, the height of one, and the greatest em."""
    _, (_, top, _, bottom) = poster_box(width, height)
    short = min(width, height)
    if emblem:
        top += 2 * REACH * EMBLEM * short
    slot = (bottom - top) / count
    return [top + (i + 0.5) * slot for i in range(count)], slot, min(0.74 * slot, 0.5 * short)


def poster_em(lines, emblem, width, height):
    _, (left, _, right, _) = poster_box(width, height)
    most = poster_lines(len(lines), emblem, width, height)[2]
    return min(most, (right - left) / max(lettering.width(line) for line in lines))


def poster_emblem(width, height):
    """Centre and side of the scene of the emblem."""
    side = EMBLEM * min(width, height)
    return width / 2, (_WALL + _PAD) * min(width, height) + REACH * side, side


def line_start(align, left, right, length):
    """Where a line of that length begins."""
    return {"left": left, "center": (left + right - length) / 2, "right": right - length}[align]


def alignment_shows(page, width, height):
    """Whether some line is so much shorter than the board that its alignment can be seen."""
    _, (left, _, right, _) = poster_box(width, height)
    em = poster_em(page.lines, page.emblem, width, height)
    return right - left - em * min(map(lettering.width, page.lines)) > 0.08 * min(width, height)


TITLE_EM, LABEL_EM = 0.125, 0.1
TITLE_MIDDLE, LABEL_MIDDLE, VALUE_MIDDLE = 0.085, 0.07, 0.066  # from the top, the bottom, the bar
BASE = 0.14  # a bar's foot, from the bottom
BAR = 0.56  # its share of a slot
_TOP, _SIDE = 0.29, 0.05  # its highest top, from the top; beside all bars


def chart_slots(count, width, height):
    """The middles of the bars, the width of a slot, the y of their foot, the height of one unit."""
    short = min(width, height)
    slot = (width - 2 * _SIDE * short) / count
    foot = height - BASE * short
    return (
        [_SIDE * short + (i + 0.5) * slot for i in range(count)],
        slot,
        foot,
        (foot - _TOP * short) / HIGHEST,
    )


WORD_EM = 0.105
_THIN = 0.0075  # half of a line's thickness


def diagram_rows(count, width, height):
    """The x of the things and of the words, the ys of the rows, the side of the scene of a thing."""
    short = min(width, height)
    rows = [(i + 0.5) * height / count for i in range(count)]
    window = (
        0.92 * height / count if count == 4 else height / count - 0.1 * short
    )  # room for an arrow between
    side = min(0.56 * short, window / (2 * REACH))
    return REACH * side + 0.05 * short, width - 0.415 * short, rows, side


def leader(row, slot, x, word, rows, side, short):
    """Both ends of the arrow from the words in a slot to the thing in a row."""
    return (word - 0.03 * short, rows[slot]), (x + REACH * side + 0.004 * short, rows[row])


def link_ends(link, x, rows, side, short):
    """Both ends of the arrow between two things."""
    a, b = (rows[i] for i in link)
    down = 1 if b > a else -1
    reach = REACH * side + 0.004 * short
    return (x, a + down * reach), (x, b - down * reach)


CAPTION_EM, FRAME = 0.1, 0.012
_GUTTER, _STRIP = 0.03, 0.13  # between panels; for the words of one


def panel_boxes(grid, width, height):
    """Of each panel in reading order: left, top, right, bottom of its frame, and the top of the words below."""
    short = min(width, height)
    gap = _GUTTER * short
    w, h = ((extent - (n + 1) * gap) / n for extent, n in zip((width, height), grid, strict=True))
    for row, column in itertools.product(range(grid[1]), range(grid[0])):
        left, top = gap + column * (w + gap), gap + row * (h + gap)
        yield left, top, left + w, top + h, top + h - (_STRIP + FRAME) * short


def panel_window(left, top, right, strip, short, inside=0):
    """The whole pixels of a panel's scene, as slices; `inside`: pixels less on each side."""
    frame = FRAME * short
    rows = slice(round(top + frame) + inside, round(strip - frame) - inside)
    return rows, slice(round(left + frame) + inside, round(right - frame) - inside)


# ---- drawing ----------------------------------------------------------------------------------------


def render_page(page: Page, width: int, height: int) -> np.ndarray:
    """The picture of a page: uint8 [height, width, 3]. width, height: at least LEAST of its kind."""
    least = LEAST[kind_of(page)]
    if min(width, height) < least:
        raise ValueError(
            f"size: expected at least {least}x{least} for a {kind_of(page)}; found {width}x{height}"
        )
    canvas = np.empty((height, width, 3), np.float32)
    draw = {Poster: _draw_poster, Chart: _draw_chart, Diagram: _draw_diagram, Comic: _draw_comic}[type(page)]
    draw(canvas, page, width, height, min(width, height))
    return (canvas + 0.5).astype(np.uint8)


def _blend(canvas, alpha, color):
    canvas += alpha[..., None] * (np.asarray(PALETTE[color], np.float32) - canvas)


def _fill(canvas, left, top, right, bottom, color):
    """A rectangle, to fractions of a pixel."""
    rows, cols = np.arange(canvas.shape[0]), np.arange(canvas.shape[1])
    y = np.clip(np.minimum(rows + 1, bottom) - np.maximum(rows, top), 0, 1)
    x = np.clip(np.minimum(cols + 1, right) - np.maximum(cols, left), 0, 1)
    _blend(canvas, (y[:, None] * x).astype(np.float32), color)


def _type(canvas, text, em, left, middle, color):
    _blend(canvas, lettering.write(text, em, left, middle, canvas.shape[:2]), color)


def _stamp(canvas, shape, color, x, y, side):
    """A shape as small as it is in a square scene of that side."""
    alpha, top, left = coverage(shape, "small", x, y, round(side))
    part = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    _blend(part, alpha, color)


def _arrow(canvas, start, end, thin, color):
    """A line of half-thickness `thin`, with a head at its end."""
    start, end = np.asarray(start), np.asarray(end)
    length = float(np.hypot(*(end - start)))
    along = (end - start) / length
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]] + 0.5
    t = (x - start[0]) * along[0] + (y - start[1]) * along[1]
    off = np.abs((y - start[1]) * along[0] - (x - start[0]) * along[1])
    head = min(6 * thin, 0.6 * length)
    line = np.minimum(np.minimum(t, length - head - t + 1), thin - off) + 0.5
    tip = np.minimum(t - (length - head), (0.62 * (length - t) - off) * 0.85) + 0.5
    _blend(canvas, np.clip(np.maximum(line, tip), 0, 1).astype(np.float32), color)


def _draw_poster(canvas, page, width, height, short):
    board, (left, _, right, _) = poster_box(width, height)
    canvas[:] = PALETTE[page.wall]
    _fill(canvas, *board, page.board)
    if page.emblem:
        _stamp(canvas, page.emblem.shape, page.emblem.color, *poster_emblem(width, height))
    em = poster_em(page.lines, page.emblem, width, height)
    for line, middle in zip(
        page.lines, poster_lines(len(page.lines), page.emblem, width, height)[0], strict=True
    ):
        _type(
            canvas,
            line,
            em,
            line_start(page.align, left, right, em * lettering.width(line)),
            middle,
            page.ink,
        )


def _draw_chart(canvas, page, width, height, short):
    canvas[:] = PALETTE[page.ground]
    ink = ink_on(page.ground)
    middles, slot, foot, unit = chart_slots(len(page.bars), width, height)
    if page.title:
        em = TITLE_EM * short
        _type(
            canvas, page.title, em, (width - em * lettering.width(page.title)) / 2, TITLE_MIDDLE * short, ink
        )
    em = LABEL_EM * short
    for bar, x in zip(page.bars, middles, strict=True):
        top = foot - bar.value * unit
        _fill(canvas, x - BAR / 2 * slot, top, x + BAR / 2 * slot, foot, bar.color)
        for text, y in (
            (str(bar.value), top - VALUE_MIDDLE * short),
            (bar.label, height - LABEL_MIDDLE * short),
        ):
            _type(canvas, text, em, x - em * lettering.width(text) / 2, y, ink)
    _fill(canvas, _SIDE * short, foot, width - _SIDE * short, foot + 0.012 * short, ink)


def _draw_diagram(canvas, page, width, height, short):
    canvas[:] = PALETTE[page.ground]
    ink = ink_on(page.ground)
    x, word, rows, side = diagram_rows(len(page.parts), width, height)
    for row, part in enumerate(page.parts):
        _stamp(canvas, part.shape, part.color, x, rows[row], side)
        _type(canvas, part.label, WORD_EM * short, word, rows[part.slot], ink)
        _arrow(canvas, *leader(row, part.slot, x, word, rows, side, short), _THIN * short, ink)
    if page.link:
        _arrow(canvas, *link_ends(page.link, x, rows, side, short), _THIN * short, ink)


def _draw_comic(canvas, page, width, height, short):
    canvas[:] = PALETTE["white"]
    frame, em = FRAME * short, CAPTION_EM * short
    for panel, (left, top, right, bottom, strip) in zip(
        page.panels, panel_boxes(page.grid, width, height), strict=True
    ):
        _fill(canvas, left, top, right, bottom, "black")
        _fill(canvas, left + frame, strip, right - frame, bottom - frame, "white")
        window = panel_window(left, top, right, strip, short)
        rows, cols = window
        canvas[window] = render(panel.scene, cols.stop - cols.start, rows.stop - rows.start)
        x = (left + right - em * lettering.width(panel.caption)) / 2
        _type(canvas, panel.caption, em, x, (strip + bottom - frame) / 2, "black")
