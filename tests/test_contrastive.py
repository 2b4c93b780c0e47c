"""Towers: their loss against arithmetic by hand and over devices, their use, and what the rest does with them."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mmgen.data.loader import Images
from mmgen.data.shards import Shards
from mmgen.data.sources import open_source
from mmgen.document import Document, Turn
from mmgen.document import Text as Words
from mmgen.evals import metrics, towers
from mmgen.models import contrastive
from mmgen.models.contrastive import Contrastive, load_towers, pair_loss
from mmgen.runtime import checkpoint, optimizer
from mmgen.runtime import config as configs
from mmgen.runtime.config import ConfigError
from mmgen.sampling.best import best_of
from mmgen.sampling.sampler import Request
from mmgen.sampling.strategies import Strategy
from mmgen.stages import loop
from mmgen.stages.contrastive import held_out_pairs, retrieval
from mmgen.text import Text
from mmgen.world.scene import holds
from tests.conftest import arrays, assert_same_arrays, config_of, mmgen, records, run_python


@pytest.fixture(scope="module")
def run(space, tmp_path_factory):
    """A tiny contrastive run: its workdir and the flags of its `mmgen train`."""
    workdir = tmp_path_factory.mktemp("towers") / "run"
    flags = ["--config", "contrastive:tiny", f"--config.data.text={space.text}", "--config.steps=8"]
    flags += ["--config.save_every=3", "--config.log_every=2", "--config.evaluate_every=8"]
    assert mmgen("train", *flags, "--workdir", workdir) == 0
    return SimpleNamespace(workdir=workdir, flags=flags)


@pytest.fixture(scope="module")
def pair(run):
    return load_towers(run.workdir)


def units(rng, n, width=8):
    x = rng.normal(size=(n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", contrastive.LOSSES)
@pytest.mark.parametrize("repeats, more", [(False, 0), (True, 0), (True, 3)])
def test_the_loss_is_what_the_papers_say(kind, repeats, more):
    rng = np.random.default_rng(0)
    altered = units(rng, 6 * more).reshape(6, more, 8) if more else None
    a, b, scale, bias = units(rng, 6), units(rng, 6), 7.0, -3.0
    texts, documents = ([0, 1, 2, 0, 4, 1], [0, 1, 2, 3, 4, 4]) if repeats else (range(6), range(6))
    same = np.stack([texts, documents], 1).astype(np.int32)
    left_out = lambda i, j: i != j and (same[i] == same[j]).any()
    logits = scale * a.astype(np.float64) @ b.T.astype(np.float64)
    expected = np.zeros(6)
    for i in range(6):
        wrong = scale * altered[i].astype(np.float64) @ a[i] if more else np.zeros(0)
        if kind == "sigmoid":
            expected[i] += np.log1p(np.exp(wrong + bias)).sum()
            for j in range(6):
                sign = 1 if i == j else -1
                expected[i] += 0 if left_out(i, j) else np.log1p(np.exp(-sign * (logits[i, j] + bias)))
        else:
            row = sum(np.exp(logits[i, j]) for j in range(6) if not left_out(i, j)) + np.exp(wrong).sum()
            column = sum(np.exp(logits[j, i]) for j in range(6) if not left_out(j, i))
            expected[i] = (np.log(row) + np.log(column)) / 2 - logits[i, i]
    found, best = pair_loss(a, b, scale, bias if kind == "sigmoid" else None, same, altered)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for i in range(6):
        assert best[i] == all(logits[i, i] > logits[i, j] for j in range(6) if j != i and not left_out(i, j))
    ones = np.ones((4, 8), np.float32) / 8**0.5  # towers that say one thing of all find nothing
    assert not pair_loss(ones, ones, scale, None, np.arange(4, dtype=np.int32)[:, None])[1].any()


EIGHT = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from mmgen.models.contrastive import pair_loss
from mmgen.runtime import mesh as meshes
from mmgen.runtime.presets import SHARDING

B = 4096
x = np.random.default_rng(0).normal(size=(2, B, 16)).astype(np.float32)
a, b = x / np.linalg.norm(x, axis=-1, keepdims=True)
same = np.stack([np.arange(B) // 2 * (np.arange(B) % 7 == 0), np.arange(B)], 1).astype(np.int32)
out = {}
for kind, bias in (("softmax", None), ("sigmoid", -10.0)):
    def total(a, b, scale, same):
        return pair_loss(a, b, scale, bias, same)[0].mean()
    found = []
    for shape in ({"data": 1}, {"data": 4, "fsdp": 2}):
        ways = np.prod(list(shape.values()))
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:ways]).reshape([shape.get(n, 1) for n in meshes.AXES]),
                                 meshes.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 5)
        with meshes.use(mesh, SHARDING):
            place = jax.NamedSharding(mesh, meshes.spec(("batch", None), SHARDING))
            args = (jax.device_put(a, place), jax.device_put(b, place), jnp.float32(20.0), same)
            step = jax.jit(jax.value_and_grad(total, (0, 1, 2)), out_shardings=(None, (place, place, None)))
            compiled = step.lower(*args).compile()
            found.append(jax.tree.map(np.asarray, compiled(*args)))
            memory, text = compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()
        whole = bool(re.search(rf"\\[{B},{B}\\]", text))
        assert whole == (ways == 1), kind  # the search finds it where it is
    worst = max(float(np.abs(p - q).max() / np.abs(p).max())
                for p, q in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1])))
    out[kind] = dict(worst=worst, memory=memory)
print(json.dumps(out))
"""


