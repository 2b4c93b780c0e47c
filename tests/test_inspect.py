"""`mmgen tools inspect`: its numbers against counts made one by one, its page, and what it says of damage."""

import base64
import collections
import html.parser
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mmgen.__main__ import TOOLS
from mmgen.data.shards import Shards, write
from mmgen.data.sources import open_source
from mmgen.document import Document, Text, Turn
from mmgen.document import Image as DocumentImage
from mmgen.evals import inspect
from mmgen.grammar import Grammar
from mmgen.models.autoencoders import load_tokenizer
from mmgen.text import Text as TextModel
from tests.conftest import mmgen
from tests.test_shards import GRAMMAR, edit, rephrased


class Page(html.parser.HTMLParser):
    """The words and the pictures of a page; fails where an element is closed that is not open."""

    EMPTY = ("meta", "img", "br", "rect")

    def __init__(self, path):
        super().__init__()
        self.open, self.words, self.images, self.names = [], [], [], collections.Counter()
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.names[name] += 1
        if name not in self.EMPTY or name == "rect":
            self.open.append(name)
        if name == "img":
            data = dict(attributes)["src"].removeprefix("data:image/png;base64,")
            self.images.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)


def several(folder, count=60):
    """Shards of edits in one to three wordings -> the documents, lists of tokens."""
    rng = np.random.default_rng(0)
    firsts = [edit(rng) for _ in range(count)]
    documents = [[first, *(rephrased(rng, first) for _ in range(k % 3))] for k, first in enumerate(firsts)]
    facts = {"skipped": {"no_caption": 3, "bad_png": 1}, "cut": 2}
    write(folder, documents, GRAMMAR, phrasings=3, shard_size=25, **facts)
    return documents


def test_the_tools_are_listed(capsys):
    assert mmgen("tools", "--help") == 0
    listed = capsys.readouterr().out
    assert "usage: mmgen tools TOOL" in listed and all(f"{name} " in listed for name in TOOLS)
    assert mmgen("tools") == 2
    assert mmgen("tools", "inspct") == 2 and "did you mean 'inspect'" in capsys.readouterr().err
    assert mmgen("--help") == 0 and "tools" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        mmgen("tools", "inspect", "--help")
    assert done.value.code == 0 and "mmgen tools inspect" in capsys.readouterr().out


