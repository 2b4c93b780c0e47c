"""Pages that differ from others in one thing: what an edit asks for, and what a judge must not let pass."""

from dataclasses import dataclass, replace

from mmgen.world import lettering
from mmgen.world.pages import (
    ALIGNMENTS,
    GRIDS,
    HIGHEST,
    PALETTE,
    TITLE,
    Chart,
    Comic,
    Diagram,
    Page,
    Panel,
    Poster,
    caption_width,
    inks,
    is_held_out,
    kind_of,
    panel_scene,
    random_string,
    same,
    strings,
    widest,
)
from mmgen.world.pages_render import alignment_shows
from mmgen.world.scene import BACKGROUNDS, COLORS, SEEN, SHAPES, pick


@dataclass(frozen=True)
class PageEdit:
    """A change that is asked for. kind: "words" (the words `target` become `value`), "ink" or "board" (of a poster, to the
    color `value`), "value" or "bar" (of the bar labelled `target`, to that height or color), "ground" (to `value`)."""

    kind: str
    value: str | int
    target: str | None = None


def edit_page(rng, page: Page, held_out: bool = False) -> tuple[PageEdit, Page]:
    """A change of a page and the page after it. held_out: new words are held out of training; otherwise they are not."""
    kinds = {Poster: ("words", "words", "ink", "board"), Chart: ("words", "value", "value", "bar", "ground")}
    kind = "words" if held_out else pick(rng, kinds.get(type(page), ("words",)))
    if kind == "board":
        options = [c for c in (BACKGROUNDS if page.emblem else PALETTE) if page.ink in inks(c)]
        options = [c for c in options if c not in (page.board, page.wall)]
        if options:
            color = pick(rng, options)
            return PageEdit(kind, color), replace(page, board=color)
        kind = "ink"
    if kind == "ink":
        color = pick(rng, [c for c in inks(page.board) if c != page.ink])
        return PageEdit(kind, color), replace(page, ink=color)
    if kind == "ground":
        color = pick(rng, [c for c in BACKGROUNDS if c != page.ground])
        return PageEdit(kind, color), replace(page, ground=color)
    if kind in ("value", "bar"):
        i = int(rng.random() * len(page.bars))
        field, options = ("value", range(1, HIGHEST + 1)) if kind == "value" else ("color", COLORS)
        value = pick(rng, [v for v in options if v != getattr(page.bars[i], field)])
        return PageEdit(kind, value, page.bars[i].label), _with_bar(page, i, **{field: value})
    before = strings(page)
    i = int(rng.random() * len(before))
    while (new := random_string(rng, widest(page, i), held_out)) in before:
        pass
    return PageEdit("words", new, before[i]), _with_string(page, i, new)


def _with_bar(page, i, **changes):
    return replace(page, bars=_changed(page.bars, i, **changes))


def _changed(parts, i, **changes):
    return (*parts[:i], replace(parts[i], **changes), *parts[i + 1 :])


def _with_string(page, i, new):
    """The page with another string in the place of its string i."""
    if isinstance(page, Poster):
        return replace(page, lines=(*page.lines[:i], new, *page.lines[i + 1 :]))
    if isinstance(page, Chart):
        if page.title and i == 0:
            return replace(page, title=new)
        return _with_bar(page, i - bool(page.title), label=new)
    if isinstance(page, Diagram):
        return replace(page, parts=_changed(page.parts, i, label=new))
    return replace(page, panels=_changed(page.panels, i, caption=new))


def alter_page(rng, page: Page) -> Page:
    """The page with one thing wrong: a letter, a color, a height, two labels or panels exchanged, one panel less ..."""
    others = {
        "letter": _misspelt,
        "words": lambda rng, page: edit_page(rng, page, is_held_out(strings(page)[0]))[1],
    }
    others |= {
        Poster: {
            "color": _other_colors,
            "order": _other_order,
            "align": _other_align,
            "emblem": _other_emblem,
        },
        Chart: {"value": _other_bar, "order": _other_order, "title": _other_title, "ground": _other_ground},
        Diagram: {
            "thing": _other_thing,
            "labels": _other_labels,
            "link": _other_link,
            "ground": _other_ground,
        },
        Comic: {
            "panel": _other_panel,
            "order": _other_order,
            "count": _other_grid,
            "captions": _other_captions,
        },
    }[type(page)]
    while True:
        other = others[pick(rng, others)](rng, page)
        if other is not None and not same(page, other):
            return other


