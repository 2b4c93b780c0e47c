"""The refiner: its flow against what is known of normal distributions, tiles, seeds, and runs of the stage."""

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mmgen.document import Text
from mmgen.models import refiner
from mmgen.models.autoencoders import Autoencoder, Tokenizer
from mmgen.models.quantizers import FSQ
from mmgen.models.refiner import Refiner, RefinerNet, load_refiner, noise
from mmgen.runtime import checkpoint
from mmgen.runtime import config as configs
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError
from mmgen.stages import loop, program
from mmgen.stages import refiner as stage
from tests.conftest import QUICK, arrays, assert_same_arrays, config_of, mmgen, records, run_python


@pytest.fixture(scope="module")
def run(space, tmp_path_factory):
    """The workdir of a tiny run, and its flags."""
    workdir = tmp_path_factory.mktemp("refiner") / "run"
    flags = ["--config", "refiner:tiny", f"--config.data.tokenizer={space.tokenizer}", "--config.steps=8"]
    flags += ["--config.save_every=3", "--config.log_every=2", "--config.evaluate_every=8"]
    assert mmgen("train", *flags, "--workdir", workdir) == 0
    return workdir, flags


def net(seed=None, **settings):
    """A network for codes of 5 digits and patches of 4 pixels; with a seed its last layer says something."""
    config = configs.load("refiner:tiny").model
    with config.unlocked():
        config.update(settings)
    model = RefinerNet(config, 3, 5, 4, nnx.Rngs(0))
    if seed is not None:
        shape = model.head.w[...].shape
        model.head.w[...] = 0.1 * jax.random.normal(jax.random.key(seed), shape)
    return model