def test_the_numbers_are_right(tmp_path):
    documents = several(tmp_path / "a")
    stats = inspect.statistics(Shards(tmp_path / "a"), row_length=30)
    firsts = [document[0] for document in documents]
    lengths = np.array([len(tokens) for tokens in firsts])
    assert stats["documents"] == 60 and stats["tokens"] == lengths.sum() and stats["files"] == 3
    assert stats["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("a/*.arrayrecord"))
    assert stats["phrasings"] == {"1": 20, "2": 20, "3": 20}
    assert stats["skipped"] == {"no_caption": 3, "bad_png": 1} and stats["cut"] == 2
    (part,) = stats["parts"]
    assert (part["documents"], part["tokens"], part["share"]) == (60, lengths.sum(), 1.0)
    found = stats["lengths"]
    assert (found["shortest"], found["longest"]) == (lengths.min(), lengths.max())
    assert found["mean"] == part["mean"] == pytest.approx(lengths.mean())
    for q, value in found["percentiles"].items():
        assert value == np.percentile(lengths, int(q), method="inverted_cdf")
    assert sum(count for _, _, count in found["histogram"]) == 60
    for low, high, count in found["histogram"]:
        assert count == sum(low <= n <= high for n in lengths)
    assert stats["packing"]["longer"] == (lengths > 30).sum() > 0
    assert 0.5 < stats["packing"]["filled"] <= 1 and stats["packing"]["documents"] <= 60

    kinds, learned = collections.Counter(), collections.Counter()
    turns, images, shapes, codes, pieces = (collections.Counter() for _ in range(5))
    for tokens in firsts:
        role, begun, height = None, 0, None
        for token in tokens.tolist():
            name = GRAMMAR.name(token)
            word = name.split()[0]
            kind = {"piece": "text pieces", "code": "image codes"}.get(word, "marks and roles")
            kind = "sizes" if name[:3] in ("<h:", "<w:") else kind
            if name[1:-1] in GRAMMAR.roles:
                role = name[1:-1]
                turns[role] += 1
            kinds[kind] += 1
            if role == "assistant" and (kind != "marks and roles" or name in ("<end>", "<boi>")):
                learned["text" if name == "<end>" or word == "piece" else "image"] += 1
            begun += name == "<boi>"
            height = int(name[3:-1]) if name.startswith("<h:") else height
            shapes[f"{name[3:-1]}x{height}"] += name.startswith("<w:")
            codes[name] += word == "code"
            pieces[name] += word == "piece"
        images[str(begun)] += 1
    positive = lambda counter: dict(+counter)
    sample = stats["sample"]
    assert (sample["documents"], sample["of"], sample["damaged"]) == (60, 60, 0)
    assert {name: kind["tokens"] for name, kind in sample["kinds"].items()} == kinds
    assert sample["learned"] == learned
    assert sum(kind["learned"] for kind in sample["kinds"].values()) == sum(learned.values())
    assert positive(collections.Counter(sample["turns"])) == turns
    assert sample["images_per_document"] == images and sample["image_shapes"] == positive(shapes)
    assert sample["text"]["used"] == len(+pieces) and sample["text"]["bytes"] is None
    assert sample["codes"]["used"] == len(+codes) and sample["codes"]["of"] == 100
    for name, count in sample["codes"]["common"].items():
        assert count == codes[name]
    assert max(codes.values()) == max(sample["codes"]["common"].values())
    shares = np.array(list((+codes).values())) / codes.total()
    assert sample["codes"]["perplexity"] == pytest.approx(np.prod(shares**-shares))


def test_a_sample_is_a_sample(tmp_path):
    several(tmp_path / "a")
    several(tmp_path / "b", 20)
    shards = Shards(tmp_path / "a", tmp_path / "b")
    some, again, other = (inspect.statistics(shards, sample=30, seed=seed) for seed in (1, 1, 2))
    assert some == again and some["sample"] != other["sample"] and some["lengths"] == other["lengths"]
    assert (some["sample"]["documents"], some["sample"]["of"]) == (30, 80)
    assert sum(some["sample"]["images_per_document"].values()) == 30
    assert "a sample of 30 of 80" in inspect.show(some)
    assert [part["documents"] for part in some["parts"]] == [60, 20]
    assert sum(part["share"] for part in some["parts"]) == pytest.approx(1)
    chosen = inspect.choose(shards, 10)
    assert len(set(chosen)) == 10 and sum(i < 60 for i in chosen) == 5
    assert inspect.choose(shards, 100) == list(range(80)) and inspect.choose(shards, 0) == []
    assert inspect.statistics(shards, row_length=5)["packing"] == {
        "row_length": 5, "rows": 0, "documents": 0, "filled": 0.0, "longer": 80,
    }  # fmt: skip


def test_the_page_shows_what_is_stored(space, tmp_path, capsys):
    """Pictures are those of the source, as the tokenizer gives them back; neither grammar nor shards between."""
    assert mmgen("tools", "inspect", space.shards, "--out", tmp_path, "--documents", 6, "--verify") == 0
    said = capsys.readouterr().out
    assert "verified: all is whole" in said and str(tmp_path / "inspect.html") in said
    facts, page = json.loads((tmp_path / "inspect.json").read_text()), Page(tmp_path / "inspect.html")
    assert facts["damage"] == facts["notes"] == [] and len(facts["shown"]) == 6
    assert facts["sample"]["text"]["bytes"] == 0.0 and facts["documents"] == 200
    source, tokenizer = (
        open_source("world:train", (32, 32), 0, documents=200),
        load_tokenizer(space.tokenizer),
    )
    documents = [source[i] for i in facts["shown"]]
    pixels = np.stack([document.images()[0].pixels for document in documents])
    assert len(page.images) == 6 and len(np.unique(tokenizer.encode(pixels))) > 1
    # Up to a gray level, as the programs are of other batches.
    np.testing.assert_allclose(page.images, tokenizer.decode(tokenizer.encode(pixels)).astype(int), atol=1)
    for document in documents:
        assert document.text() in page.words
    assert (
        page.words.count("64 codes 8x8") == 6 and "http" not in page.source and "<script" not in page.source
    )


def hostile(space, out, codes=lambda k: k * 7 % 1000):
    """Shards with words that would be HTML, of images that are not square."""
    text = TextModel(space.text)
    grammar = Grammar(pieces=text.size, max_side=16, codes=1000)
    image = DocumentImage(codes=np.array([codes(k) for k in range(15)]).reshape(3, 5))
    words = "<script>alert('&amp;')</script>\n\0 \U0001f7e5 </p>"
    document = Document([Turn("user", [image, Text(words)]), Turn("assistant", [Text("<b>so"), image])])
    write(out, [grammar.encode(document, text)] * 3, grammar, text_hash=text.hash)
    return words


def test_words_stay_words(space, tmp_path):
    words = hostile(space, tmp_path / "s")
    shutil.copy(space.text, tmp_path / "s" / "text.model")
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", tmp_path) == 0
    page, facts = Page(tmp_path / "inspect.html"), json.loads((tmp_path / "inspect.json").read_text())
    assert "script" not in page.names and words.replace("\0", "\u2400") in page.words
    pieces = TextModel(space.text).pieces(words) + TextModel(space.text).pieces("<b>so")
    spelt = sum(piece.startswith("<0x") for piece in pieces) / len(pieces)
    assert facts["sample"]["text"]["bytes"] == pytest.approx(spelt) and 0 < spelt < 1
    # Without a tokenizer an image is its codes, as greys.
    assert "tokenizer is missing" in facts["notes"][0] and len(page.images) == 6
    np.testing.assert_array_equal(page.images[0][..., 0], np.arange(15).reshape(3, 5) * 7 * 255 // 999)
    assert any("28 35 42" in " ".join(word.split()) for word in page.words)


def test_pages_stay_small(space, tmp_path, monkeypatch):
    hostile(space, tmp_path / "s")
    monkeypatch.setattr(inspect, "BYTES", 9000)
    monkeypatch.setattr(inspect, "TOKENS", 20)
    monkeypatch.setattr(inspect, "PICTURES", 1)
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", tmp_path) == 0
    page = Page(tmp_path / "inspect.html")
    assert json.loads((tmp_path / "inspect.json").read_text())["shown"] in ([0], [0, 1])
    assert len(page.source.encode()) < 9100 and "more documents" in page.source
    assert "more tokens" in page.source and "[one more image]" in page.source


def test_another_tokenizer_or_text_model_is_an_error(space, tmp_path, capsys):
    shutil.copytree(space.shards, tmp_path / "s")
    path, out = tmp_path / "s" / "manifest.json", tmp_path / "out"
    manifest = json.loads(path.read_text())
    for name, words in (
        ("text_hash", "text.model"),
        ("tokenizer_hash", "tokenizer"),
        ("grammar_hash", "grammar"),
    ):
        path.write_text(json.dumps({**manifest, name: "0" * 12}))
        assert mmgen("tools", "inspect", tmp_path / "s", "--out", out) == 1
        said = capsys.readouterr().err
        assert words in said and "0" * 12 in said and not out.exists()
    small = {**manifest["grammar"], "pieces": manifest["grammar"]["pieces"] - 1}
    facts = {"grammar": small, "grammar_hash": Grammar(**small).hash}
    path.write_text(json.dumps({**manifest, **facts}))
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", out) == 1
    assert f"the shards were written with {small['pieces']}" in capsys.readouterr().err


def test_damage_is_found_and_named(tmp_path, capsys):
    several(tmp_path / "s")
    out = tmp_path / "out"
    path = tmp_path / "s" / "tokens-00001.arrayrecord"
    whole = path.read_bytes()
    data = bytearray(whole)
    record = Shards(tmp_path / "s").records([30])[0].tobytes()
    assert data.count(record) == 1
    data[data.index(record) + 4] ^= 1
    path.write_bytes(data)
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", out, "--verify") == 1
    said = capsys.readouterr().out
    assert "1 of 25 documents: 30 (" in said and "sha256" in said and "tokens-00000" not in said
    # Without --verify it goes on, and says how many it could not read.
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", out, "--documents", 60) == 0
    facts, page = json.loads((out / "inspect.json").read_text()), Page(out / "inspect.html")
    assert facts["sample"]["damaged"] == 1 and facts["sample"]["why"][0].startswith("document 30: ")
    assert "all documents, 1 of them damaged" in capsys.readouterr().out
    assert sum(word.startswith("damaged: cannot be read") for word in page.words) == 1
    assert page.words.count("wording 2") == 40 and page.words.count("wording 3") == 20
    assert len(page.images) == 2 * 59

    path.write_bytes(whole[:-1])
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", out, "--verify") == 1
    assert "its records were not read" in capsys.readouterr().out
    path.write_bytes(whole)
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", out, "--verify") == 0
    path.with_suffix(".json").unlink()
    assert mmgen("tools", "inspect", tmp_path / "s", "--out", out, "--verify") == 1


def test_whole_records_that_are_no_documents_are_damage(tmp_path):
    """Files with the right digest, whose tokens or lengths are not what the grammar makes of them."""
    rng = np.random.default_rng(0)
    good = [edit(rng) for _ in range(4)]
    bad = good[1].copy()
    bad[-1] = GRAMMAR.end
    write(tmp_path, [good[0], bad, good[2], good[3]], GRAMMAR)
    (words,) = inspect.verify(tmp_path)
    assert "1 of 4 documents: 1 (token" in words
    lengths = np.load(tmp_path / "lengths.npy")
    lengths[2, 0, 1] += 1
    np.save(tmp_path / "lengths.npy", lengths)
    (words,) = inspect.verify(tmp_path)
    assert "2 of 4 documents: 1 (token" in words and "2 (phrasing 0 has lengths" in words
    stats = inspect.statistics(Shards(tmp_path))
    assert stats["sample"]["damaged"] == 2 and sum(stats["sample"]["images_per_document"].values()) == 2


def test_what_is_no_finished_folder_of_shards(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    several(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    several(tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{")
    for folder, words in (
        ("nowhere", "no such folder"),
        ("empty", "no folder of shards"),
        ("unfinished", "never finished"),
        ("broken", "is damaged"),
    ):
        for flags in ((), ("--verify",)):
            assert mmgen("tools", "inspect", tmp_path / folder, "--out", tmp_path / "out", *flags) == 1
            assert words in capsys.readouterr().err
    assert mmgen("tools", "inspect", tmp_path / "broken", "--sample", 0) == 1
    assert "--sample" in capsys.readouterr().err and not (tmp_path / "out").exists()
