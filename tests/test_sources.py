"""Sources: skipping and giving up, the world, filters, several sources, the flags, mutations, the docs."""

import argparse
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from mmgen.commands.common import add_source_flags, source_from
from mmgen.data.images import BadImage, Buckets
from mmgen.data.readers import write_records
from mmgen.data.sources import Several, TooManyBad, documents_of, open_source, texts
from tests.test_readers import all_texts, edit, jsonl, page, tfds_folder
from tests.test_tars import caption, png, samples, write_tar


def with_bad(tmp_path, count, bad):
    members = samples([f"{k:03}" for k in range(count)])
    for k in bad:
        members[f"{k:03}.png"] = members[f"{k:03}.png"][:30] if k % 2 else b"<html>"
    return open_source(f"tars:{write_tar(tmp_path / 'a.tar', members)}", size=(8, 8))


def test_bad_images_are_skipped_and_counted(tmp_path):
    source = with_bad(tmp_path, 200, range(0, 200, 11))
    good = [i for i, _ in documents_of(source)]
    assert good == [i for i in range(200) if i % 11]
    assert source.skipped == {"bad_format": 10, "unreadable": 9}
    with pytest.raises(BadImage, match=r"a\.tar 011\.png"):
        source[11]


def test_gives_up_with_a_report(tmp_path):
    source = with_bad(tmp_path, 300, range(0, 300, 5))
    seen = []
    with pytest.raises(
        TooManyBad, match=r"of 1\d\d documents are bad.*10%.*bad_format \d+.*unreadable \d+.*000\.png"
    ):
        seen += [i for i, _ in documents_of(source)]
    assert sum(1 for _ in documents_of(with_bad(tmp_path, 300, range(0, 300, 5)), max_bad=0.25)) == 240
    assert sum(1 for _ in documents_of(with_bad(tmp_path, 20, range(19)))) == 1  # too few to judge by
    with pytest.raises(TooManyBad, match="60 of 100"):  # although no bad one follows the hundredth
        list(documents_of(with_bad(tmp_path, 150, range(60))))
    with pytest.raises(TooManyBad, match="20 of 20"):
        list(documents_of(with_bad(tmp_path, 20, range(20))))


def test_errors_say_what_to_do(tmp_path):
    for spec, hint in (
        ("tar:x", "tars:x"),
        ("word:train", "world:train"),
        ("world:", "world:SPLIT"),
        ("x", "tars:GLOB"),
    ):
        with pytest.raises(ValueError, match=hint):
            open_source(spec)
    for task, size, hint in (
        ("edit+drawing", (64, 64), "'drawing'"),
        ("edit+style", (32, 32), "style: legible from a short side of 48"),
        ("style", Buckets(64 * 64, 16), "style: legible"),  # some of whose shapes are narrower
    ):
        with pytest.raises(ValueError, match=hint):
            open_source(f"world:train/{task}", size, documents=4)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_source(f"tars:{tmp_path}/*.tar")
    with pytest.raises(ValueError, match="documents=N"):
        open_source("world:train")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="tar_truncated"):
        open_source(f"tars:{tmp_path}/a.tar")


def test_the_world_is_a_source():
    options = dict(size=(32, 24), documents=40, languages={"en": 1, "zh": 3})
    source, again = (
        open_source("world:train", seed=5, **options),
        open_source("world:train", seed=5, **options),
    )
    assert len(source) == 40
    documents = [source[i] for i in range(40)]
    assert [again[i] for i in reversed(range(40))] == documents[::-1]
    assert documents[0].turns[1].parts[0].pixels.shape == (24, 32, 3)
    assert (source.pixels(3) == documents[3].turns[1].parts[0].pixels).all()
    chinese = sum(not caption(document).isascii() for document in documents)
    assert 20 <= chinese <= 39
    assert open_source("world:train", seed=6, **options)[0] != documents[0]
    with pytest.raises(IndexError):
        source[40]


