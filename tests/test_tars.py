"""Tar shards written here: whole, broken, mixed; splits and filters of their records."""

import collections
import io
import json
import pickle
import tarfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from mmgen.data.filters import held_out
from mmgen.data.images import BadImage, Limits
from mmgen.data.sources import TooManyBad, documents_of, open_source
from mmgen.data.tars import tar_members, write_index


def png(color=(200, 30, 30), size=(20, 12)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(keys, **fields):
    members = {}
    for key in keys:
        members[f"{key}.png"] = png((int(key) % 256, 0, 0))
        members[f"{key}.txt"] = f" caption {key}\n".encode()
        members[f"{key}.json"] = json.dumps({"key": key, "base": str(int(key) // 3), **fields}).encode()
    return members


def caption(document):
    return document.turns[0].parts[0].text


def test_reads_captions_and_images_in_sorted_order(tmp_path):
    write_tar(tmp_path / "b.tar", samples(["03", "04"]))
    write_tar(tmp_path / "a.tar", samples(["00", "01", "02"]))
    source = open_source(f"tars:{tmp_path}/*.tar", size=(16, 8))
    assert len(source) == 5 and not source.skipped
    for i, document in documents_of(source):
        user, assistant = document.turns
        assert (user.role, assistant.role) == ("user", "assistant")
        assert caption(document) == f"caption 0{i}"
        assert assistant.parts[0].pixels.shape == (8, 16, 3)
        assert (assistant.parts[0].pixels == (i, 0, 0)).all()
    assert source.pixels(2).shape == (12, 20, 3)
    assert len(open_source(f"tars:{tmp_path}/*.tar", documents=2)) == 2
    assert caption(pickle.loads(pickle.dumps(source))[4]) == "caption 04"


def test_captions_from_json_and_missing_parts(tmp_path):
    write_tar(tmp_path / "a.tar", {
        "dir.v1/a.jpg.png": b"not of ours",
        "dir.v1/b.PNG": png(), "dir.v1/b.json": b'{"caption": "a red box"}',
        "c.txt": b"no image",
        "d.webp": b"",
        "e.png": png(), "e.json": b'{"caption": 7}',
        "f.png": png(), "f.txt": b"\xff\xfe",
        "g.png": png(), "g.json": b"{",
        "h.png": png(), "h.json": b'{"caption": "\\ud800"}',
        "i.png": png(), "i.txt": " 红色的盒子 ".encode(),
    })  # fmt: skip
    source = open_source(f"tars:{tmp_path}/a.tar")
    assert source.skipped == {"no_image": 2}
    good = [caption(document) for _, document in documents_of(source)]
    assert good == ["a red box", "红色的盒子"]
    assert source.skipped == {"no_image": 2, "no_caption": 2, "bad_caption": 2, "bad_json": 1}
    assert source.pixels(2).shape == (12, 20, 3)  # the tokenizer stage needs no caption


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_header_as_tarfile_reads_it(tmp_path, format):
    members = {"short.txt": b"1", f"{'deep/' * 18}name.txt": b"22", "红.txt": b"333", "empty.txt": b""}
    if format != tarfile.USTAR_FORMAT:
        members |= {f"{'x' * 300}.txt": b"4444"}
    path = write_tar(tmp_path / "a.tar", members, format)
    with tarfile.open(path, "a", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    skipped = collections.Counter()
    with open(path, "rb") as file, tarfile.open(path) as tar:
        found = list(tar_members(file, path.stat().st_size, skipped))
        assert found == [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isfile()]
    assert len(found) == len(members) and not skipped


def test_a_truncated_tar_gives_what_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples([f"{k:02}" for k in range(9)]))
    data, image = path.read_bytes(), png((5, 0, 0))
    start = data.index(image)
    path.write_bytes(data[: start + len(image) - 1])
    source = open_source(f"tars:{path}")
    assert len(source) == 5 and source.skipped == {"tar_truncated": 1}
    assert [i for i, _ in documents_of(source)] == list(range(5))

    path.write_bytes(data[: start + len(image)])
    source = open_source(f"tars:{path}")
    assert len(source) == 6 and source.skipped == {"tar_truncated": 1}
    with pytest.raises(BadImage, match="no_caption"):  # its caption was in the part that is lost
        source[5]


def test_a_tar_that_shrinks_or_vanishes_is_bad_not_fatal(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(["00", "01"]))
    source = open_source(f"tars:{path}")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadImage, match=r"truncated: .*a\.tar"):
        source[1]
    path.unlink()
    for use in (source.__getitem__, source.texts, source.pixels, source.fields):
        with pytest.raises(BadImage, match=r"no_file: .*a\.tar record 1"):
            use(1)


def test_a_damaged_header_ends_a_tar_and_is_counted(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(["00", "01", "02"]))
    data = bytearray(path.read_bytes())
    data[data.index(b"01.txt") + 2] ^= 1
    path.write_bytes(data)
    source = open_source(f"tars:{path}")
    assert len(source) == 2 and source.skipped == {"tar_corrupt": 1}


def test_mutated_tars_neither_crash_nor_hang(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples([f"{k:02}" for k in range(6)]))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 12):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        try:
            source = open_source(f"tars:{path}")
        except ValueError as error:
            assert "no document is left" in str(error)
            continue
        try:
            good = list(documents_of(source))
        except TooManyBad:
            good = []
        assert len(good) <= len(source) <= 6
        assert len(good) == 6 or source.skipped


def test_splits_are_disjoint_by_base_stable_and_complete(tmp_path):
    write_tar(tmp_path / "a.tar", samples([f"{k:03}" for k in range(300)]))
    spec = f"tars:{tmp_path}/a.tar"
    sides = {
        split: open_source(spec, split=split, split_by="base", holdout=0.2) for split in ("train", "test")
    }
    bases = {split: {source.fields(i)["base"] for i in range(len(source))} for split, source in sides.items()}
    assert not bases["train"] & bases["test"]
    assert len(sides["train"]) + len(sides["test"]) == len(open_source(spec)) == 300
    assert 0.1 < len(sides["test"]) / 300 < 0.3
    # A value stays on its side for ever, and a smaller holdout is part of a larger one.
    assert [n for n in range(30) if held_out(str(n), 0.1)] == [9]
    assert 900 < sum(held_out(n, 0.1) for n in range(10_000)) < 1100
    assert all(held_out(n, 0.2) for n in range(1000) if held_out(n, 0.1))


def test_filters(tmp_path):
    flags, food = samples("01", group="Flags", tone=None), samples("234", group="Food", tone="dark")
    write_tar(tmp_path / "a.tar", flags | food)
    spec = f"tars:{tmp_path}/a.tar"
    captions = lambda **options: [caption(d)[-1] for _, d in documents_of(open_source(spec, **options))]
    assert captions(only={"group": "Food"}) == ["2", "3", "4"]
    assert captions(only={"group": ["Food", "Flags"]}, exclude={"key": ["1", "3"]}) == ["0", "2", "4"]
    assert captions(only={"tone": None}) == ["0", "1"]
    with pytest.raises(ValueError, match="no document is left"):
        captions(only={"group": "Food"}, exclude={"tone": "dark"})
    with pytest.raises(ValueError, match="no_missing"):
        captions(split="train", split_by="missing")
    with pytest.raises(ValueError, match="holdout|train"):
        captions(split="validation")


def test_an_image_too_large_is_not_even_read(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(["0"]))
    with pytest.raises(BadImage, match="too_many_bytes"):
        open_source(f"tars:{path}", limits=Limits(max_bytes=10)).pixels(0)


@pytest.mark.parametrize("remote", [False, True])
def test_an_index_stands_for_the_scan(tmp_path, monkeypatch, remote):
    write_tar(tmp_path / "a.tar", samples(["00", "01", "02"]) | {"x.txt": b"no image"})
    write_tar(tmp_path / "b.tar", {"03.png": png(), "03.txt": b"three", "04.png": png(), "04.json": b"{"})
    where = str(tmp_path)
    if remote:
        system, where = fsspec.filesystem("memory"), f"memory:///{tmp_path.name}"
        for name in ("a.tar", "b.tar"):
            system.pipe_file(f"/{tmp_path.name}/{name}", (tmp_path / name).read_bytes())
    spec, options = (
        f"tars:{where}/*",
        ({}, {"split": "train"}, {"only": {"key": "02"}}, {"exclude": {"key": "02"}}),
    )
    scanned = [open_source(spec, **option) for option in options]
    assert write_index(f"{where}/*") == 5
    monkeypatch.setattr("mmgen.data.tars.tar_members", lambda *_: pytest.fail("scanned again"))
    for option, before in zip(options, scanned):
        source = open_source(spec, **option)
        assert source.fingerprint == before.fingerprint and source.skipped == before.skipped
        assert (source.reader.records == before.reader.records).all()
    assert caption(open_source(spec)[1]) == "caption 01"
    if not remote:
        (tmp_path / "b.tar").write_bytes(b"another")
        with pytest.raises(ValueError, match=r"b\.tar\.index was written for another tar"):
            open_source(spec)
        (tmp_path / "a.tar.index").write_bytes(b"garbage")
        with pytest.raises(ValueError, match=r"a\.tar\.index is damaged"):
            open_source(spec)
