"""Pages: signs, posters, bar charts, labelled diagrams and comics, whose words and truth a program reads from pixels.

A page says what is on it; its layout follows from that and from the picture's size alone, so it can be rendered at any
size, and read back by looking where things must be. `read_page` reads pixels and nothing else; what it read is drawn
again, and a picture that this drawing does not explain has a fault, as one has that cannot be read.

Lengths in the layouts are in units of the short side unless they say pixels.
"""

import itertools
from dataclasses import dataclass, replace
from hashlib import blake2b

import cv2
import numpy as np

from mmgen.world import lettering
from mmgen.world.judge import SIGHT, Verdict, parse
from mmgen.world.render import coverage, render
from mmgen.world.scene import (
    BACKGROUNDS,
    COLORS,
    SEEN,
    Claim,
    Group,
    Scene,
    distinct,
    holds,
    pick,
    random_item,
)

KINDS = ("sign", "poster", "chart", "diagram", "comic")
LEAST = {"sign": 64, "poster": 128, "chart": 128, "diagram": 128, "comic": 128}  # pixels of the short side
PALETTE = COLORS | BACKGROUNDS
ALIGNMENTS = ("left", "center", "right")
GRIDS = ((2, 1), (1, 2), (3, 1), (2, 2))  # columns and rows of a comic
HIGHEST = 10  # value of a bar

WORDS = """ACORN ALBUM ALOE ANCHOR ANGEL ANT APPLE APRIL APRON ARCH ARROW ART ATLAS ATTIC AUTUMN BABY BACON BAG BAKERY BALL
BAMBOO BANANA BAND BANK BARN BASKET BAT BATH BEACH BEAN BEAR BED BEE BELL BENCH BERRY BIKE BIRD BLUE BOAT BONE BOOK BOOT
BOTTLE BOWL BOX BREAD BRICK BRIDGE BROOM BRUSH BUS BUTTER BUTTON CABIN CAFE CAKE CAMERA CAMP CANDLE CANDY CAR CARD CARPET
CARROT CASTLE CAT CAVE CEDAR CHAIR CHALK CHEESE CHERRY CHESS CIRCUS CITY CLAY CLOCK CLOSED CLOUD CLOVER COAST COAT COCOA
COFFEE COIN COMET CORAL CORN COTTON COUSIN COW CRAB CREAM CROWN CUP CURRY DAISY DANCE DAWN DEER DESERT DESK DINER DOG DOLL
DOOR DOVE DRAGON DREAM DRUM DUCK DUSK EAGLE EARTH EAST ECHO EGG ELBOW ELM EMBER ENGINE EXIT FABRIC FAIR FALCON FAN FARM
FERN FERRY FIELD FIG FIRE FISH FLAG FLOUR FLOWER FLUTE FOG FOREST FORK FOX FRESH FRIEND FROG FRUIT GALAXY GAME GARDEN GATE
GEESE GIFT GINGER GLASS GLOBE GLOVE GOAT GOLD GRAPE GRASS GREEN GUITAR HALL HAM HARBOR HAT HAWK HAZEL HEART HELLO HEN HERO
HILL HOME HONEY HOPE HORN HORSE HOTEL HOUSE ICE INK IRON ISLAND IVORY IVY JACKET JAM JAR JAZZ JEANS JEWEL JOY JUICE JULY
JUNE JUNGLE KETTLE KEY KING KITE KIWI KOALA LADDER LAKE LAMP LARK LEAF LEMON LIBRARY LIGHT LILY LIME LION LOBSTER LOVE
LUNCH MAGIC MAGNET MAP MAPLE MARBLE MARCH MARKET MAY MEADOW MELON MENU MILK MINT MIRROR MOON MOSS MOUSE MUFFIN MUSEUM MUSIC
NEST NEWS NIGHT NOON NORTH NOVEL NUT OAK OASIS OCEAN OLIVE ONION OPEN OPERA ORANGE ORCHID OTTER OWL PANDA PAPER PARADE PARK
PARTY PASTA PEACE PEACH PEAR PEARL PEN PENCIL PEPPER PIANO PIE PIG PILLOW PINE PIZZA PLANET PLUM POCKET POEM POND PONY
POTATO PRIZE PUPPY PUZZLE QUEEN QUIET QUILT RABBIT RADIO RAIN RAVEN RED RIBBON RICE RING RIVER ROBIN ROCKET ROOF ROSE RUBY
SALAD SALE SALT SAND SCHOOL SEA SEED SHEEP SHELL SHIP SHOE SHOP SILK SILVER SKY SLOW SMILE SNAIL SNOW SOAP SOCK SOFA SONG
SOUP SOUTH SPICE SPOON SPRING STAR STATION STONE STOP STORM STORY STREET SUGAR SUMMER SUN SWAN TABLE TAXI TEA TEMPLE TENT
THANKS TICKET TIGER TOAST TODAY TOMATO TORCH TOWER TOY TRAIN TREE TULIP TUNNEL TURTLE UNCLE VALLEY VASE VELVET VIOLET
VIOLIN WAGON WALNUT WATER WAVE WELCOME WEST WHALE WHEAT WILLOW WIND WINDOW WINTER WOLF WOOD WOOL WORLD YARN YELLOW YES
ZEBRA ZOO WOW! HI! YUM! HEY! WHAT? WHY? A-Z B&B POP! ZAP!""".split()
HAN_WORDS = """你好 春天 咖啡 书店 开心 早安 晚安 月亮 太阳 星星 大海 花园 面包 水果 牛奶 茶 鱼 山 水 火 木 雨 雪 风 云 猫 狗 鸟 马
家 学校 医院 银行 公园 车站 出口 入口 欢迎 谢谢 再见 生日快乐 新年快乐 我爱你 中国 北京 上海 朋友 老师 今天 明天 小心 米饭 红茶 绿茶
电话 电影 音乐 夏天 秋天 冬天 东门 西门 一路平安 水果店 音乐学校""".split()