def test_eight_devices_compute_the_loss_of_one_and_none_holds_all_logits():
    found = json.loads(run_python(EIGHT, devices=8).stdout.splitlines()[-1])
    for kind, each in found.items():
        assert each["worst"] < 1e-5, (kind, each)
        # A device's share of a few float32 logits of all pairs, and not all of one of them.
        assert each["memory"] < 4096 * 4096 * 4, (kind, each)


TRAIN = """
import json, sys
from mmgen.stages import loop
from tests.conftest import config_of
flags, out = json.loads(sys.argv[1]), sys.argv[2]
config = config_of(flags)
with config.unlocked():
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
loop.train(config, out + "/mixed")
"""


@pytest.mark.soak  # what it compiles takes a minute; test_processes.py has a step of it on four devices
def test_runs_on_eight_devices_learn_what_one_does(run, tmp_path):
    flags = [*run.flags, "--config.log_every=1"]
    run_python(TRAIN, json.dumps(flags), tmp_path, devices=8)
    loop.train(config_of(flags), tmp_path / "one")
    one = records(tmp_path / "one")
    other = records(tmp_path / "mixed")
    assert [line["step"] for line in other] == [line["step"] for line in one]
    np.testing.assert_allclose([x["loss"] for x in other], [x["loss"] for x in one], rtol=1e-4)
    assert other[-1]["text_r10"] == pytest.approx(one[-1]["text_r10"], abs=0.05)


@pytest.mark.soak
def test_stopped_and_resumed_is_bit_identical(run, tmp_path):
    config = config_of(run.flags)
    loop.train(config, tmp_path, stop_at=5)
    loop.train(config, tmp_path)
    assert_same_arrays(arrays(tmp_path, 8), arrays(run.workdir, 8))
    assert records(tmp_path) == records(run.workdir)


def test_the_temperature_stays_within_its_bounds_and_can_come_back():
    config = configs.load("contrastive:tiny")
    abstract = nnx.split(nnx.eval_shape(lambda: Contrastive(config.model, 300, nnx.Rngs(0))))[1]
    tx = optimizer.make(config.optimizer, 100, abstract)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), nnx.to_pure_dict(abstract))
    state, most = tx.init(params), np.log(100.0)
    params["scale"] = jnp.float32(most - 0.001)
    update = jax.jit(tx.update)
    for push, back in (
        (-1.0, False),
        (1.0, True),
    ):  # against the gradient: up beyond the bound, and down again
        grads = jax.tree.map(jnp.zeros_like, params) | {"scale": jnp.float32(push)}
        for _ in range(12):
            updates, state = update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        assert float(params["scale"]) <= most + 1e-6
        assert (float(params["scale"]) < most - 1e-3) == back


