"""`mmgen tokenize`: every document once, whatever stops it and however many share the work."""

import collections
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from mmgen.data import shards as shards_module
from mmgen.data.images import Buckets
from mmgen.data.shards import Shards
from mmgen.data.sources import Several, TooManyBad, open_source
from mmgen.document import Text
from mmgen.safety import watermark
from mmgen.stages import tokenize as stage
from mmgen.text import Text as TextModel
from tests.conftest import ROOT, mmgen, run_python

N, SIZE = 90, 12  # documents, and how many a shard


def tokenize(space, source, out, **options):
    options = {"max_side": 16, "shard_size": SIZE, "batch": 8, **options}
    return stage.tokenize(source, space.tokenizer, space.text, out, **options)


def world(documents=N, **options):
    return open_source("world:train", (32, 32), 5, documents=documents, **options)


@pytest.fixture(scope="module")
def whole(space, tmp_path_factory):
    """A folder that nothing ever stopped."""
    out = tmp_path_factory.mktemp("whole")
    tokenize(space, world(), out)
    return out


def records(folder):
    return [record.tolist() for record in Shards(folder).records(np.arange(len(Shards(folder))))]


def assert_same_shards(a, b):
    assert records(a) == records(b)
    assert Shards(a).manifest == Shards(b).manifest
    assert (Shards(a).lengths[:] == Shards(b).lengths[:]).all()
    assert not list(a.glob("*.tmp")) and not list(a.glob("tokens-*.npy")) and not (a / "job.json").exists()


@pytest.mark.smoke
def test_what_is_written_reads_back(space, whole):
    shards, source, text = Shards(whole), world(), TextModel(whole / "text.model")
    assert len(shards) == N and shards.manifest["shards"] == [12] * 7 + [6]
    assert shards.longest == max(map(len, records(whole))) == shards.lengths[:][:, 0, 0].max()
    assert shards.total == sum(map(len, records(whole)))
    assert shards.manifest["parts"] == {"world": N} and shards.manifest["skipped"] == {}
    for i in (0, 11, 12, 55, N - 1):
        document = shards.grammar.decode(shards.tokens(i), text)
        assert document.turns[0] == source[i].turns[0]
        assert document.turns[1].parts[0].codes.shape == (8, 8)


def flags_of(space, out):
    """The command that makes `whole`."""
    flags = [
        "tokenize",
        "--source",
        "world:train",
        "--documents",
        N,
        "--seed",
        5,
        "--tokenizer",
        space.tokenizer,
    ]
    return [*flags, "--text", space.text, "--max-side", 16, "--shard-size", SIZE, "--out", out]


class Stop(BaseException):
    pass


def stop_at_shard(monkeypatch, number):
    """The shard that is finished as the `number`th is not."""
    real, left = shards_module.Writer.finish, number

    def finish(self, **facts):
        nonlocal left
        left -= 1
        if not left:
            raise Stop
        return real(self, **facts)

    monkeypatch.setattr(shards_module.Writer, "finish", finish)


def test_stopped_anywhere_it_goes_on(space, whole, tmp_path, monkeypatch):
    """Where a shard is written, where it gets its name, where the manifest does."""
    rng = random.Random(0)
    real = {
        "add": shards_module.Writer.add,
        "finish": shards_module.Writer.finish,
        "_write": shards_module._write,
    }
    stops = 0
    while not (tmp_path / "manifest.json").exists():
        left = rng.randrange(1, 40)

        def stopping(name):
            def call(*arguments, **named):
                nonlocal left
                left -= 1
                if not left:
                    raise Stop
                return real[name](*arguments, **named)

            return call

        monkeypatch.setattr(shards_module.Writer, "add", stopping("add"))
        monkeypatch.setattr(shards_module.Writer, "finish", stopping("finish"))
        monkeypatch.setattr(shards_module, "_write", stopping("_write"))
        try:
            tokenize(space, world(), tmp_path)
        except Stop:
            stops += 1
    assert stops >= 3
    assert_same_shards(tmp_path, whole)


