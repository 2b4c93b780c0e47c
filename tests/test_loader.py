"""Batches are a pure function of the step, and say of each document what the grammar says."""

import collections
import io
import json
import shutil
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from mmgen.data.loader import Images, Rows, prefetch
from mmgen.data.packing import DROP_IMAGES, DROP_TEXT
from mmgen.data.shards import Shards, write
from mmgen.data.sources import TooManyBad, open_source
from mmgen.grammar import Grammar
from tests.conftest import run_python
from tests.test_shards import GRAMMAR, edit

ROW = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    write(folder, (edit(rng) for _ in range(240)), GRAMMAR, shard_size=100)
    return folder


def documents_of(loader, epoch):
    """[(document, variant), ...] of each row of an epoch, in the order they are given out."""
    plan = loader.plan
    first = sum(plan.rows(before) for before in range(epoch))
    rows = [plan.row(first + row) for row in range(plan.rows(epoch))]
    return [list(zip(documents.tolist(), variants.tolist())) for documents, variants in rows]


def rows(folder, **options):
    options = {"batch_size": 5, "row_length": ROW, "seed": 7, "text_drop": 0.3, "image_drop": 0.2, **options}
    return Rows(Shards(folder), GRAMMAR, **options)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def segments_of(batch):
    """Every document of a batch -> (tokens, positions, weights)."""
    for row in range(len(batch["tokens"])):
        segments = batch["segments"][row]
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            yield tuple(batch[name][row][here] for name in ("tokens", "positions", "weights"))


def test_shapes_and_padding(folder):
    batch = rows(folder).batch(0)
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "tokens": ((5, ROW), "int32"),
        "segments": ((5, ROW), "int32"),
        "positions": ((5, ROW, 3), "int32"),
        "weights": ((5, ROW), "float32"),
    }
    padding = batch["segments"] == 0
    assert padding.any() and (batch["segments"][:, 0] == 1).all()
    for name in ("tokens", "positions", "weights"):
        assert not batch[name][padding].any()
    for segments in batch["segments"]:  # 1, 1, ..., 2, 2, ..., 0, 0: in order, each in one piece
        real = segments[segments > 0]
        assert (segments[len(real) :] == 0).all() and set(np.diff(real)) <= {0, 1}


def test_a_batch_depends_on_its_step_alone(folder):
    one, other = rows(folder), rows(folder, cache_bytes=0)
    forwards = [one.batch(step) for step in range(60)]
    assert one.plan.find((59) * one.batch_size)[0] >= 3
    for step in (59, 0, 31, 31, 12, 58):
        assert same(rows(folder).batch(step), forwards[step])
        assert same(other.batch(step), forwards[step])
        assert same(one.batch(step), forwards[step])
    assert not same(rows(folder, seed=8).batch(0), forwards[0])
    assert len({batch["tokens"].tobytes() for batch in forwards}) == 60


def test_part_of_a_batch_is_that_part(folder):
    loader = rows(folder)
    whole = loader.batch(9)
    parts = [loader.rows_of(9, [0, 1])[0], loader.rows_of(9, [2, 3, 4])[0]]
    assert same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)


def test_the_rows_of_an_epoch_are_the_same_at_any_batch_size(folder):
    five, three = rows(folder), rows(folder, batch_size=3)
    a = np.concatenate([five.batch(step)["tokens"] for step in range(30)])
    b = np.concatenate([three.batch(step)["tokens"] for step in range(50)])
    np.testing.assert_array_equal(a, b)


def test_every_document_once_an_epoch(folder):
    loader = rows(folder, batch_size=1, text_drop=0.0, image_drop=0.0)
    expected = collections.Counter(Shards(folder).tokens(i).tobytes() for i in range(240))
    step = 0
    for epoch in range(3):
        count = len(documents_of(loader, epoch))
        found = collections.Counter(
            tokens.tobytes()
            for s in range(step, step + count)
            for tokens, _, _ in segments_of(loader.batch(s))
        )
        assert found == expected
        step += count
        assert (
            loader.plan.find((step - 1) * loader.batch_size)[0] == epoch
            and loader.plan.find((step) * loader.batch_size)[0] == epoch + 1
        )
    assert documents_of(loader, 0) != documents_of(loader, 1)


