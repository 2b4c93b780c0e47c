"""The stage that trains tokenizers: its quantizers, losses and discriminator in real steps, what it warns of, and
what is measured of a tokenizer."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from mmgen.data import images as pictures
from mmgen.data import packing
from mmgen.data.shards import Shards
from mmgen.grammar import Grammar
from mmgen.models.autoencoders import load_tokenizer, to_float
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError
from mmgen.stages import loop, program
from mmgen.stages import tokenizer as stage
from mmgen.text import Text
from tests.conftest import ROOT, arrays, assert_same_arrays, config_of, mmgen, records, run_python

PLAIN = ["--config", "tokenizer:tiny", "--config.loss.recolor=0.0", "--config.loss.weights.rate=0.0"]
PLAIN += ["--config.steps=4", "--config.save_every=2", "--config.log_every=1", "--config.loss.noise=0.0"]
GAN = [
    "--config.loss.weights.adversarial=0.5",
    "--config.loss.gan.r1_weight=1.0",
    "--config.loss.gan.r1_every=2",
]
GAN += ["--config.model.discriminator.width=8", "--config.model.discriminator.layers=1"]
VQ = [
    "--config.model.quantizer.kind=vq",
    "--config.model.quantizer.codes=64",
    "--config.model.quantizer.channels=4",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The workdir of a tiny run without an adversary."""
    workdir = tmp_path_factory.mktemp("plain")
    assert 0 <= loop.train(config_of(PLAIN), workdir)["near_border"] < 1
    return workdir


def parts(found):
    """(the tokenizer's, the discriminator's) of a checkpoint's parameters."""
    params = {name: value for name, value in found.items() if name.startswith("params")}
    theirs = {name: value for name, value in params.items() if "discriminator" in name}
    return {name: value for name, value in params.items() if name not in theirs}, theirs


@pytest.mark.soak
def test_until_it_is_listened_to_a_discriminator_changes_nothing(plain, tmp_path):
    """Nor does it by a norm that is clipped, or by the optimizer: the tokenizer is that of a run without one."""
    config = config_of([*PLAIN, *GAN, "--config.loss.gan.start=3"])
    loop.train(config, tmp_path / "run", stop_at=2)
    before, learned = parts(arrays(tmp_path / "run", 2))
    for name, value in parts(arrays(plain, 2))[0].items():
        np.testing.assert_allclose(before[name], value, atol=1e-5, err_msg=name)
    loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "whole")
    assert_same_arrays(arrays(tmp_path / "run", 4), arrays(tmp_path / "whole", 4))
    after, theirs = parts(arrays(tmp_path / "run", 4))
    assert all(np.abs(theirs[name] - learned[name]).max() > 0 for name in theirs) and len(theirs) == 6
    others = parts(arrays(plain, 4))[0]
    assert max(np.abs(after[name] - others[name]).max() for name in after) > 1e-4  # now it does
    measured = records(tmp_path / "run")
    assert all({"adversarial", "discriminator", "discriminator_right"} <= line.keys() for line in measured)
    assert [line["adversarial"] == 0 for line in measured] == [True] * 3 + [False]
    # A rare term of the discriminator's is no spike of the tokenizer's gradient, and its norm is its own.
    assert measured[-1]["skipped"] == 0
    norms = [line["grad_norm_discriminator"] for line in measured]
    assert min(norms[0], norms[2]) > 2 * max(norms[1], norms[3])  # R1 in every second step
    for line, other in zip(measured[:3], records(plain)):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    tokenizer = load_tokenizer(tmp_path / "run")  # which knows nothing of it
    assert tokenizer.encode(np.zeros((1, 8, 8, 3), np.uint8)).shape == (1, 2, 2)


def test_the_codebook_is_a_moving_average_of_the_features(tmp_path):
    """A step of the real program against the update by hand; neither its rate nor its clipping is the optimizer's."""
    config = config_of([*PLAIN, *VQ, "--config.model.quantizer.restart=0.0", "--config.optimizer.clip=1e-3"])
    made = loop.setup(config, tmp_path)
    mesh = meshes.make_mesh({"data": 1})
    with meshes.use(mesh, config.sharding):
        built = program.build(config, made.make, made.loss, mesh)
        state = built.init(jax.random.key(0))
        before = jax.tree.map(np.asarray, state["params"])
        batch = made.data.batch(0)

        @jax.jit
        def coded(params, images):
            model = stage.nnx.merge(built.graphdef, params)
            features = model.quantizer.squash(model.features(to_float(images))).reshape(-1, 4)
            return features, model.quantizer.index(features)

        features, codes = jax.tree.map(np.asarray, coded(state["params"], batch["images"]))
        state, measured = built.step(state, batch)
    after = state["params"]["quantizer"]
    counts = np.bincount(codes, minlength=64)
    np.testing.assert_allclose(
        after["counts"], 0.99 * before["quantizer"]["counts"] + 0.01 * counts, rtol=1e-4
    )
    sums = np.zeros((64, 4))
    np.add.at(sums, codes, features)
    np.testing.assert_allclose(after["sums"], 0.99 * before["quantizer"]["sums"] + 0.01 * sums, atol=1e-4)
    assert float(measured["usage"]) == pytest.approx((counts > 0).mean())
    # Of everything else the first step of a warmup is 0.
    assert np.array_equal(state["params"]["to_features"]["w"], before["to_features"]["w"])


