"""Shards on disk: what is written is read, what is unfinished or damaged is never taken for whole."""

import json

import numpy as np
import pytest

from mmgen.data import shards as shards_module
from mmgen.data.packing import DROP_IMAGES, DROP_TEXT
from mmgen.data.shards import DamagedRecord, Shards, Writer, begin, finish, finished, variant_of, write
from mmgen.grammar import Grammar
from tests.conftest import run_python

GRAMMAR = Grammar(pieces=50, max_side=4, codes=100)
LARGE = Grammar(pieces=50, max_side=4, codes=70_000)


def edit(rng, grammar=GRAMMAR):
    """Tokens of an edit: the user shows an image and says something, the assistant shows another."""
    text = rng.integers(0, grammar.pieces, rng.integers(1, 9)).tolist()
    return np.array([
        grammar.bos, grammar.roles["user"], *picture(rng, grammar), *text, grammar.end,
        grammar.roles["assistant"], *picture(rng, grammar), grammar.end, grammar.eos,
    ])  # fmt: skip


def picture(rng, grammar):
    height, width = rng.integers(1, 4, 2)
    codes = rng.integers(0, grammar.codes, height * width) + grammar.code_start
    return [grammar.boi, grammar.h(int(height)), grammar.w(int(width)), *codes.tolist(), grammar.eoi]


def rephrased(rng, tokens, grammar=GRAMMAR):
    """The same edit in other words."""
    is_text = tokens < grammar.pieces
    first = np.flatnonzero(is_text)[0]
    words = rng.integers(0, grammar.pieces, rng.integers(1, 9))
    return np.concatenate([tokens[:first], words, tokens[first + is_text.sum() :]])


def written(path, count=25, grammar=GRAMMAR, **options):
    rng = np.random.default_rng(0)
    documents = [edit(rng, grammar) for _ in range(count)]
    return documents, write(path, iter(documents), grammar, shard_size=10, **options)


@pytest.mark.parametrize("grammar, dtype", [(GRAMMAR, "<u2"), (LARGE, "<i4")])
def test_round_trip(tmp_path, grammar, dtype):
    documents, manifest = written(tmp_path / "s", grammar=grammar, source="world:train", seed=3)
    shards = Shards(tmp_path / "s")
    assert shards.manifest == manifest == json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["shards"] == [10, 10, 5] and manifest["count"] == len(shards) == 25
    assert manifest["tokens"] == sum(map(len, documents)) and manifest["dtype"] == dtype
    assert manifest["longest"] == max(map(len, documents)) and manifest["phrasings"] == 1
    assert shards.grammar == grammar and manifest["grammar_hash"] == grammar.hash
    assert (manifest["source"], manifest["seed"]) == ("world:train", 3)
    for _ in ("from disk", "from memory"):
        for i in (*range(25), 3, 0):
            assert shards.tokens(i).dtype == np.int32
            np.testing.assert_array_equal(shards.tokens(i), documents[i])
        chosen = np.random.default_rng(1).integers(0, 25, 60)
        for i, record in zip(chosen, shards.records(chosen)):
            np.testing.assert_array_equal(record, documents[i])
        shards.preload()
    assert shards._memory
    for i, tokens in enumerate(documents):
        text, images = grammar.guidance_drops(tokens)
        assert shards.lengths[[i]].tolist() == [[[len(tokens), text.sum(), images.sum()]]]
    with pytest.raises(IndexError):
        shards.tokens(25)


def test_lengths_take_the_room_that_they_need(tmp_path):
    g = GRAMMAR
    long = np.array([g.bos, g.roles["page"], *[1] * 70_000, g.end, g.eos])
    shards = _shards(tmp_path / "a", [long])
    assert shards.lengths[:].dtype == np.int32 and shards.lengths[:].tolist() == [[[70_004, 0, 0]]]
    assert shards.tokens(0).tolist() == long.tolist()
    assert _shards(tmp_path / "b", [long[:50]]).lengths[:].dtype == np.uint16


def _shards(path, documents, **options):
    write(path, documents, GRAMMAR, **options)
    return Shards(path)


def test_phrasings_share_their_images(tmp_path):
    rng = np.random.default_rng(0)
    firsts = [edit(rng) for _ in range(12)]
    documents = [[first, *(rephrased(rng, first) for _ in range(k % 3))] for k, first in enumerate(firsts)]
    shards = _shards(tmp_path, documents, phrasings=3)
    for i, document in enumerate(documents):
        record = shards.records([i])[0]
        assert len(record) < sum(map(len, document)) or len(document) == 1
        for phrasing, tokens in enumerate(document):
            text, images = GRAMMAR.guidance_drops(tokens)
            assert shards.lengths[[i]][0, phrasing].tolist() == [len(tokens), text.sum(), images.sum()]
            for bits, dropped in enumerate((text & False, text, images, text | images)):
                found = shards.tokens(i, phrasing * 4 + bits)
                np.testing.assert_array_equal(found, tokens[~dropped])
        assert not shards.lengths[[i]][0, len(document) :].any()
    with pytest.raises(ValueError, match="at most 2"):
        write(tmp_path / "b", documents, GRAMMAR, phrasings=2)


