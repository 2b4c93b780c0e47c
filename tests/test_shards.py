"""Shards on disk, and packing from their lengths."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgen.data.packing import pack
from mmgen.data.shards import DROP_IMAGES, DROP_TEXT, Shards, variant_of, write
from mmgen.grammar import Grammar

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


def written(path, count=25, grammar=GRAMMAR, **options):
    rng = np.random.default_rng(0)
    documents = [edit(rng, grammar) for _ in range(count)]
    return documents, write(path, iter(documents), grammar, shard_size=10, **options)


@pytest.mark.parametrize("grammar, dtype", [(GRAMMAR, "<u2"), (LARGE, "<i4")])
def test_round_trip(tmp_path, grammar, dtype):
    documents, manifest = written(
        tmp_path / "s", grammar=grammar, manifest_extra={"source": "world:train", "seed": 3}
    )
    shards = Shards(tmp_path / "s")
    assert shards.manifest == manifest == json.loads((tmp_path / "s/manifest.json").read_text())
    assert manifest["shards"] == [10, 10, 5] and manifest["count"] == len(shards) == 25
    assert manifest["tokens"] == sum(map(len, documents)) and manifest["dtype"] == dtype
    assert Grammar.from_dict(manifest["grammar"]) == grammar and manifest["grammar_hash"] == grammar.hash
    assert (manifest["source"], manifest["seed"]) == ("world:train", 3)
    for _ in ("from disk", "from memory"):
        for i in (*range(25), 3, 0):
            assert shards.tokens(i).dtype == np.int32
            np.testing.assert_array_equal(shards.tokens(i), documents[i])
        shards.preload()
    for i, tokens in enumerate(documents):
        assert shards.lengths[i].tolist() == [
            len(variant_of(tokens, variant, grammar)) for variant in range(4)
        ]
    with pytest.raises(IndexError):
        shards.tokens(25)


def test_variants_drop_what_guidance_drops():
    tokens = edit(np.random.default_rng(1))
    text, images = GRAMMAR.guidance_drops(tokens)
    assert text.any() and images.any()
    assert variant_of(tokens, 0, GRAMMAR) is tokens
    np.testing.assert_array_equal(variant_of(tokens, DROP_TEXT, GRAMMAR), tokens[~text])
    np.testing.assert_array_equal(variant_of(tokens, DROP_IMAGES, GRAMMAR), tokens[~images])
    np.testing.assert_array_equal(
        variant_of(tokens, DROP_TEXT | DROP_IMAGES, GRAMMAR), tokens[~(text | images)]
    )


def test_counters_in_the_manifest_are_read_at_the_end(tmp_path):
    skipped = {"truncated": 0}

    def documents():
        for _ in range(3):
            skipped["truncated"] += 1
            yield edit(np.random.default_rng(0))

    assert write(tmp_path, documents(), GRAMMAR, manifest_extra={"skipped": skipped})["skipped"] == {
        "truncated": 3
    }


def test_an_unfinished_folder_is_refused_and_can_be_written_again(tmp_path):
    def dies():
        rng = np.random.default_rng(0)
        for _ in range(15):
            yield edit(rng)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", dies(), GRAMMAR, shard_size=4)
    assert (tmp_path / "s/tokens-00002.arrayrecord").exists()
    with pytest.raises(ValueError, match="never finished"):
        Shards(tmp_path / "s")
    written(tmp_path / "s", 8)
    assert len(Shards(tmp_path / "s")) == 8
    assert len(list((tmp_path / "s").glob("*.arrayrecord"))) == 1  # nothing stale
    with pytest.raises(FileExistsError, match="overwrite"):
        written(tmp_path / "s")
    written(tmp_path / "s", 12, overwrite=True)
    assert len(Shards(tmp_path / "s")) == 12


def test_damage_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Shards(tmp_path / "nowhere")
    written(tmp_path)
    middle = tmp_path / "tokens-00001.arrayrecord"
    data = middle.read_bytes()

    middle.unlink()
    with pytest.raises(ValueError, match="expected 10 records, found no such file"):
        Shards(tmp_path)
    middle.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="expected 10 records, found"):
        Shards(tmp_path)
    middle.write_bytes((tmp_path / "tokens-00002.arrayrecord").read_bytes())
    with pytest.raises(ValueError, match="expected 10 records, found 5"):
        Shards(tmp_path)
    middle.write_bytes((tmp_path / "tokens-00000.arrayrecord").read_bytes())  # ten records, of other lengths
    shards = Shards(tmp_path)
    with pytest.raises(ValueError, match="damaged"):
        for i in range(25):
            shards.tokens(i)
    middle.write_bytes(data)
    Shards(tmp_path).preload()

    np.save(tmp_path / "lengths.npy", np.zeros((24, 4), np.int32))
    with pytest.raises(ValueError, match="25 documents"):
        Shards(tmp_path)


def test_bad_tokens_are_refused(tmp_path):
    for tokens in ([], [[1, 2]], [-1], [GRAMMAR.vocab_size]):
        with pytest.raises(ValueError, match="document 0: expected tokens"):
            write(tmp_path, [np.array(tokens, int)], GRAMMAR)
    with pytest.raises(ValueError, match="no document"):
        write(tmp_path, [], GRAMMAR)
    assert not (tmp_path / "manifest.json").exists()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=120), st.integers(1, 60), st.integers(0, 9))
def test_every_document_once_and_no_row_too_long(lengths, window, seed):
    order = np.random.default_rng(seed).permutation(len(lengths))
    plan = pack(lengths, 40, order, window=window)
    assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
    rows = [plan[r] for r in range(len(plan))]
    assert np.concatenate([[], *rows]).tolist() == plan.documents.tolist()
    assert all(0 < sum(lengths[i] for i in row) <= 40 for row in rows)
    again = pack(lengths, 40, order, window=window)
    assert (again.documents == plan.documents).all() and (again.starts == plan.starts).all()
    # Best fit opens a row only for what fits nowhere, so no two rows of a window fit into one.
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    if window >= len(lengths) and len(rows) > 1:
        assert fills[0] + fills[1] > 40


def test_a_window_is_packed_by_itself():
    lengths = np.random.default_rng(0).integers(1, 30, 300)
    first = pack(lengths, 40, np.arange(100), window=100)
    whole = pack(lengths, 40, np.arange(300), window=100)
    assert whole.documents[:100].tolist() == first.documents.tolist()


def test_fill_on_realistic_mixes():
    rng = np.random.default_rng(0)
    captions = rng.integers(78, 105, 20_000)  # 8 x 8 codes and a caption
    parts = (rng.integers(20, 120, 10_000), rng.integers(280, 330, 10_000), rng.integers(500, 2000, 2_000))
    mixed = np.concatenate(parts)  # captions, small images, large images
    skewed = np.clip(rng.lognormal(5, 0.8, 20_000), 10, 2048).astype(int)
    cases = ((captions, 190, 0.95), (captions, 1024, 0.97), (mixed, 2048, 0.99), (skewed, 2048, 0.99))
    for lengths, row_length, least in cases:
        plan = pack(lengths, row_length, rng.permutation(len(lengths)))
        assert lengths.sum() / (len(plan) * row_length) >= least


def test_documents_longer_than_a_row():
    with pytest.raises(
        ValueError, match="2 of 4 documents are longer than a row of 10 tokens.*document 2, has 30"
    ):
        pack([5, 20, 30, 10], 10)
    plan = pack([5, 20, 30, 10], 10, overlong="drop")
    assert sorted(plan.documents.tolist()) == [0, 3] and plan.dropped.tolist() == [1, 2]
    with pytest.raises(ValueError, match="expected at least 1"):
        pack([3, 0], 10)
    with pytest.raises(ValueError, match="overlong"):
        pack([3], 10, overlong="cut")
    assert len(pack([], 10)) == 0
