"""The model that comes with mmgen: it is there, it is small, and it draws what it is asked for where none is named."""

import functools
import json
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import mmgen as package
from mmgen import world
from mmgen.commands import train
from mmgen.commands.common import with_defaults
from mmgen.data.images import fit
from mmgen.data.sources import open_source
from mmgen.models.contrastive import load_towers
from mmgen.runtime.released import model_folder, part_of, towers_folder
from mmgen.safety.images import ImageLayer
from mmgen.safety.policy import Policy
from mmgen.sampling import sampler
from mmgen.stages import policy, reinforce
from mmgen.text import Text
from mmgen.world.judge import parse
from tests.conftest import ROOT, config_of, mmgen, whole_model

FOLDER = ROOT / "mmgen" / "reference"


def test_it_is_named_reference_unless_a_folder_is(tmp_path, monkeypatch):
    assert model_folder("reference") == str(FOLDER) == f"{package.__path__[0]}/reference"
    assert model_folder("runs/mine") == "runs/mine" and towers_folder("reference") == f"{FOLDER}/towers"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    assert model_folder("reference") == "reference"
    assert towers_folder("reference") == "reference" and towers_folder("runs/mine") == "runs/mine"


def test_trainings_begin_with_it_by_its_name(tmp_path, monkeypatch):
    """What `train` passes on, of each stage that has a part of it; and shards whose tokens are its own."""
    passed = []
    monkeypatch.setattr(train.loop, "train", lambda config, workdir: passed.append(config))
    for preset, folder, more in (
        ("transformer:tiny", FOLDER, ()), ("reinforce:tiny", FOLDER, ()), ("refiner:tiny", FOLDER / "refiners" / "x2", ("data.tokenizer",)),
        ("tokenizer:tiny", FOLDER / "tokenizer", ("loss.towers",)), ("contrastive:tiny", FOLDER / "towers", ("data.text",)),
        ("classifier:safety", FOLDER / "safety", ()),
    ):  # fmt: skip
        flags = [f"--config.{name}=reference" for name in ("init", *more)]
        train.main(["--config", preset, "--workdir", str(tmp_path), *flags])
        assert passed[-1].init == str(folder) and folder.is_dir()
        for name in more:
            place = functools.reduce(lambda node, key: node[key], name.split("."), passed[-1])
            assert Path(place).exists() and Path(place).is_relative_to(FOLDER)
    train.main(["--config", "transformer:tiny", "--workdir", str(tmp_path), "--config.init=runs/mine"])
    assert passed[-1].init == "runs/mine" and part_of("tokenizer")("runs/t") == "runs/t"
    monkeypatch.undo()
    flags = [
        "--source",
        "world:train",
        "--size",
        "64x64",
        "--documents",
        "8",
        "--max-side",
        "32",
        "--out",
        tmp_path / "shards",
    ]
    assert mmgen("tokenize", *flags, "--tokenizer", "reference", "--text", "reference") == 0
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    released = json.loads((FOLDER / "vocabulary.json").read_text())
    for name in ("tokenizer_hash", "text_hash", "grammar_hash"):
        assert manifest[name] == released[name]


def test_it_is_sampled_at_its_own_temperature(tmp_path):
    found = lambda folder, temperature=None: (
        with_defaults(Namespace(temperature=temperature), folder).temperature
    )
    assert found(FOLDER) == json.loads((FOLDER / "config.json").read_text())["sampling"]["temperature"] == 0.3
    assert found(FOLDER, 0.0) == 0.0
    (tmp_path / "config.json").write_text(
        '{"stage": "transformer"}'
    )  # a run of before there was such a setting
    assert found(tmp_path) == 0.1


def test_it_is_small_and_says_nothing_of_where_it_was_made():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    for path in FOLDER.rglob("*.json"):
        assert json.loads(path.read_text()) and "/tmp/" not in path.read_text(), path


@pytest.mark.smoke
def test_it_draws_what_is_asked_where_no_checkpoint_is_named(tmp_path):
    """Bits differ between machines, so that not one picture but half of four are to be right."""
    out = tmp_path / "out"
    prompts = [f"a {color} {shape}" for color in ("red", "blue") for shape in ("circle", "square")]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    assert mmgen("sample", *flags, "--size", "64x64", "--out", out, "--no-provenance") == 0
    right = 0
    for path in sorted(out.glob("*.png")):
        note = json.loads(path.with_suffix(".json").read_text())
        _, color, shape = note["request"]["prompt"].split()
        scene = parse(np.asarray(Image.open(path).convert("RGB"))).scene
        right += bool(scene) and [(thing.color, thing.shape) for thing in scene.objects] == [(color, shape)]
    assert right >= 2


