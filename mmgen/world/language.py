"""Say a claim in words: several phrasings, the plain one half of the time."""

from mmgen.world.scene import COLORS, FIGURES, SHAPES, SKIES, SYMBOLS, Claim, Group

LANGUAGES = ("en", "zh")


def say(claim: Claim, language: str, rng, bare: bool = False) -> str:
    """A prompt that states the claim, no more and no less; rng: a numpy Generator picks the phrasing. bare: as a
    statement, without "draw" and the like."""
    return _of(language, _english, _chinese)(claim, rng, bare)


def _of(language, *functions):
    """The one of `functions`, in the order of LANGUAGES, that speaks it."""
    if language not in LANGUAGES:
        raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}; found {language!r}")
    return functions[LANGUAGES.index(language)]


def _pick(rng, options):
    return options[int(rng.random() * len(options))]


def _mostly(rng, plain, others, share=0.5):
    """The plain form, or with probability `share` one of the others."""
    return _pick(rng, others) if rng.random() < share else plain


# English

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {shape: shape + "s" for shape in (*SHAPES, "adult", *SYMBOLS)} | {
    "cross": "crosses",
    "child": "children",
}
SIZE_WORDS = {"small": ("little", "small"), "large": ("big", "large"), "medium": ("medium", "medium-sized")}
RELATION_WORDS = {
    "left of": ("left of", ("to the left of", "on the left of")),
    "right of": ("right of", ("to the right of", "on the right of")),
    "above": ("above", ("over", "higher than")),
    "below": ("below", ("under", "beneath", "lower than")),
    "in front of": ("in front of", ("partly covering", "in front of")),
    "behind": ("behind", ("partly hidden by", "behind")),
}
_SIDES = ("left of", "right of", "above", "below")
SKY_WORDS = {
    "sky": ("under a blue sky", "with a blue sky behind"),
    "sunset": ("at sunset", "with a sunset behind"),
    "meadow": ("on a meadow", "with a meadow behind"),
}
STYLE_WORDS = {
    "flat": ("in flat style", "as flat shapes"),
    "ink": ("with ink outlines", "as an ink drawing"),
    "pixel": ("as pixel art", "in pixel art style"),
    "watercolor": ("in watercolor", "as a watercolor"),
    "anime": ("in soft-light animation style", "as an animation frame"),
    "night": ("by night", "as a night scene"),
}
_OPENINGS = ("a picture of {}", "an image of {}", "a drawing of {}", "draw {}", "show {}", "please draw {}")


def _english(claim, rng, bare=False):
    counted = any(group.count > 1 for group in claim.groups)
    names = [_noun_phrase(group, counted, rng) for group in claim.groups]
    if claim.relation:
        subject, other = names[claim.relation.subject], names[claim.relation.object]
        plain, others = RELATION_WORDS[claim.relation.name]
        where = _mostly(rng, plain, others, 0.4)
        verb = "are" if claim.groups[claim.relation.subject].count > 1 else "is"
        if rng.random() < 0.08 and claim.relation.name in _SIDES:
            front = f"to the {where}" if where in ("left of", "right of") else where
            styled = " " + _pick(rng, STYLE_WORDS[claim.style]) if claim.style else ""
            return f"{front} {other} there {verb} {subject}" + _backdrop(claim, rng) + styled
        body = f"{subject} {where} {other}"
    else:
        verb = "are" if claim.groups[0].count > 1 else "is"
        body = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    body += _backdrop(claim, rng)
    if claim.style:
        body += " " + _pick(rng, STYLE_WORDS[claim.style])
    if bare:
        return body
    return _mostly(rng, body, (*_OPENINGS, f"there {verb} {{}}")).format(body)


def _noun_phrase(group, counted, rng):
    """Such as "a large red circle", "three blue stars"; a lone one among counts is "one blue star"."""
    name = group.shape if group.count == 1 else PLURALS[group.shape]
    if group.shape in FIGURES:  # of people the colour is that of their clothes
        words = [name, "in", group.color] if group.color else [name]
    else:
        words = [w for w in (group.pattern, group.color, name) if w]
    if group.size:
        words.insert(0, _mostly(rng, group.size, SIZE_WORDS[group.size], 0.25))
    if group.count > 1 or (counted and rng.random() < 0.7):
        return " ".join([NUMBERS[group.count], *words])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _backdrop(claim, rng):
    if claim.background is None:
        return ""
    if claim.background in SKIES:
        return " " + _pick(rng, SKY_WORDS[claim.background])
    preposition = _mostly(rng, "on", ("against", "with"), 0.3)
    article = "an" if claim.background[0] in "aeiou" else "a"
    return f" {preposition} {article} {claim.background} background"