def given(B, side, patch):
    keys = jax.random.split(jax.random.key(0), 3)
    z = jax.random.normal(keys[0], (B, side // patch, side // patch, 3 * patch**2))
    base = 0.3 * jax.random.normal(keys[1], (B, side, side, 3))
    return z, base, jax.random.normal(keys[2], (B, side // 8, side // 8, 5))


@pytest.mark.parametrize("channels", [3, 4])
def test_coordinates_of_the_detail(channels):
    """They are pixels turned round: the same lengths, a gray square is one coefficient, and there is a way back."""
    rng = np.random.default_rng(0)
    images, bases = rng.normal(0, 0.3, (2, 4, 32, 32, channels)).astype(np.float32)
    spread = refiner.measured_spread(images, bases, 4)
    model = RefinerNet(configs.load("refiner:tiny").model, channels, 5, 4, nnx.Rngs(0), spread)
    detail = model.detail(images - bases)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(detail), (0, 1, 2))), 1, rtol=1e-4)
    np.testing.assert_allclose(model.pixels(detail), images - bases, atol=1e-5)
    np.testing.assert_allclose(np.square(detail * spread).sum(), np.square(images - bases).sum(), rtol=1e-4)
    gray = np.zeros((1, 4, 4, channels), np.float32)
    gray[..., :3] = 0.1
    found = np.asarray(model.detail(gray) * spread)[0, 0, 0]
    assert found[0] == pytest.approx(0.4 * np.sqrt(3), rel=1e-4) and np.abs(found[1:]).max() < 1e-5
    assert refiner.measured_spread(images, images, 4) == pytest.approx(1 / 255)  # never 0


def test_normal_detail_is_drawn_in_any_number_of_steps():
    """Of a normal distribution one step comes out where many do, and where it should; and the velocity at an angle is
    the limit of mean velocities."""
    mean, deviation = 0.5, jnp.array([0.05, 0.3, 1.0, 4.0])
    z = jax.random.normal(jax.random.key(0), (1, 64, 64, 4))
    for steps in (1, 3, 16):
        x, angles = z, np.linspace(np.pi / 2, 0, steps + 1)
        for at, to in zip(angles[:-1], angles[1:]):
            x = x - (at - to) * refiner.mean_velocity(x, mean, deviation, jnp.full(1, at), jnp.full(1, to))
        np.testing.assert_allclose(x, mean + deviation * z, atol=2e-5)
    at = jnp.full(1, 0.4)
    here, near = (refiner.mean_velocity(z, mean, deviation, at, at - d) for d in (0.0, 1e-3))
    np.testing.assert_allclose(here, near, atol=0.02)
    variance = (np.cos(0.4) * deviation) ** 2 + np.sin(0.4) ** 2
    expected = (z - np.cos(0.4) * mean) * np.cos(0.4) * np.sin(0.4) * (1 - deviation**2) / variance
    np.testing.assert_allclose(here, expected - np.sin(0.4) * mean, atol=1e-5)


def test_a_step_that_is_right_has_no_loss(monkeypatch):
    """A network that tells nothing takes every step alike, so that few-step targets ask nothing of it; and its flow's
    error is the velocity's own deviation of 1, where the detail has the deviation that it should."""
    model = net(certain=0)
    images = jax.random.randint(jax.random.key(0), (64, 32, 32, 3), 0, 256).astype(jnp.uint8)
    y = jax.random.normal(jax.random.key(1), (64, 32, 32, 3))
    flat = SimpleNamespace(encode=lambda x: jnp.zeros((64, 4, 4, 5)), quantizer=None)
    monkeypatch.setattr(stage, "base_of", lambda *_: stage.to_float(images) - y)
    how = dict(
        drop=0.1,
        noise=0.0,
        near=0.0,
        uniform=0.2,
        mean=0.0,
        width=1.2,
        few_every=4,
        most_steps=8,
        gan={"weight": 0},
    )
    graphdef, params = nnx.split(model)
    ask = lambda params: stage.loss(
        nnx.merge(graphdef, params), {"images": images}, jax.random.key(2), autoencoder=flat, **how
    )
    found = jax.jit(ask)(params)
    mean = {name: float(total / count) for name, (total, count) in found.items()}
    assert mean["few"] == 0 and mean["flow"] == pytest.approx(1, abs=0.03)
    assert float(found["few"][1]) == 16 and float(found["flow"][1]) == 48


class Linear:
    """Stands for the network: what it tells depends on all that it is given, and it keeps what it was asked."""

    flow, scale, spread, certain = True, 1, np.ones(48, np.float32), np.zeros(48, bool)
    step = RefinerNet.step
    detail = staticmethod(lambda difference: difference[:, ::4, ::4].repeat(16, -1))

    def __init__(self):
        self.asked = []

    def __call__(self, z, base, values, at, to, given):
        self.asked.append(tuple(np.asarray(a) for a in (z, at, to, given)))
        told = np.sin(3 * at) - 0.5 * to + 0.2 * given
        return 0.3 * told[:, None, None, None] * z + 0.1 * (at * to)[:, None, None, None]


def test_steps_learn_where_two_of_half_the_length_come_out(monkeypatch):
    model, B, every, most = Linear(), 256, 4, 8
    images = jax.random.randint(jax.random.key(0), (B, 8, 8, 3), 0, 256).astype(jnp.uint8)
    y = np.asarray(jax.random.normal(jax.random.key(1), (B, 8, 8, 3)))
    flat = SimpleNamespace(encode=lambda x: jnp.zeros((B, 1, 1, 5)), quantizer=None)
    monkeypatch.setattr(stage, "base_of", lambda *_: stage.to_float(images) - y)
    how = dict(
        drop=0.25,
        noise=0.0,
        near=0.0,
        uniform=0.2,
        mean=-1.0,
        width=0.8,
        few_every=every,
        most_steps=most,
        gan={"weight": 0},
    )
    found = stage.loss(model, {"images": images}, jax.random.key(2), autoencoder=flat, **how)
    z, at, to, given = model.asked[-1]
    assert 0.15 < 1 - given.mean() < 0.35  # which share sees no condition
    few = np.arange(B) % every == 0
    assert (at[~few] == to[~few]).all() and (at[few] > to[few]).all()
    assert abs(np.median(np.log(np.tan(at[~few]))) + 1) < 0.4  # where the times of the flow lie

    steps = np.round(np.pi / 2 / (at - to)[few])
    assert set(steps) == {1, 2, 4, 8}
    places = to[few] / (np.pi / 2) * steps
    np.testing.assert_allclose(places, np.round(places), atol=1e-4)
    ask = lambda z, at, to: model(z, None, None, at, to, given[few])
    column = lambda a: a[:, None, None, None]
    go = lambda z, at, to: z - column(at - to) * ask(z, at, np.where(steps == most, at, to))
    start, end = at[few], to[few]
    middle = (start + end) / 2
    target = (z[few] - go(go(z[few], start, middle), middle, end)) / column(start - end)
    expected = np.mean(np.square(ask(z[few], start, end) - target))
    assert expected > 1e-3 and float(found["few"][0] / found["few"][1]) == pytest.approx(expected, rel=1e-3)

    e = (z - np.cos(column(at)) * model.detail(y)) / np.sin(column(at))
    velocity = np.cos(column(at)) * e - np.sin(column(at)) * model.detail(y)
    each = np.square(model(z, None, None, at, to, given) - velocity).mean((1, 2, 3))[~few]
    assert float(found["flow"][0] / found["flow"][1]) == pytest.approx(each.mean(), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, dict(channels=(8, 8, 8), patch=2), dict(channels=(16,), patch=8)])