def test_it_is_whole():
    model = sampler.load(FOLDER)
    assert model.refuses and model.tokenizer.patch == 4 and model.grammar.max_side == 32


def test_true_pictures_are_likely():
    """Its tokenizer was rounded once, and gave black and gray grounds codes that training never had: 3.2 nats a code."""
    model = sampler.load(FOLDER)
    source = open_source("world:valid", (64, 64), 9, documents=16)
    rows = [
        model.grammar.encode(document, model.text)
        for document in model.encode([source[i] for i in range(16)])
    ]
    code = np.concatenate(rows) >= model.grammar.code_start
    assert np.concatenate(model.nats(rows))[code].mean() < 0.6


def test_its_refiner_is_nearer_to_true_pictures_of_twice_the_size():
    model = sampler.load(FOLDER)
    refiner = sampler.refining(FOLDER, model.tokenizer, upscale=2).refiner
    source = open_source("world:valid/draw+style", (128, 128), 9, documents=24)
    real = np.stack([source.pixels(i) for i in range(24)])
    small = np.stack([fit(image, 64, 64) for image in real])
    codes = model.tokenizer.encode(small)
    refined = refiner.refine(codes, list(range(24)), 1)
    enlarged = [fit(image, 128, 128) for image in model.tokenizer.decode(codes)]
    error = lambda images: np.square(np.float32(images) - np.float32(real)).mean()
    assert refined.shape == real.shape and error(refined) < 0.9 * error(enlarged)  # half a decibel


def test_its_towers_tell_what_is_said_from_what_is_not():
    """Of two captions, one of which has one attribute wrong: chance is a half."""
    towers = load_towers(FOLDER / "towers")
    assert towers.text.hash == Text(FOLDER / "text.model").hash
    source = open_source("world:valid", (64, 64), 9, documents=60, languages=["en", "zh"])
    numbers = range(len(source))
    pixels = [source.pixels(i) for i in numbers]
    right, wrong = (
        [source.captions(i, 1)[0] for i in numbers],
        [source.altered(i, 1, 0)[0] for i in numbers],
    )
    assert (towers.score(pixels, right) > towers.score(pixels, wrong)).mean() >= 0.75


def test_its_eyes_let_pages_pass_and_no_symbols():
    """Half of true signs, posters and comics were stopped once, of a classifier that had seen none."""
    layer = ImageLayer(Policy(), FOLDER / "safety")
    shown = {}
    for task, side in (("sign", 64), ("poster+chart+diagram+comic", 128), ("guarded", 64)):
        source = open_source(f"world:valid/{task}", (side, side), seed=21, documents=80)
        for i in range(len(source)):
            passed = layer.decide([source.pixels(i)]).allowed
            shown.setdefault((task == "guarded", source.fields(i)["symbol"]), []).append(passed)
    assert np.mean(shown[False, "no"]) >= 0.98 and len(shown[False, "no"]) == 160
    assert np.mean(shown[True, "no"]) >= 0.95 and np.mean(shown[True, "yes"]) <= 0.05


def test_rewards_are_learned_by_the_policy_that_draws():
    """As in test_policy.py, of codes told in two steps: the mean -log p of pictures is the entropy of the policy that
    drew them, low temperature with the mode kept, and not of low temperature alone."""
    data = config_of(
        ["--config", "reinforce:reference", "--config.data.temperature=0.3", "--config.data.keep_mode=True"]
        + ["--config.data.batch_size=8", "--config.data.slots=8", "--config.data.longest=320"]
    ).data
    items = [world.item(5, "train", i, category="counting") for i in range(8)]
    model = sampler.load(FOLDER)
    drawn, _ = reinforce._draw(model, items, range(8), (16, 16), data)
    batch, _ = policy.rows(drawn, model.grammar, 256, data.longest)
    measure = functools.partial(policy.log_probs, grammar=model.grammar, codes=256, temperature=0.3)
    whole = nnx.merge(*whole_model(FOLDER))

    def error(keep_mode):
        x = -np.add(*map(np.asarray, jax.jit(functools.partial(measure, keep_mode=keep_mode))(whole, batch)))
        return abs(x.mean()) / (x.std() / x.size**0.5)

    assert error(True) < 4 < error(False)
