"""Every kind of source but tars: what is read, in which order, what is bad, what remote files change."""

import io
import json
import multiprocessing
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import fsspec
import numpy as np
import PIL.Image
import pytest

from mmgen.data import files
from mmgen.data.images import BadImage, Limits
from mmgen.data.readers import write_records
from mmgen.data.sources import documents_of, open_source
from mmgen.document import Image, Text
from tests.test_tars import png, samples, write_tar


def said(role, *parts):
    return {"role": role, "parts": [{"text": part} for part in parts]}


def page(text, **fields):
    return {"turns": [said("page", text)], **fields}


def jsonl(path, documents):
    lines = [
        document if isinstance(document, bytes) else json.dumps(document).encode() for document in documents
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def all_texts(source):
    return [text for i in range(len(source)) for text in source.texts(i)]


def reasons(source):
    """{index: reason} of the documents that are bad."""
    found = {}
    for i in range(len(source)):
        try:
            source[i]
        except BadImage as error:
            found[i] = error.reason
    return found


# Native documents


def edit(path, k=0):
    path.joinpath("images").mkdir(exist_ok=True)
    path.joinpath("images/before.png").write_bytes(png((10, 0, 0), (30, 20)))
    path.joinpath("after.png").write_bytes(png((0, 10, 0)))
    return {
        "turns": [
            {"role": "user", "parts": [{"image": "images/before.png"}, {"text": ["make it green", "绿色"]}]},
            {"role": "assistant", "parts": [{"text": "Here."}, {"image": str(path / "after.png")}]},
            {"role": "user", "parts": [{"image": "images/before.png"}, {"text": ["a", "b", "c"]}]},
        ],
        "group": k,
    }


def test_a_native_document_with_its_images_and_phrasings(tmp_path):
    source = open_source(f"jsonl:{jsonl(tmp_path / 'a.jsonl', [edit(tmp_path)])}", size=(15, 10))
    document = source[0]
    assert [turn.role for turn in document.turns] == ["user", "assistant", "user"]
    kinds = [[type(part) for part in turn.parts] for turn in document.turns]
    assert kinds == [[Image, Text], [Text, Image], [Image, Text]]
    assert [int(image.pixels[0, 0].argmax()) for image in document.images()] == [0, 1, 0]
    assert all(image.pixels.shape == (10, 15, 3) for image in document.images())
    assert document.text() == "make it green\nHere.\na"
    assert source.texts(0) == ["make it green", "绿色", "Here.", "a", "b", "c"]
    assert source.fields(0) == {"group": 0}

    phrased = source.alternatives(0, 5)
    texts = [document.text().split("\nHere.\n") for document in phrased]
    assert texts == [["make it green", "a"], ["绿色", "b"], ["make it green", "c"]]
    assert phrased[0] == document and len(source.alternatives(0, 2)) == 2
    for other in phrased:
        assert all(a is b for a, b in zip(other.images(), phrased[0].images(), strict=True))
    assert phrased[0].images()[0] is phrased[0].images()[2]  # the same file is decoded once

    assert [source.pixels(0, which).shape[0] for which in range(4)] == [20, 12, 20, 20]


BAD = [
    (b"{", "bad_json"), (b"[1]", "bad_json"), (b"\xff{}", "bad_json"), (b" x", "bad_json"),
    (b"[" * 100_000, "bad_json"),
    ({}, "bad_turns"), ({"turns": []}, "bad_turns"),
    ({"turns": "x"}, "bad_turns"), ({"turns": [7]}, "bad_turns"),
    ({"turns": [{"role": "user"}]}, "bad_turns"),
    ({"turns": [{"role": "user", "parts": {}}]}, "bad_turns"),
    ({"turns": [{"role": "user", "parts": [], "name": "x"}]}, "bad_turns"),
    ({"turns": [{"role": "page", "parts": []}]}, "bad_turns"),
    ({"turns": [said("robot", "x")]}, "bad_role"), ({"turns": [said(["user"], "x")]}, "bad_role"),
    ({"turns": [{"role": "user", "parts": ["x"]}]}, "bad_part"),
    ({"turns": [{"role": "user", "parts": [{}]}]}, "bad_part"),
    ({"turns": [{"role": "user", "parts": [{"sound": "x"}]}]}, "bad_part"),
    ({"turns": [{"role": "user", "parts": [{"text": "x", "image": "a.png"}]}]}, "bad_part"),
    ({"turns": [{"role": "user", "parts": [{"image": None}]}]}, "bad_part"),
    ({"turns": [{"role": "user", "parts": [{"image": 0}]}]}, "bad_part"),
    ({"turns": [{"role": "user", "parts": [{"image": "none.png"}]}]}, "no_file"),
    ({"turns": [{"role": "user", "parts": [{"image": "a.jsonl/x.png"}]}]}, "no_file"),
    ({"turns": [{"role": "user", "parts": [{"image": ""}]}]}, "not_read"),
    ({"turns": [{"role": "user", "parts": [{"image": "."}]}]}, "not_read"),
    ({"turns": [{"role": "user", "parts": [{"image": "/dev/zero"}]}]}, "not_read"),
    ({"turns": [{"role": "user", "parts": [{"image": "a\0.png"}]}]}, "not_read"),
    ({"turns": [{"role": "user", "parts": [{"image": "\ud800.png"}]}]}, "not_read"),
    ({"turns": [{"role": "user", "parts": [{"image": "unheard://a.png"}]}]}, "not_read"),
    ({"turns": [{"role": "user", "parts": [{"image": "a.jsonl"}]}]}, "bad_format"),
    (page(""), "no_text"), (page([]), "no_text"), (page(["x", ""]), "no_text"),
    (page(7), "bad_text"), (page(["x", None]), "bad_text"), (page("\ud83d"), "bad_text"),
]  # fmt: skip


def test_bad_native_documents_are_named_by_reason(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [page("good"), *(document for document, _ in BAD), page("good")])
    source = open_source(f"jsonl:{path}")
    expected = {k: reason for k, (_, reason) in enumerate(BAD, 1)}
    assert reasons(source) == expected
    assert [i for i, _ in documents_of(source, max_bad=1)] == [0, len(BAD) + 1]
    assert sum(source.skipped.values()) == len(BAD)
    with pytest.raises(BadImage, match=r"bad_role: .*a\.jsonl at byte \d+: expected one of system, user"):
        source[14]


def test_blank_lines_are_nothing_and_a_cut_one_is_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = b"\n \n" + json.dumps(page("a")).encode() + b"\r\n\n\n" + json.dumps(page("b")).encode()
    path.write_bytes(whole)
    source = open_source(f"jsonl:{path}")
    assert all_texts(source) == ["a", "b"] and not source.skipped
    path.write_bytes(whole[:-3])
    source = open_source(f"jsonl:{path}")
    assert all_texts(source) == ["a"] and source.skipped == {"jsonl_truncated": 1}
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no document is left"):
        open_source(f"jsonl:{path}")


def test_lines_are_found_whatever_the_block(tmp_path, monkeypatch):
    documents = [page("x" * int(n)) for n in np.random.default_rng(0).integers(1, 90, 200)]
    path = jsonl(tmp_path / "a.jsonl", documents)
    for block in (1, 7, 64, 1000, 1 << 20):
        monkeypatch.setattr("mmgen.data.readers.BLOCK", block)
        assert all_texts(open_source(f"jsonl:{path}")) == [
            d["turns"][0]["parts"][0]["text"] for d in documents
        ]


def test_a_file_that_vanishes_or_shrinks_is_bad_not_fatal(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [page("a"), page("b")])
    source = open_source(f"jsonl:{path}")
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    assert reasons(source) == {1: "truncated"}
    path.unlink()
    assert reasons(source) == {0: "no_file", 1: "no_file"}


def test_the_sample_opens_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = open_source("jsonl:sample", size=(48, 32))
    documents = dict(documents_of(source, max_bad=0))
    assert 4 <= len(documents) == len(source) <= 6 and not source.skipped
    assert max(len(document.turns) for document in documents.values()) >= 3
    assert max(len(source.alternatives(i, 9)) for i in documents) == 2
    assert {document.turns[0].role for document in documents.values()} >= {"user", "system", "page"}
    assert any(not text.isascii() for text in all_texts(source))


# Records


def test_records_are_the_same_documents_in_one_file(tmp_path):
    documents = [edit(tmp_path), page("only text", key="x")]
    documents[0]["turns"][0]["parts"][0]["image"] = str(tmp_path / "images/before.png")
    documents[0]["turns"][2]["parts"][0]["image"] = png((10, 0, 0), (30, 20))
    documents[0]["turns"][1]["parts"][1]["image"] = np.full((12, 20, 3), (0, 10, 0), np.uint8)
    assert write_records(tmp_path / "a.records", documents) == 2
    lines = open_source(f"jsonl:{jsonl(tmp_path / 'a.jsonl', [edit(tmp_path), documents[1]])}")
    records = open_source(f"records:{tmp_path}/*.records")
    assert list(records) == list(lines)
    assert records.alternatives(0, 3) == lines.alternatives(0, 3)
    assert [records.fields(i) for i in range(2)] == [{"group": 0}, {"key": "x"}]
    assert (records.pixels(0, 1) == (0, 10, 0)).all()
    with pytest.raises(BadImage, match="no_image"):
        records.pixels(1)
    with pytest.raises(BadImage, match="too_many_bytes"):
        open_source(f"records:{tmp_path}/*.records", limits=Limits(max_bytes=10))[0]
    with pytest.raises(BadImage, match="no_text"):
        write_records(tmp_path / "b.records", [page("")])
    assert not (tmp_path / "b.records").exists()


def test_more_files_than_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr("mmgen.data.readers.OPEN", 2)
    for k in range(5):
        write_records(tmp_path / f"{k}.records", [page(f"{k} {n}") for n in range(3)])
    source = open_source(f"records:{tmp_path}/*.records")
    order = np.random.default_rng(0).permutation(15).tolist() * 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.texts, order)) == [[f"{i // 3} {i % 3}"] for i in order]
    assert len(source.reader._readers) == 2