def test_the_network_sees_the_condition_the_angles_and_no_further_than_it_says(settings):
    model = net(seed=1, **settings)
    z, base, values = given(1, 192, model.patch)
    at, to, there = jnp.full(1, 0.6), jnp.full(1, 0.3), jnp.ones(1, bool)
    tell = jax.jit(lambda *a: model(*a))
    plain = tell(z, base, values, at, to, there)
    for other in (
        (z, base + 0.1, values, at, to, there),
        (z, base, values + 1, at, to, there),
        (z, base, values, at, to, ~there),
    ):
        assert np.abs(tell(*other) - plain).max() > 1e-3
    assert (tell(z, base, values, at, to, ~there) == tell(z, base + 1, values + 1, at, to, ~there)).all()
    square, places = slice(96, 104), slice(96 // model.patch, 104 // model.patch)  # of a code
    changed = [
        tell(z.at[:, places, places].add(1.0), base, values, at, to, there),
        tell(z, base.at[:, square, square].add(1.0), values, at, to, there),
        tell(z, base, values.at[:, 12, 12].add(1.0), at, to, there),
    ]
    far = 0
    for each in changed:
        rows = np.flatnonzero(np.abs(np.asarray(each - plain)).max((0, 2, 3)))
        far = max(far, 96 - model.patch * rows.min(), model.patch * (rows.max() + 1) - 104)
    assert model.reach - model.patch < far <= model.reach


def test_networks_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="8x8 refined pixels.*squares of 32"):
        net(channels=(16, 16, 16, 16))
    with pytest.raises(ValueError, match="1, 2 or 4"):
        net(scale=3)
    with pytest.raises(ValueError, match="at least 1"):
        net(patch=0)
    with pytest.raises(ValueError, match="below model.patch=4, found 4"):
        net(certain=4)


def test_the_coarsest_coefficients_are_told_whatever_was_drawn():
    """Their noise does not matter, and what the network tells of them is what comes out."""
    model = net(seed=1, certain=2)
    assert (
        model.certain.reshape(4, 4, 3).any(-1).tolist() == [[True] * 2 + [False] * 2] * 2 + [[False] * 4] * 2
    )
    z, base, values = given(2, 32, 4)
    at, to, there = jnp.full(2, 1.5), jnp.full(2, 0.2), jnp.ones(2, bool)
    told = model(z, base, values, at, to, there)
    other = model(jnp.where(model.certain, 7.0, z), base, values, at, to, there)
    np.testing.assert_array_equal(told, other)
    moved = model.step(z, told, at, to)
    np.testing.assert_array_equal(moved[..., model.certain], told[..., model.certain])
    assert np.abs(moved[..., ~model.certain] - told[..., ~model.certain]).min() > 0


