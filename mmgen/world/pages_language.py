"""Say pages in words: prompts, captions, questions and wishes, in English and Chinese.

Words that stand on a page are quoted exactly as they are written there, in both languages.
"""

from mmgen.world.language import answer, say
from mmgen.world.pages import Bar, Chart, Comic, Diagram, Page, Poster, kind_of, scene_claim
from mmgen.world.pages_changes import PageEdit
from mmgen.world.scene import Claim, Group, pick

ZH_NUMBERS = ("零", "一", "二", "三", "四", "五")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_ZH_ALIGN = {"left": "左对齐", "center": "居中", "right": "右对齐"}
_ALIGN = {"left": "aligned left", "center": "centered", "right": "aligned right"}


def say_page(page: Page, language: str, rng) -> str:
    """A prompt that states all that is judged of a page; rng picks one of several phrasings."""
    body = describe_page(page, language, rng)
    if language == "en":
        return pick(rng, ("{}", "{}", "draw {}", "please draw {}", "make {}", "a picture of {}")).format(body)
    return pick(rng, ("{}", "{}", "画{}", "请画{}", "做{}", "生成{}")).format(body)


def describe_page(page: Page, language: str, rng) -> str:
    """A caption: all that is judged of a page, as a statement."""
    if language not in ("en", "zh"):
        raise ValueError(f"language: expected one of en, zh; found {language!r}")
    tell = {Poster: _poster, Chart: _chart, Diagram: _diagram, Comic: _comic}[type(page)]
    return tell(page, language, rng)


def say_edit(edit: PageEdit, language: str, rng) -> str:
    """The words that ask for a PageEdit."""
    value = _color(edit.value, language) if edit.kind in ("ink", "board", "bar", "ground") else edit.value
    forms = {
        "en": {
            "words": ('change "{target}" to "{value}"', 'write "{value}" instead of "{target}"', 'replace the words "{target}" with "{value}"'),
            "ink": ("make the letters {value}", "change the color of the letters to {value}", "write it in {value}"),
            "board": ("make the board {value}", "change the board to {value}", "paint the board {value}"),
            "value": ('make the bar "{target}" {value} high', 'set "{target}" to {value}', 'change the value of "{target}" to {value}'),
            "bar": ('make the bar "{target}" {value}', 'change the color of the bar "{target}" to {value}', 'paint the bar "{target}" {value}'),
            "ground": ("make the background {value}", "change the background to {value}"),
        },
        "zh": {
            "words": ("把“{target}”改成“{value}”", "把“{target}”换成“{value}”", "不写“{target}”，写“{value}”"),
            "ink": ("把字改成{value}", "字用{value}", "把文字换成{value}"),
            "board": ("把牌子改成{value}", "牌子用{value}", "把底板换成{value}"),
            "value": ("把“{target}”的数值改成{value}", "把“{target}”改为{value}", "让“{target}”的柱子高{value}"),
            "bar": ("把“{target}”的柱子改成{value}", "“{target}”的柱子用{value}"),
            "ground": ("把背景改成{value}", "背景用{value}"),
        },
    }[language][edit.kind]  # fmt: skip
    return pick(rng, forms).format(target=edit.target, value=value)


def ask_page(page: Page, language: str, rng) -> tuple[str, str]:
    """A question about a page and its answer, a short exact text."""
    ask = {Poster: _ask_poster, Chart: _ask_chart, Diagram: _ask_diagram, Comic: _ask_comic}[type(page)]
    english, chinese, reply = ask(page, language, rng)
    return pick(rng, english if language == "en" else chinese), reply


# ---- parts ------------------------------------------------------------------------------------------


def _quote(text, language):
    return f'"{text}"' if language == "en" else f"“{text}”"


