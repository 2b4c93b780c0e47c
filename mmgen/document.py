"""What is said: a document is a list of turns, a turn a role and its parts, a part text, an image or a refusal.

Every task is a document. Text-to-image is one; so are a caption, an edit, a dialogue that keeps
changing an image, a comic, a page of plain text. `grammar.py` says how a document is written as tokens.
"""

import dataclasses

import numpy as np

# Who speaks. A page has no speaker: it is a web page or a story, text and images interleaved.
ROLES = ("system", "user", "assistant", "page")
REFUSALS = 16  # categories of what is refused


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text: any Unicode string, control characters and all."""

    text: str

    def __post_init__(self):
        if not isinstance(self.text, str):
            raise TypeError(f"Text holds a str, not {type(self.text).__name__}: {self.text!r}")
        try:
            self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            # Half of a surrogate pair (broken JSON has them) is no character: nothing can write it.
            where = f"lone surrogate at {error.start} of {self.text!r}"
            raise ValueError(f"Text must be valid Unicode: {where}") from None


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image as pixels, as codes, or as both.

    pixels: uint8 [H, W, 3], or [H, W, 4] with alpha beside the colours as seen over middle gray (see `data.images.ALPHA`
    and `straight`). codes: int32 [h, w], or [h, w, depth] where the quantizer gives
    several codes a patch. Images are equal when both arrays are.
    """

    pixels: np.ndarray | None = None
    codes: np.ndarray | None = None

    def __post_init__(self):
        if self.pixels is None and self.codes is None:
            raise ValueError("Image needs pixels, codes, or both")
        if self.pixels is not None:
            object.__setattr__(self, "pixels", _pixels(self.pixels))
        if self.codes is not None:
            object.__setattr__(self, "codes", _codes(self.codes))

    def __eq__(self, other):
        if not isinstance(other, Image):
            return NotImplemented
        return _same(self.pixels, other.pixels) and _same(self.codes, other.codes)

    def __hash__(self):
        return hash(tuple(None if a is None else (a.shape, a.tobytes()) for a in (self.pixels, self.codes)))

    def __repr__(self):
        shape = lambda a: None if a is None else list(a.shape)
        return f"Image(pixels={shape(self.pixels)}, codes={shape(self.codes)})"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """That a request is not fulfilled, and of which category it is (0 to 15, as a safety policy numbers them). It is the first part of
    an assistant's turn, and texts alone follow, which say so in words."""

    category: int

    def __post_init__(self):
        if not isinstance(self.category, (int, np.integer)) or not 0 <= self.category < REFUSALS:
            raise ValueError(
                f"a refusal's category is a number from 0 to {REFUSALS - 1}, not {self.category!r}"
            )


@dataclasses.dataclass(frozen=True)
class Turn:
    """One speaker's parts, in order."""

    role: str
    parts: tuple[Text | Image | Refusal, ...] = ()

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}: expected one of {', '.join(ROLES)}")
        object.__setattr__(self, "parts", _tuple_of(self.parts, (Text, Image, Refusal), "parts of a turn"))
        refusals = [n for n, part in enumerate(self.parts) if isinstance(part, Refusal)]
        alone = all(isinstance(part, Text) for part in self.parts[1:])
        if refusals and not (refusals == [0] and self.role == "assistant" and alone):
            raise ValueError("a refusal is the first part of an assistant's turn, and texts alone follow it")

    def normalised(self) -> "Turn":
        """The same turn with adjacent texts merged and empty texts dropped."""
        parts = []
        for part in self.parts:
            if isinstance(part, Text) and parts and isinstance(parts[-1], Text):
                parts[-1] = Text(parts[-1].text + part.text)
            elif part != Text(""):
                parts.append(part)
        return Turn(self.role, parts)


@dataclasses.dataclass(frozen=True)
class Document:
    """Turns, in order. Possibly none."""

    turns: tuple[Turn, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "turns", _tuple_of(self.turns, (Turn,), "turns of a document"))

    def normalised(self) -> "Document":
        """The document as decoding gives it back: tokens do not tell where a text ends and another begins."""
        return Document([turn.normalised() for turn in self.turns])

    def images(self) -> list[Image]:
        """All images, in order."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Image)]

    def text(self) -> str:
        """All text, one line for each text part."""
        return "\n".join(part.text for turn in self.turns for part in turn.parts if isinstance(part, Text))


def caption_to_image(prompt: str, image: Image | None = None) -> Document:
    """The user describes, the assistant draws. Without an image, the answer is still to come."""
    return Document([Turn("user", [Text(prompt)]), Turn("assistant", [] if image is None else [image])])


def image_to_caption(image: Image, caption: str = "", question: str = "") -> Document:
    """The user shows an image (and may ask something), the assistant answers in words."""
    return Document([Turn("user", [image, Text(question)]), Turn("assistant", [Text(caption)])]).normalised()


def edit_image(source: Image, instruction: str, image: Image | None = None) -> Document:
    """The user shows an image and says what to change, the assistant draws it anew."""
    answer = [] if image is None else [image]
    return Document([Turn("user", [source, Text(instruction)]), Turn("assistant", answer)])


def _pixels(pixels) -> np.ndarray:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or 0 in pixels.shape:
        raise ValueError(f"pixels must be uint8 [H, W, 3 or 4], not {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _codes(codes) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or codes.ndim not in (2, 3) or 0 in codes.shape:
        found = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"codes must be integers [h, w] or [h, w, depth], not {found}")
    if codes.min() < 0 or codes.max() > np.iinfo(np.int32).max:
        raise ValueError(f"codes must be in [0, 2**31), found {codes.min()} to {codes.max()}")
    return codes.astype(np.int32, copy=False)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _tuple_of(items, kinds: tuple[type, ...], what: str) -> tuple:
    names = " or ".join(kind.__name__ for kind in kinds)
    if isinstance(items, (str, *kinds)):
        raise TypeError(f"{what} must be a sequence of {names}, not one {type(items).__name__}")
    items = tuple(items)
    for item in items:
        if not isinstance(item, kinds):
            raise TypeError(f"{what} must be {names}, not {type(item).__name__}: {item!r}")
    return items