def test_foreign_and_damaged_records(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    write_records(tmp_path / "a.records", [page("a")])
    writer = ArrayRecordWriter(str(tmp_path / "b.records"), "group_size:1")
    blob = json.dumps({"turns": [{"role": "user", "parts": [{"image": 3}]}]}).encode()
    head = lambda *lengths: np.array([len(lengths), *lengths], "<u4").tobytes()
    for record in (
        b"x",
        b"\xff" * 8,
        head(5) + b"abc",
        head(),
        head(len(blob)) + blob,
        head(2) + b"{}",
        head(1) + b"{",
    ):
        writer.write(record)
    writer.close()
    (tmp_path / "c.records").write_bytes(b"garbage" * 100)
    source = open_source(f"records:{tmp_path}/*.records")
    assert source.skipped == {"records_corrupt": 1}
    found = ("bad_record", "bad_record", "bad_record", "bad_record", "no_file", "bad_turns", "bad_json")
    assert reasons(source) == dict(enumerate(found, 1))


# Folders


def test_a_folder_with_metadata_beside_its_images(tmp_path):
    for name in (
        "b.png",
        "a.JPG.png",
        "sub/c.png",
        "sub/d.png",
        "sub/deep/e.png",
        ".hidden/f.png",
        "sub/.g.png",
        "h.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    jsonl(tmp_path / "metadata.jsonl", [
        {"file_name": "b.png", "text": " bee ", "captions": ["B", "bee"], "n": 1},
        {"file_name": "sub/c.png", "caption": "see", "n": 2},
        {"file_name": "none.png", "text": "x"}, b"{", {"text": "x"}, {"file_name": ["b.png"]},
    ])  # fmt: skip
    (tmp_path / "sub/metadata.csv").write_text(
        'file_name,text,n\nd.png,"dee, 红",2\ndeep/e.png,e\n\ndeep/e.png,,3\n'
    )
    (tmp_path / "a.JPG.txt").write_text("ay\n")
    source = open_source(f"folder:{tmp_path}", size=(8, 8))
    assert source.skipped == {"no_file": 1, "bad_json": 1, "bad_metadata": 3}
    names = [source.reader.where(i).removeprefix(f"{tmp_path}/") for i in range(len(source))]
    assert names == ["a.JPG.png", "b.png", "h.png", "sub/c.png", "sub/d.png", "sub/deep/e.png"]
    assert reasons(source) == {2: "no_caption", 5: "no_caption"}
    assert source.texts(1) == ["bee", "B"] and source.texts(4) == ["dee, 红"] and source.texts(0) == ["ay"]
    assert [d.text() for d in source.alternatives(1, 3)] == ["bee", "B"]
    assert source[3].turns[1].parts[0].pixels.shape == (8, 8, 3) and source.pixels(2).shape == (12, 20, 3)
    assert source.fields(1)["n"] == 1 and source.fields(4)["n"] == "2"
    assert len(open_source(f"folder:{tmp_path}", only={"n": [2, "2"]})) == 2
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadImage, match=r"no_file: .*b\.png"):
        source[1]
    with pytest.raises(FileNotFoundError):
        open_source(f"folder:{tmp_path}/none")