def test_the_world_says_the_same_in_other_words():
    source = open_source("world:train", size=(32, 24), documents=40, languages=("en", "zh"))
    several = 0
    for i in range(40):
        phrased = source.alternatives(i, 6)
        said = [caption(document) for document in phrased]
        assert phrased[0] == source[i] and source.alternatives(i, 6) == phrased
        assert len(set(said)) == len(said) <= 6 and len({text.isascii() for text in said}) == 1
        assert all(document.images()[0] is phrased[0].images()[0] for document in phrased)
        if said[0].isascii():
            names = {group.shape for group in source.item(i).claim.groups}
            assert all(name in text for name in names for text in said)
        several += len(said) > 2
    assert several > 20
    with pytest.raises(ValueError, match="has no fields"):
        open_source("world:train", documents=3, split="test")


# Filters


FIELDS = [{"group": "Food", "n": 1}, {"group": "Flags", "n": 2}, {"group": "Food", "n": 3, "key": "k"}]


def with_fields(kind, folder):
    """A spec whose three documents have FIELDS."""
    if kind == "tars":
        members = {}
        for k, fields in enumerate(FIELDS):
            members |= {f"{k}.png": png(), f"{k}.txt": b"x", f"{k}.json": json.dumps(fields).encode()}
        write_tar(folder / "a.tar", members)
        return f"tars:{folder}/a.tar"
    if kind == "folder":
        for k in range(3):
            (folder / f"{k}.png").write_bytes(png())
        jsonl(
            folder / "metadata.jsonl",
            [{"file_name": f"{k}.png", "text": "x", **f} for k, f in enumerate(FIELDS)],
        )
        return f"folder:{folder}"
    documents = [page(f"text {k}", **fields) for k, fields in enumerate(FIELDS)]
    if kind == "jsonl":
        return f"jsonl:{jsonl(folder / 'a.jsonl', documents)}"
    write_records(folder / "a.records", documents)
    return f"records:{folder}/a.records"


@pytest.mark.parametrize("kind", ["tars", "folder", "jsonl", "records"])
def test_filters_of_every_kind_with_fields(tmp_path, kind):
    spec = with_fields(kind, tmp_path)

    def found(**options):
        source = open_source(spec, **options)
        return [source.fields(i)["n"] for i in range(len(source))]

    assert found(only={"group": "Food"}) == [1, 3] and found(exclude={"n": [1, 2]}) == [3]
    assert found(only={"group": "Food"}, documents=1) == [1]
    for unknown in ({"only": {"shade": "dark"}}, {"exclude": {"shade": "dark"}}):
        with pytest.raises(ValueError, match="no document has a field 'shade'; the fields are: .*group"):
            found(**unknown)
    with pytest.raises(ValueError, match="no_shade"):
        found(split="train", split_by="shade")


