"""Say a claim in words: several phrasings, the plain one half of the time."""

from mmgen.world.scene import COLORS, SHAPES, Claim

LANGUAGES = ("en", "zh")


def say(claim: Claim, language: str, rng) -> str:
    """A prompt that states the claim, no more and no less; rng: a numpy Generator picks the phrasing."""
    if language == "en":
        return _english(claim, rng)
    if language == "zh":
        return _chinese(claim, rng)
    raise ValueError(f"language: expected one of {', '.join(LANGUAGES)}; found {language!r}")


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


def _english(claim, rng):
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


def _chinese(claim, rng):
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
