"""What a caption says: the inverse of `world.say(claim, bare=True)`, and whether it is true of a scene.

A caption is analysed by a regular grammar of the sentences that the world speaks, in English and Chinese. One that
does not follow it has no meaning here and counts as wrong.
"""

import dataclasses
import itertools
import re

from mmgen.world import language as words
from mmgen.world.scene import (
    ALL_SIZES,
    BACKGROUNDS,
    COLORS,
    FIGURES,
    PATTERNS,
    SHAPES,
    Claim,
    Group,
    Relation,
    Scene,
    holds,
)

TELLS = ("colored", "sized", "related", "grounded", "styled", "patterned")


def parse(text: str, language: str = "en") -> Claim | None:
    """The claim that a caption makes, or None where it is none of the world's sentences."""
    read = {"en": _english, "zh": _chinese}[language]
    return read(text.strip())


def judge(text: str, scene: Scene, language: str = "en") -> dict[str, bool]:
    """What is right with a caption of a scene: {"understood", "true": all that it says is so, "complete": true, and
    every object is named}, and which of `TELLS` it tells: "colored", "sized": it says that of all it names; "related", "grounded",
    "styled", "patterned": how two things lie, before what, in which style, with what pattern. `complete` is what counts: a caption
    may leave these out, as some of the world's do, but no object."""
    claim = parse(text, language)
    if claim is None:
        return dict.fromkeys(("understood", "true", "complete", *TELLS), False)
    count = sum(group.count for group in claim.groups)
    parts = itertools.combinations(scene.objects, count)
    return {
        "understood": True,
        "true": any(holds(claim, dataclasses.replace(scene, objects=part)) for part in parts),
        "complete": holds(claim, scene),
        "colored": all(group.color for group in claim.groups),
        "sized": all(group.size for group in claim.groups),
        "related": claim.relation is not None,
        "grounded": claim.background is not None,
        "styled": claim.style is not None,
        "patterned": any(group.pattern for group in claim.groups),
    }


def _any(options):
    """A regular expression of any of these texts, the longest first."""
    return "(?:" + "|".join(map(re.escape, sorted(options, key=len, reverse=True))) + ")"


def _bare(pattern):
    """The expression without its groups, to stand in another."""
    return re.sub(r"\((?!\?)", "(?:", pattern)


def _phrases(table):
    """{phrase: name} of a table {name: phrase}, or of phrases in any nesting."""
    flat = lambda each: [each] if isinstance(each, str) else [word for part in each for word in flat(part)]
    return {phrase: name for name, phrases in table.items() for phrase in flat(phrases)}


def _claim(groups, relation, background, style):
    """None where a phrase is none, such as "two circle"."""
    if None in groups:
        return None
    return Claim(tuple(groups), relation and Relation(relation, 0, 1), background, style)


# English

_COUNTS = {"a": 1, "an": 1} | {word: n for n, word in words.NUMBERS.items()}
_SIZES = _phrases({size: (size, words.SIZE_WORDS[size]) for size in ALL_SIZES})
_NOUNS = {(shape, True): shape for shape in (*SHAPES, *FIGURES)} | {
    (word, False): shape for shape, word in words.PLURALS.items()
}
_SIDES = _phrases(words.RELATION_WORDS)
_SKIES = _phrases(words.SKY_WORDS)
_STYLES = _phrases(words.STYLE_WORDS)
_NOUN_PHRASE = (
    f"({_any(_COUNTS)}) (?:({_any(_SIZES)}) )?(?:({_any(PATTERNS)}) )?(?:({_any(COLORS)}) )?"
    f"({_any(noun for noun, _ in _NOUNS)})(?: in ({_any(COLORS)}))?"
)
_THING = _bare(_NOUN_PHRASE)
_BACKDROP = re.compile(
    f"(.+?)(?: (?:(?:on|against|with) an? ({_any(BACKGROUNDS)}) background|({_any(_SKIES)})))?(?: ({_any(_STYLES)}))?"
)
_BESIDE = re.compile(f"({_THING}) ({_any(_SIDES)}) ({_THING})")
_FRONT = re.compile(f"({_any(_SIDES)}) ({_THING}) there (?:is|are) ({_THING})")
_LIST = re.compile(f"{_THING}(?:(?:, {_THING})* and {_THING})?")