def test_noise_is_of_its_seed_alone():
    a, b = noise([3, 7], (8, 8, 3)), noise([7, -1, 2**40], (8, 8, 3))
    assert (a[1] == b[0]).all() and not (a[0] == a[1]).any()
    assert abs(float(a.mean())) < 0.2 and 0.8 < float(a.std()) < 1.2


def test_wrong_codes_are_a_level_off_or_of_elsewhere():
    quantizer = FSQ((8, 5, 2))
    values = quantizer.unpack(jax.random.randint(jax.random.key(0), (8, 16, 16), 0, quantizer.codes))
    keys = dict(zip(("noise", "nudge", "where"), jax.random.split(jax.random.key(1), 3)))
    for near in (0.0, 1.0):
        wrong = stage._mistaken(quantizer, values, keys, 0.5, near)
        np.testing.assert_array_equal(quantizer.unpack(quantizer.pack(wrong)), wrong)  # codes, all of them
        digits = [np.asarray(quantizer.digits(quantizer.pack(x))) for x in (values, wrong)]
        off = np.abs(digits[0] - digits[1])
        lost = (off > 0).any(-1)
        assert 0.1 < lost.mean() < 0.4
        assert ((off.sum(-1) == 1) == lost).all() == bool(near)


@pytest.mark.parametrize(
    "settings, near",
    [
        (["model.quantizer.kind=vq"], 0.0),
        (["model.quantizer.depth=2", "model.alpha=True"], 0.0),
    ],
)
def test_other_codes_and_transparent_images_are_refined(settings, near):
    autoencoder = Autoencoder(configs.load("tokenizer:tiny", settings).model, nnx.Rngs(0))
    config = configs.load("refiner:tiny")
    model = refiner.make(config.model, autoencoder, nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, autoencoder.channels), np.uint8)
    how = dict(config.loss, near=near)

    @nnx.jit
    @nnx.value_and_grad
    def told(model):
        found = stage.loss(model, {"images": images}, jax.random.key(1), autoencoder=autoencoder, **how)
        return found["loss"][0] / found["loss"][1]

    loss, gradients = told(model)
    assert 0.5 < loss < 2 and np.abs(gradients["head"]["w"][...]).max() > 0
    model = Refiner(model, Tokenizer(autoencoder), config.loss.most_steps)
    codes = model.codes(images[..., :3])
    assert codes.shape[:3] == (8, 4, 4) and model.refine(codes, range(8), steps=1).shape == images.shape


def test_a_run_resumes_and_is_measured(run, tmp_path):
    workdir, flags = run
    config = config_of(flags)
    loop.train(config, tmp_path, stop_at=5)
    loop.train(config_of([*flags, "--config.data.tokenizer=gone"]), tmp_path)  # the workdir has a copy
    assert_same_arrays(arrays(tmp_path, 8), arrays(workdir, 8))
    assert records(tmp_path) == records(workdir)
    last = records(workdir)[-1]
    assert {"flow", "few", "psnr", "base_psnr", "ssim", "power_2", "base_error_4"} <= last.keys()
    # Three rows: real, the decoder's, refined.
    assert Image.open(workdir / "previews" / "0000008.png").size == (8 * 64, 3 * 64)


def test_images_are_of_their_codes_and_seed_alone(run):
    model = load_refiner(run[0])
    codes = np.random.default_rng(0).integers(0, model.tokenizer.codes, (5, 6, 4)).astype(np.int32)
    images = model.refine(codes, range(5), steps=2, batch=4)
    assert images.shape == (5, 48, 32, 3) and images.dtype == np.uint8
    assert (model.refine(codes[3:], [3, 4], steps=2, batch=4) == images[3:]).all()
    assert (model.refine(codes[:1], [9], steps=2, batch=4) != images[:1]).any()
    assert (model.refine(codes[:1], [0], steps=3, batch=4) != images[:1]).any()
    assert (model.refine(codes[:1], [0], steps=2, guidance=1.5, batch=4) != images[:1]).any()
    cold = [model.refine(codes[:1], [seed], steps=2, batch=4, temperature=0.0) for seed in (0, 9)]
    assert (cold[0] == cold[1]).all() and (cold[0] != images[:1]).any()  # the mean has no use for a seed
    assert model.bicubic(codes).shape == images.shape
    with pytest.raises(ValueError, match="a seed for each, found 5 and 1"):
        model.refine(codes, [1])
    with pytest.raises(ValueError, match="at least 1 step"):
        model.refine(codes, range(5), steps=0)
    with pytest.raises(ValueError, match="temperature from 0 to 1"):
        model.refine(codes, range(5), temperature=1.5)