@pytest.fixture
def stickers(tmp_path):
    """A folder of pictures that are transparent in part, each with a caption."""
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[8:32, 8:32] = [250, 20, 20, 255]
    rgba[32:, :] = [20, 20, 250, 128]
    rgba[:4, :] = [9, 99, 9, 0]  # a colour that cannot be seen
    (tmp_path / "stickers").mkdir()
    for i in range(16):
        Image.fromarray(np.roll(rgba, i, 0)).save(tmp_path / "stickers" / f"{i:02d}.png")
        (tmp_path / "stickers" / f"{i:02d}.txt").write_text("a square")
    return tmp_path / "stickers"


@pytest.mark.soak
def test_a_tokenizer_with_a_codebook_and_alpha_serves_a_transformer(space, stickers, tmp_path):
    """From transparent pictures to transparent samples."""
    flags = [*PLAIN, *VQ, "--config.model.quantizer.depth=2", "--config.model.quantizer.codes=16", *GAN]
    flags += [f"--config.{name}.spec=folder:{stickers}" for name in ("data.source", "held_out")]
    flags += [
        "--config.held_out.documents=16",
        "--config.data.source.category=",
    ]
    flags += ["--config.model.alpha=true", "--config.steps=2"]
    assert mmgen("train", *flags, "--workdir", tmp_path / "vq") == 0
    tokenizer = load_tokenizer(tmp_path / "vq")
    assert tokenizer.levels == (16, 16) and tokenizer.codes == 256
    evaluate = ["evaluate", "--suite", "tokenizer", "--checkpoint", tmp_path / "vq", "--out", tmp_path]
    assert mmgen(*evaluate) == 0
    assert mmgen(*evaluate, "--data", "world:test", "--documents", 4) == 0  # opaque
    out = ["--tokenizer", tmp_path / "vq", "--text", space.text, "--out", tmp_path / "shards"]
    assert mmgen("tokenize", "--source", f"folder:{stickers}", *out) == 0
    manifest, shards = (
        json.loads((tmp_path / "shards" / "manifest.json").read_text()),
        Shards(tmp_path / "shards"),
    )
    document = Grammar.from_dict(manifest["grammar"]).decode(shards.tokens(0), Text(space.text))
    file = (stickers / "00.png").read_bytes()
    pixels = pictures.read(file, background=pictures.ALPHA, size=(32, 32))
    assert np.array_equal(document.images()[0].codes, tokenizer.encode(pixels[None])[0])
    assert not np.array_equal(document.images()[0].codes, tokenizer.encode(pixels[None, ..., :3])[0])
    flags = [
        "--config",
        "transformer:tiny",
        f"--config.data.shards={tmp_path / 'shards'}",
        "--config.steps=1",
    ]
    assert mmgen("train", *flags, "--config.data.row_length=256", "--workdir", tmp_path / "transformer") == 0
    sample = [
        "sample",
        "--checkpoint",
        tmp_path / "transformer",
        "--prompt",
        "a square",
        "--size",
        "32x32",
        "--out",
    ]
    for name, mode in (("drawn.png", "RGBA"), ("drawn.jpg", "RGB")):
        assert mmgen(*sample, tmp_path / name) == 0
        assert Image.open(tmp_path / name).mode == mode


@pytest.mark.soak
def test_the_other_terms_and_quantizers_learn(tmp_path):
    weights = {"log_mse": 0, "l1": 1, "l2": 1, "gradient": 0.5, "focal_frequency": 1, "ms_ssim": 0.5}
    flags = [f"--config.loss.weights.{name}={value}" for name, value in weights.items()]
    flags += ["--config.model.quantizer.kind=lfq", "--config.model.quantizer.entropy=0.1", "--config.ema=0.9"]
    flags += ["--config.steps=30", "--config.save_every=30", "--config.log_every=10"]
    last = loop.train(config_of([*PLAIN, *flags]), tmp_path)
    first = records(tmp_path)[0]
    assert last["l1"] < first["l1"] and last["batch_psnr"] > first["batch_psnr"]
    assert {"gradient", "focal_frequency", "ms_ssim"} <= last.keys() and not {"log_mse", "rate"} & last.keys()
    assert last["psnr"] > 8 and 0 < last["digit_entropy_least"] <= last["digit_entropy_mean"] <= 1


