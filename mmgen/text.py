"""Text as SentencePiece ids, without loss: decode(encode(s)) == s for every string of characters.

Byte fallback gives every character a spelling; the identity normaliser, no dummy prefix and no
removal of spaces leave it alone. The model has no bos, eos or pad pieces and no user-defined
symbols: control tokens live in `grammar.py`, where no text can reach them.

What stands in quotation marks is told character by character ("STOP" -> S, T, O, P), because a picture shows words
letter by letter: a transformer that reads them as pieces of several letters has to learn by heart how each of these is
spelt before it can draw one (Liu et al. 2022, "Character-Aware Models Improve Visual Text Rendering", arXiv:2212.10562).

SentencePiece: Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226
"""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

# SentencePiece writes a space as U+2581, so a typed U+2581 would come back as a space. We spell
# that one character in bytes, which decode exactly.
SPACE_MARK = "\u2581"

# Characters that the trainer reserves for itself; it drops whole sentences that hold them. They
# are cut out of the training lines, and byte fallback writes them.
RESERVED = re.compile("[\0\t\r\n\u2581\u2585]")

# Chinese characters, which stand side by side without spaces.
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")

# What is told character by character: up to LETTERING characters of a line in quotation marks. More are speech.
QUOTED = re.compile('"([^"]*)"|“([^”]*)”|「([^」]*)」|『([^』]*)』')
LETTERING = 64

# At the end of a model's file: its text is told so. Field 200 of the protobuf, the first that the format leaves to
# others, so that SentencePiece reads the file as ever. Models without it, and what was trained with them, stay as they were.
SPELT = b"\xc0\x0c\x01"

# What every model must write and read back exactly.
PROBE = " a  large,  Red ①ﬁ\t\n\0 两个 🟥 <s> </s> <unk> <0x41> ▁ "


class Text:
    """A SentencePiece model, held as the bytes of its file.

    Args:
      model: the path of a `.model` file, or its bytes.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a SentencePiece model, or one that loses text (it needs byte fallback, the
        identity normaliser, no dummy prefix and no removal of extra spaces).
    """

    def __init__(self, model: str | Path | bytes):
        name = "the given bytes" if isinstance(model, bytes) else str(model)
        self.model = model if isinstance(model, bytes) else Path(model).read_bytes()
        self._spelt = self.model.endswith(SPELT)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model)
            spelling = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
            self._space_mark = [self._processor.piece_to_id(byte) for byte in spelling]
            found = self.decode(self.encode(PROBE))
        except RuntimeError as error:
            raise ValueError(f"{name} is not a SentencePiece model: {error}") from None
        if found != PROBE:
            raise ValueError(
                f"{name} loses text: it reads {PROBE!r} back as {found!r}. A model needs byte_fallback, "
                "normalization_rule_name=identity, remove_extra_whitespaces=false, add_dummy_prefix=false "
                "(mmgen.text.train makes such models)"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of the pieces of a text, each in [0, size)."""
        ids = []
        for run in _runs(text) if self._spelt else [text]:
            for n, part in enumerate(run.split(SPACE_MARK)):
                ids += self._space_mark if n else []
                ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some pieces. Bytes that are no UTF-8 (a model may say them) read as U+FFFD."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text as people can read them."""
        return [self._processor.id_to_piece(i) for i in self.encode(text)]

    @property
    def size(self) -> int:
        """How many pieces there are."""
        return self._processor.get_piece_size()

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the model's SHA-256: equal for equal models, on any machine."""
        return hashlib.sha256(self.model).hexdigest()[:12]

    def save(self, path: str | Path) -> None:
        """Writes the `.model` file."""
        Path(path).write_bytes(self.model)


def _runs(text):
    """The parts of a text that are encoded each by itself: the characters of what is quoted, and all between."""
    at = 0
    for match in QUOTED.finditer(text):
        start, stop = match.span(match.lastindex)
        if stop - start <= LETTERING and "\n" not in text[start:stop]:
            yield text[at:start]
            yield from text[start:stop]
            at = stop
    yield text[at:]


def train(lines: Iterable[str], pieces: int, path: str | Path, join_han: bool = False) -> Text:
    """Trains a model on lines of text, writes it to `path` and returns it. Same lines, same bytes.

    Byte-pair merges rather than a unigram model: on 5,000 short captions of a small world, 512
    pieces, they take 7 pieces a caption against 13, because the unigram model's first guess at
    the pieces comes from whole repeated sentences.

    Args:
      lines: the text, held in memory; each line counts once.
      pieces: the size aimed at. Little text may give fewer pieces: `Text.size` says how many.
      path: the `.model` file to write.
      join_han: whether a piece may hold several Chinese characters. Shorter on much and varied
        text. On the captions of a small world leave it off: a whole phrase such as a colour and a
        shape would become one piece, and a pair held out of training would be spelt unlike any seen.

    Raises:
      ValueError: there is no text, or `pieces` cannot hold the bytes and every character of it.
    """
    lines = [part for line in lines for part in RESERVED.split(line) if part]
    if not lines:
        raise ValueError("there is no text to train on")
    characters = set().union(*lines)
    minimum = 1 + 256 + len(characters | {" "})  # <unk>, the bytes, the characters
    if pieces < minimum:
        raise ValueError(
            f"{pieces} pieces are too few for this text: <unk>, 256 bytes and its characters need {minimum}"
        )
    if not join_han:
        # A merge needs neighbours: give each Chinese character a line to itself, once.
        lines = [part for line in lines for part in HAN.split(line) if part]
        lines += sorted(character for character in characters if HAN.match(character))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=pieces,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=SPACE_MARK,  # even where no line has a space
        split_digits=True,  # numbers are spelt alike whether they were seen or not
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_surface="\ufffd",
        hard_vocab_limit=False,
        max_sentence_length=1 << 20,  # longer lines would be left out; the default is 4,192 bytes
        num_threads=1,  # more would make the sums, and so the model, depend on the machine
        minloglevel=2,
    )
    text = Text(model.getvalue() + SPELT)
    text.save(path)
    return text