KILLED = """
import os, signal, sys
from mmgen.data import shards
left = int(sys.argv[1])
def killing(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call
shards.Writer.add, shards._write, os.replace = map(killing, (shards.Writer.add, shards._write, os.replace))
from mmgen.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


def test_killed_at_random_points_nothing_is_lost_or_twice(space, whole, tmp_path):
    flags = flags_of(space, tmp_path)
    for _ in range(3):
        done = run_python(KILLED, random.randrange(1, 40), *flags, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        with pytest.raises(ValueError, match="never finished"):
            Shards(tmp_path)
    (tmp_path / "tokens-00007.deadbeef.tmp").write_bytes(b"what a killed process leaves")
    assert mmgen(*flags) == 0
    assert_same_shards(tmp_path, whole)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert mmgen(*flags) == 0 and (tmp_path / "manifest.json").stat().st_mtime_ns == before  # it is finished


@pytest.mark.soak
def test_twenty_kills_at_any_time_of_two_processes(space, whole, tmp_path):
    """By the clock, wherever they are, both writing the same folder; then one finishes."""
    flags = flags_of(space, tmp_path)
    command = [sys.executable, "-m", "mmgen", *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    rng = random.Random(0)
    for _ in range(20):
        running = [
            subprocess.Popen(
                command, env={**environment, "MMGEN_DISTRIBUTED": f"{rank}/2"}, stderr=subprocess.DEVNULL
            )
            for rank in range(2)
        ]
        time.sleep(rng.uniform(4, 9))
        for process in running:
            process.kill()
            process.wait()
        if (tmp_path / "manifest.json").exists():
            assert_same_shards(tmp_path, whole)
            shutil.rmtree(tmp_path)
    if not (tmp_path / "manifest.json").exists():
        assert mmgen(*flags) == 0
    assert_same_shards(tmp_path, whole)


def test_a_late_process_finds_all_done(space, whole, tmp_path):
    """More processes than shards, or a kill just behind the manifest: nothing is left to do, and nothing fails."""
    tokenize(space, world(), tmp_path)
    manifest = Shards(tmp_path).manifest
    assert tokenize(space, world(), tmp_path, process=(19, 20)) == manifest
    with pytest.raises(FileExistsError, match="other finished shards"):
        tokenize(space, world(documents=N - 1), tmp_path)


def test_overwriting_goes_on_too(space, whole, tmp_path, monkeypatch):
    tokenize(space, world(documents=30), tmp_path)
    stop_at_shard(monkeypatch, 4)
    with pytest.raises(Stop):
        tokenize(space, world(), tmp_path, overwrite=True)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tokens-*.json")}
    assert len(kept) == 3
    tokenize(space, world(), tmp_path, overwrite=True)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert_same_shards(tmp_path, whole)


def test_shards_of_another_job_do_not_count(space, whole, tmp_path):
    """Two jobs begun at once on one folder: the later has it, and what the earlier still writes is not taken."""
    first = shards_module.begin(tmp_path, {"job": 1})
    assert first is None and shards_module.begin(tmp_path, {"job": 2}) is None
    assert json.loads((tmp_path / "job.json").read_text()) == {"job": 2}
    writer = shards_module.Writer(tmp_path, 0, Shards(whole).grammar, mark=shards_module.mark_of({"job": 1}))
    writer.add([Shards(whole).tokens(0)])
    writer.finish()
    assert shards_module.finished(tmp_path, 0, shards_module.mark_of({"job": 1}))
    assert shards_module.finished(tmp_path, 0, shards_module.mark_of({"job": 2})) is None


def test_a_folder_can_be_made_anew_with_its_own_tokenizer(space, whole, tmp_path):
    tokenize(space, world(documents=30), tmp_path)
    again = stage.tokenize(
        world(), tmp_path / "tokenizer", tmp_path / "text.model", tmp_path, max_side=16, shard_size=SIZE,
        overwrite=True, batch=8,
    )  # fmt: skip
    assert again["count"] == N
    assert_same_shards(tmp_path, whole)


def test_all_phrasings_of_a_document_are_cut_at_the_same_turn(space, tmp_path):
    draw = lambda texts: [
        {"role": "user", "parts": [{"text": texts}]},
        {"role": "assistant", "parts": [{"image": "a.png"}]},
    ]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    source = jsonl(
        tmp_path / "a.jsonl", [draw(["1", "2" * 20]) + draw(["3" * n, "4" * (41 - n)]) for n in range(1, 41)]
    )
    manifest = tokenize(space, source, tmp_path / "s", phrasings=2, longest=170, overlong="cut", max_bad=1.0)
    shards, text = Shards(tmp_path / "s"), TextModel(space.text)
    assert 0 < manifest["cut"] < 40 and manifest["longest"] <= 170
    counts = (shards.lengths[:][:, :, 0] > 0).sum(1)
    assert set(counts) == {1, 2}
    for i in range(len(shards)):
        turns = [len(shards.grammar.decode(shards.tokens(i, 4 * k), text).turns) for k in range(counts[i])]
        assert len(set(turns)) == 1


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"phrasings": 0}, {"longest": -5}, {"workers": -1}])
def test_numbers_that_make_no_sense(space, tmp_path, options):
    with pytest.raises(ValueError, match="at least"):
        tokenize(space, world(), tmp_path, **options)
    assert tokenize(space, world(), tmp_path)["count"] == N  # nothing was claimed


def test_more_processes_than_shards(space, whole, tmp_path):
    assert tokenize(space, world(), tmp_path, process=(8, 20)) is None
    assert tokenize(space, world(), tmp_path)["count"] == N
    assert_same_shards(tmp_path, whole)


def test_several_processes_share_the_work(space, whole, tmp_path):
    rest = [2, 0, 1]
    for rank in rest[:-1]:
        assert tokenize(space, world(), tmp_path, process=(rank, 3)) is None
    assert tokenize(space, world(), tmp_path, process=(0, 3)) is None  # again: nothing to do
    assert tokenize(space, world(), tmp_path, process=(rest[-1], 3))["count"] == N
    assert_same_shards(tmp_path, whole)
    with pytest.raises(ValueError, match="several processes cannot overwrite"):
        tokenize(space, world(), tmp_path, process=(0, 2), overwrite=True)


def test_a_run_can_go_on_with_another_number_of_processes(space, whole, tmp_path):
    assert tokenize(space, world(), tmp_path, process=(1, 4)) is None
    assert tokenize(space, world(), tmp_path)["count"] == N
    assert_same_shards(tmp_path, whole)


def test_the_number_of_devices_and_workers_changes_nothing(space, whole, tmp_path):
    code = """