@pytest.mark.parametrize(
    "loss", [None, {"text": 0.5, "image": 2.0}, {"text": 1.0, "image": 1.0, "user": True}]
)
def test_documents_are_as_the_grammar_says(folder, loss):
    loader, shards = rows(folder, batch_size=1, loss=loss), Shards(folder)
    for step, documents in enumerate(documents_of(loader, 0)):
        found = list(segments_of(loader.batch(step)))
        assert len(found) == len(documents)
        for (tokens, positions, weights), (i, variant) in zip(found, documents):
            expected = shards.tokens(i, variant)
            np.testing.assert_array_equal(tokens, expected)
            np.testing.assert_array_equal(positions, GRAMMAR.positions(expected))
            np.testing.assert_array_equal(weights, GRAMMAR.loss_weights(expected, **(loss or {})))
            assert weights[0] == 0  # the first token of a segment has nothing before it to follow from
            GRAMMAR.feed(tokens)  # well-formed with any drop
    assert sum(weights.sum() for _, _, weights in found) > 0


def test_drop_rates(folder):
    drawn = np.array([v for epoch in range(40) for row in documents_of(rows(folder), epoch) for _, v in row])
    assert abs(((drawn & DROP_TEXT) > 0).mean() - 0.3) < 0.02
    assert abs(((drawn & DROP_IMAGES) > 0).mean() - 0.2) < 0.02
    assert abs((drawn == DROP_TEXT | DROP_IMAGES).mean() - 0.06) < 0.02
    per_epoch = [dict(d for row in documents_of(rows(folder), epoch) for d in row) for epoch in (0, 1)]
    assert per_epoch[0] != per_epoch[1]


def test_rows_are_planned_with_the_lengths_after_dropping(folder):
    counts = [len(documents_of(rows(folder, text_drop=p, image_drop=p), 0)) for p in (0.0, 0.5, 1.0)]
    assert counts[0] > counts[1] > counts[2]
    whole, text, images = Shards(folder).lengths[:, 0].sum(0)
    assert counts[2] <= 1.1 * (whole - text - images) / ROW


def test_rows_too_short(folder):
    with pytest.raises(ValueError, match="longer than a row"):
        rows(folder, row_length=24).batch(0)
    loader = rows(folder, row_length=24, overlong="drop")
    kept = sum(len(row) for row in documents_of(loader, 0))
    assert 0 < kept < 240 and loader.plan.dropped(0) == 240 - kept
    with pytest.raises(ValueError, match="no document fits"):
        rows(folder, row_length=2, overlong="drop").batch(0)


@pytest.mark.parametrize("threads", [1, 3])
def test_prefetch_is_the_batches_from_any_step_on(folder, threads):
    loader = rows(folder)
    before = threading.active_count()
    for start in (0, 13, 1000):
        batches = rows(folder, threads=threads).prefetch(start)
        for step in range(start, start + 6):
            found, batch, _ = next(batches)
            assert found == step and same(batch, loader.batch(step))
        batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(5)
    assert threading.active_count() <= before


def test_worker_processes_make_the_same_batches(tmp_path):
    script = tmp_path / "run.py"  # workers import the main module again
    script.write_text("""
import sys
import numpy as np
from mmgen.data.loader import Images, Rows
from mmgen.data.shards import Shards, write
from mmgen.data.sources import open_source
from tests.test_loader import GRAMMAR, edit, same

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    write(sys.argv[1], [edit(rng) for _ in range(100)], GRAMMAR)
    rows = lambda workers: Rows(Shards(sys.argv[1]), GRAMMAR, batch_size=3, row_length=96, workers=workers)
    source = open_source("world:train", size=(16, 16), documents=40)
    images = lambda workers: Images(source, 4, augment=True, recolored=True, workers=workers)
    for make in (rows, images):
        one, two = make(0).prefetch(5, [0, 2]), make(2).prefetch(5, [0, 2])
        for step in range(5, 12):
            (a, batch, bad), (b, other, worse) = next(one), next(two)
            assert a == b == step and same(batch, other) and bad == worse == 0, step
        one.close(), two.close()
    print("same")
""")
    code = f"import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert run_python(code, "run", tmp_path / "shards").stdout.strip() == "same"