def test_metadata_that_is_not_utf8_spoils_its_own_rows_only(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbffile_name,text\na.png,\xff\xfe\nb.png,fine\n")
    assert reasons(open_source(f"folder:{tmp_path}")) == {0: "bad_caption"}


# Text


def test_text_is_cut_into_runs_of_whole_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ntwo\r\n\r\n  three \n \nfour\n\n\n\n五六七八 九十\n".encode())
    texts = lambda n: all_texts(open_source(f"text:{path}", max_chars=n))
    assert texts(1000) == ["one\ntwo\n\n  three \n \nfour\n\n\n\n五六七八 九十"]
    assert texts(16) == ["one\ntwo", "  three \n \nfour", "五六七八 九十"]
    assert texts(7) == ["one\ntwo", "  three", "four", "五六七八 九十"]
    assert texts(4) == ["one", "two", "thre", "e", "four", "五六七八", "九十"]
    source = open_source(f"text:{path}")
    assert [turn.role for turn in source[0].turns] == ["page"] and source.fields(0) == {"file": "a.txt"}
    with pytest.raises(BadImage, match="no_image"):
        source.pixels(0)


@pytest.mark.parametrize("max_chars", [1, 5, 40, 2000])
def test_no_character_is_lost_and_no_document_too_long(tmp_path, monkeypatch, max_chars):
    rng = np.random.default_rng(max_chars)
    letters = np.array(list("aé红😀.") + [" ", "\n", "\n\n", "\r\n", "\t", "\u3000"])
    for k in range(40):
        text = "".join(rng.choice(letters, rng.integers(1, 300)))
        (tmp_path / "a.txt").write_bytes(("a" + text).encode())
        monkeypatch.setattr("mmgen.data.readers.BLOCK", int(rng.integers(1, 50)))
        found = all_texts(open_source(f"text:{tmp_path}/a.txt", max_chars=max_chars))
        assert "".join("".join(found).split()) == "a" + "".join(text.split())
        assert all(0 < len(part) <= max_chars and part.strip() for part in found)


def test_text_that_is_not_utf8_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n" + b"b\xffd " * 10 + b"\n\nfine too, really fine\n")
    source = open_source(f"text:{tmp_path}/*.txt", max_chars=20)
    assert reasons(source).keys() == {1, 2} and set(reasons(source).values()) == {"bad_text"}
    assert source.texts(0) == ["good"]


# TFDS


def tfds_folder(root, name="mini", captions=True, count=6):
    """A data set as TFDS prepares it in ArrayRecord, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2
    from tensorflow_datasets.proto import tf_feature_pb2 as tf

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    kinds = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["red_box", "box"])}
    if captions:
        kinds |= {
            "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            "name": tfds.features.Text(),
        }
    tfds.features.FeaturesDict(kinds).save_config(folder)
    texts = lambda *values: tf.Feature(bytes_list=tf.BytesList(value=values))
    writer = ArrayRecordWriter(str(folder / f"{name}-train.array_record-00000-of-00001"), "group_size:1")
    for k in range(count):
        feature = {
            "image": texts(png((k, 0, 0))),
            "label": tf.Feature(int64_list=tf.Int64List(value=[k % 2])),
        }
        if captions:
            feature |= {"captions/text": texts(f"cap {k}".encode(), "红".encode()), "name": texts(b"n%d" % k)}
        writer.write(tf_example_pb2.Example(features=tf.Features(feature=feature)).SerializeToString())
    writer.close()
    split = {"name": "train", "shardLengths": [str(count)], "numBytes": "1",
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}  # fmt: skip
    info = {"name": name, "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def test_tfds_with_captions_and_with_labels(tmp_path):
    tfds_folder(tmp_path)
    source = open_source("tfds:mini/train", size=(8, 8), data_dir=tmp_path)
    assert len(source) == 6 and source.texts(2) == ["cap 2", "红"] and len(source.alternatives(2, 9)) == 2
    assert (source[3].images()[0].pixels == (3, 0, 0)).all() and source.pixels(3).shape == (12, 20, 3)
    assert source.fields(4) == {"label": "red_box", "name": "n4"}
    assert pickle.loads(pickle.dumps(source))[5] == source[5]
    half = open_source("tfds:mini/train", data_dir=tmp_path, only={"label": "box"})
    assert all_texts(half) == ["cap 1", "红", "cap 3", "红", "cap 5", "红"]
    assert len(open_source("tfds:mini:1.0.0/train[:50%]", data_dir=tmp_path)) == 3

    tfds_folder(tmp_path, "boxes", captions=False)
    assert all_texts(open_source("tfds:boxes/train", data_dir=tmp_path)) == ["red box", "box"] * 3
    assert "tensorflow" not in sys.modules


def test_tfds_says_what_to_do(tmp_path):
    folder = tfds_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="tfds build other --file_format=array_record.*--data-dir"):
        open_source("tfds:other/train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="Unknown split"):
        open_source("tfds:mini/valid", data_dir=tmp_path)
    with pytest.raises(ValueError, match="tfds:NAME/SPLIT"):
        open_source("tfds:mini", data_dir=tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(FileNotFoundError, match="not prepared as array_record"):
        open_source("tfds:mini/train", data_dir=tmp_path)


# Remote files


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def upload(system, folder, target):
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/{target}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("kind", ["tars", "folder", "jsonl", "records", "text"])
def test_remote_files_are_as_local_ones(tmp_path, memory, monkeypatch, kind):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    data = tmp_path / "data"
    data.mkdir()
    where = {
        "tars": "/*.tar",
        "folder": "",
        "jsonl": "/*.jsonl",
        "records": "/**/*.records",
        "text": "/*.txt",
    }[kind]
    write_tar(data / "a.tar", samples(["00", "01", "02"]))
    jsonl(data / "a.jsonl", [edit(data), page("x")])
    native = edit(data)
    native["turns"][0]["parts"][0]["image"] = native["turns"][2]["parts"][0]["image"] = png()
    (data / "deep").mkdir()
    write_records(data / "deep/a.records", [native, page("x")])
    for name in ("a.txt", "b.txt"):
        (data / name).write_text("one\n\ntwo\n")
    (data / "after.txt").write_text("after")
    (data / "images/before.txt").write_text("before")
    upload(memory, data, "bucket/data")
    local, remote = open_source(f"{kind}:{data}{where}"), open_source(f"{kind}:memory://bucket/data{where}")
    assert len(local) == len(remote) > 0 and local.fingerprint == remote.fingerprint
    assert list(local) == list(remote)
    assert [local.texts(i) for i in range(len(local))] == [remote.texts(i) for i in range(len(remote))]
    assert remote[0] == pickle.loads(pickle.dumps(remote))[0]


def test_a_url_is_an_image_of_a_local_document(tmp_path, memory):
    memory.pipe_file("/far/a.png", png((9, 0, 0)))
    drawn = {
        "turns": [
            {"role": "page", "parts": [{"image": "memory://far/a.png"}, {"image": "memory://far/b.png"}]}
        ]
    }
    source = open_source(f"jsonl:{jsonl(tmp_path / 'a.jsonl', [drawn])}")
    assert (source.pixels(0) == (9, 0, 0)).all()
    with pytest.raises(BadImage, match="no_file"):
        source[0]


def test_errors_of_places(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        open_source("jsonl:memory://nowhere/*.jsonl")
    with pytest.raises(ValueError, match="no document is left"):
        open_source("folder:memory://nowhere")
    if "gcsfs" not in sys.modules:
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with pytest.raises(ImportError, match=r"pip install 'mmgen\[gcs\]'"):
            open_source("tars:gs://bucket/*.tar")


def test_names_with_brackets_and_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = jsonl(tmp_path / "a[1].jsonl", [page("x")])
    assert len(open_source(f"jsonl:{path}")) == len(open_source("jsonl:~/a[[]1].jsonl")) == 1
    assert files.read(str(path), 2, 5) == path.read_bytes()[2:7]


# For all


def kinds(folder):
    """A source of every kind, small."""
    write_tar(folder / "a.tar", samples(["00", "01", "02", "03"]))
    jsonl(folder / "a.jsonl", [edit(folder), page("x", group=1)])
    (folder / "after.txt").write_text("after")
    (folder / "images/before.txt").write_text("before")
    native = edit(folder)
    native["turns"][0]["parts"][0]["image"] = native["turns"][2]["parts"][0]["image"] = png()
    write_records(folder / "a.records", [native, page("x", group=1)])
    tfds_folder(folder / "tfds")
    specs = ("tars:a.tar", "jsonl:a.jsonl", "records:a.records", "folder:", "text:*.txt")
    return [
        open_source("world:train", documents=5, size=(16, 16)),
        open_source("tfds:mini/train", data_dir=folder / "tfds"),
        *(open_source(spec.replace(":", f":{folder}/")) for spec in specs),
    ]


def test_every_kind_pickles_and_is_safe_in_threads(tmp_path):
    for source in kinds(tmp_path):
        expected = list(source)
        again = pickle.loads(pickle.dumps(source))
        assert list(again) == expected and again.fingerprint == source.fingerprint
        order = np.random.default_rng(0).integers(0, len(source), 60).tolist()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(again.__getitem__, order)) == [expected[i] for i in order]
        assert source.parts == [(source.name, 0, len(source))] and source.spec.startswith(source.name)
        for i in range(len(source)):
            alternatives = source.alternatives(i, 3)
            assert alternatives[0] == source[i] and 1 <= len(alternatives) <= 3
            if source.name != "world":  # which finds words that stand nowhere
                assert set(alternatives[-1].text().split("\n")) <= set("\n".join(source.texts(i)).split("\n"))
        for i in (-1, len(source)):
            for use in (source.__getitem__, source.pixels, source.texts, source.fields):
                with pytest.raises(IndexError):
                    use(i)
            with pytest.raises(IndexError):
                source.alternatives(i, 2)


def test_a_fingerprint_changes_with_what_an_index_means(tmp_path):
    (tmp_path / "x").mkdir()
    path = jsonl(tmp_path / "x/a.jsonl", [page("a", g=1), page("b", g=2)])
    open_it = lambda **options: open_source(f"jsonl:{path}", **options).fingerprint
    found = [open_it(), open_it(documents=1), open_it(only={"g": 1}), open_it(only={"g": 2})]
    found += [open_it(size=(9, 9)), open_it(split="train", holdout=0.0), open_it(background=(0, 0, 0))]
    path.rename(tmp_path / "x/b.jsonl")
    path = tmp_path / "x/b.jsonl"
    found.append(open_it())
    path.write_bytes(path.read_bytes() + b"\n")
    found.append(open_it())
    assert len(set(found)) == len(found)
    (tmp_path / "x").rename(tmp_path / "y")
    path = tmp_path / "y/b.jsonl"
    assert open_it() == found[-1]  # wherever the folder lies
    world = lambda seed=0, **options: (
        open_source("world:train", seed=seed, documents=9, **options).fingerprint
    )
    assert len({world(), world(1), world(languages=("zh",)), world(category="colors")}) == 4


def test_limits_and_background_reach_the_images(tmp_path):
    clear = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 4), np.uint8) * np.uint8([1, 1, 1, 0])
    PIL.Image.fromarray(noise).save(clear, "PNG")
    (tmp_path / "a.png").write_bytes(clear.getvalue())
    (tmp_path / "a.txt").write_text("clear")
    drawn = {"turns": [{"role": "page", "parts": [{"image": clear.getvalue()}]}]}
    write_records(tmp_path / "a.records", [drawn])
    drawn["turns"][0]["parts"][0]["image"] = "a.png"
    write_tar(tmp_path / "a.tar", {"a.png": clear.getvalue(), "a.txt": b"clear"})
    jsonl(tmp_path / "a.jsonl", [drawn])
    for spec in ("folder:{}", "jsonl:{}/a.jsonl", "records:{}/a.records", "tars:{}/a.tar"):
        spec = spec.format(tmp_path)
        assert (open_source(spec, background=(7, 8, 9)).pixels(0) == (7, 8, 9)).all()
        for limits, reason in (
            (Limits(max_pixels=143), "too_large"),
            (Limits(max_bytes=300), "too_many_bytes"),
            (Limits(min_side=13), "too_small"),
        ):
            assert reasons(open_source(spec, limits=limits)) == {0: reason}


def test_a_remote_document_costs_two_requests_at_most(tmp_path, memory, monkeypatch):
    write_tar(tmp_path / "a.tar", samples(["00", "01"]))
    jsonl(tmp_path / "a.jsonl", [page("x")])
    (tmp_path / "a.txt").write_text("x")
    upload(memory, tmp_path, "data")
    asked, real = [], type(memory).cat_file
    monkeypatch.setattr(
        type(memory), "cat_file", lambda self, path, **span: asked.append(path) or real(self, path, **span)
    )
    for kind, requests in (("tars:{}/a.tar", 2), ("jsonl:{}/a.jsonl", 1), ("text:{}/a.txt", 1)):
        source = open_source(kind.format("memory://data"))
        asked.clear()
        assert source[0] and len(asked) == requests


def test_another_process_reads_the_same(tmp_path):
    write_records(tmp_path / "a.records", [page(f"text {k}") for k in range(9)])
    source = open_source(f"records:{tmp_path}/a.records")
    first = source[3]  # with a reader open, which cannot be sent
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(source.alternatives, 3, 1).result() == [first]