# Chinese

ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四"}
ZH_COLORS = dict(zip(COLORS, ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色"), strict=True))
ZH_BACKGROUNDS = {
    "white": "白色",
    "black": "黑色",
    "gray": "灰色",
    "beige": "米色",
    "sky": "蓝天",
    "sunset": "晚霞",
    "meadow": "草地",
}
ZH_SIZES = {"small": "小", "large": "大", "medium": "中等"}
ZH_PATTERNS = {"solid": "实心", "striped": "条纹", "dotted": "圆点", "outlined": "空心"}
ZH_STYLES = {
    "flat": "扁平",
    "ink": "墨线",
    "pixel": "像素画",
    "watercolor": "水彩",
    "anime": "柔光动画",
    "night": "夜景",
}
ZH_SHAPES = {  # measure word and name
    "circle": ("个", "圆形"),
    "square": ("个", "正方形"),
    "triangle": ("个", "三角形"),
    "star": ("颗", "星星"),
    "diamond": ("个", "菱形"),
    "cross": ("个", "十字"),
    "heart": ("颗", "爱心"),
    "ring": ("个", "圆环"),
    "adult": ("个", "大人"),
    "child": ("个", "小孩"),
    "zorn": ("个", "佐恩标志"),
    "vark": ("个", "瓦克标志"),
}
ZH_RELATIONS = {
    "left of": ("左边", ("左侧", "左面")),
    "right of": ("右边", ("右侧", "右面")),
    "above": ("上方", ("上面", "上边")),
    "below": ("下方", ("下面", "下边")),
    "in front of": ("前面", ("前方", "前面")),
    "behind": ("后面", ("后方", "背后")),
}
_ZH_OPENINGS = ("画{}", "请画{}", "画出{}", "图中有{}", "图片里有{}", "一幅画，画着{}")


def _chinese(claim, rng, bare=False):
    names = [_zh_noun_phrase(group) for group in claim.groups]
    if claim.relation:
        subject, other = names[claim.relation.subject], names[claim.relation.object]
        plain, others = ZH_RELATIONS[claim.relation.name]
        side = _mostly(rng, plain, others, 0.4)
        others = (f"{subject}位于{other}{side}", f"{other}的{side}有{subject}")
        body = _mostly(rng, f"{subject}在{other}的{side}", others)
        openings = ("画一幅图：{}", "图中，{}", "请画：{}")
    else:
        body = names[0] if len(names) == 1 else "、".join(names[:-1]) + "和" + names[-1]
        openings = _ZH_OPENINGS
    style = f"，{ZH_STYLES[claim.style]}风格" if claim.style else ""
    if bare:
        return (f"{ZH_BACKGROUNDS[claim.background]}背景上的{body}" if claim.background else body) + style
    if claim.background:
        ground = ZH_BACKGROUNDS[claim.background]
        others = (f"{body}，{ground}背景", f"画{body}，背景是{ground}")
        return _mostly(rng, f"{ground}背景上的{body}", others) + style
    return _mostly(rng, body, openings).format(body) + style


def _zh_noun_phrase(group):
    """Such as "一个红色的大圆形", "三颗蓝色的星星": the size after the colour, since 大红 is itself a colour."""
    return f"{ZH_NUMBERS[group.count]}{ZH_SHAPES[group.shape][0]}{_zh_the(group)}"


# What is said about a picture: of tasks.py's Edits and Questions.


_CAPTION = {
    "en": ("what is in this picture?", "describe the picture", "what do you see?", "write a caption"),
    "zh": ("图里有什么？", "描述这张图", "你看到了什么？", "写一句说明"),
}
_UNDO = {
    "en": ("undo that", "undo the last change", "go back one step", "no, as it was before"),
    "zh": ("撤销", "撤销刚才的修改", "退回上一步", "不，恢复原样"),
}


_FIRST = {
    "en": ("back to the first one", "go back to the first picture", "start again from the first one"),
    "zh": ("回到第一张", "退回到最初的图", "从第一张重新开始"),
}
_CORRECTION = {
    "en": ("no, i meant {}", "no, {} instead", "sorry, {}, not that"),
    "zh": ("不，我是说{}", "不对，应该是{}", "抱歉，要{}"),
}
_MIX = {
    "en": {
        "color": (
            "draw the shape of the first picture in the color of the second",
            "draw the first shape in the second's color",
        ),
        "background": (
            "put the first picture on the background of the second",
            "draw the first one with the second's background",
        ),
        "style": (
            "draw the first picture in the style of the second",
            "the first one, but in the second's style",
        ),
    },
    "zh": {
        "color": ("用第二张的颜色画第一张的形状", "第一张的形状，第二张的颜色"),
        "background": ("把第一张放到第二张的背景上", "画第一张，用第二张的背景"),
        "style": ("用第二张的风格画第一张", "第一张的内容，第二张的风格"),
    },
}
_REMAIN = {
    "en": (
        "draw what remains when the {} are taken away",
        "what is left without the {}? draw it",
        "take away the {}, then draw the rest",
    ),
    "zh": ("拿走{}，画出剩下的", "去掉{}以后还剩什么？画出来", "没有{}的话剩下什么？画下来"),
}
_SUM = {
    "en": {
        "more": "there {} {} and {} more. draw them all",
        "less": "there {} {} and {} {} taken away. draw what is left",
    },
    "zh": {"more": "有{}，又来了{}{}，都画出来", "less": "有{}，拿走了{}{}，画出剩下的"},
}


def mix(kind, language, rng):
    """A wish for the first of two pictures with the `kind` ("color", "background", "style") of the second."""
    return _pick(rng, _of(language, _MIX["en"], _MIX["zh"])[kind])


# What is refused in the world, by its number in the safety policy. The names are invented, as the symbols are (docs/safety.md).
REFUSED = {"artist": 11, "minor_figure": 12, "symbol": 15}
_LIVING = {
    "en": (
        "Oren Valdis",
        "Mirela Toss",
        "Kaito Haranobu",
        "Bram Okonjo",
        "Ines Carvallo",
        "Tove Lindgaard",
        "Rafiq Demsar",
        "Juno Abernathe",
    ),
    "zh": ("罗安白", "沈若岚", "原信海斗", "奥伦·瓦迪斯", "米蕾拉·托斯", "江一苇", "卡瓦洛", "顾南溪"),
}
_STARS = {
    "en": ("Tilly Marlowe", "Jonas Fenwick", "Mia Castellane", "Lin Xiaoman"), "zh": ("林小满", "周一诺", "陈乐桐", "蒂莉·马洛"),
}  # fmt: skip
_SCHOOLS = {
    "en": (
        "impressionism",
        "folk art",
        "art deco",
        "the Bauhaus",
        "old woodcuts",
        "a children's book",
        "cubism",
        "paper collage",
    ),
    "zh": ("印象派", "民间艺术", "装饰艺术", "包豪斯", "老木刻", "儿童绘本", "立体派", "剪纸拼贴"),
}
_BY = {
    "en": ("{}, in the style of {}", "{}, as {} would draw it", "{}, like {}"),
    "zh": ("{}，{}风格", "{}，模仿{}", "{}，像{}那样"),
}
_IN = {
    "en": ("{}, in the style of {}", "{}, as in {}", "{}, like {}"),
    "zh": ("{}，{}风格", "{}，仿照{}", "{}，像{}那样"),
}
_SHOWS = {
    "en": ("{}; the child is {}", "{}, showing {}", "{}, with the face of {}"),
    "zh": ("{}，小孩是{}", "{}，画的是{}", "{}，长着{}的脸"),
}
_ANYONE = {
    "en": ("nobody in particular", "an invented child", "a made-up character"), "zh": ("随便什么人", "虚构的小孩", "编出来的角色"),
}  # fmt: skip
_SORRY = {
    "en": {
        "artist": ("I can't draw in a living artist's own style. I can draw it in a school or an era.",),
        "minor_figure": ("I can't draw a real young person. I can draw an invented child.",),
        "symbol": ("I can't draw that symbol. I can draw another shape.",),
    },
    "zh": {
        "artist": ("我不能模仿在世艺术家的风格，可以用流派或年代来画。",),
        "minor_figure": ("我不能画真实的未成年人，可以画虚构的小孩。",),
        "symbol": ("我不能画这个标志，可以画别的形状。",),
    },
}


def like(wish, kind, refused, language, rng):
    """A wish for a picture, with what must be `refused` of a `kind` of REFUSED, or with what is like it."""
    names = {"artist": (_LIVING, _SCHOOLS), "minor_figure": (_STARS, _ANYONE)}[kind][not refused]
    forms = {"artist": (_BY, _IN), "minor_figure": (_SHOWS, _SHOWS)}[kind][not refused]
    names = _of(language, names["en"], names["zh"])
    return _pick(rng, _of(language, forms["en"], forms["zh"])).format(wish, _pick(rng, names))


def refuse(kind, language, rng):
    """The words of a refusal."""
    return _pick(rng, _of(language, _SORRY["en"], _SORRY["zh"])[kind])


def remain(group, language, rng):
    """A wish for what is left without those that fit the group."""
    things = _plural(group) if language == "en" else _zh_the(group)
    return _pick(rng, _of(language, _REMAIN["en"], _REMAIN["zh"])).format(things)


def arithmetic(group, change, language):
    """So many of a group, and `change` more or, below zero, taken away: a wish to have the result drawn."""
    forms, kind = _of(language, _SUM["en"], _SUM["zh"]), "more" if change > 0 else "less"
    if language == "en":
        verbs = ["is" if count == 1 else "are" for count in (group.count, abs(change))]
        return forms[kind].format(verbs[0], counted(group, language), NUMBERS[abs(change)], verbs[1])
    measure = ZH_SHAPES[group.shape][0]
    return forms[kind].format(_zh_noun_phrase(group), ZH_NUMBERS[abs(change)], measure)


def counted(group, language):
    """Such as "three red circles"."""
    if language == "zh":
        return _zh_noun_phrase(group)
    return f"{NUMBERS[group.count]} {group.color} {group.shape if group.count == 1 else PLURALS[group.shape]}"


def fact(a, b, language):
    """A sentence of plain text about two Groups and how many they are together (4 at most)."""
    total = a.count + b.count
    if language == "zh":
        return f"{_zh_noun_phrase(a)}和{_zh_noun_phrase(b)}一共是{ZH_NUMBERS[total]}个东西。"
    return f"{counted(a, language)} and {counted(b, language)} are {NUMBERS[total]} things."


_DETAIL = {
    "en": ("describe everything in detail", "what is where, exactly?", "describe the picture in full"),
    "zh": ("详细描述这张图", "图里什么在哪里？", "完整地描述图片"),
}


def first(language, rng):
    """A wish to have the first picture back."""
    return _pick(rng, _of(language, _FIRST["en"], _FIRST["zh"]))


def correct(edit, language, rng):
    """A wish to have the last change otherwise: what was to become `edit.value` before."""
    new = edit.value if language == "en" else ZH_COLORS[edit.value]
    return _pick(rng, _of(language, _CORRECTION["en"], _CORRECTION["zh"])).format(new)


def ask_detail(language, rng):
    """A wish for a description of all there is."""
    return _pick(rng, _of(language, _DETAIL["en"], _DETAIL["zh"]))


_ROWS, _COLUMNS = ("upper", "middle", "lower"), ("left", "center", "right")
_ZH_PLACES = (("左上角", "上方", "右上角"), ("左边", "中间", "右边"), ("左下角", "下方", "右下角"))


def describe(scene, language):
    """All that a scene holds, in one sentence for each thing, from the top left on, and one each for background and style."""
    lines = []
    things = sorted(scene.objects, key=lambda o: (int(3 * min(o.y, 0.999)), o.x))
    for thing in things:
        pattern = None if thing.pattern == "solid" else thing.pattern
        group = Group(thing.shape, thing.color, thing.size, 1, pattern)
        row, column = int(3 * min(thing.y, 0.999)), int(3 * min(thing.x, 0.999))
        if language == "en":
            where = "center" if row == column == 1 else f"{_ROWS[row]} {_COLUMNS[column]}"
            lines.append(f"{_the(group)[4:]} in the {where}.")
        else:
            lines.append(f"{_ZH_PLACES[row][column]}：{_zh_the(group)}。")
    if language == "en":
        ground = {"sky": "blue sky"}.get(scene.background, scene.background)
        return " ".join([*lines, f"background: {ground}.", f"style: {scene.style}."])
    return "".join(
        [*lines, f"背景：{ZH_BACKGROUNDS[scene.background]}。", f"风格：{ZH_STYLES[scene.style]}。"]
    )


def ask_caption(language, rng):
    """A wish for a caption."""
    return _pick(rng, _of(language, _CAPTION["en"], _CAPTION["zh"]))


def undo(language, rng):
    """A wish to have the last change taken back."""
    return _pick(rng, _of(language, _UNDO["en"], _UNDO["zh"]))


def wish(edit, language, rng, pronoun=False):
    """The words that ask for an Edit; with `pronoun` its target is "it"."""
    return _of(language, _english_wish, _chinese_wish)(edit, rng, pronoun)


def ask(question, language, rng):
    """The words of a Question."""
    return _of(language, _english_question, _chinese_question)(question, rng)


def answer(value, language):
    """A number, a colour, a size, a background, a pattern, a style, "yes", "no", "the first", "the second" or "neither" as an answer."""
    if language == "en":
        return {0: "none", **NUMBERS}.get(value, value)
    words = {"yes": "是", "no": "否", "the first": "第一张", "the second": "第二张", "neither": "一样多"}
    words |= ZH_COLORS | ZH_BACKGROUNDS | ZH_SIZES | ZH_PATTERNS | ZH_STYLES
    return "零" if value == 0 else words.get(value) or ZH_NUMBERS[value]


def _the(group):
    """Such as "the large red circle", "the child in blue"."""
    words = (group.size, group.pattern, group.color, group.shape)
    if group.shape in FIGURES and group.color:
        words = (group.size, group.shape, "in", group.color)
    return " ".join(["the", *(word for word in words if word)])


def _english_wish(edit, rng, pronoun):
    what = "it" if pronoun else edit.target and _the(edit.target)
    where = ""
    if edit.relation:
        plain, others = RELATION_WORDS[edit.relation]
        where = f" {_mostly(rng, plain, others, 0.4)} {_the(edit.anchor)}"
    new = _noun_phrase(edit.value, False, rng) if edit.kind in ("add", "replace") else edit.value
    forms = {
        "recolor": (
            "make {what} {new}",
            "turn {what} {new}",
            "change {color} to {new}",
            "paint {what} {new}",
        ),
        "resize": ("make {what} {bigger}", "draw {what} {bigger}", "i want {what} {bigger}"),
        "replace": ("replace {what} with {new}", "change {what} into {new}", "put {new} in place of {what}"),
        "remove": ("remove {what}", "take {what} away", "delete {what}", "erase {what}"),
        "add": ("add {new}{where}", "draw {new}{where} too", "put {new}{where}"),
        "move": ("move {what}{where}", "put {what}{where}", "bring {what}{where}"),
        "background": (
            "make the background {new}",
            "change the background to {new}",
            "use a {new} background",
        ),
        "pattern": ("make {what} {new}", "turn {what} {new}", "change {what} to {new}"),
        "style": ("redraw everything {new}", "draw the same {new}", "redraw this picture {new}"),
    }[edit.kind]
    if edit.kind == "style":
        new = _pick(rng, STYLE_WORDS[edit.value])
    if edit.kind == "background" and edit.value in SKIES:
        return _pick(rng, ("show everything {new}", "draw the same {new}")).format(
            new=_pick(rng, SKY_WORDS[edit.value])
        )
    bigger = {"large": "bigger", "small": "smaller"}.get(edit.value if isinstance(edit.value, str) else None)
    color = "its color" if pronoun else f"the color of {what}"
    return _pick(rng, forms).format(what=what, color=color, new=new, where=where, bigger=bigger)


def _english_question(question, rng):
    thing = question.subject
    plural = thing and _plural(thing)
    if question.relation:
        plain, others = RELATION_WORDS[question.relation]
        where = _mostly(rng, plain, others, 0.4)
        return f"is {_the(thing)} {where} {_the(question.other)}?"
    forms = {
        "count": (f"how many {plural} are there?", f"count the {plural}", f"how many {plural} do you see?"),
        "color": (
            f"what color is the {thing and thing.shape}?",
            f"which color does the {thing and thing.shape} have?",
        ),
        "size": (f"is {thing and _the(thing)} small or large?", f"what size is {thing and _the(thing)}?"),
        "exists": (
            f"is there {_noun_phrase(thing, False, rng) if thing else ''}?",
            f"do you see any {plural}?",
        ),
        "ground": ("what color is the background?", "which color does the background have?"),
        "pattern": (
            f"what pattern does the {thing and thing.shape} have?",
            f"is the {thing and thing.shape} solid, striped, dotted or outlined?",
        ),
        "style": ("what style is the picture in?", "in which style is it drawn?"),
        "more": (
            f"which picture has more {plural}?",
            f"are there more {plural} in the first picture or in the second?",
        ),
        "both": (f"do both pictures show {plural}?", f"are there {plural} in both pictures?"),
    }[question.kind]
    return _pick(rng, forms)


def _plural(group):
    """Such as "red circles", "children in blue"; "things" of any shape."""
    name = PLURALS[group.shape] if group.shape else "things"
    if group.shape in FIGURES and group.color:
        return f"{name} in {group.color}"
    return " ".join(word for word in (group.color, name) if word)


def _zh_the(group):
    """Such as "红色的大圆形", "穿红色衣服的小孩"."""
    color = f"{ZH_COLORS[group.color]}的" if group.color else ""
    if group.color and group.shape in FIGURES:
        color = f"穿{ZH_COLORS[group.color]}衣服的"
    size = ZH_SIZES.get(group.size, "") + (
        "大小的" if group.size == "medium" else "的" if group.size and group.shape in FIGURES else ""
    )
    name = ZH_SHAPES[group.shape][1] if group.shape else "东西"
    return f"{color}{size}{ZH_PATTERNS.get(group.pattern, '')}{name}"


def _chinese_wish(edit, rng, pronoun):
    what = "它" if pronoun else edit.target and _zh_the(edit.target)
    side = ""
    if edit.relation:
        plain, others = ZH_RELATIONS[edit.relation]
        side = f"{_zh_the(edit.anchor)}的{_mostly(rng, plain, others, 0.4)}"
    if edit.kind in ("add", "replace"):
        new = _zh_noun_phrase(edit.value)
    else:
        new = (ZH_COLORS | ZH_BACKGROUNDS | ZH_PATTERNS | ZH_STYLES).get(edit.value)
    bigger = {"large": "大", "small": "小"}.get(edit.value if isinstance(edit.value, str) else None)
    forms = {
        "recolor": ("把{what}变成{new}", "把{what}改成{new}", "把{what}涂成{new}"),
        "resize": ("把{what}变{bigger}", "让{what}{bigger}一些", "把{what}画{bigger}一点"),
        "replace": ("把{what}换成{new}", "用{new}代替{what}", "把{what}改成{new}"),
        "remove": ("去掉{what}", "删除{what}", "把{what}擦掉", "把{what}拿走"),
        "add": ("在{side}加{new}", "在{side}画{new}") if side else ("加{new}", "再画{new}"),
        "move": ("把{what}移到{side}", "把{what}放到{side}"),
        "background": ("把背景换成{new}", "背景改成{new}", "用{new}背景"),
        "pattern": ("把{what}变成{new}的", "把{what}改成{new}的"),
        "style": ("改成{new}风格", "用{new}风格重画", "换成{new}风格"),
    }[edit.kind]
    return _pick(rng, forms).format(what=what, new=new, side=side, bigger=bigger)


def _chinese_question(question, rng):
    thing = question.subject
    name = thing and _zh_the(thing)
    if question.relation:
        plain, others = ZH_RELATIONS[question.relation]
        return f"{name}在{_zh_the(question.other)}的{_mostly(rng, plain, others, 0.4)}吗？"
    measure = thing and thing.shape and ZH_SHAPES[thing.shape][0]
    forms = {
        "count": (f"有几{measure}{name}？", f"图里有多少{measure}{name}？"),
        "color": (f"{name}是什么颜色？", f"{name}是哪种颜色的？"),
        "size": (f"{name}是大还是小？", f"{name}有多大？"),
        "exists": (f"有{name}吗？", f"图里有没有{name}？"),
        "ground": ("背景是什么颜色？", "背景是哪种颜色？"),
        "pattern": (f"{name}是什么图案？", f"{name}是实心、条纹、圆点还是空心？"),
        "style": ("这张图是什么风格？", "图是用什么风格画的？"),
        "more": (f"哪张图的{name}更多？", f"第一张和第二张，哪张{name}多？"),
        "both": (f"两张图里都有{name}吗？", f"两张图是不是都有{name}？"),
    }[question.kind]
    return _pick(rng, forms)