@dataclass(frozen=True)
class Poster:
    """Lines of words in the color `ink` on a board on a wall, and a shape above them; a sign is one line without a shape."""

    lines: tuple[str, ...]
    ink: str
    board: str
    wall: str
    align: str = "center"
    emblem: Group | None = None  # a shape and a color


@dataclass(frozen=True)
class Bar:
    label: str
    value: int  # 1 to HIGHEST
    color: str


@dataclass(frozen=True)
class Chart:
    """Bars from the left, each with its label below and its value above."""

    bars: tuple[Bar, ...]
    ground: str
    title: str | None = None


@dataclass(frozen=True)
class Part:
    """A thing of a diagram; its label stands in row `slot` of the words."""

    shape: str
    color: str
    label: str
    slot: int


@dataclass(frozen=True)
class Diagram:
    """Things from the top on the left, an arrow to each from its label on the right; `link` is an arrow from one thing to
    one beside it, as their indices."""

    parts: tuple[Part, ...]
    ground: str
    link: tuple[int, int] | None = None


@dataclass(frozen=True)
class Panel:
    scene: Scene
    caption: str


@dataclass(frozen=True)
class Comic:
    """Panels in reading order, in a grid."""

    panels: tuple[Panel, ...]
    grid: tuple[int, int]  # columns, rows


Page = Poster | Chart | Diagram | Comic


@dataclass(frozen=True)
class Reading:
    """The page in a picture, None where none was found; what could not be read."""

    page: Page | None
    faults: tuple[str, ...]


def kind_of(page: Page) -> str:
    """One of KINDS."""
    if isinstance(page, Poster):
        return "sign" if len(page.lines) == 1 and page.emblem is None else "poster"
    return type(page).__name__.lower()


def strings(page: Page) -> tuple[str, ...]:
    """All words on the page, the values of bars aside."""
    if isinstance(page, Poster):
        return page.lines
    if isinstance(page, Chart):
        return (*((page.title,) if page.title else ()), *(bar.label for bar in page.bars))
    if isinstance(page, Diagram):
        return tuple(part.label for part in page.parts)
    return tuple(panel.caption for panel in page.panels)


# ---- what there is ----------------------------------------------------------------------------------