import sys, jax
from mmgen.__main__ import main
if __name__ == "__main__":
    assert jax.local_device_count() == 3
    sys.exit(main(sys.argv[1:]))
"""
    script = tmp_path / "run.py"  # workers import the main module again
    script.write_text(code)
    flags = flags_of(space, tmp_path / "s")
    run = f"import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    run_python(run, "run", *flags, "--workers", 2, devices=3)
    assert_same_shards(tmp_path / "s", whole)


def test_another_job_is_refused(space, tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "finish", lambda *a: None)
    tokenize(space, world(), tmp_path)
    assert list(tmp_path.glob("tokens-*.json"))
    for changed, name in (
        (dict(source=world(documents=N - 1)), "fingerprint"), (dict(source=world(), phrasings=2), "phrasings"),
        (dict(source=world(), longest=90), "longest"), (dict(source=world(), shard_size=13), "shard_size"),
        (dict(source=world(), max_side=17), "grammar"),
    ):  # fmt: skip
        with pytest.raises(FileExistsError, match=f"another job .*{name}"):
            tokenize(space, changed.pop("source"), tmp_path, **changed)


@pytest.mark.smoke
def test_phrasings_are_kept(space, tmp_path):
    source = world(documents=30)
    manifest = tokenize(space, source, tmp_path, phrasings=3)
    shards, text = Shards(tmp_path), TextModel(tmp_path / "text.model")
    assert manifest["phrasings"] == shards.phrasings == 3
    counts = (shards.lengths[:][:, :, 0] > 0).sum(1)
    assert counts.max() == 3
    for i in range(30):
        found = [shards.grammar.decode(shards.tokens(i, 4 * k), text) for k in range(counts[i])]
        assert [d.turns[0] for d in found] == [d.turns[0] for d in source.alternatives(i, 3)]
        assert all(d.turns[1] == found[0].turns[1] for d in found)


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in documents))
    return open_source(f"jsonl:{path}", (32, 32))


def test_documents_that_are_too_long(space, tmp_path):
    say = lambda role, n: {"role": role, "parts": [{"text": "1" * n}]}  # digits are a piece each
    source = lambda: jsonl(tmp_path / "a.jsonl", [
        [say("user", 5), say("assistant", 5)],  # fits
        [say("user", 5), say("assistant", 5), say("user", 5), say("assistant", 30)],  # loses its last answer
        [say("user", 5), say("assistant", 40)],  # nothing is left to learn
        [say("page", 50)],
        [say("system", 3), say("assistant", 5), say("assistant", 5), say("assistant", 5)],  # fits with 1 to spare
    ])  # fmt: skip
    refused = tokenize(space, source(), tmp_path / "refuse", longest=31, max_bad=1.0)
    assert refused["count"] == 2 and refused["skipped"] == {"overlong": 3} and refused["cut"] == 0
    cut = tokenize(space, source(), tmp_path / "cut", longest=31, overlong="cut", max_bad=1.0)
    assert cut["count"] == 3 and cut["skipped"] == {"overlong": 2} and cut["cut"] == 1
    assert 25 < cut["longest"] <= 31
    text = TextModel(tmp_path / "cut" / "text.model")
    shards = Shards(tmp_path / "cut")
    turns = shards.grammar.decode(shards.tokens(1), text).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert tokenize(space, source(), tmp_path / "all")["count"] == 5
    with pytest.raises(ValueError, match="overlong"):
        tokenize(space, source(), tmp_path / "x", overlong="drop")


def test_a_share_of_what_users_show_is_watermarked(space, tmp_path):
    source = lambda: open_source("world:train/edit", (64, 64), 5, documents=12)
    codes = {}
    for share in (0.0, 0.5, 1.0):
        tokenize(space, source(), tmp_path / str(share), marked=share, watermark=watermark.embed_where_it_lasts)
        shards, text = Shards(tmp_path / str(share)), TextModel(tmp_path / str(share) / "text.model")
        documents = [shards.grammar.decode(shards.tokens(i), text) for i in range(len(shards))]
        codes[share] = [[image.codes.tolist() for image in document.images()] for document in documents]
    asked, drawn = (sum(a[k] != b[k] for a, b in zip(codes[0.0], codes[1.0])) for k in (0, 1))
    assert asked == 12 and drawn == 0  # each has one picture of the user's, and the answer
    half = [some[0] for some in codes[0.5]]
    marked = [i for i in range(12) if half[i] == codes[1.0][i][0]]
    assert 0 < len(marked) < 12 and all(half[i] == codes[0.0][i][0] for i in range(12) if i not in marked)
    small = np.zeros((32, 32, 3), np.uint8)
    assert watermark.embed_where_it_lasts(small, b"k") is small
    for options in ({"marked": 1.5, "watermark": watermark.embed}, {"marked": 0.5}):
        with pytest.raises(ValueError, match="marked"):
            tokenize(space, source(), tmp_path / "x", **options)


def test_the_commands_own_flags(space, tmp_path):
    flags = ["--size", "32x32", "--documents", 6, "--tokenizer", space.tokenizer, "--text", space.text, "--max-side", 16]
    made = lambda *more: mmgen("tokenize", "--source", "world:train", *flags, *more)
    assert made("--category", "counting", "--marked", 0.5, "--out", tmp_path / "a") == 0
    manifest = Shards(tmp_path / "a").manifest
    assert manifest["count"] == 6 and manifest["settings"]["marked"] == 0.5
    assert made("--category", "counted", "--out", tmp_path / "b") == 1


def tar(path, count, bad=(), sizes=((32, 32),)):
    with tarfile.open(path, "w") as file:
        for k in range(count):
            out = io.BytesIO()
            Image.new("RGB", sizes[k % len(sizes)], (k, 0, 0)).save(out, "PNG")
            image = out.getvalue()[:40] if k in bad else out.getvalue()
            for name, data in ((f"{k:03}.png", image), (f"{k:03}.txt", f"{k}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def test_what_is_skipped_is_counted_across_stops(space, tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", 60, bad=(3, 20, 21, 50))
    source = lambda: open_source(f"tars:{path}", (32, 32))
    stop_at_shard(monkeypatch, 3)
    with pytest.raises(Stop):
        tokenize(space, source(), tmp_path / "s")
    manifest = tokenize(space, source(), tmp_path / "s")
    assert manifest["count"] == 56 and sum(manifest["skipped"].values()) == 4
    captions = [Shards(tmp_path / "s").grammar.decode(t, TextModel(space.text)).turns[0].parts[0].text
                for t in map(Shards(tmp_path / "s").tokens, range(56))]  # fmt: skip
    assert captions == [str(k) for k in range(60) if k not in (3, 20, 21, 50)]


def test_gives_up_with_a_report_and_can_go_on(space, tmp_path):
    path = tar(tmp_path / "a.tar", 150, bad=range(60, 150, 3))
    source = lambda: open_source(f"tars:{path}", (32, 32))
    with pytest.raises(TooManyBad, match="more than the accepted 10%"):
        tokenize(space, source(), tmp_path / "s")
    assert list((tmp_path / "s").glob("tokens-*.json"))
    assert tokenize(space, source(), tmp_path / "s", max_bad=0.5)["count"] == 120
    path = tar(tmp_path / "b.tar", 5, bad=range(5))
    with pytest.raises(TooManyBad, match="5 of 5"):
        tokenize(space, open_source(f"tars:{path}", (32, 32)), tmp_path / "t", max_bad=1.0)


def test_images_of_many_shapes(space, tmp_path):
    sizes = ((40, 40), (80, 20), (30, 90), (64, 48))
    path = tar(tmp_path / "a.tar", 24, sizes=sizes)
    buckets = Buckets(32 * 32, multiple=4, max_side=64)
    tokenize(space, open_source(f"tars:{path}", buckets), tmp_path / "s")
    shards, text = Shards(tmp_path / "s"), TextModel(space.text)
    for i in range(24):
        h, w = shards.grammar.decode(shards.tokens(i), text).turns[1].parts[0].codes.shape
        assert (w * 4, h * 4) == buckets.of(*sizes[i % 4])


def test_several_sources_are_parts_of_one_folder(space, tmp_path):
    path = tar(tmp_path / "a.tar", 20, bad=(7,))
    source = Several(
        [
            world(documents=30),
            open_source(f"red=tars:{path}", (32, 32)),
            open_source("jsonl:sample", (32, 32)),
        ]
    )
    manifest = tokenize(space, source, tmp_path / "s")
    sample = len(open_source("jsonl:sample"))
    assert manifest["parts"] == {"world": 30, "red": 19, "jsonl": sample}
    shards, text = Shards(tmp_path / "s"), TextModel(space.text)
    red = next(part for part in shards.parts if part.name == "red")
    first = [
        shards.grammar.decode(shards.tokens(i), text).turns[0].parts[0] for i in range(red.start, red.stop)
    ]
    assert first == [Text(str(k)) for k in range(20) if k != 7]
    for i in range(red.stop, len(shards)):  # dialogues, pages, images in questions
        document = shards.grammar.decode(shards.tokens(i), text)
        expected = open_source("jsonl:sample", (32, 32))[i - red.stop].normalised()
        assert [t.role for t in document.turns] == [t.role for t in expected.turns]
        assert document.text() == expected.text() and len(document.images()) == len(expected.images())
    assert collections.Counter(part.name for part in shards.parts) == {"world": 1, "red": 1, "jsonl": 1}
