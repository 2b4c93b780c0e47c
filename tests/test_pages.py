"""Pages: what is drawn is what is said, and what is read from pixels is what was drawn."""

import io
import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from mmgen.world import lettering
from mmgen.world.pages import (
    HAN_WORDS,
    KINDS,
    LEAST,
    PALETTE,
    WORDS,
    Diagram,
    Poster,
    inks,
    is_held_out,
    kind_of,
    random_page,
    random_string,
    same,
    strings,
)
from mmgen.world.pages_changes import alter_page, edit_page
from mmgen.world.pages_judge import judge_page, read_page
from mmgen.world.pages_language import ask_page, describe_page, say_edit, say_page
from mmgen.world.pages_render import render_page

SIZES = {kind: ((128, 128), (256, 256), (160, 200)) for kind in KINDS} | {
    "sign": ((64, 64), (128, 128), (96, 200))
}


SOAK = 1000  # pages of a kind


def pages(kind, n, seed=0, held_out=False):
    rng = np.random.default_rng(seed)
    return [random_page(rng, kind, held_out) for _ in range(n)]


def jpeg(pixels, quality=75):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def worn(pixels, seed=0):
    """Blurred and noisy, as a reconstruction of 24 to 29 dB."""
    pixels = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.5)), np.float32)
    return np.clip(pixels + np.random.default_rng(seed).normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)


# Letters


def test_the_font_has_every_character_and_no_two_alike():
    glyphs = [lettering.write(c, 24, 4, 16, (32, 36)) for c in lettering.CHARACTERS]
    assert min(float(glyph.sum()) for glyph in glyphs) > 3
    for a, b in itertools.combinations(glyphs, 2):
        assert ((a - b) ** 2).sum() > 2
    assert lettering.FONT.stat().st_size < 100_000 and (lettering.FONT.parent / "OFL.txt").exists()


@pytest.mark.parametrize("em", [12, 13.3, 19, 41])
def test_a_line_is_read_at_any_size_and_place(em):
    rng = np.random.default_rng(0)
    for _ in range(12):
        text = random_string(rng, 5, False)
        extent = round(1.4 * em), round(lettering.width(text) * em + 12)
        left, middle = 5 + rng.random(), extent[0] / 2 + rng.random() - 0.5
        ink = lettering.write(text, em, left, middle, extent)
        ink += rng.normal(0, 0.05, extent).astype(np.float32)
        line = lettering.read(ink, em, extent[0] / 2)
        assert line.text == text
        assert abs(line.left - left) < 0.06 * em and abs(line.middle - middle) < 0.06 * em + 0.5


def test_writing_covers_as_much_at_any_sub_pixel_place():
    masses = [
        lettering.write("R2好"[:2], 15.3, 4 + dx / 7, 12 + dy / 5, (26, 40)).sum()
        for dx in range(7)
        for dy in range(5)
    ]
    assert max(masses) - min(masses) < 1e-3 * max(masses)


def test_nothing_is_read_where_there_is_no_ink():
    assert lettering.read(np.zeros((20, 60), np.float32), 14, 10) is None


# Strings


def test_held_out_strings_are_a_tenth_and_never_in_training():
    for words in (WORDS, HAN_WORDS):
        assert len(set(words)) == len(words) and set("".join(words)) <= set(lettering.CHARACTERS)
    assert 0.06 < np.mean([is_held_out(word) for word in WORDS]) < 0.14
    for kind in KINDS:
        rng = np.random.default_rng(1)
        for held_out in (False, True):
            for page in pages(kind, 30, held_out=held_out):
                _, after = edit_page(rng, page, held_out)
                for string in (*strings(page), *strings(after), *strings(alter_page(rng, page))):
                    assert is_held_out(string) == held_out


def test_a_page_is_a_function_of_the_seed():
    assert pages("comic", 5) == pages("comic", 5) != pages("comic", 5, seed=1)
    page = pages("poster", 1)[0]
    assert (render_page(page, 128, 160) == render_page(page, 128, 160)).all()


# Judging


@pytest.mark.parametrize("kind", KINDS)
def test_true_pages_are_right_and_altered_ones_wrong(kind):
    rng = np.random.default_rng(2)
    right = worn_right = total = 0
    for i, page in enumerate(pages(kind, 14, seed=3)):
        assert kind_of(page) == kind
        width, height = SIZES[kind][i % 3]
        pixels = render_page(page, width, height)
        right += judge_page(pixels, page).ok
        worn_right += judge_page(jpeg(pixels) if i % 2 else worn(pixels), page).ok
        other = alter_page(rng, page)
        assert not same(page, other)
        if min(width, height) >= LEAST[kind_of(other)]:
            assert not judge_page(render_page(other, width, height), page).ok, (page, other)
        total += 1
    assert right >= total - 1 and worn_right >= total - 2


@pytest.mark.parametrize("kind", KINDS)
def test_other_pictures_are_no_pages(kind):
    rng = np.random.default_rng(0)
    page = pages(kind, 1)[0]
    side = 128
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    drawing = Image.new("RGB", (side, side), "white")
    for _ in range(6):
        points = [tuple(p) for p in rng.integers(0, side, (4, 2)).tolist()]
        ImageDraw.Draw(drawing).polygon(points, tuple(rng.integers(0, 256, 3).tolist()))
    others = [np.full((side, side, 3), value, np.uint8) for value in PALETTE.values()]
    others += [rng.integers(0, 256, (side, side, 3), np.uint8), np.asarray(smooth), np.asarray(drawing)]
    others += [render_page(pages(k, 1, seed=5)[0], side, side) for k in KINDS if k != kind]
    for pixels in others:
        assert not judge_page(pixels, page).ok