def test_variants_drop_what_guidance_drops():
    tokens = edit(np.random.default_rng(1))
    text, images = GRAMMAR.guidance_drops(tokens)
    assert text.any() and images.any()
    np.testing.assert_array_equal(variant_of(tokens, 0, GRAMMAR), tokens)
    np.testing.assert_array_equal(variant_of(tokens, DROP_TEXT, GRAMMAR), tokens[~text])
    np.testing.assert_array_equal(variant_of(tokens, DROP_IMAGES, GRAMMAR), tokens[~images])
    np.testing.assert_array_equal(
        variant_of(tokens, DROP_TEXT | DROP_IMAGES, GRAMMAR), tokens[~(text | images)]
    )


def test_several_folders_are_one(tmp_path):
    rng = np.random.default_rng(0)
    a, b = [edit(rng) for _ in range(7)], [[edit(rng)] for _ in range(5)]
    b[2].append(rephrased(rng, b[2][0]))
    write(tmp_path / "a", a, GRAMMAR, shard_size=3)
    write(tmp_path / "b", b, GRAMMAR, phrasings=2)
    shards = Shards(tmp_path / "a", tmp_path / "b")
    assert len(shards) == 12 and [part[1:] for part in shards.parts] == [(0, 7), (7, 12)]
    assert len({part.name for part in shards.parts}) == 2
    for i, tokens in enumerate([*a, *(each[0] for each in b)]):
        np.testing.assert_array_equal(shards.tokens(i), tokens)
    np.testing.assert_array_equal(shards.tokens(9, 4), b[2][1])
    assert (shards.lengths[np.array([9, 0])][:, :, 0] > 0).sum(1).tolist() == [2, 1]
    assert len(shards.lengths[2:11]) == 9
    _shards(tmp_path / "c", [edit(rng)], text_hash="other")
    with pytest.raises(ValueError, match="different texts"):
        Shards(tmp_path / "a", tmp_path / "c")


def test_an_unfinished_folder_is_refused_and_can_be_written_again(tmp_path):
    def dies():
        rng = np.random.default_rng(0)
        for _ in range(15):
            yield edit(rng)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", dies(), GRAMMAR, shard_size=4)
    assert (tmp_path / "s/tokens-00002.arrayrecord").exists()
    assert not list((tmp_path / "s").glob("*.tmp"))
    with pytest.raises(ValueError, match="never finished"):
        Shards(tmp_path / "s")
    written(tmp_path / "s", 8, overwrite=True)
    assert len(Shards(tmp_path / "s")) == 8
    names = {"tokens-00000.arrayrecord", "tokens-00000.json", "lengths.npy", "manifest.json"}
    assert {path.name for path in (tmp_path / "s").iterdir()} == names  # nothing stale
    with pytest.raises(FileExistsError, match="overwrite"):
        written(tmp_path / "s")
    two = [edit(np.random.default_rng(0)), np.array([GRAMMAR.bos, GRAMMAR.eos])]
    with pytest.raises(ValueError, match="images, not the same"):
        write(tmp_path / "t", [two], GRAMMAR, phrasings=2)
    written(tmp_path / "s", 12, overwrite=True)
    assert len(Shards(tmp_path / "s")) == 12


def test_shards_are_finished_in_any_order_and_by_anyone(tmp_path):
    rng = np.random.default_rng(0)
    documents = [edit(rng) for _ in range(9)]
    begin(tmp_path, {"job": 1})
    for number in (2, 0, 1):
        assert finished(tmp_path, number) is None
        assert finish(tmp_path, 3, GRAMMAR, 1, lambda found: {"parts": {"x": 9}}) is None
        begin(tmp_path, {"job": 1})  # another process comes
        writer = Writer(tmp_path, number, GRAMMAR)
        for tokens in documents[number * 3 : number * 3 + 3]:
            writer.add([tokens])
        assert writer.finish(start=number * 3) == finished(tmp_path, number)
    with pytest.raises(FileExistsError, match=r"another job \(job differ\)"):
        begin(tmp_path, {"job": 2})
    first = finish(tmp_path, 3, GRAMMAR, 1, lambda found: {"parts": {"x": 9}})
    assert first == finish(
        tmp_path, 3, GRAMMAR, 1, lambda found: {"parts": {"x": 9}}
    )  # once more is harmless
    for i, tokens in enumerate(documents):
        np.testing.assert_array_equal(Shards(tmp_path).tokens(i), tokens)


def test_a_shard_that_is_damaged_before_the_folder_is_finished_is_made_again(tmp_path):
    begin(tmp_path, {"job": 1})
    writer = Writer(tmp_path, 0, GRAMMAR)
    writer.add([edit(np.random.default_rng(0))])
    writer.finish()
    path = tmp_path / "tokens-00000.arrayrecord"
    path.write_bytes(path.read_bytes()[:-1])
    assert finished(tmp_path, 0) is None
    path.unlink()
    assert finished(tmp_path, 0) is None


