"""Say a claim in words: several phrasings, the plain one half of the time."""

from mmgen.world.scene import COLORS, SHAPES, Claim

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

_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_PLURALS = {shape: shape + "s" for shape in SHAPES} | {"cross": "crosses"}
_SIZE_WORDS = {"small": ("little", "small"), "large": ("big", "large")}
_RELATION_WORDS = {
    "left of": ("left of", ("to the left of", "on the left of")),
    "right of": ("right of", ("to the right of", "on the right of")),
    "above": ("above", ("over", "higher than")),
    "below": ("below", ("under", "beneath", "lower than")),
}
_OPENINGS = ("a picture of {}", "an image of {}", "a drawing of {}", "draw {}", "show {}", "please draw {}")


def _english(claim, rng, bare=False):
    counted = any(group.count > 1 for group in claim.groups)
    names = [_noun_phrase(group, counted, rng) for group in claim.groups]
    if claim.relation:
        subject, other = names[claim.relation.subject], names[claim.relation.object]
        plain, others = _RELATION_WORDS[claim.relation.name]
        where = _mostly(rng, plain, others, 0.4)
        verb = "are" if claim.groups[claim.relation.subject].count > 1 else "is"
        if rng.random() < 0.08:
            front = f"to the {where}" if where in ("left of", "right of") else where
            return f"{front} {other} there {verb} {subject}" + _backdrop(claim, rng)
        body = f"{subject} {where} {other}"
    else:
        verb = "are" if claim.groups[0].count > 1 else "is"
        body = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    body += _backdrop(claim, rng)
    if bare:
        return body
    return _mostly(rng, body, (*_OPENINGS, f"there {verb} {{}}")).format(body)


def _noun_phrase(group, counted, rng):
    """Such as "a large red circle", "three blue stars"; a lone one among counts is "one blue star"."""
    words = [w for w in (group.color, group.shape if group.count == 1 else _PLURALS[group.shape]) if w]
    if group.size:
        words.insert(0, _mostly(rng, group.size, _SIZE_WORDS[group.size], 0.25))
    if group.count > 1 or (counted and rng.random() < 0.7):
        return " ".join([_NUMBERS[group.count], *words])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _backdrop(claim, rng):
    if claim.background is None:
        return ""
    preposition = _mostly(rng, "on", ("against", "with"), 0.3)
    article = "an" if claim.background[0] in "aeiou" else "a"
    return f" {preposition} {article} {claim.background} background"


# Chinese

_ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四"}
_ZH_COLORS = dict(zip(COLORS, ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "粉色"), strict=True))
_ZH_BACKGROUNDS = {"white": "白色", "black": "黑色", "gray": "灰色", "beige": "米色"}
_ZH_SIZES = {"small": "小", "large": "大"}
_ZH_SHAPES = {  # measure word and name
    "circle": ("个", "圆形"),
    "square": ("个", "正方形"),
    "triangle": ("个", "三角形"),
    "star": ("颗", "星星"),
    "diamond": ("个", "菱形"),
    "cross": ("个", "十字"),
    "heart": ("颗", "爱心"),
    "ring": ("个", "圆环"),
}
_ZH_RELATIONS = {
    "left of": ("左边", ("左侧", "左面")),
    "right of": ("右边", ("右侧", "右面")),
    "above": ("上方", ("上面", "上边")),
    "below": ("下方", ("下面", "下边")),
}
_ZH_OPENINGS = ("画{}", "请画{}", "画出{}", "图中有{}", "图片里有{}", "一幅画，画着{}")


def _chinese(claim, rng, bare=False):
    names = [_zh_noun_phrase(group) for group in claim.groups]
    if claim.relation:
        subject, other = names[claim.relation.subject], names[claim.relation.object]
        plain, others = _ZH_RELATIONS[claim.relation.name]
        side = _mostly(rng, plain, others, 0.4)
        others = (f"{subject}位于{other}{side}", f"{other}的{side}有{subject}")
        body = _mostly(rng, f"{subject}在{other}的{side}", others)
        openings = ("画一幅图：{}", "图中，{}", "请画：{}")
    else:
        body = names[0] if len(names) == 1 else "、".join(names[:-1]) + "和" + names[-1]
        openings = _ZH_OPENINGS
    if bare:
        return f"{_ZH_BACKGROUNDS[claim.background]}背景上的{body}" if claim.background else body
    if claim.background:
        ground = _ZH_BACKGROUNDS[claim.background]
        others = (f"{body}，{ground}背景", f"画{body}，背景是{ground}")
        return _mostly(rng, f"{ground}背景上的{body}", others)
    return _mostly(rng, body, openings).format(body)