def is_held_out(string: str) -> bool:
    """Whether the string never occurs in training: a tenth of all, fixed by a hash."""
    digest = blake2b(f"held-out words: {string}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def random_string(rng, widest: float, held_out: bool) -> str:
    """A word or, half of the time, random characters, at most `widest` em long; a third is Chinese."""
    han = rng.random() < 1 / 3
    real = rng.random() < 0.5
    for tries in range(1000):
        if real and tries < 200:  # few words are short enough for a narrow place
            string = pick(rng, HAN_WORDS if han else WORDS)
        else:
            string = _gibberish(rng, han, widest)
        if string and is_held_out(string) == held_out and lettering.width(string) <= widest:
            return string
    raise ValueError(f"widest: found no string of {widest:.2f} em; expected at least 1")


def _gibberish(rng, han, widest):
    """Random characters, as many as fit and at most 4 Chinese or 8 others."""
    # O and 0, I and 1 are told apart by the reader but hardly by people: never both.
    letters, digits = lettering.LATIN, lettering.DIGITS
    mixed = letters.replace("O", "").replace("I", "") + digits[2:]
    some = lettering.HAN if han else pick(rng, (letters, letters, letters, digits, mixed))
    length = 1 + int(rng.random() * (4 if han else 8))
    string = ""
    for c in (pick(rng, some) for _ in range(length)):
        # Two narrow bars beside each other look like one letter when small.
        if lettering.width(string + c) <= widest and not (string + c).endswith("II"):
            string += c
    return string


def _strings(rng, count, widest, held_out):
    """So many different strings."""
    found = []
    while len(found) < count:
        string = random_string(rng, widest, held_out)
        if string not in found:
            found.append(string)
    return found


def _brightness(color):
    return float(np.dot((0.299, 0.587, 0.114), PALETTE[color]))


def inks(board: str) -> tuple[str, ...]:
    """The colors in which words are clear on a board; by brightness, since JPEG halves the resolution of hue."""
    options = (*COLORS, "white", "black")
    return tuple(c for c in options if abs(_brightness(c) - _brightness(board)) >= 90)


def ink_on(ground: str) -> str:
    """The color of words and lines of a chart or a diagram."""
    return "white" if ground in ("black", "gray") else "black"


# The longest strings, in em.
_SIGN, _LINE, TITLE, _LABEL = 4.2, 6.2, 6.5, 3.7


def _bar_label(count):
    return 9 / count - 0.3


def caption_width(grid):
    return 2.65 if grid[0] == 3 else 4.3


def widest(page, i):
    """How long string i of a page may be, in em."""
    if isinstance(page, Poster):
        return _SIGN if kind_of(page) == "sign" else _LINE
    if isinstance(page, Chart):
        return TITLE if page.title and i == 0 else _bar_label(len(page.bars))
    return _LABEL if isinstance(page, Diagram) else caption_width(page.grid)


def random_page(rng, kind: str, held_out: bool = False) -> Page:
    """A page of a kind (one of KINDS). held_out: all its strings are held out of training; otherwise none is."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}; found {kind!r}")
    make = {"sign": _sign, "poster": _poster, "chart": _chart, "diagram": _diagram, "comic": _comic}[kind]
    return make(rng, held_out)


def _sign(rng, held_out):
    board = pick(rng, PALETTE)
    wall = pick(rng, [c for c in BACKGROUNDS if c != board])
    return Poster((random_string(rng, _SIGN, held_out),), pick(rng, inks(board)), board, wall)


def _poster(rng, held_out):
    emblem = rng.random() < 0.4
    board = pick(rng, BACKGROUNDS if emblem else PALETTE)
    wall = pick(rng, [c for c in BACKGROUNDS if c != board])
    count = 1 + (rng.random() < 0.5) + (not emblem)
    color, shape = pick(rng, SEEN)
    return Poster(
        tuple(_strings(rng, count, _LINE, held_out)),
        pick(rng, inks(board)),
        board,
        wall,
        pick(rng, ("center", "center", "left", "right")),
        Group(shape, color) if emblem else None,
    )


def _chart(rng, held_out):
    count = 2 + int(rng.random() * 4)
    labels = _strings(rng, count, _bar_label(count), held_out)
    same = pick(rng, COLORS) if rng.random() < 0.3 else None
    bars = tuple(Bar(s, 1 + int(rng.random() * HIGHEST), same or pick(rng, COLORS)) for s in labels)
    title = random_string(rng, TITLE, held_out) if rng.random() < 0.5 else None
    return Chart(bars, pick(rng, BACKGROUNDS), title)


def _diagram(rng, held_out):
    count = 2 + int(rng.random() * 3)
    pairs = []
    while len(pairs) < count:
        pair = pick(rng, SEEN)
        if pair not in pairs:
            pairs.append(pair)
    labels = _strings(rng, count, _LABEL, held_out)
    slots = rng.permutation(count).tolist()
    parts = tuple(Part(shape, color, s, i) for (color, shape), s, i in zip(pairs, labels, slots, strict=True))
    link = None
    if count < 4 and rng.random() < 0.5:  # four stand too close for one
        first = int(rng.random() * (count - 1))
        link = pick(rng, ((first, first + 1), (first + 1, first)))
    return Diagram(parts, pick(rng, BACKGROUNDS), link)


def _comic(rng, held_out):
    grid = pick(rng, GRIDS)
    captions = _strings(rng, grid[0] * grid[1], caption_width(grid), held_out)
    return Comic(tuple(Panel(panel_scene(rng), caption) for caption in captions), grid)


def panel_scene(rng):
    while True:
        _, scene = random_item(rng, pick(rng, ("single_object", "two_object")), False)
        if distinct(scene_claim(scene).groups):
            return scene


def scene_claim(scene: Scene) -> Claim:
    """What is said of a panel: shapes and colors, and the background."""
    return Claim(tuple(Group(o.shape, o.color) for o in scene.objects), None, scene.background)


# ---- layouts, in pixels -----------------------------------------------------------------------------

_WALL, _PAD = 0.05, 0.05  # around the board of a poster, and within it
_EMBLEM, _REACH = (
    0.68,
    0.22,
)  # the side of the square scene in which a shape is small; half of its window in such sides


def _poster_box(width, height):
    """Left, top, right and bottom of the board, and of what is inside it."""
    wall, pad = _WALL * min(width, height), (_WALL + _PAD) * min(width, height)
    return (wall, wall, width - wall, height - wall), (pad, pad, width - pad, height - pad)


def _poster_lines(count, emblem, width, height):
    """The middles of the lines, the height of one, and the greatest em."""
    _, (_, top, _, bottom) = _poster_box(width, height)
    short = min(width, height)
    if emblem:
        top += 2 * _REACH * _EMBLEM * short
    slot = (bottom - top) / count
    return [top + (i + 0.5) * slot for i in range(count)], slot, min(0.74 * slot, 0.5 * short)


def _poster_em(lines, emblem, width, height):
    _, (left, _, right, _) = _poster_box(width, height)
    most = _poster_lines(len(lines), emblem, width, height)[2]
    return min(most, (right - left) / max(lettering.width(line) for line in lines))


def _poster_emblem(width, height):
    """Centre and side of the scene of the emblem."""
    side = _EMBLEM * min(width, height)
    return width / 2, (_WALL + _PAD) * min(width, height) + _REACH * side, side


def _align(align, left, right, length):
    """Where a line of that length begins."""
    return {"left": left, "center": (left + right - length) / 2, "right": right - length}[align]


_TITLE_EM, _LABEL_EM = 0.125, 0.1
_TITLE_MIDDLE, _LABEL_MIDDLE, _VALUE_MIDDLE = 0.085, 0.07, 0.066  # from the top, the bottom, the bar
_BASE, _TOP, _SIDE, _BAR = (
    0.14,
    0.29,
    0.05,
    0.56,
)  # a bar's foot, its highest top; the sides; its share of a slot


def _chart_slots(count, width, height):
    """The middles of the bars, the width of a slot, the y of their foot, the height of one unit."""
    short = min(width, height)
    slot = (width - 2 * _SIDE * short) / count
    foot = height - _BASE * short
    return (
        [_SIDE * short + (i + 0.5) * slot for i in range(count)],
        slot,
        foot,
        (foot - _TOP * short) / HIGHEST,
    )


_WORD_EM, _THIN = 0.105, 0.0075  # half of a line's thickness


def _diagram_rows(count, width, height):
    """The x of the things and of the words, the ys of the rows, the side of the scene of a thing."""
    short = min(width, height)
    rows = [(i + 0.5) * height / count for i in range(count)]
    window = (
        0.92 * height / count if count == 4 else height / count - 0.1 * short
    )  # room for an arrow between
    side = min(0.56 * short, window / (2 * _REACH))
    return _REACH * side + 0.05 * short, width - 0.415 * short, rows, side


def _leader(row, slot, x, word, rows, side, short):
    """Both ends of the arrow from the words in a slot to the thing in a row."""
    return (word - 0.03 * short, rows[slot]), (x + _REACH * side + 0.004 * short, rows[row])


def _link(link, x, rows, side, short):
    """Both ends of the arrow between two things."""
    a, b = (rows[i] for i in link)
    down = 1 if b > a else -1
    reach = _REACH * side + 0.004 * short
    return (x, a + down * reach), (x, b - down * reach)


_GUTTER, _FRAME, _STRIP, _CAPTION_EM = 0.03, 0.012, 0.13, 0.1


def _panels(grid, width, height):
    """Of each panel in reading order: left, top, right, bottom of its frame, and the top of the words below."""
    short = min(width, height)
    gap = _GUTTER * short
    w, h = ((extent - (n + 1) * gap) / n for extent, n in zip((width, height), grid, strict=True))
    for row, column in itertools.product(range(grid[1]), range(grid[0])):
        left, top = gap + column * (w + gap), gap + row * (h + gap)
        yield left, top, left + w, top + h, top + h - (_STRIP + _FRAME) * short


def _panel_window(left, top, right, strip, short, inside=0):
    """The whole pixels of a panel's scene, as slices; `inside`: pixels less on each side."""
    frame = _FRAME * short
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
    return _draw(page, width, height)


def _draw(page, width, height):
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
    board, (left, _, right, _) = _poster_box(width, height)
    canvas[:] = PALETTE[page.wall]
    _fill(canvas, *board, page.board)
    if page.emblem:
        _stamp(canvas, page.emblem.shape, page.emblem.color, *_poster_emblem(width, height))
    em = _poster_em(page.lines, page.emblem, width, height)
    for line, middle in zip(
        page.lines, _poster_lines(len(page.lines), page.emblem, width, height)[0], strict=True
    ):
        _type(canvas, line, em, _align(page.align, left, right, em * lettering.width(line)), middle, page.ink)


def _draw_chart(canvas, page, width, height, short):
    canvas[:] = PALETTE[page.ground]
    ink = ink_on(page.ground)
    middles, slot, foot, unit = _chart_slots(len(page.bars), width, height)
    if page.title:
        em = _TITLE_EM * short
        _type(
            canvas, page.title, em, (width - em * lettering.width(page.title)) / 2, _TITLE_MIDDLE * short, ink
        )
    em = _LABEL_EM * short
    for bar, x in zip(page.bars, middles, strict=True):
        top = foot - bar.value * unit
        _fill(canvas, x - _BAR / 2 * slot, top, x + _BAR / 2 * slot, foot, bar.color)
        for text, y in (
            (str(bar.value), top - _VALUE_MIDDLE * short),
            (bar.label, height - _LABEL_MIDDLE * short),
        ):
            _type(canvas, text, em, x - em * lettering.width(text) / 2, y, ink)
    _fill(canvas, _SIDE * short, foot, width - _SIDE * short, foot + 0.012 * short, ink)


def _draw_diagram(canvas, page, width, height, short):
    canvas[:] = PALETTE[page.ground]
    ink = ink_on(page.ground)
    x, word, rows, side = _diagram_rows(len(page.parts), width, height)
    for row, part in enumerate(page.parts):
        _stamp(canvas, part.shape, part.color, x, rows[row], side)
        _type(canvas, part.label, _WORD_EM * short, word, rows[part.slot], ink)
        _arrow(canvas, *_leader(row, part.slot, x, word, rows, side, short), _THIN * short, ink)
    if page.link:
        _arrow(canvas, *_link(page.link, x, rows, side, short), _THIN * short, ink)


def _draw_comic(canvas, page, width, height, short):
    canvas[:] = PALETTE["white"]
    frame, em = _FRAME * short, _CAPTION_EM * short
    for panel, (left, top, right, bottom, strip) in zip(
        page.panels, _panels(page.grid, width, height), strict=True
    ):
        _fill(canvas, left, top, right, bottom, "black")
        _fill(canvas, left + frame, strip, right - frame, bottom - frame, "white")
        window = _panel_window(left, top, right, strip, short)
        rows, cols = window
        canvas[window] = render(panel.scene, cols.stop - cols.start, rows.stop - rows.start)
        x = (left + right - em * lettering.width(panel.caption)) / 2
        _type(canvas, panel.caption, em, x, (strip + bottom - frame) / 2, "black")


# ---- reading ----------------------------------------------------------------------------------------

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
        strange = _unexplained(image, _draw(page, image.shape[1], image.shape[0]).astype(np.float32))
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
    (b0, b1, b2, b3), (left, top, right, bottom) = _poster_box(width, height)
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
        emblem = _thing(image, *_poster_emblem(width, height), ground, board)
    layouts = [layout for layout in layouts if layout[1] == (emblem is not None)]
    if emblem:
        top += 2 * _REACH * _EMBLEM * short
    share = _brightest(image, (left - 1, top, right + 1, bottom), ground, board)
    if share is None:
        faults.append("no words")
        return None
    rows = (np.maximum(_box(share, left - 1, top, right + 1, bottom)[0], 0) ** 2).sum(1)
    count = next((n for n, _ in layouts if _in_slots(rows, n)), layouts[-1][0])
    middles, slot, most = _poster_lines(count, emblem, width, height)
    boxes = [(left - 1, y - slot / 2, right + 1, y + slot / 2) for y in middles]
    # The size of all lines is found in the widest.
    inked = [_box(share, *box)[0] > 0.4 for box in boxes]
    first = max(range(count), key=lambda i: _span(inked[i].any(0)))
    high = _span(inked[first].any(1))
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
    if abs(em / _poster_em(lines, emblem, width, height) - 1) > 0.12:
        faults.append("words of another size than fits the board")
    return (
        page
        if len(layouts) == 1 and layouts[0] == (1, False)
        else replace(page, align=_alignment(found, left, right))
    )


def _alignment(found, left, right):
    """The alignment that the lines' places are nearest to."""

    def error(align):
        return sum(abs(line.left - _align(align, left, right, line.right - line.left)) for line in found)

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
        (abs(_brightness(c) - _brightness(board)) for c in inks(board)), key=lambda v: abs(v - full / 0.95)
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
        slope = (off[..., None] * seen).sum((0, 1)) / (off * off).sum()
        names.add(_name(seen.mean((0, 1)) + (1 - alpha.mean()) * slope, inks(board), faults, "letters"))
    if len(names) > 1:
        faults.append(f"letters of more than one color ({', '.join(sorted(names))})")
    return min(names)


def _parse(pixels):
    """parse() of a picture so small that it is taken for one of the plain world."""
    height, width = pixels.shape[:2]
    scale = min(1.0, 36 / min(height, width))
    size = round(width * scale), round(height * scale)
    return parse(cv2.resize(np.rint(pixels).astype(np.uint8), size, interpolation=cv2.INTER_AREA))


def _thing(image, x, y, side, ground, name):
    """The shape and color of the one thing at a place, as it is in a square scene of that side; None if there is none."""
    reach = _REACH * side
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
    foot = height - _BASE * short
    low = image[round(foot - 0.04 * short) : round(foot - 0.012 * short)].mean(0) - ground
    runs = _runs((low * low).sum(-1) > EVEN**2)
    runs = [run for run in runs if run[1] - run[0] > 0.04 * short]
    if not 2 <= len(runs) <= 5:
        faults.append(f"{len(runs)} bars")
    if faults:
        return None
    middles, slot, foot, unit = _chart_slots(len(runs), width, height)
    share = _share(image, ground, ink_on(name))
    bars = []
    for i, (run, x) in enumerate(zip(runs, middles, strict=True), 1):
        half = _BAR / 2 * slot
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
        box = (x - slot / 2, top - (_VALUE_MIDDLE + 0.07) * short, x + slot / 2, top - 0.018 * short)
        line = _words(share, box, _LABEL_EM * short, top - _VALUE_MIDDLE * short, faults, f"value {i}")
        if not 1 <= round(value) <= HIGHEST or abs(value - round(value)) > 0.35:
            faults.append(f"bar {i} is {value:.2f} high")
        elif _text(line) != str(round(value)):
            faults.append(f"bar {i} is {value:.2f} high, and says {_text(line)!r}")
        box = (x - slot / 2, foot + 0.022 * short, x + slot / 2, height)
        middle = height - _LABEL_MIDDLE * short
        line = _words(share, box, _LABEL_EM * short, middle, faults, f"label {i}")
        bars.append(Bar(_text(line), round(value), bar))
    box = (0, (_TITLE_MIDDLE - 0.07) * short, width, (_TITLE_MIDDLE + 0.07) * short)
    title = None
    if (_box(share, *box)[0] > 0.5).sum() > 0.0005 * short * short:
        title = _words(share, box, _TITLE_EM * short, _TITLE_MIDDLE * short, faults, "title")
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
    x, word, rows, side = _diagram_rows(count, width, height)
    things = [_thing(image, x, y, side, ground, name) for y in rows]
    if not all(things):
        faults.append(f"thing {things.index(None) + 1} is no known shape at its place")
        return None
    share = _share(image, ground, ink)
    labels = []
    for slot, y in enumerate(rows):
        box = (word - 0.015 * short, y - 0.08 * short, width, y + 0.08 * short)
        labels.append(_words(share, box, _WORD_EM * short, y, faults, f"words {slot + 1}"))
    seen = np.array([
        [_along(share, *_leader(row, slot, x, word, rows, side, short)) for row in range(count)] for slot in range(count)
    ])  # fmt: skip
    target = seen.argmax(1).tolist()
    if sorted(target) != list(range(count)) or seen.max(1).min() < ALONG:
        faults.append("not one arrow from each words to each thing")
        return None
    link = None
    for first in range(count - 1):
        (_, a), (_, b) = _link((first, first + 1), x, rows, side, short)
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
    for i, (left, top, right, bottom, strip) in enumerate(_panels(grid, width, height), 1):
        pixels = image[_panel_window(left, top, right, strip, short, inside=1)]
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        whole = np.empty((pixels.shape[0] + 2, pixels.shape[1] + 2, 3), np.float32)
        whole[:] = np.median(border, 0)
        whole[1:-1, 1:-1] = pixels  # without the frame's blur
        reading = _parse(whole)
        faults += [f"panel {i}: {fault}" for fault in reading.faults]
        frame = _FRAME * short
        box = (left + 2 * frame, strip + 0.6 * frame, right - 2 * frame, bottom - 1.6 * frame)
        middle = (strip + bottom - frame) / 2
        line = _words(share, box, _CAPTION_EM * short, middle, faults, f"caption {i}")
        panels.append(Panel(reading.scene, _text(line)))
    return None if faults else Comic(tuple(panels), grid)


def _gutters(bright, grid, width, height):
    """How far a picture is, in brightness, from the white between the panels of a grid and their black frames."""
    frame = _FRAME * min(width, height)
    boxes = list(_panels(grid, width, height))
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


# ---- judging ----------------------------------------------------------------------------------------


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


def same(page: Page, other: Page) -> bool:
    """Whether two pages say the same: the place of a thing in its diagram or its panel does not count."""
    if type(page) is not type(other):
        return False
    if isinstance(page, Diagram):
        return _said(page) == _said(other)
    if isinstance(page, Comic):
        return page.grid == other.grid and all(
            a.caption == b.caption and holds(scene_claim(a.scene), b.scene)
            for a, b in zip(page.panels, other.panels, strict=True)
        )
    return page == other


def alignment_shows(page, width, height):
    """Whether some line is so much shorter than the board that its alignment can be seen."""
    _, (left, _, right, _) = _poster_box(width, height)
    em = _poster_em(page.lines, page.emblem, width, height)
    return right - left - em * min(map(lettering.width, page.lines)) > 0.08 * min(width, height)


def _said(diagram):
    things = frozenset((part.shape, part.color, part.label) for part in diagram.parts)
    link = diagram.link and tuple(diagram.parts[i].label for i in diagram.link)
    return things, diagram.ground, link
