"""Text survives exactly, whatever it holds, and nothing that can be typed is a control token."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmgen.document import Document, Image, Turn, caption_to_image
from mmgen.document import Text as Words
from mmgen.grammar import CONTROL, Grammar
from mmgen.text import SPELT, Text, train

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CAPTIONS = [
    f"{count} {size} {color} {shape} above a {color} star on a white background, 图中有{zh}色的圆形"
    for count in ("a", "two", "three", "four")
    for size in ("large", "small")
    for color, zh in zip(("red", "green", "blue"), "红绿蓝")
    for shape in ("circle", "squares", "hearts")
]
LOOKS_SPECIAL = "<bos> <eos> <|assistant|> <end> <h:3> <s> </s> <unk> <pad> <0x41> ▁ ▅ ⁇".split() + [" ⁇ "]

odd = st.sampled_from([*'"“”', *" ▁▅\t\n\r\0aé红🟥\u200b\ufeff\ufffd\u0301\U0010ffff", *LOOKS_SPECIAL])
anything = st.text() | st.lists(odd).map("".join)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return train(CAPTIONS, 400, tmp_path_factory.mktemp("text") / "text.model")


@given(anything)
@example("".join(LOOKS_SPECIAL))
@example("  two  spaces, a tab\t, a line\r\n, a NUL \0 and an end   ")
def test_every_text_survives(text, words):
    ids = text.encode(words)
    assert all(isinstance(i, int) and 0 < i < text.size for i in ids)  # 0 is <unk>
    assert text.decode(ids) == words
    assert text.decode(np.array(ids, np.int32)) == words


@given(anything, anything)
def test_texts_join(text, first, second):
    assert text.decode(text.encode(first) + text.encode(second)) == first + second


@pytest.mark.parametrize("quoted", ['"STARS"', "“三颗star”", "「large」", "『红 a』", '"▁red"'])
def test_what_is_quoted_is_spelt(text, quoted):
    words, inside = f"a large {quoted} star", quoted[1:-1]
    ids = text.encode(words)
    assert text.decode(ids) == words
    before, after = text.encode(f"a large {quoted[0]}"), text.encode(f"{quoted[-1]} star")
    assert ids == before + [i for character in inside for i in text.encode(character)] + after
    whole = Text(text.model.removesuffix(SPELT))  # a model of before: as its transformer was trained
    assert whole.hash != text.hash and whole.decode(whole.encode(words)) == words
    assert len(whole.encode(quoted)) <= len(text.encode(quoted))
    assert whole.encode('a "large" star') != text.encode('a "large" star')


@pytest.mark.parametrize("words", ['an open " star', 'a "" star', '"' + "star " * 13 + '"', '"large\nstar"'])
def test_what_is_no_lettering_is_not_spelt(text, words):
    whole = Text(text.model.removesuffix(SPELT))
    assert text.encode(words) == whole.encode(words)
    if words.count('"') == 2:  # and what comes after it is
        spelt = [i for part in (words + ' and "', *"large", '"') for i in whole.encode(part)]
        assert text.encode(words + ' and "large"') == spelt


@given(st.lists(st.integers(0, 399)))
def test_all_pieces_decode_to_some_text(text, ids):
    assert isinstance(text.decode(ids), str)


def test_nothing_typed_is_a_control_token(text):
    grammar = Grammar(pieces=text.size, max_side=4, codes=8)
    image = Image(codes=np.zeros((2, 2), int))
    silent = grammar.encode(caption_to_image("", image), text)
    names = [f"<{name}>" for name in CONTROL]
    for typed in [*LOOKS_SPECIAL, *names, "".join(names)]:
        document = caption_to_image(typed, image)
        tokens = grammar.encode(document, text)
        assert np.array_equal(tokens[tokens >= grammar.pieces], silent)
        assert grammar.decode(tokens, text) == document


@given(st.lists(anything, max_size=3))
def test_documents_survive_with_real_pieces(text, parts):
    grammar = Grammar(pieces=text.size, max_side=4, codes=8)
    document = Document([Turn("page", [Words(part) for part in parts])])
    assert grammar.decode(grammar.encode(document, text), text) == document.normalised()


def test_words_of_the_captions_are_single_pieces(text):
    assert text.pieces("three small green hearts") == ["three", "▁small", "▁green", "▁hearts"]
    assert text.pieces("a large red circle above a small blue star") == (
        ["a", "▁large", "▁red", "▁circle", "▁above", "▁a", "▁small", "▁blue", "▁star"]
    )


def test_chinese_characters_stand_alone_unless_joined(text, tmp_path):
    assert text.pieces("红色的圆形") == list("红色的圆形")
    joined = train(CAPTIONS, 450, tmp_path / "joined.model", join_han=True)
    assert len(joined.encode("红色的圆形")) < 5


def test_a_file_is_the_whole_model_and_its_hash(text, tmp_path):
    text.save(tmp_path / "copy.model")
    for again in (Text(tmp_path / "copy.model"), Text(str(tmp_path / "copy.model")), Text(text.model)):
        assert again.hash == text.hash and again.size == text.size == 400
        assert again.encode(CAPTIONS[0]) == text.encode(CAPTIONS[0])


def test_training_is_a_pure_function_of_the_lines(text, tmp_path):
    again = train(iter(CAPTIONS), 400, tmp_path / "a.model")
    assert again.model == text.model == (tmp_path / "a.model").read_bytes()
    assert train(CAPTIONS[1:], 400, tmp_path / "b.model").hash != text.hash


def test_too_few_pieces_names_the_minimum(tmp_path):
    minimum = 257 + len(set("ab "))
    with pytest.raises(ValueError, match=f"need {minimum}"):
        train(["ab", "ba"], minimum - 1, tmp_path / "a.model")
    assert train(["ab", "ba"], minimum, tmp_path / "a.model").size == minimum
    assert train(["ab", "ba"], 10**5, tmp_path / "a.model").size < 300  # little text, few pieces


@pytest.mark.parametrize("lines", [[], [""], ["\n", "\0"]])
def test_no_text_is_an_error(lines, tmp_path):
    with pytest.raises(ValueError, match="no text"):
        train(lines, 1000, tmp_path / "a.model")


def test_odd_lines_are_learned_from_too(tmp_path):
    text = train(["abc\tabc\nabc▁abc▅\0" * 2000], 300, tmp_path / "a.model")  # 30 kB in one line
    assert text.pieces("abc") == ["abc"]


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        Text(tmp_path / "missing.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match="bad.model is not a SentencePiece model"):
            Text(tmp_path / "bad.model")


def test_a_model_that_loses_text_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="loses text"):
        Text(model.getvalue())
