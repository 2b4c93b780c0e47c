"""Documents hold what they say they hold, and compare by content."""

import numpy as np
import pytest

from mmgen.document import (
    Document,
    Image,
    Refusal,
    Text,
    Turn,
    caption_to_image,
    edit_image,
    image_to_caption,
)

CODES = np.arange(6).reshape(2, 3)
PIXELS = np.zeros((4, 6, 3), np.uint8)


def test_images_compare_by_content():
    assert Image(codes=CODES) == Image(codes=CODES.astype(np.uint16)) != Image(codes=CODES + 1)
    assert Image(codes=CODES) != Image(codes=CODES.reshape(3, 2))
    assert Image(PIXELS) == Image(PIXELS.copy()) != Image(PIXELS + 1)
    assert Image(PIXELS, CODES) != Image(codes=CODES) and Image(PIXELS, CODES) != Image(PIXELS)
    assert Image(codes=CODES) != Text("a") and Image(codes=CODES) is not None
    assert len({Image(PIXELS, CODES), Image(PIXELS.copy(), CODES.copy()), Image(PIXELS)}) == 2
    assert Image(codes=CODES).codes.dtype == np.int32


def test_documents_compare_by_content():
    make = lambda word: caption_to_image(word, Image(codes=CODES.copy()))
    assert make("a") == make("a") != make("b")
    assert hash(make("a")) == hash(make("a"))


def test_normalised_merges_adjacent_texts_and_drops_empty_ones():
    image = Image(codes=CODES)
    turn = Turn("user", [Text(""), Text("a"), Text(""), Text("b"), image, image, Text("")])
    assert Document([turn, Turn("assistant", [Text("")])]).normalised() == Document(
        [Turn("user", [Text("ab"), image, image]), Turn("assistant")]
    )


def test_the_usual_documents():
    image = Image(codes=CODES)
    assert caption_to_image("a", image).turns == (Turn("user", [Text("a")]), Turn("assistant", [image]))
    assert caption_to_image("a").turns[1] == Turn("assistant")
    assert image_to_caption(image, "a").turns == (Turn("user", [image]), Turn("assistant", [Text("a")]))
    asked = Turn("user", [image, Text("b")])
    assert image_to_caption(image, question="b").turns == (asked, Turn("assistant"))
    assert edit_image(image, "b", image).turns == (asked, Turn("assistant", [image]))
    assert edit_image(image, "a").images() == [image] and edit_image(image, "a").text() == "a"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Text(b"a"), "holds a str, not bytes"),
        (lambda: Text("a\ud800"), "lone surrogate at 1"),
        (lambda: Image(), "needs pixels, codes, or both"),
        (lambda: Image(PIXELS.astype(np.float32)), r"uint8 \[H, W, 3 or 4\], not float32 \[4, 6, 3\]"),
        (lambda: Image(PIXELS[..., :1]), r"not uint8 \[4, 6, 1\]"),
        (lambda: Image(codes=CODES.astype(float)), "codes must be integers"),
        (lambda: Image(codes=np.zeros((0, 3), int)), r"not int64 \[0, 3\]"),
        (lambda: Image(codes=CODES - 1), "found -1 to 4"),
        (lambda: Image(codes=CODES + 2**31), r"must be in \[0, 2\*\*31\)"),
        (lambda: Turn("bot", []), "unknown role 'bot': expected one of system, user, assistant, page"),
        (lambda: Turn("user", Text("a")), "sequence of Text or Image or Refusal, not one Text"),
        (lambda: Turn("user", "a"), "sequence of Text or Image or Refusal, not one str"),
        (lambda: Turn("user", ["a"]), "must be Text or Image or Refusal, not str: 'a'"),
        (lambda: Document(Turn("user")), "sequence of Turn, not one Turn"),
        (lambda: Document([Text("a")]), "must be Turn, not Text"),
    ],
)
def test_what_is_not_a_document_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    "role, parts",
    [
        ("user", [Refusal(0)]),
        ("assistant", [Text("no"), Refusal(0)]),
        ("assistant", [Refusal(0), Image(codes=np.zeros((1, 1), int))]),
        ("assistant", [Refusal(0), Refusal(1)]),
    ],
)
def test_a_refusal_is_what_an_assistant_says_first(role, parts):
    with pytest.raises(ValueError, match="a refusal is the first part"):
        Turn(role, parts)
    assert Turn("assistant", [Refusal(15), Text("no"), Text("!")]).normalised().parts == (
        Refusal(15),
        Text("no!"),
    )


@pytest.mark.parametrize("category", [-1, 16, 1.5, "hate"])
def test_a_refusal_has_a_category_by_number(category):
    with pytest.raises(ValueError, match="a number from 0 to 15"):
        Refusal(category)
