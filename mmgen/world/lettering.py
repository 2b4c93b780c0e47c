"""Draw words and read them back exactly: one bundled font, and templates of its glyphs.

Glyphs are drawn once, large, and then shrunk by area, so that any size and any sub-pixel place is exact and nothing
hangs on a library's hinting. Reading is the reverse: of all strings, the one whose rendering explains most of the
ink, found by dynamic programming over the line, as in a Viterbi decoder.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path(__file__).parent / "fonts" / "mmgen-sans.otf"
LATIN = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
MARKS = ".,!?'-:&"
HAN = (
    "你好春天咖啡书店开心早安晚月亮太阳星大海花园面包水果牛奶茶鱼山火木雨雪风云猫狗鸟马家学校医院银行公车站出口入欢迎谢再见"
    "生日快乐新年我爱中国北京上朋友老师今明小米饭红绿电话影音夏秋冬东西南一路平门"
)
SCRIPTS = (LATIN + DIGITS + MARKS, HAN)  # a line is of one of them
CHARACTERS = "".join(SCRIPTS)

# Lengths in em. A line's middle is that of capitals and, within a hundredth, of Chinese characters.
MIDDLE = 0.37  # above the baseline
TALL = 1.1  # of a glyph's box, which its line's middle halves
SIDE = 0.06  # of the box beyond the advance, for glyphs that reach out

READ_EM = 17.0  # pixels; larger letters are read reduced to this
_FINE = 120  # pixels of the em in which glyphs are drawn
_STEP = 1.025  # sizes at which templates are kept: within 1.3 % of any size
_PHASES = 2  # places within a pixel
_ENOUGH = 0.93  # of the ink's energy is explained: no better size or place is sought
_STEPS = 4
_BATCH = (
    4  # places in a matrix product: too small for BLAS's threads, which wait for each other on busy cores
)
# Glyphs that are taken for each other where half a pixel decides.
_ALIKE = ("8BDS", "0ODQ", "5S63", "PFERB", "CG6", "VYU", "MNWH", "2Z7", "1ILTJ", "KXR", "AR4", "9G8")
_SURELY = 0.9  # of the error: an exchange must be so much better
_COST = 0.01  # of one more glyph, in squared em: no mark is read into noise


@dataclass(frozen=True)
class Line:
    """What a line says; its size and place in pixels: em, left and right end, middle; the root of the squared error over
    the ink's squared sum, of the whole line and of its worst glyph."""

    text: str
    em: float
    left: float
    right: float
    middle: float
    misfit: float
    worst: float


def width(text: str) -> float:
    """The length of a line in em."""
    return float(sum(_glyphs()[1][CHARACTERS.index(c)] for c in text))


def write(text: str, em: float, left: float, middle: float, extent: tuple[int, int]) -> np.ndarray:
    """The share of each pixel that a line covers: float32 [h, w] of that extent. em, left, middle: in pixels."""
    ink = np.zeros(extent, np.float32)
    scale = _FINE / em
    for c in text:
        k = CHARACTERS.index(c)
        x, y = left - SIDE * em, middle - TALL / 2 * em
        top, first = int(np.floor(y)), int(np.floor(x))
        table = _glyphs()[0][k]
        rows = _at((top - y + np.arange(int(TALL * em) + 3)) * scale, table.shape[0])
        cols = _at((first - x + np.arange(int((1 + 2 * SIDE) * em) + 4)) * scale, table.shape[1])
        patch = _boxes(table, rows, cols) / scale**2
        here = ink[max(top, 0) : max(0, top + patch.shape[0]), max(first, 0) : max(0, first + patch.shape[1])]
        patch = patch[max(-top, 0) :, max(-first, 0) :][: here.shape[0], : here.shape[1]]
        np.maximum(here, patch, out=here)
        left += _glyphs()[1][k] * em
    return ink