def test_damage_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Shards(tmp_path / "nowhere")
    written(tmp_path)
    middle = tmp_path / "tokens-00001.arrayrecord"
    data = middle.read_bytes()

    middle.unlink()
    with pytest.raises(ValueError, match="expected .* bytes, found no such file"):
        Shards(tmp_path)
    middle.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="expected .* bytes, found"):
        Shards(tmp_path)

    # Ten records of other lengths, in a file of the right size as far as the manifest knows.
    other = (tmp_path / "tokens-00000.arrayrecord").read_bytes()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    middle.write_bytes(other)
    swapped = {**manifest, "bytes": [len(other) if k == 1 else n for k, n in enumerate(manifest["bytes"])]}
    (tmp_path / "manifest.json").write_text(json.dumps(swapped))
    shards = Shards(tmp_path)
    lengths = shards.lengths[:][:, 0, 0]
    for i in range(25):
        if 10 <= i < 20 and lengths[i] != lengths[i - 10]:
            with pytest.raises(DamagedRecord, match=f"document {i} is damaged"):
                shards.tokens(i)
        else:
            assert len(shards.tokens(i)) == lengths[i]
    shards.preload()
    assert not shards._memory or lengths.sum() == len(shards._memory[0])

    middle.write_bytes(data)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    Shards(tmp_path).preload()
    np.save(tmp_path / "lengths.npy", np.zeros((24, 1, 3), np.int32))
    with pytest.raises(ValueError, match="25 documents"):
        Shards(tmp_path)
    (tmp_path / "lengths.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read"):
        Shards(tmp_path)
    data = np.zeros((25, 1, 3), np.int32)
    np.save(tmp_path / "lengths.npy", data)
    header = (tmp_path / "lengths.npy").read_bytes()
    for place in range(120):  # a header is Python
        (tmp_path / "lengths.npy").write_bytes(header[:place] + b"\n(" + header[place + 2 :])
        try:
            assert Shards(tmp_path).lengths[:].shape == (25, 1, 3)
        except ValueError as error:
            assert "lengths.npy" in str(error)
    for text in ("", "[]", "{", json.dumps({"version": 2})):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            Shards(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
    with pytest.raises(ValueError, match="version 1"):
        Shards(tmp_path)


def test_mutated_shards_give_what_was_written_or_nothing(tmp_path):
    """200 times one file with bytes changed, cut, doubled or zeroed: a record is right, or it is reported."""
    rng = np.random.default_rng(0)
    documents = [edit(rng) for _ in range(900)]
    write(tmp_path, documents, GRAMMAR, shard_size=300)
    path = tmp_path / "tokens-00001.arrayrecord"
    whole = path.read_bytes()
    parts = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the rest is padding
    opened = damaged = right = 0
    for round_ in range(200):
        data = bytearray(whole)
        at, size = int(rng.choice(parts)), int(rng.integers(1, 200))
        match round_ % 5:
            case 0:
                for place in rng.choice(parts, 1 + round_ % 7):
                    data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data = data[:at]
            case 2:
                data[at : at + size] = bytes(len(data[at : at + size]))
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at : at + size] = rng.integers(0, 256, len(data[at : at + size]), np.uint8).tobytes()
        path.write_bytes(data)
        try:
            shards = Shards(tmp_path)
        except ValueError as error:
            assert "damaged" in str(error) and len(data) != len(whole)
            continue
        opened += 1
        if round_ % 2:
            shards.preload()
        for i, record in enumerate(shards.records(np.arange(300, 600)), 300):
            damaged += record is None
            right += record is not None and np.array_equal(record, documents[i])
        assert all(np.array_equal(shards.tokens(i), documents[i]) for i in (0, 299, 600, 899))
    assert damaged + right == 300 * opened and opened > 80 and damaged > 1000 and right > 1000, (
        opened,
        damaged,
        right,
    )


def test_bad_tokens_are_refused(tmp_path):
    for tokens in ([], [[1, 2]], [-1], [GRAMMAR.vocab_size]):
        with pytest.raises(ValueError, match="document 0: expected tokens"):
            write(tmp_path, [np.array(tokens, int)], GRAMMAR, overwrite=True)
    with pytest.raises(ValueError, match="no document"):
        write(tmp_path, [], GRAMMAR, overwrite=True)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob("*.tmp"))


def test_thousands_of_files_may_be_open(monkeypatch):
    asked = []
    monkeypatch.setattr(shards_module.resource, "getrlimit", lambda which: (1024, 1 << 20))
    monkeypatch.setattr(shards_module.resource, "setrlimit", lambda which, limits: asked.append(limits))
    shards_module._may_open(0)
    assert not asked
    shards_module._may_open(5000)
    assert asked == [(6024, 1 << 20)]


def test_too_few_open_files_are_no_damage(tmp_path):
    write(tmp_path, [edit(np.random.default_rng(k)) for k in range(60)], GRAMMAR, shard_size=1)
    code = """
import resource, sys
import numpy as np
from mmgen.data.shards import Shards
shards = Shards(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
try:
    print(sum(record is None for record in shards.records(np.arange(60))))
except OSError as error:
    print(error.strerror)
"""
    assert run_python(code, tmp_path).stdout.strip() == "Too many open files"