def _misspelt(rng, page):
    """One letter wrong, missing or too much."""
    before = strings(page)
    i = int(rng.random() * len(before))
    text = before[i]
    at = int(rng.random() * len(text))
    letters = next(
        s for s in (lettering.LATIN, lettering.DIGITS, lettering.HAN, lettering.MARKS) if text[at] in s
    )
    swap = pick(rng, letters)
    change = pick(rng, (swap, swap, swap, "", swap + text[at]))
    new = text[:at] + change + text[at + 1 :]
    if (
        not new
        or new in before
        or "II" in new
        or is_held_out(new) != is_held_out(text)
        or lettering.width(new) > widest(page, i)
    ):
        return None
    return _with_string(page, i, new)


def _other_order(rng, page):
    name = {Poster: "lines", Chart: "bars", Comic: "panels"}[type(page)]
    parts = list(getattr(page, name))
    if len(parts) < 2:
        return None
    i = int(rng.random() * (len(parts) - 1))
    parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return replace(page, **{name: tuple(parts)})


def _other_colors(rng, page):
    name = pick(rng, ("ink", "board", "wall"))
    options = {"ink": inks(page.board), "wall": BACKGROUNDS}.get(
        name, BACKGROUNDS if page.emblem else PALETTE
    )
    other = replace(page, **{name: pick(rng, options)})
    return other if other.ink in inks(other.board) and other.board != other.wall else None


def _other_align(rng, page):
    return (
        None
        if kind_of(page) == "sign" or not alignment_shows(page, 1, 1)
        else replace(page, align=pick(rng, ALIGNMENTS))
    )


def _other_emblem(rng, page):
    if not page.emblem:
        return None
    color, shape = pick(rng, SEEN)
    changes = {"color": color} if rng.random() < 0.5 else {"shape": shape}
    return replace(page, emblem=replace(page.emblem, **changes))


def _other_bar(rng, page):
    i = int(rng.random() * len(page.bars))
    changes = (
        {"color": pick(rng, COLORS)} if rng.random() < 0.3 else {"value": 1 + int(rng.random() * HIGHEST)}
    )
    return _with_bar(page, i, **changes)


def _other_title(rng, page):
    if page.title:
        return replace(page, title=None)
    return replace(page, title=random_string(rng, TITLE, is_held_out(strings(page)[0])))


def _other_ground(rng, page):
    return replace(page, ground=pick(rng, BACKGROUNDS))


def _other_thing(rng, page):
    i = int(rng.random() * len(page.parts))
    changes = {"color": pick(rng, COLORS)} if rng.random() < 0.5 else {"shape": pick(rng, SHAPES)}
    return replace(page, parts=_changed(page.parts, i, **changes))


def _other_labels(rng, page):
    i, j = rng.permutation(len(page.parts))[:2].tolist()
    parts = _changed(page.parts, i, label=page.parts[j].label)
    return replace(page, parts=_changed(parts, j, label=page.parts[i].label))


def _other_link(rng, page):
    if len(page.parts) > 3:
        return None
    first = int(rng.random() * (len(page.parts) - 1))
    return replace(page, link=pick(rng, (None, (first, first + 1), (first + 1, first))))


def _other_panel(rng, page):
    i = int(rng.random() * len(page.panels))
    scene = page.panels[i].scene
    if rng.random() < 0.3:
        return replace(page, panels=_changed(page.panels, i, scene=panel_scene(rng)))
    j = int(rng.random() * len(scene.objects))
    thing = scene.objects[j]
    changes = {"color": pick(rng, COLORS)} if rng.random() < 0.5 else {"shape": pick(rng, SHAPES)}
    objects = (*scene.objects[:j], replace(thing, **changes), *scene.objects[j + 1 :])
    return replace(page, panels=_changed(page.panels, i, scene=replace(scene, objects=objects)))


def _other_captions(rng, page):
    i, j = rng.permutation(len(page.panels))[:2].tolist()
    panels = _changed(page.panels, i, caption=page.panels[j].caption)
    return replace(page, panels=_changed(panels, j, caption=page.panels[i].caption))


def _other_grid(rng, page):
    columns, rows = pick(rng, [g for g in GRIDS if g != page.grid])
    panels = page.panels[: columns * rows]
    while len(panels) < columns * rows:
        held_out = is_held_out(page.panels[0].caption)
        panels += (Panel(panel_scene(rng), random_string(rng, caption_width((columns, rows)), held_out)),)
    if any(lettering.width(panel.caption) > caption_width((columns, rows)) for panel in panels):
        return None
    return Comic(panels, (columns, rows))