def read(ink: np.ndarray, em: float, middle: float, least: float | None = None) -> Line | None:
    """The line of words in a region; None where there is no ink.

    ink: float32 [h, w], how far each pixel is from the ground (0) to the letters' colour (1). em: the size at which the
    words are sought, and with `least` the greatest of a range that begins there. middle: of the line, in pixels; a pixel
    or so off is found.
    """
    if ink.size == 0 or float(np.clip(ink, 0, 1).sum()) <= _COST * em * em:
        return None
    shrink = max(1.0, (em if least is None else (em * least) ** 0.5) / READ_EM)
    if shrink > 1:
        h, w = max(1, round(ink.shape[0] / shrink)), max(1, round(ink.shape[1] / shrink))
        ys, xs = ink.shape[0] / h, ink.shape[1] / w
        ink = cv2.resize(ink, (w, h), interpolation=cv2.INTER_AREA)
    else:
        ys = xs = 1.0
    ink = _soft(ink)
    size, middle = em / ys, middle / ys
    sizes = [round(np.log(size) / np.log(_STEP))]
    if least is not None:
        lowest = round(np.log(least / ys) / np.log(_STEP))
        sizes = list(range(lowest, sizes[0] + 1, 2))
    energy = float((ink * ink).sum())
    found = max((_decode(ink, script, k, middle) for k in sizes for script in SCRIPTS), key=lambda f: f[0])
    # One step of size or place at a time, as long as it explains more; a line that is drawn as ours is there at once.
    for i in range(_STEPS):
        _, script, k, y, _ = found
        if found[0] > _ENOUGH * energy and (least is None or i):
            break
        steps = ((k, y - 0.5), (k, y + 0.5), (k - 1, y), (k + 1, y))
        better = max((_decode(ink, script, *step) for step in steps), key=lambda f: f[0])
        if better[0] <= found[0]:
            break
        found = better
    _, script, k, y, glyphs = found
    if not glyphs:
        return None
    return _line(ink, _STEP**k, y, _resolved(ink, _STEP**k, y, glyphs), xs, ys)


def _resolved(ink, em, y, glyphs):
    """The glyphs, one or two exchanged for others that are alike where the whole line, drawn as one, is then closer."""

    def far(text, left, em, y):
        return float(np.square(ink - _soft(write(text, em, left, y, ink.shape))).sum())

    text, place = "".join(c for c, _ in glyphs), (glyphs[0][1], em, y)
    least = far(text, *place)
    for step in (0.25, 0.125):  # each of the three by itself
        for axis, size in enumerate((step, 0.02 * em * step, step)):
            for sign in (1, -1):
                moved = tuple(v + sign * size * (i == axis) for i, v in enumerate(place))
                while (error := far(text, *moved)) < least:
                    least, place = error, moved
                    moved = tuple(v + sign * size * (i == axis) for i, v in enumerate(place))
    for _ in range(2):
        others = [
            text[:i] + other + text[i + 1 :]
            for i, c in enumerate(text)
            for other in dict.fromkeys("".join(group for group in _ALIKE if c in group))
            if other != c
        ]
        error, best = min(((far(other, *place), other) for other in others), default=(least, text))
        if error >= _SURELY * least:
            break
        least, text = error, best
    return [(c, x) for c, (_, x) in zip(text, glyphs, strict=True)]


def _line(ink, em, y, glyphs, xs, ys):
    """A Line from (character, place) of its glyphs, with the errors of its rendering."""
    drawn = np.zeros(ink.shape, np.float32)
    spans = []
    for c, x in glyphs:
        drawn = np.maximum(drawn, write(c, em, x, y, ink.shape))
        spans.append((x, x + width(c) * em))
    drawn = _soft(drawn)
    error = (ink - drawn) ** 2
    columns, mass = error.sum(0), (drawn * drawn).sum(0)
    worst = 0.0
    for x0, x1 in spans:
        cols = slice(max(0, round(x0)), max(1, round(x1)))
        worst = max(worst, float(columns[cols].sum() / max(mass[cols].sum(), 1.0)))
    text = "".join(c for c, _ in glyphs)
    total = float(error.sum() / max(mass.sum(), 1.0))
    return Line(text, em * ys, spans[0][0] * xs, spans[-1][1] * xs, y * ys, total**0.5, worst**0.5)


def _soft(ink):
    """Blurred by a pixel: what differs by a fraction of one, or is a little less sharp, is then much the same."""
    return cv2.GaussianBlur(ink, (3, 3), 0, borderType=cv2.BORDER_CONSTANT)


