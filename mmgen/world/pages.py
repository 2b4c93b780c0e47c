"""Pages: signs, posters, bar charts, labelled diagrams and comics, with words on them.

A page says what is on it. Its layout follows from that and from the picture's size alone (pages_render.py), so that it
can be drawn at any size, and read back by looking where things must be (pages_judge.py).
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from mmgen.world import lettering
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


def brightness(color):
    return float(np.dot((0.299, 0.587, 0.114), PALETTE[color]))


def inks(board: str) -> tuple[str, ...]:
    """The colors in which words are clear on a board; by brightness, since JPEG halves the resolution of hue."""
    options = (*COLORS, "white", "black")
    return tuple(c for c in options if abs(brightness(c) - brightness(board)) >= 90)


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


def _said(diagram):
    things = frozenset((part.shape, part.color, part.label) for part in diagram.parts)
    link = diagram.link and tuple(diagram.parts[i].label for i in diagram.link)
    return things, diagram.ground, link