def _zh_noun_phrase(group):
    """Such as "一个红色的大圆形", "三颗蓝色的星星": the size after the colour, since 大红 is itself a colour."""
    measure, name = _ZH_SHAPES[group.shape]
    color = f"{_ZH_COLORS[group.color]}的" if group.color else ""
    return f"{_ZH_NUMBERS[group.count]}{measure}{color}{_ZH_SIZES.get(group.size, '')}{name}"


# What is said about a picture: of tasks.py's Edits and Questions.


_CAPTION = {
    "en": ("what is in this picture?", "describe the picture", "what do you see?", "write a caption"),
    "zh": ("图里有什么？", "描述这张图", "你看到了什么？", "写一句说明"),
}
_UNDO = {
    "en": ("undo that", "undo the last change", "go back one step", "no, as it was before"),
    "zh": ("撤销", "撤销刚才的修改", "退回上一步", "不，恢复原样"),
}


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
    """A number, a colour, a size, a background, "yes" or "no" as an answer."""
    if language == "en":
        return {0: "none", **_NUMBERS}.get(value, value)
    yes_no = {"yes": "是", "no": "否"}
    words = yes_no | _ZH_COLORS | _ZH_BACKGROUNDS | _ZH_SIZES
    return "零" if value == 0 else words.get(value) or _ZH_NUMBERS[value]


def _the(group):
    """Such as "the large red circle"."""
    return " ".join(["the", *(word for word in (group.size, group.color, group.shape) if word)])


def _english_wish(edit, rng, pronoun):
    what = "it" if pronoun else edit.target and _the(edit.target)
    where = ""
    if edit.relation:
        plain, others = _RELATION_WORDS[edit.relation]
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
    }[edit.kind]
    bigger = {"large": "bigger", "small": "smaller"}.get(edit.value if isinstance(edit.value, str) else None)
    color = "its color" if pronoun else f"the color of {what}"
    return _pick(rng, forms).format(what=what, color=color, new=new, where=where, bigger=bigger)


def _english_question(question, rng):
    thing = question.subject
    plural = thing and " ".join(word for word in (thing.color, _PLURALS[thing.shape]) if word)
    if question.relation:
        plain, others = _RELATION_WORDS[question.relation]
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
        "ground": ("what color is the background?", "which color is behind?"),
    }[question.kind]
    return _pick(rng, forms)


def _zh_the(group):
    """Such as "红色的大圆形"."""
    color = f"{_ZH_COLORS[group.color]}的" if group.color else ""
    return f"{color}{_ZH_SIZES.get(group.size, '')}{_ZH_SHAPES[group.shape][1]}"


def _chinese_wish(edit, rng, pronoun):
    what = "它" if pronoun else edit.target and _zh_the(edit.target)
    side = ""
    if edit.relation:
        plain, others = _ZH_RELATIONS[edit.relation]
        side = f"{_zh_the(edit.anchor)}的{_mostly(rng, plain, others, 0.4)}"
    if edit.kind in ("add", "replace"):
        new = _zh_noun_phrase(edit.value)
    else:
        new = _ZH_COLORS.get(edit.value) or _ZH_BACKGROUNDS.get(edit.value)
    bigger = {"large": "大", "small": "小"}.get(edit.value if isinstance(edit.value, str) else None)
    forms = {
        "recolor": ("把{what}变成{new}", "把{what}改成{new}", "把{what}涂成{new}"),
        "resize": ("把{what}变{bigger}", "让{what}{bigger}一些", "把{what}画{bigger}一点"),
        "replace": ("把{what}换成{new}", "用{new}代替{what}", "把{what}改成{new}"),
        "remove": ("去掉{what}", "删除{what}", "把{what}擦掉", "把{what}拿走"),
        "add": ("在{side}加{new}", "在{side}画{new}") if side else ("加{new}", "再画{new}"),
        "move": ("把{what}移到{side}", "把{what}放到{side}"),
        "background": ("把背景换成{new}", "背景改成{new}", "用{new}背景"),
    }[edit.kind]
    return _pick(rng, forms).format(what=what, new=new, side=side, bigger=bigger)


def _chinese_question(question, rng):
    thing = question.subject
    name = thing and _zh_the(thing)
    if question.relation:
        plain, others = _ZH_RELATIONS[question.relation]
        return f"{name}在{_zh_the(question.other)}的{_mostly(rng, plain, others, 0.4)}吗？"
    measure = thing and _ZH_SHAPES[thing.shape][0]
    forms = {
        "count": (f"有几{measure}{name}？", f"图里有多少{measure}{name}？"),
        "color": (f"{name}是什么颜色？", f"{name}是哪种颜色的？"),
        "size": (f"{name}是大还是小？", f"{name}有多大？"),
        "exists": (f"有{name}吗？", f"图里有没有{name}？"),
        "ground": ("背景是什么颜色？", "背景是哪种颜色？"),
    }[question.kind]
    return _pick(rng, forms)