def _decode(ink, script, k, middle):
    """The string of one size and middle that explains most ink.

    Returns (gain, script, k, middle, [(character, left)]): gain is the ink's energy less the squared error.
    """
    em = _STEP**k
    top = int(np.floor(middle - TALL / 2 * em))
    templates, energies, advances = _templates(script, k, round((middle - TALL / 2 * em - top) * _PHASES))
    count, phases, high, wide = templates.shape
    places = -(-(ink.shape[1] + wide) // _BATCH) * _BATCH
    strip = np.zeros((high, places + wide - 1), np.float32)
    rows = ink[max(top, 0) : max(0, top + high)]
    strip[max(-top, 0) : max(-top, 0) + rows.shape[0], wide : wide + ink.shape[1]] = rows[:, : places - 1]
    windows = np.lib.stride_tricks.sliding_window_view(strip, wide, 1)  # [high, places, wide]
    flat = windows.transpose(1, 0, 2).reshape(-1, _BATCH, high * wide)
    gain = 2 * (flat @ templates.reshape(count * phases, -1).T).reshape(-1, count, phases)
    gain = (gain - energies).transpose(1, 0, 2).reshape(count, -1) - _COST * em * em
    # The best continuation from each place, from the right; the next glyph may stand half a pixel aside.
    places = gain.shape[1]
    reach = int(advances.max()) + 2
    best = np.zeros(places + reach, np.float32)
    around = np.zeros(places + reach, np.float32)
    block = int(advances.min()) - 1
    if block < 1:  # smaller than on any page: glyphs would not advance
        return 0.0, script, k, middle, []
    for last in range(places, 0, -block):
        here = np.arange(max(0, last - block), last)
        total = gain[:, here] + around[here + advances[:, None]]
        best[here] = np.maximum(total.max(0), 0)
        span = np.arange(max(0, here[0] - 1), min(here[-1] + 2, places + reach - 1))
        around[span] = np.maximum(np.maximum(best[span], best[np.maximum(span - 1, 0)]), best[span + 1])
    at, glyphs = int(best.argmax()), []
    explained = float(best[at])
    while best[at] > 0:
        c = int((gain[:, at] + around[at + advances]).argmax())
        glyphs.append((script[c], at / _PHASES - wide + SIDE * em))
        at += int(advances[c])
        at += max((0, -1, 1), key=lambda d: best[at + d])
    return explained, script, k, middle, glyphs


@lru_cache(maxsize=1)
def _glyphs():
    """Summed-area tables of all glyphs drawn finely, float32 [C, h + 1, w + 1], and advances in em [C]."""
    font = ImageFont.truetype(str(FONT), _FINE, layout_engine=ImageFont.Layout.BASIC)
    high, wide = round(TALL * _FINE), round((1 + 2 * SIDE) * _FINE)
    tables, advances = [], []
    for c in CHARACTERS:
        image = Image.new("L", (wide, high))
        draw = ImageDraw.Draw(image)
        draw.text((round(SIDE * _FINE), high // 2 + round(MIDDLE * _FINE)), c, 255, font, anchor="ls")
        table = (np.asarray(image, np.float64) / 255).cumsum(0).cumsum(1)
        tables.append(np.pad(table, ((1, 0), (1, 0))))
        advances.append(font.getlength(c) / _FINE)
    return np.stack(tables), np.array(advances)


def _at(places, size):
    """Where fractional places lie between the entries of a table: (index, share of the next)."""
    places = np.clip(places, 0, size - 1)
    index = np.minimum(places.astype(int), size - 2)
    return index, places - index


def _boxes(table, rows, cols):
    """Sums over the boxes between those places of summed-area tables [..., h, w]."""
    i, f = rows
    table = table[..., i, :] * (1 - f)[:, None] + table[..., i + 1, :] * f[:, None]
    table = table[..., 1:, :] - table[..., :-1, :]
    j, g = cols
    table = table[..., j] * (1 - g) + table[..., j + 1] * g
    return table[..., 1:] - table[..., :-1]


@lru_cache(maxsize=256)
def _templates(script, k, phase_y):
    """Every glyph of a script at size _STEP**k: coverage [C, phases, h, w], its energy [C, phases], and advances in phases [C]."""
    chosen = [CHARACTERS.index(c) for c in script]
    tables, advances = (part[chosen] for part in _glyphs())
    em = _STEP**k
    scale = _FINE / em
    rows = _at((np.arange(int(TALL * em) + 3) - phase_y / _PHASES) * scale, tables.shape[1])
    patches = []
    for phase in range(_PHASES):
        cols = _at(
            (np.arange(int((advances.max() + 2 * SIDE) * em) + 3) - phase / _PHASES) * scale, tables.shape[2]
        )
        patches.append(_boxes(tables, rows, cols) / scale**2)
    patches = np.stack(patches, 1).astype(np.float32)
    for patch in patches.reshape(-1, *patches.shape[2:]):
        patch[:] = _soft(patch)
    return patches, (patches * patches).sum((2, 3)), np.rint(advances * em * _PHASES).astype(int)