def _list(parts, language):
    if language == "zh":
        return "，".join(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _color(name, language):
    return answer(name, language)


def _a(phrase):
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _name(shape, color, language, rng):
    """Such as "a red circle", "一个红色的圆形"."""
    return say(Claim((Group(shape, color),)), language, rng, bare=True)


def _the(phrase, language):
    """A thing that was named with its article or measure word, once more."""
    return "the " + phrase.split(" ", 1)[1] if language == "en" else phrase[2:]


def _number(n, language):
    return answer(n, language) if language == "en" or n != 2 else "两"


# ---- what is seen -----------------------------------------------------------------------------------


def _poster(page, language, rng):
    ink, board, wall = (_color(c, language) for c in (page.ink, page.board, page.wall))
    lines = [_quote(line, language) for line in page.lines]
    sign = kind_of(page) == "sign"
    if language == "en":
        thing = pick(rng, ("sign", "signboard", "board")) if sign else pick(rng, ("poster", "placard"))
        if len(lines) == 1:
            says = pick(
                rng, ("that says {} in {} letters", "with {} written in {} letters", "with the word {} in {}")
            )
        else:
            says = pick(rng, ("with the lines {} in {} letters", "that says {}, line by line, in {} letters"))
        text = f"{_a(f'{board} {thing}')} {says.format(_list(lines, language), ink)}"
        if not sign:
            text += f", {_ALIGN[page.align]}"
        if page.emblem:
            text += f", under {_name(page.emblem.shape, page.emblem.color, language, rng)}"
        return text + pick(rng, (", on {} wall", ", against {} background")).format(_a(wall))
    thing = pick(rng, ("牌子", "招牌", "告示牌")) if sign else "海报"
    where = pick(rng, ("{}背景上的", "{}墙上的")).format(wall)
    says = pick(rng, ("用{ink}的字写着{text}", "写着{ink}的字{text}", "上面是{ink}的字{text}"))
    count = f"{_number(len(lines), language)}行" if len(lines) > 1 else ""
    says = says.format(ink=ink, text=count + "、".join(lines))
    text = f"{where}一张{board}{thing}，{says}"
    if not sign:
        text += f"，{_ZH_ALIGN[page.align]}"
    if page.emblem:
        text += f"，字的上方有{_name(page.emblem.shape, page.emblem.color, language, rng)}"
    return text


def _chart(page, language, rng):
    ground = _color(page.ground, language)
    if language == "en":
        form = pick(
            rng, ("{label}: {value} ({color})", "{label} {value} in {color}", "{color} {label} = {value}")
        )
        bars = [_bar(form, bar, language) for bar in page.bars]
        title = (
            f" titled {_quote(page.title, language)}" if page.title else pick(rng, ("", " without a title"))
        )
        return f"a bar chart{title} on {_a(ground)} background with the bars {_list(bars, language)}"
    form = pick(
        rng, ("{label}为{value}（{color}）", "{color}的{label}是{value}", "{label}：{value}，{color}")
    )
    bars = "；".join(_bar(form, bar, language) for bar in page.bars)
    title = f"，标题是{_quote(page.title, language)}" if page.title else pick(rng, ("", "，没有标题"))
    return f"一张{ground}背景的柱状图{title}，从左到右的柱子：{bars}"


def _bar(form, bar: Bar, language):
    return form.format(label=_quote(bar.label, language), value=bar.value, color=_color(bar.color, language))


def _diagram(page, language, rng):
    things = [_name(part.shape, part.color, language, rng) for part in page.parts]
    ground = _color(page.ground, language)
    english = pick(rng, ("{} labelled {}", "{} with an arrow from the word {}", "{} called {}"))
    form = english if language == "en" else pick(rng, ("{}标着{}", "{}叫{}", "{}由箭头标注为{}"))
    parts = [
        form.format(thing, _quote(part.label, language))
        for thing, part in zip(things, page.parts, strict=True)
    ]
    link = ""
    if page.link:
        a, b = (_the(things[i], language) for i in page.link)
        link = f", and an arrow from {a} to {b}" if language == "en" else f"，还有一个箭头从{a}指向{b}"
    if language == "en":
        thing = pick(rng, ("diagram", "labelled diagram"))
        return f"a {thing} on {_a(ground)} background: {_list(parts, language)}{link}"
    return f"一张{ground}背景的{pick(rng, ('示意图', '图解'))}：{_list(parts, language)}{link}"


def _comic(page, language, rng):
    columns, rows = page.grid
    panels = []
    for i, panel in enumerate(page.panels):
        scene = say(scene_claim(panel.scene), language, rng, bare=True)
        caption = _quote(panel.caption, language)
        if language == "en":
            panels.append(f"{_ORDINALS[i]} panel: {scene}, caption {caption}")
        else:
            panels.append(f"第{ZH_NUMBERS[i + 1]}格：{scene}，文字{caption}")
    if language == "en":
        shape = {(2, 2): "two rows of two panels"}.get(page.grid) or (
            f"{_number(columns, language)} panels side by side" if rows == 1 else f"{_number(rows, language)} panels, one below the other"
        )  # fmt: skip
        return f"a {pick(rng, ('comic', 'comic strip'))} of {shape}; " + "; ".join(panels)
    shape = {(2, 2): "两行两列四格"}.get(page.grid) or (
        f"横排{_number(columns, language)}格" if rows == 1 else f"竖排{_number(rows, language)}格"
    )
    return f"一幅{shape}的{pick(rng, ('漫画', '连环画', '小漫画'))}。" + "；".join(panels)


# ---- questions: English and Chinese forms, and the answer -------------------------------------------


def _ask_poster(page, language, rng):
    name = "sign" if kind_of(page) == "sign" else "poster"
    i = int(rng.random() * len(page.lines))
    if len(page.lines) == 1:
        words = (
            (f"what does the {name} say?", f"what is written on the {name}?", f"read the {name}"),
            ("上面写着什么？", "牌子上写的是什么？", "读出上面的字"),
            page.lines[0],
        )
    else:
        words = (
            (f"what is written on line {_number(i + 1, 'en')}?", f"read the {_ORDINALS[i]} line", f"what does the {_ORDINALS[i]} line say?"),
            (f"第{ZH_NUMBERS[i + 1]}行写着什么？", f"读出第{ZH_NUMBERS[i + 1]}行", f"第{ZH_NUMBERS[i + 1]}行是什么字？"),
            page.lines[i],
        )  # fmt: skip
    return pick(
        rng,
        (
            words,
            words,
            (("what color are the letters?",), ("字是什么颜色？",), _color(page.ink, language)),
            ((f"what color is the {name}?",), ("牌子是什么颜色？",), _color(page.board, language)),
            (("how many lines of words are there?",), ("有几行字？",), _number(len(page.lines), language)),
        ),
    )


def _ask_chart(page, language, rng):
    bar = pick(rng, page.bars)
    q, z = _quote(bar.label, "en"), _quote(bar.label, "zh")
    questions = [
        ((f"how high is bar {q}?", f"what is the value of {q}?"), (f"{z}的数值是多少？", f"柱子{z}有多高？"), str(bar.value)),
        ((f"what color is bar {q}?",), (f"柱子{z}是什么颜色？",), _color(bar.color, language)),
        (("how many bars are there?",), ("有几根柱子？",), str(len(page.bars))),
    ]  # fmt: skip
    for end, english, chinese in ((max, "highest", "最高"), (min, "lowest", "最低")):
        value = end(bar.value for bar in page.bars)
        labels = [bar.label for bar in page.bars if bar.value == value]
        if len(labels) == 1:
            questions.append(
                (
                    (f"which bar is the {english}?", f"which bar is {english}?"),
                    (f"哪根柱子{chinese}？",),
                    labels[0],
                )
            )
    if page.title:
        questions.append((("what is the title of the chart?",), ("图的标题是什么？",), page.title))
    return pick(rng, questions)


def _ask_diagram(page, language, rng):
    i = int(rng.random() * len(page.parts))
    part = page.parts[i]
    name = _name(part.shape, part.color, language, rng)
    the, q, z = _the(name, language), _quote(part.label, "en"), _quote(part.label, "zh")
    questions = [
        ((f"what does the arrow labelled {q} point to?", f"what is labelled {q}?"), (f"标着{z}的箭头指向什么？", f"{z}标的是什么？"), name),
        ((f"what is the label of {the}?", f"which word points to {the}?"), (f"{the}标着什么字？", f"{the}叫什么？"), part.label),
        (("how many labels are there?",), ("有几个标注？",), _number(len(page.parts), language)),
    ]  # fmt: skip
    if page.link:
        a, b = (page.parts[i].label for i in page.link)
        q, z = _quote(a, "en"), _quote(a, "zh")
        questions.append(
            ((f"where does the arrow from the thing labelled {q} lead? give the label",), (f"从{z}出发的箭头指向哪个标注？",), b)
        )  # fmt: skip
    return pick(rng, questions)


def _ask_comic(page, language, rng):
    i = int(rng.random() * len(page.panels))
    panel = page.panels[i]
    scene = say(scene_claim(panel.scene), language, rng, bare=True)
    q, z = _quote(panel.caption, "en"), _quote(panel.caption, "zh")
    nth, zh = _ORDINALS[i], ZH_NUMBERS[i + 1]
    return pick(
        rng,
        (
            (("how many panels are there?", "how many panels does the comic have?"), ("有几格？", "漫画有多少格？"), _number(len(page.panels), language)),
            ((f"what is in the {nth} panel?", f"what does the {nth} panel show?"), (f"第{zh}格里有什么？", f"第{zh}格画着什么？"), scene),
            ((f"what does the {nth} panel say?", f"what is the caption of the {nth} panel?"), (f"第{zh}格写着什么？", f"第{zh}格的文字是什么？"), panel.caption),
            ((f"what is in the panel with the caption {q}?",), (f"写着{z}的那一格里有什么？",), scene),
        ),
    )  # fmt: skip