def test_padding_says_nothing_and_sizes_may_differ(pair):
    tokens, lengths = contrastive.tokens_of(["a red circle", "两个"], pair.text, 20)
    longer = np.concatenate([tokens, np.full((2, 12), 7, np.int32)], 1)
    tokens[0, lengths[0] :] = 99
    embed_texts = nnx.jit(lambda model, *batch: model.embed_texts(*batch))
    embed_images = nnx.jit(lambda model, images: model.embed_images(images))
    a = embed_texts(pair.model, tokens, lengths)
    b = embed_texts(pair.model, longer, lengths)
    np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    for shape in ((2, 48, 32, 3), (1, 8, 64, 3)):
        images = jax.random.uniform(jax.random.key(0), shape, minval=-1)
        assert embed_images(pair.model, images).shape == (shape[0], 16)
    rng = np.random.default_rng(0)  # of any size, fitted: alone or among others, the vectors are the same
    images = [rng.integers(0, 256, (side, 40, 3), np.uint8) for side in (30, 64, 32)]
    together = pair.embed_images(images)
    for i, image in enumerate(images):
        np.testing.assert_allclose(together[i], pair.embed_images([image])[0], atol=1e-5)


def test_depths_end_with_what_the_pool_reads(pair):
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1)
    depths = pair.model.image.depths(images)
    assert len(depths) == 1 + pair.model.image.encoder.config.layers
    np.testing.assert_allclose(depths[-1], pair.model.image.grid(images), atol=1e-5)


def test_retrieval_by_hand():
    images = np.eye(4)[:, :3] + 0.0
    images[3] = [1, 1, 1]
    texts = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 1]], float)
    # Scores, images down: [1 0 0 1] [0 0 1 1] [0 1 0 1] [1 1 1 3]
    found = retrieval(images, texts, ranks=(1, 2, 3, 4))
    assert [found[f"text_r{k}"] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.5, 1.0]
    assert [found[f"image_r{k}"] for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.5, 1.0]
    perfect = retrieval(np.eye(12), np.eye(12))
    assert set(perfect.values()) == {1.0}
    blind = retrieval(np.ones((100, 3)), np.ones((100, 3)))  # all alike: no better than chance, and no credit
    assert blind["text_r1"] == blind["image_r10"] == 0.0
    assert set(retrieval(np.full((20, 3), np.nan), np.ones((20, 3))).values()) == {0.0}


def test_frechet_and_auc_by_hand():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5000, 3))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, a + [1, 2, 2]) == pytest.approx(9, rel=1e-6)
    assert metrics.frechet(a, 3 * a) == pytest.approx(
        4 * np.trace(np.cov(a.T)) + 4 * (a.mean(0) ** 2).sum(), rel=1e-6
    )
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]  # covariances that do not commute
    b = a * [1, 2, 3]
    A, B = np.cov(b.T), np.cov((b @ turn).T)
    roots = np.sqrt(np.linalg.eigvals(A @ B)).real.sum()
    expected = ((b.mean(0) - (b @ turn).mean(0)) ** 2).sum() + np.trace(A + B) - 2 * roots
    assert metrics.frechet(b, b @ turn) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="features"):
        metrics.frechet(a, a[:, :2])
    right, wrong = rng.integers(0, 5, 40), rng.integers(0, 5, 30)
    pairs = np.sign(right[:, None] - wrong).mean() / 2 + 0.5
    assert metrics.auc(right, wrong) == pytest.approx(pairs)