def test_words_half_erased_or_of_two_colors_and_dirt_are_faults():
    page = Poster(("HELLO",), "white", "blue", "beige")
    pixels = render_page(page, 128, 128)
    assert judge_page(pixels, page).ok
    erased = pixels.copy()
    erased[40:88, 40:60] = PALETTE["blue"]
    assert not judge_page(erased, page).ok
    mixed = pixels.copy()
    mixed[:, 64:][(mixed[:, 64:] > 200).all(-1)] = PALETTE["yellow"]
    mixed[:, :12], mixed[:, -12:] = pixels[:, :12], pixels[:, -12:]
    assert not judge_page(mixed, page).ok
    dirty = pixels.copy()
    dirty[14:30, 14:30] = PALETTE["red"]
    assert not judge_page(dirty, page).ok


@pytest.mark.parametrize("kind", ["sign", "poster"])
def test_letters_may_fade_to_nothing(kind):
    """At each contrast they are read or are a fault, and at last there are none."""
    read = 0
    for page in pages(kind, 4):
        pixels = render_page(page, 128, 128).astype(np.float32)
        empty = render_page(replace(page, ink=page.board), 128, 128)
        verdicts = [
            judge_page((empty + share * (pixels - empty)).astype(np.uint8), page)
            for share in (1, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0)
        ]
        read += verdicts[0].ok
        assert not any(verdict.ok for verdict in verdicts[-3:])
    assert read >= 3


def test_bad_input_is_an_error():
    page = pages("poster", 1)[0]
    with pytest.raises(ValueError, match="at least 128x128"):
        render_page(page, 64, 128)
    with pytest.raises(ValueError, match="short side of at least 128"):
        read_page(np.zeros((64, 64, 3), np.uint8), "poster")
    with pytest.raises(ValueError, match="uint8"):
        read_page(np.zeros((128, 128, 3)), "poster")
    with pytest.raises(ValueError, match="kind: expected one of"):
        random_page(np.random.default_rng(0), "letter")


def test_the_ink_is_clear_on_every_board():
    for board in PALETTE:
        assert len(inks(board)) >= 2 and board not in inks(board)


# Words


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_phrasing_states_the_words(kind, language):
    rng = np.random.default_rng(0)
    for page in pages(kind, 12):
        said = {say_page(page, language, rng) for _ in range(8)} | {describe_page(page, language, rng)}
        assert len(said) > 2
        for text in said:
            quoted = [f'"{s}"' if language == "en" else f"“{s}”" for s in strings(page)]
            assert all(quote in text for quote in quoted) and "None" not in text
            if isinstance(page, Diagram) and page.link:
                assert "arrow from" in text or "箭头" in text


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", KINDS)
def test_wishes_and_questions_follow_the_page(kind, language):
    rng = np.random.default_rng(0)
    for page in pages(kind, 12):
        edit, after = edit_page(rng, page)
        assert not same(page, after) and kind_of(after) == kind
        words = say_edit(edit, language, rng)
        assert edit.target is None or edit.target in words
        assert "None" not in words
        if edit.kind in ("words", "value"):
            assert str(edit.value) in words
        for _ in range(4):
            question, reply = ask_page(page, language, rng)
            assert question and reply and "None" not in question + reply


def test_what_the_sign_says_is_answered_exactly():
    page = Poster(("OPEN",), "white", "red", "gray")
    answers = {ask_page(page, "en", np.random.default_rng(i)) for i in range(40)}
    assert ("what does the sign say?", "OPEN") in answers and (
        "what color are the letters?",
        "white",
    ) in answers


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_how_often_the_judge_is_right(kind):
    """The table of docs/pages.md; run with -s."""
    n, rng, row = (
        1000,
        np.random.default_rng(7),
        dict.fromkeys(("true", "jpeg", "worn", "altered", "altered jpeg"), 0),
    )
    seconds = others = 0
    for i, page in enumerate(pages(kind, n, seed=8) + pages(kind, n // 10, seed=9, held_out=True)):
        width, height = SIZES[kind][i % 3]
        pixels = render_page(page, width, height)
        start = time.perf_counter()
        row["true"] += judge_page(pixels, page).ok
        seconds += time.perf_counter() - start
        row["jpeg"] += judge_page(jpeg(pixels), page).ok
        row["worn"] += judge_page(worn(pixels, i), page).ok
        other = alter_page(rng, page)
        if min(width, height) >= LEAST[kind_of(other)]:
            others += 1
            pixels = render_page(other, width, height)
            row["altered"] += judge_page(pixels, page).ok
            row["altered jpeg"] += judge_page(jpeg(pixels), page).ok
    total = n + n // 10
    rates = {name: count / (others if "altered" in name else total) for name, count in row.items()}
    print(
        f"\n| {kind} | {' | '.join(f'{rate:.2%}' for rate in rates.values())} | {1e3 * seconds / total:.0f} ms |"
    )
    assert rates["true"] >= 0.995 and rates["altered"] <= 0.005 and rates["altered jpeg"] <= 0.005
    assert rates["jpeg"] >= 0.95 and rates["worn"] >= 0.95


@pytest.mark.parametrize("em", [1.0, 2.0, 3.0])
def test_marks_smaller_than_any_letter_are_read_as_something_or_nothing(em):
    """What a model draws may have any size: a glyph then advances by a pixel or less."""
    ink = np.zeros((8, 12), np.float32)
    ink[3:5, 2:9:2] = 1
    line = lettering.read(ink, em, 4.0)
    assert line is None or isinstance(line.text, str)