def test_mistakes_are_said(tmp_path):
    for flags, words in (
        (["--config.loss.recolor=0.5", *VQ], "plain FSQ"),
        (["--config.model.quantizer.kind=pq"], "unknown quantizer 'pq'; known: fsq, vq, lfq, bsq"),
        (["--config.model.alpha=true"], "the world has none"),
        ([*VQ, "--config.accumulate=2"], "restart the same dead codes"),
        (["--config.loss.weights.perceptual=1"], "loss.towers"),
    ):
        with pytest.raises((ConfigError, ValueError), match=words):
            loop.train(config_of([*PLAIN, *flags]), tmp_path)


@pytest.mark.parametrize("layers", [1, 2])  # the decoder of the run before, or another
def test_a_decoder_learns_alone_and_codes_stay(plain, layers, tmp_path):
    flags = [f"--config.init={plain}", "--config.model.frozen=True", f"--config.model.layers={layers}"]
    loop.train(config_of(PLAIN + flags), tmp_path / "run")
    before, after = checkpoint.weights(plain)[0], checkpoint.weights(tmp_path / "run")[0]
    kept = [name for name in before if re.match(stage.CODES, name)]
    assert len(kept) > 3
    for name in kept:
        np.testing.assert_array_equal(before[name], after[name])
    assert not np.array_equal(before["from_features/w"], after["from_features/w"])
    with pytest.raises(ConfigError, match="no encoder to keep"):
        loop.train(config_of([*PLAIN, "--config.model.frozen=True"]), tmp_path / "other")


def test_parts_are_cut_out_of_a_larger_source(tmp_path):
    config = config_of(PLAIN)
    config.loss.recolor = 0.5
    config.data.larger = dict(spec="world:train/poster", size=(128, 128), documents=64)
    data = stage.setup(config, tmp_path).data
    batch = data.batch(3)
    assert batch["images"].shape == batch["recolored"].shape == (config.data.batch_size, 32, 32, 3)
    order = [packing.permute(np.array([n]), 128, packing.mix(0, packing.ORDER, np.array([0])))[0] for n in range(24, 32)]
    for n, i in zip(range(24, 32), order):
        whole = data.source.pixels(int(i))
        assert whole.shape[:2] == ((32, 32) if i < 64 else (128, 128))
        views = np.lib.stride_tricks.sliding_window_view(whole, (32, 32, 3)).reshape(-1, 32, 32, 3)
        assert (views == batch["images"][n - 24]).all((1, 2, 3)).any()
    config.data.larger = dict(spec="world:train", size=(16, 16), documents=64)
    with pytest.raises(ConfigError, match="larger"):
        stage.setup(config, tmp_path)