def test_damaged_documents_leave_their_place_empty_and_are_counted(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "s")
    path = tmp_path / "s" / "tokens-00001.arrayrecord"
    data = bytearray(path.read_bytes())
    parts = np.flatnonzero(np.frombuffer(data, np.uint8))
    for place in parts[len(parts) // 4 : len(parts) // 2 : 40]:
        data[place] ^= 1
    path.write_bytes(data)
    whole, damaged = rows(folder), rows(tmp_path / "s", max_bad=1.0)
    lost = {i for i in range(240) if damaged.shards.records([i])[0] is None}
    assert 0 < len(lost) < 100
    total = 0
    for step in range(10):
        expected, (found, bad) = whole.batch(step), damaged.rows_of(step, range(5))
        gone = 0
        for row in range(5):
            documents = whole.plan.row(step * 5 + row)[0].tolist()
            left = [n for n, i in enumerate(documents, 1) if i not in lost]
            gone += len(documents) - len(left)
            keep = np.isin(expected["segments"][row], left)
            for name, values in found.items():
                assert np.array_equal(values[row][: keep.sum()], expected[name][row][keep])
                assert not values[row][keep.sum() :].any()
        assert bad == gone
        total += bad
    assert total == damaged.bad > 0
    strict = rows(tmp_path / "s")
    with pytest.raises(TooManyBad, match="1%.*tools inspect"):
        for step in range(100):
            strict.batch(step)


def test_prefetch_stays_a_few_steps_ahead_and_passes_errors_on():
    made = []

    def rows_of(step, rows):
        made.append(step)
        if step == 3:
            raise ValueError("step three")
        return {}, rows

    batches = prefetch(rows_of, 0, 7, ahead=2)
    assert [next(batches)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="step three"):
        next(batches)
    batches.close()
    assert max(made) <= 6


def test_another_grammar_than_the_shards_is_refused(folder):
    with pytest.raises(ValueError, match="grammar"):
        Rows(Shards(folder), Grammar(pieces=51, max_side=4, codes=100), batch_size=1, row_length=ROW)


# Images, for the tokenizer stage.


def tar_of_images(path, count, bad=(), size=(24, 24)):
    with tarfile.open(path, "w") as tar:
        for k in range(count):
            out = io.BytesIO()
            ramp = np.tile(np.arange(size[0], dtype=np.uint8)[None, :, None], (size[1], 1, 3))
            ramp[..., 0] = k
            Image.fromarray(ramp).save(out, "PNG")
            data = out.getvalue()[:40] if k in bad else out.getvalue()
            info = tarfile.TarInfo(f"{k:03}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return open_source(f"tars:{path}", size=(16, 16))


@pytest.mark.parametrize("augment", [False, True])
def test_image_batches_are_pure_and_cover_an_epoch(tmp_path, augment):
    source = tar_of_images(tmp_path / "a.tar", 30)
    loader, again = Images(source, 6, seed=1, augment=augment), Images(source, 6, seed=1, augment=augment)
    batches = [loader.batch(step)["images"] for step in range(10)]
    for step in (9, 0, 4, 4):
        assert (again.batch(step)["images"] == batches[step]).all()
    assert batches[0].shape == (6, 16, 16, 3) and batches[0].dtype == np.uint8
    for epoch in (batches[:5], batches[5:]):
        assert sorted(np.concatenate(epoch)[:, 0, 0, 0].tolist()) == list(range(30))
    assert (batches[0] != batches[5]).any()
    assert (loader.rows_of(3, [2, 3])[0]["images"] == batches[3][2:4]).all()
    loader.threads = 2
    found, batch, _ = next(prefetching := loader.prefetch(7))
    prefetching.close()
    assert found == 7 and (batch["images"] == batches[7]).all()


def test_a_bad_image_is_replaced_by_the_next_good_one_and_counted_once(tmp_path):
    source = tar_of_images(tmp_path / "a.tar", 40, bad=(7, 8, 39))
    loader = Images(source, 8)
    for _ in range(2):
        drawn = sorted(
            np.concatenate([loader.batch(step)["images"] for step in range(5)])[:, 0, 0, 0].tolist()
        )
        assert drawn == sorted([*(set(range(40)) - {7, 8, 39}), 9, 9, 0])
        assert sum(source.skipped.values()) == 3


def test_all_images_of_a_document_come_in_turn():
    source = open_source("jsonl:sample", size=(16, 16))
    most = max(len(source[i].images()) for i in range(len(source)))
    assert most > 1
    loader, seen = Images(source, len(source), max_bad=1.0), set()
    seen = {image.tobytes() for step in range(most) for image in loader.batch(step)["images"]}
    every = {image.pixels.tobytes() for i in range(len(source)) for image in source[i].images()}
    assert seen == every


def test_a_batch_depends_on_its_step_alone_with_bad_images_too(tmp_path):
    """Of some documents the second image is bad: their first must come whatever was read before."""
    lines = []
    for k in range(12):
        for which in range(2):
            data = np.full((16, 16, 3), 20 * k + which, np.uint8)
            Image.fromarray(data).save(tmp_path / f"{k}-{which}.png")
        if k % 4 == 1:
            (tmp_path / f"{k}-1.png").write_bytes(b"no image")
        parts = [{"image": f"{k}-{which}.png"} for which in range(2)]
        lines.append(json.dumps({"turns": [{"role": "page", "parts": parts}]}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(lines))
    loader = lambda **options: Images(
        open_source(f"jsonl:{tmp_path}/a.jsonl", size=(16, 16)), 4, max_bad=1.0, **options
    )
    whole = loader()
    forwards = [whole.batch(step)["images"] for step in range(18)]
    assert sum(whole.source.skipped.values()) == 3
    assert len(whole._kept) <= 24  # each image once, however many epochs
    for step in (17, 5, 3, 11, 0):
        assert (loader().batch(step)["images"] == forwards[step]).all()
        assert (loader(cache_bytes=0).batch(step)["images"] == forwards[step]).all()
        assert (whole.batch(step)["images"] == forwards[step]).all()
    for epoch in range(0, 6, 2):  # the first images, all of them good
        first = np.concatenate(forwards[3 * epoch : 3 * epoch + 3])[:, 0, 0, 0]
        assert sorted(first.tolist()) == [20 * k for k in range(12)]


@pytest.mark.parametrize("options", [{"threads": 0}, {"workers": -1}])
def test_threads_and_workers_that_make_no_sense(folder, options):
    with pytest.raises(ValueError, match="at least"):
        rows(folder, **options).prefetch(0)
    with pytest.raises(ValueError, match="at least one"):
        rows(folder, batch_size=0)


def test_too_many_bad_images_end_the_run(tmp_path):
    with pytest.raises(TooManyBad, match="5 of 5"):
        Images(tar_of_images(tmp_path / "a.tar", 5, bad=range(5)), 2).batch(0)
    loader = Images(tar_of_images(tmp_path / "b.tar", 200, bad=range(0, 200, 4)), 50)
    with pytest.raises(TooManyBad, match="10%"):
        for step in range(4):
            loader.batch(step)


def test_recolored_images_are_the_same_pictures_in_other_colors(tmp_path):
    source = open_source("world:train", size=(16, 16), documents=12, category="colors")
    batch = Images(source, 6, recolored=True).batch(1)
    again = Images(source, 6, recolored=True, cache_bytes=0).batch(1)
    assert all((batch[name] == again[name]).all() for name in ("images", "recolored"))

    def covered(image):
        distance = np.abs(image.astype(int) - image[0, 0]).sum(-1)
        return distance > distance.max() / 2

    for image, other in zip(batch["images"], batch["recolored"]):
        assert np.mean(covered(image) != covered(other)) < 0.02
    assert (batch["images"] != batch["recolored"]).any(axis=(1, 2, 3)).sum() >= 5
    with pytest.raises(ValueError, match="no pictures in other colours"):
        Images(tar_of_images(tmp_path / "a.tar", 5), 2, recolored=True)


def test_an_image_is_drawn_once_while_there_is_room():
    source = open_source("world:train", size=(16, 16), documents=10)
    drawn, draw = [], source.pixels
    source.pixels = lambda i, which: drawn.append(i) or draw(i, which)
    loader = Images(source, 5, cache_bytes=4 * 16 * 16 * 3)
    first, *_, last = [loader.batch(step)["images"] for step in range(6)]
    assert len(drawn) == 10 + 2 * 6  # four are kept
    assert sorted(drawn[:10]) == list(range(10))