def test_tiles_are_the_whole(run):
    model = load_refiner(run[0])
    codes = np.random.default_rng(0).integers(0, model.tokenizer.codes, (2, 17, 29)).astype(np.int32)
    whole = model.refine(codes, [1, 2], steps=2)
    tiled = model.refine(codes, [1, 2], steps=2, tile=3, batch=4)
    assert np.abs(whole.astype(int) - tiled).max() <= 1 and (whole == tiled).mean() > 0.999


def test_the_deterministic_up_sampler(space, tmp_path):
    flags = ["--config", "refiner:tiny", f"--config.data.tokenizer={space.tokenizer}", "--config.steps=6"]
    assert mmgen("train", *flags, "--config.model.flow=false", "--workdir", tmp_path) == 0
    assert "flow" not in records(tmp_path)[-1] and records(tmp_path)[-1]["psnr"] > 0
    model = load_refiner(tmp_path)
    codes = np.zeros((2, 4, 12), np.int32)
    images = model.refine(codes, [1, 2])
    assert (images == model.refine(codes, [3, 4], steps=1)).all()
    tiled = model.refine(codes, [1, 2], tile=2)
    assert np.abs(images.astype(int) - tiled).max() <= 1


def test_a_flow_that_tells_nothing_adds_nothing_to_an_up_samplers_image(run):
    tokenizer = load_refiner(run[0]).tokenizer
    make = lambda seed, **settings: Refiner(net(seed, **settings), tokenizer, 8)
    upsampler, codes = (
        make(1, flow=False),
        np.random.default_rng(0).integers(0, tokenizer.codes, (2, 8, 8), np.int32),
    )
    empty = Refiner(net(), tokenizer, 8, upsampler)
    for how in ({}, {"tile": 3}):
        made = empty.refine(codes, [0, 1], steps=2, temperature=0.0, **how)
        assert np.abs(made.astype(int) - upsampler.refine(codes, [0, 1], **how)).max() <= 1
    assert np.abs(made.astype(int) - upsampler.bicubic(codes)).max() > 1
    assert empty.hash != Refiner(net(), tokenizer, 8).hash