@pytest.mark.parametrize("kind", ["tars", "folder", "jsonl", "records", "tfds", "text"])
@pytest.mark.parametrize("by", ["key", "group"])
def test_the_two_sides_of_a_split_are_all_and_disjoint(tmp_path, kind, by):
    documents = [page(f"text {k}", group=k // 2) for k in range(60)]
    options = {"split_by": by, "holdout": 0.3}
    if kind == "tars":
        members = {}
        for k in range(60):
            members |= {
                f"{k}.png": png(),
                f"{k}.txt": f"text {k}".encode(),
                f"{k}.json": b'{"group": %d}' % (k // 2),
            }
        spec = f"tars:{write_tar(tmp_path / 'a.tar', members)}"
    elif kind == "folder":
        spec = f"folder:{tmp_path}"
        rows = [{"file_name": f"{k}.png", "text": f"text {k}", "group": k // 2} for k in range(60)]
        jsonl(tmp_path / "metadata.jsonl", rows)
        for k in range(60):
            (tmp_path / f"{k}.png").write_bytes(png())
    elif kind == "text":
        spec, options["max_chars"] = f"text:{tmp_path}/*.txt", 9
        for k in range(30):
            (tmp_path / f"{k}.txt").write_text(f"text {2 * k}\n\ntext {2 * k + 1}\n")
        options["split_by"] = "file" if by == "group" else by
    elif kind == "tfds":
        tfds_folder(tmp_path, count=60)
        spec, options["data_dir"] = "tfds:mini/train", tmp_path
        options["split_by"] = "name" if by == "group" else by
    elif kind == "jsonl":
        spec = f"jsonl:{jsonl(tmp_path / 'a.jsonl', documents)}"
    else:
        write_records(tmp_path / "a.records", documents)
        spec = f"records:{tmp_path}/a.records"
    whole = set(all_texts(open_source(spec, **options)))
    sides = [
        set(all_texts(open_source(spec, split=split, **options))) - {"红"} for split in ("train", "test")
    ]
    assert sides[0] | sides[1] == whole - {"红"} and not sides[0] & sides[1] and len(whole - {"红"}) == 60
    assert 5 <= len(sides[1]) <= 30
    if by == "group" and kind != "tfds":
        numbers = [{int(text.split()[1]) // 2 for text in side} for side in sides]
        assert not numbers[0] & numbers[1]


def test_a_kind_that_cannot_filter_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="no document has a field 'lang'; the fields are: file"):
        open_source(f"text:{tmp_path}/a.txt", exclude={"lang": "en"})
    with pytest.raises(ValueError, match="has no fields"):
        open_source("world:train", documents=1, only={"lang": "en"})
    with pytest.raises(ValueError, match="has no categories"):
        open_source("jsonl:sample", category="colors")
    for options in ({"documents": 0}, {"holdout": 2, "split": "test"}):
        with pytest.raises(ValueError, match="documents is at least 1|holdout is"):
            open_source("jsonl:sample", **options)
    assert len(open_source("jsonl:sample", documents=2)) == 2


# Several


def test_several_sources_are_one_after_the_other(tmp_path):
    first = open_source("world:train", size=(8, 8), documents=3)
    second = open_source(
        f"more=jsonl:{jsonl(tmp_path / 'a=b.jsonl', [b'{', page('x'), edit(tmp_path)])}", size=(8, 8)
    )
    both = Several([first, second])
    assert both.parts == [("world", 0, 3), ("more", 3, 6)] and len(both) == 6 and both.size == (8, 8)
    assert [i for i, _ in documents_of(both, max_bad=1)] == [0, 1, 2, 4, 5]
    assert both.skipped == {"bad_json": 1}
    assert both[4] == second[1] and both[0] == first[0] and both.texts(5) == second.texts(2)
    assert both.alternatives(5, 2) == second.alternatives(2, 2) and both.fields(5) == {"group": 0}
    assert (both.pixels(5, 1) == second.pixels(2, 1)).all()
    assert pickle.loads(pickle.dumps(both))[5] == second[2]
    for i in (-1, 6):
        with pytest.raises(IndexError):
            both[i]
    with pytest.raises(ValueError, match="differ in size"):
        Several([second, open_source("world:train", size=(9, 8), documents=1)])
    with pytest.raises(ValueError, match="two sources are called 'world': name them, as in"):
        Several([first, first])
    other = open_source("other=world:train", size=(8, 8), documents=3)
    assert Several([other, second]).fingerprint != both.fingerprint == Several([first, second]).fingerprint
    assert Several([both, other]).parts == [("world", 0, 3), ("more", 3, 6), ("other", 6, 9)]
    assert len(list(texts(both))) == 3 + 1 + len(second.texts(2)) and len(list(texts(both, 2))) == 2


# The command line


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_source_flags(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_flags_name_one_source_or_several(tmp_path):
    source = source_from(parsed("--source", "jsonl:sample", "--size", "24x16"))
    assert source.size == (24, 16) and source.parts == [("jsonl", 0, 6)]
    args = parsed("--source", "w=world:valid", "--source", "jsonl:sample", "--documents", 2)
    assert source_from(args).parts == [("w", 0, 2), ("jsonl", 2, 4)] and args.max_bad == 0.1
    spec = with_fields("jsonl", tmp_path)

    def numbers(*flags):
        source = source_from(parsed("--source", spec, *flags))
        return [source.fields(i)["n"] for i in range(len(source))]

    assert numbers("--only", "group=Food") == [1, 3]
    assert numbers("--only", "n=1", "--only", "n=2", "--exclude", "group=Flags") == [1]
    half = ("--source", "jsonl:sample", "--holdout", "0.5", "--split")
    sides = [len(source_from(parsed(*half, side))) for side in ("train", "test")]
    assert sum(sides) == 6
    for flags in (["--size", "3"], ["--only", "x"], ["--holdout", "2"], ["--max-bad", "x"],
                  ["--size", "8x8", "--buckets", "8x8"]):  # fmt: skip
        with pytest.raises(SystemExit):
            parsed("--source", "jsonl:sample", *flags)


def test_sizes_keep_to_the_patch():
    source = source_from(parsed("--source", "jsonl:sample", "--buckets", "32x32"), multiple=8, max_side=64)
    shapes = {image.pixels.shape[:2] for document in source for image in document.images()}
    assert all(h % 8 == w % 8 == 0 and h * w <= 1024 and w > h for h, w in shapes)  # as the 48x32 they are
    world = source_from(
        parsed("--source", "world:train", "--documents", "40", "--buckets", "32x32"), multiple=8
    )
    shapes = {world.pixels(i).shape[:2] for i in range(40)}
    assert len(shapes) > 3 and all(h % 8 == w % 8 == 0 and h * w <= 1024 for h, w in shapes)
    assert all((world[i].images()[0].pixels == world.pixels(i)).all() for i in range(5))
    for size, most in (("30x32", None), ("32x128", 64)):
        with pytest.raises(ValueError, match="multiples of 8"):
            source_from(parsed("--source", "jsonl:sample", "--size", size), multiple=8, max_side=most)


# Anything anybody could have written


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        start, stop = sorted(rng.integers(0, len(data) + 1, 2))
        stop = min(stop, start + 20)
        match rng.integers(4):
            case 0:
                data[start:stop] = b""
            case 1:
                data[start:start] = bytes(rng.choice(list(b'{}[]",:\n\xff\x00 0123'), 3).tolist())
            case 2:
                data[start:start] = data[stop : stop + 40]
            case 3:
                data[start:stop] = rng.integers(0, 256, stop - start, np.uint8).tobytes()
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("kind", ["jsonl", "tars", "folder", "records"])
def test_mutated_inputs_never_crash_and_are_counted(tmp_path, kind):
    rng = np.random.default_rng(7)
    if kind == "jsonl":
        spec, target = (
            f"jsonl:{tmp_path}/a.jsonl",
            jsonl(tmp_path / "a.jsonl", [edit(tmp_path), page("x"), page(["y", "z"])]),
        )
    elif kind == "tars":
        spec, target = f"tars:{tmp_path}/a.tar", write_tar(tmp_path / "a.tar", samples(["00", "01", "02"]))
    elif kind == "records":
        write_records(tmp_path / "a.records", [page("x"), page("y")])
        spec, target = f"records:{tmp_path}/a.records", tmp_path / "a.records"
    else:
        spec = f"folder:{tmp_path}"
        for name in ("a.png", "b.png", "c.png"):
            (tmp_path / name).write_bytes(png())
        rows = [{"file_name": "a.png", "text": "x"}, {"file_name": "b.png", "captions": ["y", "z"]}]
        target = jsonl(tmp_path / "metadata.jsonl", rows)
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/d.png").write_bytes(png())
        (tmp_path / "c.txt").write_text("see")
    original, csv = target.read_bytes(), tmp_path / "sub/metadata.csv"
    opened = 0
    for k in range(70 if kind != "records" else 20):
        target.write_bytes(mutated(original, rng))
        if kind == "folder":
            csv.write_bytes(mutated(b'file_name,text,n\nd.png,"dee, e",1\n', rng))
        try:
            source = open_source(
                spec, size=(8, 8), only={"n": "1"} if kind == "folder" and k % 5 == 0 else None
            )
        except ValueError as error:
            assert "no document is left" in str(error) or "no document has a field" in str(error)
            continue
        opened += 1
        before = sum(source.skipped.values())
        bad = 0
        for i in range(len(source)):
            for use in (source.texts, source.pixels, source.fields):
                try:
                    use(i)
                except BadImage as error:
                    assert re.fullmatch(r"\w{3,20}", error.reason), error
            try:
                source.alternatives(i, 3)
            except BadImage:
                bad += 1
        try:
            good = sum(1 for _ in documents_of(source, max_bad=1))
        except TooManyBad:
            good = 0
        assert good + bad == len(source) and sum(source.skipped.values()) == before + bad
    assert opened > 10 or kind == "records"


# The docs


def test_the_writer_in_the_docs_writes_what_opens(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/sources.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "jsonl" in block]
    assert len(code.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/sources.md", "exec"), {})
    source = open_source("jsonl:documents.jsonl", size=(16, 16))
    documents = dict(documents_of(source, max_bad=0))
    assert len(documents) == len(source) > 1 and not source.skipped
    assert any(document.images() for document in documents.values())