def test_warnings_are_in_the_log_line(tmp_path, monkeypatch, capsys):
    good = {
        "digit_entropy": 0.9,
        "digit_entropy_least": 0.6,
        "dead": 0.1,
        "grad_norm": 0.1,
        "discriminator_right": 0.6,
        "loss": 1.0,
    }
    assert stage.warnings(good) == [] == stage.warnings({"loss": 1.0})
    for change, words in (
        ({"digit_entropy": 0.2}, "collapse.*20%"),
        ({"digit_entropy_least": 0.01}, "a digit is all but constant: it has 1%"),
        ({"dead": 0.7}, "70% of the codebook"),
        ({"grad_norm": 1e-8}, "gradient"),
        ({"discriminator_right": 0.99}, "discriminator wins"),
    ):
        (found,) = stage.warnings(good | change)
        assert re.search(words, found)
    setup = stage.setup
    monkeypatch.setattr(stage, "setup", lambda *a: setup(*a)._replace(warnings=lambda m: ["look here"]))
    loop.train(config_of([*PLAIN, "--config.steps=1"]), tmp_path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1"))
    assert line.endswith("WARNING: look here")


def test_evaluate_a_tokenizer_at_any_size(plain, tmp_path, capsys):
    flags = ["--suite", "tokenizer", "--checkpoint", plain, "--data", "world:test", "--documents", 6]
    assert mmgen("evaluate", *flags, "--size", "48x32", "--out", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["metrics"]
    assert found["images"] == 6 and 5 < found["psnr_worst"] <= found["psnr"] < 40
    assert {"ssim", "ms_ssim", "code_usage", "code_perplexity", "digit_entropy_mean"} <= found.keys()
    assert "Worst" in (tmp_path / "report.html").read_text()
    assert report["config"]["data"]["size"] == [48, 32]
    assert mmgen("evaluate", *flags, "--size", "48x32", "--tile", 2, "--out", tmp_path / "tiles") == 0
    tiled = json.loads((tmp_path / "tiles" / "report.json").read_text())["metrics"]
    assert tiled["psnr"] == pytest.approx(found["psnr"], abs=0.02)  # of convolutions, the same pictures
    assert mmgen("evaluate", *flags, "--best-of", 2, "--out", tmp_path) == 1
    assert "--best-of" in capsys.readouterr().err


def test_transparent_images_survive(stickers):
    """What lies behind is told from what is seen, and comes back as PNGs have it."""
    rgba = np.asarray(Image.open(stickers / "00.png"))
    file = (stickers / "00.png").read_bytes()
    pixels = pictures.read(file, background=pictures.ALPHA)
    assert pixels.shape == (40, 40, 4) and pixels[0, 0].tolist() == [127, 127, 127, 0]
    back = pictures.straight(pixels)
    assert (
        np.abs(back[4:].astype(int) - np.where(rgba[4:, :, 3:] > 0, rgba[4:], [127, 127, 127, 0])).max() <= 2
    )
    small = pictures.read(file, background=pictures.ALPHA, size=(20, 20))
    on = lambda pixels, gray: pixels[..., :3] + (1 - pixels[..., 3:] / 255) * (gray - 127.0)
    white = pictures.read(file, background=(255, 255, 255), size=(20, 20))
    assert np.abs(on(small, 255) - white).max() < 6  # on any background it is what it would be there
    assert np.array_equal(pictures.straight(pixels[..., :3]), pixels[..., :3])


MESHES = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.stages import loop, program as programs
from tests.conftest import config_of

work, runs = sys.argv[1], json.loads(sys.argv[2])
for flags in runs:
    config, curves = config_of(flags), []
    stage = loop.setup(config, work)
    for shape in ({}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        sizes = [shape.get(axis, 1) for axis in meshes.AXES]
        mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), meshes.AXES)
        layout, rows = NamedSharding(mesh, meshes.spec(stage.axes, config.sharding)), np.arange(stage.shape[0])
        with meshes.use(mesh, config.sharding):
            program = programs.build(config, stage.make, stage.loss, mesh)
            state = program.init(jax.random.key(config.seed))
            for step in range(2):
                batch = meshes.global_batch(stage.data.batch(step), rows, len(rows), layout)
                state, measured = program.step(state, batch)
                curves.append({name: float(value) for name, value in measured.items()})
    for place, curve in enumerate(curves):
        for name, value in curves[place % 2].items():
            tolerance = 0.02 if place % 2 else 1e-4  # rounding flips a few codes, by and by
            assert np.isclose(curve[name], value, rtol=tolerance, atol=tolerance / 10), (place, name, curve[name], value)
    assert {"grad_norm", "usage", "loss"} <= curves[0].keys()
"""


@pytest.mark.soak
def test_a_mesh_of_eight_learns_what_one_device_learns(tmp_path):
    """Codebooks by moving averages, entropies of the whole batch, and the discriminator's norm and optimizer of its own:
    all sums are over the whole batch. (Restarts make several codewords of pictures' many equal patches, among which
    rounding then chooses; of these on a mesh see test_quantizers.py.)"""
    small = [*PLAIN, "--config.optimizer.warmup=1", "--config.model.quantizer.restart=0.0"]
    lfq = [*small, "--config.model.quantizer.kind=lfq", "--config.model.quantizer.entropy=0.1"]
    lfq += [
        "--config.model.encoder=attention",
        "--config.model.decoder=attention",
        "--config.model.cell_layers=0",
    ]
    run_python(MESHES, tmp_path, json.dumps([[*small, *VQ, *GAN], lfq]), devices=8, cwd=ROOT)


@pytest.mark.soak
def test_eight_images_are_learned_by_heart(tmp_path):
    flags = [
        *PLAIN,
        "--config.data.source.documents=8",
        "--config.data.source.category=",
        "--config.steps=600",
    ]
    flags += [
        "--config.held_out.spec=world:train",
        "--config.held_out.documents=8",
        "--config.model.width=64",
    ]
    flags += ["--config.log_every=600", "--config.save_every=600", "--config.loss.floor=1e-4"]
    assert loop.train(config_of(flags), tmp_path)["psnr"] > 35


def test_more_codes_than_a_vocabulary_holds_are_refused(space, tmp_path, capsys):
    flags = [*PLAIN, "--config.model.quantizer.levels=[8,8,8,8,8,8,8]", "--config.steps=1"]
    assert mmgen("train", *flags, "--workdir", tmp_path / "fine") == 0
    out = ["--tokenizer", tmp_path / "fine", "--text", space.text, "--out", tmp_path / "shards"]
    assert mmgen("tokenize", "--source", "world:train", "--documents", 4, *out) == 1
    assert "2097152 codes" in capsys.readouterr().err and not (tmp_path / "shards").exists()