@pytest.mark.soak  # two trainings
def test_a_discriminator_may_judge_what_one_step_makes(space, tmp_path):
    """It learns from the first step on and is heard from `start` on; the refiner that is left has no part of it."""
    autoencoder = Autoencoder(configs.load("tokenizer:tiny").model, nnx.Rngs(0))
    config = configs.load("refiner:tiny", ["loss.gan.start=5", "loss.gan.weight=0.1"])
    model = refiner.make(config.model, autoencoder, nnx.Rngs(0))
    model.head.w[...] = 0.1 * jax.random.normal(jax.random.key(3), model.head.w.shape)
    model.discriminator = stage.PatchGAN(config.model.discriminator, nnx.Rngs(1), dtype=jnp.float32)
    graphdef, params = nnx.split(model)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)

    def gradients(params, step, weight):
        def loss(params):
            how = dict(config.loss, gan=dict(config.loss.gan, weight=weight))
            batch = {"images": images, "step": step}
            found = stage.loss(
                nnx.merge(graphdef, params), batch, jax.random.key(1), autoencoder=autoencoder, **how
            )
            return found["loss"][0]

        found = jax.grad(loss)(params)
        return found["head"]["w"][...], found["discriminator"]["head"]["w"][...]

    gradients = functools.partial(jax.jit(gradients, static_argnums=2), params)
    (before, learns), (after, _), (without, none) = gradients(4, 0.1), gradients(5, 0.1), gradients(5, 0.0)
    np.testing.assert_allclose(before, without, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3 and np.abs(learns).max() > 0 and not none.any()

    flags = [
        "--config",
        "refiner:tiny",
        f"--config.data.tokenizer={space.tokenizer}",
        "--config.loss.gan.weight=0.1",
    ]
    flags += [
        "--config.steps=3",
        "--config.save_every=2",
        "--config.log_every=1",
        "--config.evaluate_every=3",
    ]
    loop.train(config_of(flags), tmp_path, stop_at=2)
    loop.train(config_of(flags), tmp_path)
    assert {"adversarial", "discriminator", "discriminator_right", "psnr"} <= records(tmp_path)[-1].keys()
    model = load_refiner(tmp_path)
    assert not hasattr(model.net, "discriminator") and model.refine(np.zeros((1, 4, 4), np.int32), [0]).any()


@pytest.mark.soak
def test_an_up_samplers_image_may_be_the_base(space, run, tmp_path):
    _, flags = run
    above, workdir = tmp_path / "above", tmp_path / "run"
    assert mmgen("train", *flags, "--config.model.flow=false", "--workdir", above) == 0
    flags = [*flags, f"--config.data.upsampler={above}"]
    assert mmgen("train", *flags, "--workdir", workdir) == 0
    shutil.move(above, tmp_path / "elsewhere")  # the workdir holds what it needs
    assert mmgen("train", *flags, "--workdir", workdir) == 0
    model, upsampler = load_refiner(workdir), load_refiner(tmp_path / "elsewhere")
    assert (
        model.upsampler.hash == upsampler.hash
        and model.hash != refiner.Refiner(model.net, model.tokenizer, 8).hash
    )
    with pytest.raises(ConfigError, match="model.flow=False"):
        stage.setup(config_of([*flags[:-1], f"--config.data.upsampler={workdir}"]), tmp_path / "other")


def test_samples_are_refined(space, run, tmp_path, capsys):
    """From the command line, with a refiner beside the checkpoint or in its workdir; codes are what they are without."""
    ask = [
        "sample",
        "--no-provenance",
        "--prompt",
        "a red circle",
        "--n",
        2,
        "--size",
        "32x32",
        "--batch-size",
        2,
    ]
    whole = tmp_path / "whole"
    shutil.copytree(space.transformer, whole)
    shutil.copytree(run[0], whole / "refiners" / "x2")
    outs = {
        "plain": ["--checkpoint", whole],
        "named": ["--checkpoint", space.transformer, "--refiner", run[0], "--refine", 2],
        "found": ["--checkpoint", whole, "--refine", 2, "--upscale", 2],
    }
    for name, flags in outs.items():
        assert mmgen(*ask, *flags, "--out", tmp_path / name) == 0
    read = lambda name, k: np.asarray(Image.open(tmp_path / name / f"00000-{k}.png"))
    note = lambda name, k: json.loads((tmp_path / name / f"00000-{k}.json").read_text())
    for k in range(2):
        assert read("plain", k).shape == (32, 32, 3) and read("named", k).shape == (64, 64, 3)
        assert (read("named", k) == read("found", k)).all()
        codes = [note(name, k)["answer"][0]["codes"] for name in outs]
        assert codes[0] == codes[1] == codes[2]
    assert note("plain", 0)["refined"] is None and note("named", 0)["refined"]["steps"] == 2
    # A folder of refined answers is not gone on with otherwise.
    assert mmgen(*ask, *outs["plain"], "--out", tmp_path / "named") != 0
    for flags, words in (
        (
            ["--checkpoint", space.transformer, "--refine", 2],
            "workdir of a refiner run in .*refiners, found none",
        ),
        (["--checkpoint", whole, "--refine", 2, "--upscale", 4], "enlarges 4 times, found .*x2"),
        (
            ["--checkpoint", whole, "--upscale", 2, "--refine-tile", 3],
            "--upscale, --refine-tile: for --refine",
        ),
        (["--checkpoint", whole, "--refine", 2, "--refine-guidance", "nan"], "a finite --refine-guidance"),
        (["--checkpoint", whole, "--refine", 0], "at least 1"),
    ):
        capsys.readouterr()
        assert mmgen(*ask, *flags, "--out", tmp_path / "none") != 0
        assert re.search(words, capsys.readouterr().err)


def test_a_dialogue_goes_on_with_codes_and_shows_refined_pictures(space, run):
    """The picture that is shown is refined; what the next turn sees of it, and what is drawn, are as without."""
    from mmgen.sampling import sampler
    from mmgen.sampling.dialogue import Dialogue

    answers = []
    for refined in (False, True):
        model = sampler.load(space.transformer)
        if refined:
            model.refining = sampler.refining(
                space.transformer, model.tokenizer, refiner=str(run[0]), steps=1
            )
        dialogue = Dialogue(model, seed=3, output="image", size=(8, 8))
        for text in ("a red circle", "make it blue"):
            dialogue.say(Text(text))
        answers.append([turn.parts[0] for turn in dialogue.document.turns if turn.role == "assistant"])
    for plain, fine in zip(*answers, strict=True):
        assert (plain.codes == fine.codes).all()
        assert plain.pixels.shape == (32, 32, 3) and fine.pixels.shape == (64, 64, 3)


def test_a_refiner_of_another_tokenizer_is_refused(space, run, tmp_path):
    from mmgen.sampling import sampler

    other, foreign, mine = (tmp_path / name for name in ("other", "foreign", "mine"))
    assert mmgen("train", *space.tokenizer_flags, "--config.seed=5", "--workdir", other) == 0
    for copy in (foreign, mine):
        shutil.copytree(run[0], copy)
    shutil.rmtree(foreign / "tokenizer")
    shutil.copytree(other, foreign / "tokenizer")
    with pytest.raises(ValueError, match="reads the codes of tokenizer"):
        sampler.refining(space.transformer, sampler.load(space.transformer).tokenizer, refiner=str(foreign))
    flags = [*run[1], f"--config.data.tokenizer={other}"]
    with pytest.raises(checkpoint.CheckpointError, match="another tokenizer than"):
        loop.train(config_of(flags), mine)
    shutil.rmtree(mine / "tokenizer")
    with pytest.raises(checkpoint.CheckpointError, match="learned from other data"):
        loop.train(config_of(flags), mine)


def test_evaluated_with_and_without(space, run, tmp_path):
    flags = ["--checkpoint", space.transformer, "--suite", "world", "--seen", 1, "--unseen", 0, "--probe", 0]
    assert mmgen("evaluate", *flags, "--out", tmp_path / "plain", "--batch-size", 6) == 0
    refined = ["--refiner", run[0], "--refine", 1, "--baseline", tmp_path / "plain"]
    assert mmgen("evaluate", *flags, *refined, "--out", tmp_path / "refined", "--batch-size", 6) == 0
    page = json.loads((tmp_path / "refined" / "report.json").read_text())
    assert page["config"]["refine"] == 1 and page["comparison"]
    flags = ["--checkpoint", run[0], "--suite", "refiner", "--documents", 6, "--out", tmp_path / "own"]
    assert mmgen("evaluate", *flags) == 0
    metrics = json.loads((tmp_path / "own" / "report.json").read_text())["metrics"]
    assert {"base_psnr", "steps1_psnr", "steps32_ssim", "steps4_power_2", "steps8_seconds"} <= metrics.keys()
    for more in (["--refine", 2], ["--upscale", 2], ["--refine-guidance", 2]):
        assert mmgen("evaluate", *flags, *more) != 0


def test_mistakes_in_a_config_are_said(space, tmp_path):
    for override, words in (
        ("data.tokenizer=", "config.data.tokenizer is the workdir"),
        ("data.source.size=(60,64)", "multiples of model.scale"),
        ("held_out.size=(36,64)", "config.held_out.size"),
        ("loss.drop=2.0", "config.loss.drop is a share"),
        ("loss.most_steps=6", "a power of two"),
        ("loss.few_every=3", "must divide the 8 images"),
        ("refine_steps=0", "refine_steps is at least 1"),
        ("loss.gan.weight=-1.0", "gan.weight is at least 0"),
    ):
        config = configs.load("refiner:tiny", [f"data.tokenizer={space.tokenizer}", override])
        with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
            loop.train(config, tmp_path)


MESH = """
import json, sys
from tests.test_refiner import losses

print(json.dumps(losses(sys.argv[1], "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")))
"""


def losses(tokenizer, *overrides):
    """[[loss, flow, few, gradient's norm]] of three steps on a mesh of all devices."""
    config = configs.load("refiner:tiny", [f"data.tokenizer={tokenizer}", *overrides])
    stage, mesh = loop.setup(config, Path("/nonexistent")), meshes.make_mesh(dict(config.mesh))
    found = []
    with meshes.use(mesh, config.sharding):
        built = program.build(config, stage.make, stage.loss, mesh)
        state = built.init(jax.random.key(0))
        for step in range(3):
            state, measured = built.step(state, stage.data.batch(step))
            found.append([float(measured[name]) for name in ("loss", "flow", "few", "grad_norm")])
    return found


@pytest.mark.soak
def test_eight_devices_learn_what_one_does(space):
    eight = run_python(MESH, space.tokenizer, devices=8).stdout.splitlines()[-1]
    np.testing.assert_allclose(json.loads(eight), losses(space.tokenizer), rtol=2e-4)


PROCESS = """
import sys
from tests.conftest import mmgen

sys.exit(mmgen("train", *sys.argv[1:]))
"""


@pytest.mark.soak  # on busy cores the collectives of processes time out
def test_two_processes_measure_what_one_does(space, tmp_path):
    from tests.test_processes import run as run_processes

    flags = ["--config", "refiner:tiny", f"--config.data.tokenizer={space.tokenizer}", "--config.steps=2"]
    flags += ["--config.evaluate_every=2", "--config.log_every=1"]
    loop.train(config_of(flags), tmp_path / "one")
    shared = [*flags, "--config.mesh.fsdp=2", "--workdir", tmp_path / "two"]
    run_processes(2, PROCESS, [shared] * 2, XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count=1")
    one, two = (records(tmp_path / name)[-1] for name in ("one", "two"))
    assert two["psnr"] == pytest.approx(one["psnr"], rel=1e-3) and two["step"] == 2


def test_a_spectrum_says_what_is_blurred():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    same = stage.spectrum(images, images)
    assert same["power_2"] == 0 and same["error_2"] < -60
    coarse = images[:, ::2, ::2].repeat(2, 1).repeat(2, 2)
    smooth = np.asarray(refiner.reduced(jnp.asarray(images, jnp.float32), 2)).repeat(2, 1).repeat(2, 2)
    found = stage.spectrum(images, smooth.astype(np.uint8))
    assert found["power_2"] < -6 and found["power_2"] < found["power_4"] < found["power_8"] + 0.5
    assert stage.spectrum(images, coarse)["error_2"] > found["error_2"]
    assert set(found) == {f"{kind}_{k}" for kind in ("power", "error") for k in (2, 4, 8, 16)}


def test_the_world_is_read_in_what_is_refined():
    from mmgen.data.sources import open_source
    from mmgen.evals import towers

    signs = open_source("world:valid/sign+draw", size=(64, 64), seed=0, documents=4)
    images = np.stack([signs.pixels(i) for i in range(4)])
    assert towers._read(signs, images) == {"right": 1.0, "words": 1.0}
    # Every other picture is a sign; one is another's.
    swapped = images[[2, 1, 2, 3]]
    assert towers._read(signs, swapped) == {"right": 0.75, "words": 0.5}
    assert towers._read(SimpleNamespace(), images) == {}