def _english(text):
    found = _BACKDROP.fullmatch(text)
    if not found:
        return None
    text, plain, sky, style = found.groups()
    around = plain or (sky and _SKIES[sky]), style and _STYLES[style]
    if found := _BESIDE.fullmatch(text):
        subject, side, other = found.groups()
    elif found := _FRONT.fullmatch(text):
        side, other, subject = found.groups()
    elif _LIST.fullmatch(text):
        return _claim([_group(found) for found in re.finditer(_NOUN_PHRASE, text)], None, *around)
    else:
        return None
    groups = [_group(re.fullmatch(_NOUN_PHRASE, part)) for part in (subject, other)]
    return _claim(groups, _SIDES[side], *around)


def _group(found):
    count, size, pattern, color, noun, clothes = found.groups()
    count = _COUNTS[count]
    shape = _NOUNS.get((noun, count == 1))
    # Of people, and of nothing else, the colour is that of their clothes.
    if shape is None or ((color or pattern) if shape in FIGURES else clothes):
        return None
    return Group(shape, color or clothes, size and _SIZES[size], count, pattern)


# Chinese

_ZH_COUNTS = _phrases(words.ZH_NUMBERS)
ZH_COLORS = _phrases(words.ZH_COLORS)
ZH_SIZES = _phrases(words.ZH_SIZES)
ZH_PATTERNS = _phrases(words.ZH_PATTERNS)
_ZH_NOUNS = {measure + name: shape for shape, (measure, name) in words.ZH_SHAPES.items()}
_ZH_GROUNDS = _phrases(words.ZH_BACKGROUNDS)
ZH_STYLES = _phrases(words.ZH_STYLES)
_ZH_SIDES = _phrases(words.ZH_RELATIONS)
_ZH_NOUN_PHRASE = (
    f"({_any(_ZH_COUNTS)})({_any(measure for measure, _ in words.ZH_SHAPES.values())})"
    f"(?:(穿?)({_any(ZH_COLORS)})((?:衣服)?)的)?(?:({_any(ZH_SIZES)})(?:大小的|的)?)?({_any(ZH_PATTERNS)})?"
    f"({_any(name for _, name in words.ZH_SHAPES.values())})"
)
_ZH_THING = _bare(_ZH_NOUN_PHRASE)
_ZH_AROUND = re.compile(f"(?:({_any(_ZH_GROUNDS)})背景上的)?(.+?)(?:，({_any(ZH_STYLES)})风格)?")
_ZH_BESIDE = re.compile(f"({_ZH_THING})(?:在({_ZH_THING})的|位于({_ZH_THING}))({_any(_ZH_SIDES)})")
_ZH_FRONT = re.compile(f"({_ZH_THING})的({_any(_ZH_SIDES)})有({_ZH_THING})")
_ZH_LIST = re.compile(f"{_ZH_THING}(?:(?:、{_ZH_THING})*和{_ZH_THING})?")


def _chinese(text):
    found = _ZH_AROUND.fullmatch(text)
    if not found:
        return None
    ground, text, style = found.groups()
    around = ground and _ZH_GROUNDS[ground], style and ZH_STYLES[style]
    if found := _ZH_BESIDE.fullmatch(text):
        subject, in_it, at_it, side = found.groups()
        other = in_it or at_it
    elif found := _ZH_FRONT.fullmatch(text):
        other, side, subject = found.groups()
    elif _ZH_LIST.fullmatch(text):
        return _claim([_zh_group(found) for found in re.finditer(_ZH_NOUN_PHRASE, text)], None, *around)
    else:
        return None
    groups = [_zh_group(re.fullmatch(_ZH_NOUN_PHRASE, part)) for part in (subject, other)]
    return _claim(groups, _ZH_SIDES[side], *around)


def _zh_group(found):
    count, measure, worn, color, clothes, size, pattern, name = found.groups()
    shape = _ZH_NOUNS.get(measure + name)
    if shape is None or (color and {bool(worn), bool(clothes)} != {shape in FIGURES}):
        return None
    return Group(
        shape,
        color and ZH_COLORS[color],
        size and ZH_SIZES[size],
        _ZH_COUNTS[count],
        pattern and ZH_PATTERNS[pattern],
    )