def test_mistakes_are_said_before_anything_is_written(space, tmp_path):
    config = configs.load("contrastive:tiny", [f"data.text={space.text}"])
    for change, words in (
        (dict(accumulate=2), "accumulate"),
        (dict(data=dict(text=str(tmp_path / "none.model"))), "mmgen text"),
        (dict(model=dict(loss="triplet")), "softmax, sigmoid"),
        (dict(model=dict(image=dict(patch=5))), "whole patches"),
        (dict(data=dict(phrasings=0)), "phrasings is at least 1"),
        (dict(data=dict(length=0)), "length is at least 1"),
        (dict(data=dict(altered=-1)), "altered is at least 0"),
    ):
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.update(change)
        with pytest.raises((ConfigError, ValueError), match=words):
            loop.train(changed, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_captions_are_the_words_of_the_alternatives():
    for source in (
        open_source("world:valid", (32, 32), 3, documents=12, languages=("en", "zh")),
        open_source("jsonl:sample", (32, 32)),
    ):
        for i in range(min(len(source), 12)):
            for n in (1, 4):
                assert source.captions(i, n) == [d.text() for d in source.alternatives(i, n)]


def test_altered_captions_are_wrong_and_learned_from(space, run, tmp_path):
    source = open_source("world:train", (32, 32), 0, documents=20, languages=("zh", "en"), category="scene")
    for i in range(20):
        wrong = source.altered(i, 5)
        assert wrong == source.altered(i, 5) != source.altered(i, 5, draw=1)
        assert not set(wrong) & set(source.captions(i, 8)) and len(wrong) == 5
    config = config_of([*run.flags, "--config.data.altered=2"])
    batch = loop.setup(config, tmp_path).data.batch(0)
    assert batch["altered_tokens"].shape == (16, 2, 48) and batch["altered_lengths"].shape == (16, 2)
    plain = {name: value for name, value in batch.items() if "altered" not in name}

    @jax.jit
    def losses(*batches):
        model = Contrastive(config.model, Text(space.text).size, nnx.Rngs(0))
        return [contrastive.loss(model, each)["loss"][0] / 16 for each in batches]

    more, less = losses(batch, plain)
    assert more - less == pytest.approx(np.log(18 / 16) / 2, rel=0.5)  # 18 texts to tell apart for 16
    with config.unlocked():
        config.data.source = dict(spec="jsonl:sample", size=(32, 32))
    with pytest.raises(ConfigError, match="altered"):
        loop.train(config, tmp_path / "none")


def test_an_epoch_has_another_wording_and_equal_texts_are_known(space, run):
    config = config_of(run.flags)
    with config.unlocked():
        config.data.source.documents, config.data.batch_size = 16, 16
    data = loop.setup(config, run.workdir).data
    text = Text(space.text)
    first, second = (data.batch(step) for step in (0, 1))
    read = lambda batch: [text.decode(row[:n]) for row, n in zip(batch["tokens"], batch["lengths"])]
    order = {image.tobytes(): caption for image, caption in zip(first["images"], read(first))}
    changed = [order[image.tobytes()] != caption for image, caption in zip(second["images"], read(second))]
    assert sum(changed) > 4
    captions = read(first)
    for i in range(16):
        for j in range(16):
            assert (first["same"][i, 0] == first["same"][j, 0]) == (captions[i] == captions[j])
    number = {image.tobytes(): place for image, (_, place) in zip(first["images"], first["same"])}
    assert all(
        number[image.tobytes()] == place for image, (_, place) in zip(second["images"], second["same"])
    )


def test_of_several_images_the_first_is_the_texts(tmp_path):
    for k, gray in enumerate((0, 200)):
        Image.new("RGB", (32, 32), (gray, gray, gray)).save(tmp_path / f"{k}.png")
    parts = [{"image": "0.png"}, {"text": "brighter"}, {"image": "1.png"}]
    line = {"turns": [{"role": "user", "parts": parts}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
    source = open_source(f"jsonl:{tmp_path / 'a.jsonl'}", (32, 32))
    assert len(source) == 1
    means = lambda **more: [Images(source, 1, **more).batch(step)["images"].mean() for step in range(4)]
    assert means(beside=lambda *_: {}) == [0, 0, 0, 0] and means() == [0, 200, 0, 200]


# ---- what the rest does with them -----------------------------------------------------------


def test_evaluate_writes_retrieval_and_wrong_attributes(run, tmp_path, capsys):
    flags = ["--suite", "retrieval", "--checkpoint", run.workdir, "--data", "world:test", "--documents", 40]
    assert mmgen("evaluate", *flags, "--category", "scene", "--languages", "en,zh", "--out", tmp_path) == 0
    found = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert found["pairs"] <= 40 and found["chance_r5"] == pytest.approx(5 / found["pairs"])
    assert 0 <= found["text_r1"] <= found["text_r5"] <= found["text_r10"] <= 1
    assert 0 < found["auc"] < 1 and {"auc_color", "auc_shape"} <= found.keys()
    assert "report.html" in capsys.readouterr().out
    flags = ["--suite", "retrieval", "--checkpoint", run.workdir, "--out", tmp_path]
    assert mmgen("evaluate", *flags) == 0  # on what the run has held out, as it has
    report = json.loads((tmp_path / "report.json").read_text())
    expected = records(run.workdir)[-1]
    assert report["metrics"]["text_r10"] == pytest.approx(expected["text_r10"])
    assert report["config"]["data"]["spec"] == "world:valid" in capsys.readouterr().out
    assert mmgen("evaluate", *flags, "--towers", run.workdir) == 1
    assert "suites world" in capsys.readouterr().err


def test_wrong_attributes_are_told_by_who_reads_them(monkeypatch):
    """An oracle in place of towers: the auc is 1, and 1/2 for one that reads nothing."""
    source = open_source("world:test", (32, 32), 1, documents=30, category="scene")
    claims = {source.item(i).prompt: i for i in range(30)}

    class Oracle:
        def embed_images(self, images):
            return np.eye(30)

        def embed_texts(self, texts):
            known = [claims.get(text) for text in texts]
            return np.stack([np.zeros(30) if i is None else np.eye(30)[i] for i in known])

    assert towers.attributes(Oracle(), source)["auc"] == 1.0
    Oracle.embed_texts = lambda self, texts: np.ones((30, 30))
    assert towers.attributes(Oracle(), source)["auc"] == 0.5


def test_embed_writes_a_row_for_each_document(run, pair, tmp_path):
    flags = ["--towers", run.workdir, "--source", "world:valid", "--documents", 10, "--out", tmp_path]
    assert mmgen("tools", "embed", *flags, "--batch-size", 4) == 0
    source = open_source("world:valid", (32, 32), 0, documents=10)
    images, texts = (np.load(tmp_path / name) for name in ("images.npy", "texts.npy"))
    np.testing.assert_allclose(images, pair.embed_images([source.pixels(i) for i in range(10)]), atol=2e-3)
    np.testing.assert_allclose(texts, pair.embed_texts([source.texts(i)[0] for i in range(10)]), atol=2e-3)
    assert json.loads((tmp_path / "embed.json").read_text())["towers"] == pair.name
    (tmp_path / "bad.jsonl").write_text('{"turns": 3}\n')
    assert mmgen("tools", "embed", *flags[:2], "--source", f"jsonl:{tmp_path / 'bad.jsonl'}", *flags[6:]) == 1
    assert not (tmp_path / "embed.json").exists()


def test_tokenize_leaves_out_what_does_not_fit(space, run, pair, tmp_path, capsys):
    source = open_source("world:train", (32, 32), 5, documents=120)
    scores = pair.score([source.pixels(i) for i in range(120)], [source.texts(i)[0] for i in range(120)])
    least = float(np.sort(scores)[70:72].mean())  # most of them are left out, far more than --max-bad
    flags = ["--source", "world:train", "--seed", 5, "--documents", 120, "--tokenizer", space.tokenizer]
    flags += ["--text", space.text, "--out", tmp_path / "shards", "--shard-size", 50]
    assert mmgen("tokenize", *flags, "--towers", run.workdir, "--min-score", least) == 0
    shards = Shards(tmp_path / "shards")
    assert len(shards) == 120 - 71 == (scores >= least).sum()
    assert shards.manifest["skipped"] == {"low_score": 71}
    assert shards.manifest["settings"]["towers"] == pair.name
    assert mmgen("tokenize", *flags, "--min-score", least) == 1
    assert "--towers" in capsys.readouterr().err


def test_the_best_of_several_draws(sampler, pair):
    prompts = ["a red circle", "a blue square"]
    requests = [
        Request(Document([Turn("user", [Words(p)])]), size=(8, 8), seed=k, image=Strategy(1.0, 0, 1.0, False))
        for k, p in enumerate(prompts)
    ]
    brightness = lambda images, texts: np.array([image.mean() for image in images])
    turns, scores = best_of(sampler, requests, 4, brightness, batch_size=8)
    assert scores.shape == (2, 4)
    for turn, row in zip(turns, scores):
        assert turn.parts[0].pixels.mean() == pytest.approx(row.max())
    single = sampler.generate(requests, 8)
    for turn, row in zip(single, scores):  # the first draw is that of the request itself
        assert turn.parts[0].pixels.mean() == pytest.approx(row[0])
    with pytest.raises(ValueError, match="at least one"):
        best_of(sampler, requests, 0, brightness)


def test_held_out_captions_are_true_of_their_own_picture_alone():
    """Of a world of few scenes many are the same, said in other words, in the other language or with less."""
    source = open_source("world:test", (32, 32), 0, documents=300, languages=("en", "zh"), category="colors")
    images, texts = held_out_pairs(source)
    kept = {source.captions(i, 1)[0]: source.item(i) for i in reversed(range(300))}
    items = [kept[text] for text in texts]
    assert 10 < len(items) < len(kept) and len(images) == len(items)
    for i, a in enumerate(items):
        for j, b in enumerate(items):
            assert holds(a.claim, b.scene) == (i == j)


def test_a_judged_set_of_pictures(pair):
    source = open_source("world:valid", (32, 32), 0, documents=40)
    images, texts = held_out_pairs(source)
    found = towers.judge(pair, images, texts, images)
    assert found[f"FD-{pair.name}"] == pytest.approx(0, abs=1e-4)
    expected = 100 * np.maximum(np.sum(pair.embed_images(images) * pair.embed_texts(texts), -1), 0).mean()
    assert found[f"CLIPScore-{pair.name}"] == pytest.approx(expected)
    noise = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(len(images))]
    assert towers.judge(pair, noise, texts, images)[f"FD-{pair.name}"] > 1e-3


def test_the_name_changes_with_the_weights(run, pair, tmp_path):
    assert pair.name.startswith("contrastive:tiny@")
    checkpoint.export(run.workdir, tmp_path / "copy")
    (tmp_path / "copy" / "text.model").write_bytes((run.workdir / "text.model").read_bytes())
    copy = load_towers(tmp_path / "copy")
    assert copy.name == pair.name
    copy.model.image.stem.b[...] += 1e-6
    assert (
        contrastive.Towers(copy.model, copy.text, copy.length, copy.size, "contrastive:tiny").name
        != pair.name
    )


@pytest.mark.soak
def test_a_new_run_begins_with_a_tower(space, run, tmp_path, capsys):
    """Of a run with other pieces all but their table, and a classifier the image tower alone."""
    other = tmp_path / "other.model"
    assert mmgen("text", "--source", "world:train", "--documents", 300, "--pieces", 290, "--out", other) == 0
    flags = [f"--config.init={run.workdir}", "--config.steps=1", "--config.evaluate_every=9"]
    again = [*run.flags[:2], f"--config.data.text={other}", *flags]
    assert mmgen("train", *again, "--workdir", tmp_path / "again") == 0
    assert "left as initialised: text/embedding\n" in capsys.readouterr().out
    wider = ["--config", "classifier:tiny", "--config.model.image.width=64", *flags]
    assert mmgen("train", *wider, "--workdir", tmp_path / "wider") == 1
    assert "config.json" in capsys.readouterr().err
    frozen = ["--config", "classifier:tiny", "--config.model.frozen=true", *flags[1:]]
    none = [*frozen, f"--config.init={space.transformer}"]
    assert mmgen("train", *none, "--workdir", tmp_path / "none") == 1
    assert "it has no image/encoder" in capsys.readouterr().err


@pytest.mark.soak
def test_a_tokenizer_learns_to_look_right_to_the_towers(space, run, pair, tmp_path):
    flags = [*space.tokenizer_flags, "--config.loss.weights.perceptual=1.0", "--config.steps=4"]
    config = config_of([*flags, f"--config.loss.towers={run.workdir}"])
    last = loop.train(config, tmp_path / "with")
    assert last["perceptual"] > 0
    plain = records(space.tokenizer)
    assert "perceptual" not in plain[-1] and last["loss"] > plain[1]["loss"]
    with pytest.raises(ConfigError, match="loss.towers"):
        loop.train(config_of(flags), tmp_path / "none")
    tower, images = pair.model.image, jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1)
    np.testing.assert_allclose(contrastive.distance(tower, images, images), 0, atol=1e-9)
    near, far = (contrastive.distance(tower, images, images + step) for step in (0.01, 0.5))
    assert (0 < near).all() and (near < far).all()


def test_a_flag_can_ask_for_the_whole_mixture(run):
    config = config_of([*run.flags, "--config.data.source.category="])
    source, plain = open_source(**config.data.source), open_source("world:train", (32, 32), documents=200)
    assert {source.fields(i)["category"] for i in range(60)} > {"scene", "position"}
    assert open_source("world:train", (32, 32), documents=200, category="").fingerprint == plain.fingerprint
