"""The discriminator: what it sees, which way its losses pull, whom each term reaches and when."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from mmgen.models import discriminators
from mmgen.models.discriminators import (
    LOSSES,
    PatchGAN,
    adversarial,
    discriminator_loss,
    generator_loss,
    lazily,
    r1,
)
from tests.conftest import run_python

every_kind = pytest.mark.parametrize("kind", LOSSES)


@functools.cache
def patchgan(layers=2, width=4, dtype=jnp.float32, seed=0):
    make = lambda rngs: PatchGAN(ConfigDict({"layers": layers, "width": width}), rngs, dtype=dtype)
    return nnx.jit(make)(nnx.Rngs(seed))


def images(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


judge = nnx.jit(lambda model, images: model(images))
penalty = nnx.jit(r1)


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, size, places", [(1, (6, 9), (1, 2)), (2, (12, 30), (1, 5)), (3, (24, 33), (1, 2))]
)
def test_a_logit_for_each_patch_of_any_size(layers, size, places):
    model = patchgan(layers)
    logits = judge(model, images(0, 2, *size, 3))
    assert logits.shape == (2, *places) and logits.dtype == jnp.float32
    with pytest.raises(
        ValueError, match=f"at least {model.smallest}x{model.smallest}, found {size[1]}x{size[0] - 1}"
    ):
        model(images(0, 2, size[0] - 1, size[1], 3))


@pytest.mark.parametrize("layers, field", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_the_papers_field(layers, field):
    """And all of it: the slope of one logit by the pixels."""
    model, side = patchgan(layers), 128
    image = images(0, 1, side, side, 3)
    middle = (side >> layers) // 2 - 1
    seen = nnx.jit(lambda model, x: jax.grad(lambda x: model(x)[0, middle, middle])(x))(model, image)
    rows, columns = np.nonzero(np.abs(seen[0]).sum(-1))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == field


def test_channels_double_up_to_eight_times():
    model = nnx.eval_shape(
        lambda: PatchGAN(ConfigDict({"layers": 5, "width": 2}), nnx.Rngs(0), dtype=jnp.float32)
    )
    shapes = [model.convs[str(i)].w.shape for i in range(6)]
    assert shapes == [(48, 2), (32, 4), (64, 8), (128, 16), (256, 16), (256, 16)]


def test_a_patch_moved_is_judged_the_same():
    """By whole strides, where no border is in sight."""
    model, image = patchgan(2), images(0, 1, 80, 80, 3)
    moved = np.roll(image, (8, -4), (1, 2))
    before, after = judge(model, image), judge(model, moved)
    inside = slice(6, -6)
    np.testing.assert_allclose(
        np.roll(before, (2, -1), (1, 2))[:, inside, inside], after[:, inside, inside], atol=1e-5
    )
    assert np.std(before) > 0.01


def test_company_changes_no_judgement():
    model = patchgan()
    many = images(0, 5, 16, 20, 3)
    many[1] *= 100  # as of a batch norm's statistics
    np.testing.assert_allclose(judge(model, many)[2:3], judge(model, many[2:3]), atol=1e-6)


def test_every_parameter_says_its_group_and_axes():
    for path, variable in nnx.to_flat_state(nnx.state(patchgan(3))):
        found = variable.get_metadata()
        assert found["group"] == discriminators.GROUP == "discriminator", path
        assert len(found["axes"]) == variable.ndim
        assert all(isinstance(part, str) for part in path)  # a checkpoint's paths have no numbers


def test_half_precision_still_gives_float32():
    image = images(0, 2, 16, 16, 3)
    exact, half = judge(patchgan(), image), judge(patchgan(dtype=jnp.bfloat16), image)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, atol=0.05)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match="at least 1 layer, found 0"):
        patchgan(0)


# ---- the losses ----------------------------------------------------------------------------------


def test_losses_of_known_logits():
    real, fake = np.array([[[0.5, 2.0]]]), np.array([[[-3.0, 1.0]]])
    np.testing.assert_allclose(discriminator_loss(real, fake, "hinge"), [0.5 / 2 + 2.0 / 2])
    np.testing.assert_allclose(generator_loss(fake, "hinge"), [1.0])
    log = lambda x: np.log1p(np.exp(x)) / 2
    np.testing.assert_allclose(
        discriminator_loss(real, fake, "non_saturating"),
        [log(-0.5) + log(-2.0) + log(-3.0) + log(1.0)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(generator_loss(fake, "non_saturating"), [log(3.0) + log(-1.0)], rtol=1e-6)


@every_kind
def test_a_discriminator_that_is_right_loses_little(kind):
    yes, no = jnp.full((2, 3, 3), 4.0), jnp.full((2, 3, 3), -4.0)
    right, wrong = discriminator_loss(yes, no, kind), discriminator_loss(no, yes, kind)
    assert right.shape == (2,) and right.dtype == jnp.float32
    assert (right < 0.1).all() and (wrong > 5).all()
    assert (generator_loss(yes, kind) < generator_loss(no, kind) - 3).all()


@every_kind
def test_slopes_pull_real_logits_up_and_fake_ones_to_where_each_side_wants_them(kind):
    real, fake = images(0, 2, 3, 3), images(1, 2, 3, 3)
    of_real, of_fake = jax.grad(lambda *x: discriminator_loss(*x, kind).sum(), (0, 1))(real, fake)
    assert (of_real < 0).all() and (of_fake > 0).all()  # what is minimized falls where real rises, fake sinks
    assert (jax.grad(lambda x: generator_loss(x, kind).sum())(fake) < 0).all()


@every_kind
def test_large_logits_stay_finite(kind):
    def total(x):
        sides = discriminator_loss(x, -x, kind) + discriminator_loss(-x, x, kind)
        return (sides + generator_loss(-x, kind)).sum()

    value, slope = jax.value_and_grad(total)(jnp.full((1, 1, 1), 1e4))
    assert np.isfinite(value) and np.isfinite(slope).all()


def test_unknown_losses_are_refused():
    for loss in (
        lambda kind: discriminator_loss(np.ones(1), np.ones(1), kind),
        functools.partial(generator_loss, 1),
    ):
        with pytest.raises(
            ValueError, match="unknown adversarial loss 'hinges'; known: hinge, non_saturating"
        ):
            loss("hinges")


# ---- R1 ------------------------------------------------------------------------------------------


def test_r1_of_a_linear_discriminator():
    """Its slope is its weight, whatever the image; in the weight the penalty has the slope of a square."""
    weight = images(0, 8, 8, 3)
    linear = lambda w: lambda x: jnp.stack([(x * w).sum((1, 2, 3)), (2 * x * w).sum((1, 2, 3))], -1)
    found = r1(linear(weight), images(1, 4, 8, 8, 3))
    assert found.shape == (4,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.5 * 9 * np.square(weight).sum(), rtol=1e-5)
    slope = jax.grad(lambda w: r1(linear(w), images(1, 4, 8, 8, 3)).mean())(weight)
    np.testing.assert_allclose(slope, 9 * weight, rtol=1e-5)


def test_r1_and_its_slopes_are_those_of_differences():
    """In float64, of a discriminator of a single layer."""
    with jax.enable_x64(True):
        graphdef, params = nnx.split(patchgan(1, 2))
        flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: x.astype(jnp.float64), params))
        x = images(0, 1, 6, 6, 3).astype(np.float64)

        @jax.jit
        def summed(flat, x):  # as the network computes it, but for its own rounding
            model = nnx.merge(graphdef, unravel(flat))
            for conv in (*model.convs.values(), model.head):
                conv.dtype = jnp.float64
            return model(x).sum((1, 2))

        ways = np.eye(x.size).reshape(-1, *x.shape[1:])
        slopes = lambda flat: (summed(flat, x + 1e-5 * ways) - summed(flat, x - 1e-5 * ways)) / 2e-5
        by_hand = lambda flat: 0.5 * np.square(slopes(flat)).sum()
        ours = lambda flat: r1(nnx.merge(graphdef, unravel(flat.astype(jnp.float32))), x)[0]
        value, slope = jax.jit(jax.value_and_grad(ours))(flat)
        np.testing.assert_allclose(value, by_hand(flat), rtol=1e-4)
        way = np.random.default_rng(1).normal(size=flat.shape)
        along = (by_hand(flat + 1e-4 * way) - by_hand(flat - 1e-4 * way)) / 2e-4
        np.testing.assert_allclose((slope * way).sum(), along, rtol=1e-3)


def test_r1_is_of_one_size_for_all_kinds_of_images():
    """An even middle gray is 0 in every channel that has no bias, where the slope of a norm has no bound."""
    noise = images(0, 24, 24, 3)
    edge = np.zeros((24, 24, 3))
    edge[:, 12:] = 0.01
    kinds = np.stack([noise, 0.01 * noise, edge, np.zeros_like(edge), np.ones_like(edge)]).astype(np.float32)
    for seed in range(2):
        found = np.asarray(penalty(patchgan(seed=seed), kinds))
        assert found.max() < 300 * np.median(found) and found.max() < 1000, found


def test_a_lazy_term_is_on_average_the_plain_one():
    weight = images(0, 4)
    of = lambda w, x: {"a": (w * x) ** 2, "b": w.sum()}
    lazy = jax.jit(lambda step, w: lazily(step, 4, of, w, 3.0))
    found = [lazy(step, weight) for step in range(4, 12)]
    plain = of(weight, 3.0)
    for name in plain:
        np.testing.assert_allclose(np.mean([x[name] for x in found], 0), plain[name], rtol=1e-6)
        assert [bool(np.any(x[name])) for x in found] == [True, False, False, False] * 2
    slope = jax.jit(jax.grad(lambda w, step: lazily(step, 4, of, w, 3.0)["a"].sum()))
    np.testing.assert_allclose(np.mean([slope(weight, step) for step in range(4)], 0), 18 * weight, rtol=1e-6)
    assert np.array_equal(lazily(5, 1, of, weight, 3.0)["a"], plain["a"])
    with pytest.raises(ValueError, match="at least 1, found 0"):
        lazily(5, 0, of, weight, 3.0)


# ---- both sides in one step ----------------------------------------------------------------------


@functools.cache
def terms(kind):
    """(step, shares of both terms) -> the slopes of their sum by params, real and fake, and the terms."""
    graphdef, params = nnx.split(patchgan(1, 2))

    def total(params, real, fake, step, shares):
        model = nnx.merge(graphdef, params)
        *both, watched = adversarial(model, real, fake, step, kind=kind, start=3, r1_weight=0.1, r1_every=4)
        return sum((share * term).sum() for share, term in zip(shares, both)), (both, watched)

    run = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    given = nnx.to_pure_dict(params), images(0, 3, 12, 12, 3), images(1, 3, 12, 12, 3)
    return lambda step, shares=(1.0, 1.0): run(*given, step, shares)


def moved(tree):
    return [bool(np.any(x)) for x in jax.tree.leaves(tree)]


def test_each_term_reaches_its_own_side_alone():
    run = terms("hinge")
    (params, real, fake), (both, _) = run(4, (1.0, 0.0))
    assert not any(moved(params)) and not np.any(real) and all(np.any(x) for x in fake)
    (params, real, fake), _ = run(4, (0.0, 1.0))  # a step with R1
    assert all(moved(params)) and not np.any(real) and not np.any(fake)
    assert all(x.shape == (3,) and x.dtype == jnp.float32 for x in both)


def test_the_sum_gives_each_side_what_its_own_term_would():
    run = terms("hinge")
    (params, _, fake), _ = run(4)
    np.testing.assert_allclose(fake, run(4, (1.0, 0.0))[0][2], rtol=1e-5, atol=1e-8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params, run(4, (0.0, 1.0))[0][0]
    )


def test_terms_are_the_losses_of_the_networks_logits():
    model, real, fake = patchgan(1, 2), images(0, 3, 12, 12, 3), images(1, 3, 12, 12, 3)
    of_real, of_fake = np.asarray(judge(model, real)), np.asarray(judge(model, fake))
    _, ((generator, critic), watched) = terms("hinge")(4)
    np.testing.assert_allclose(generator, generator_loss(of_fake, "hinge"), rtol=1e-5)
    expected = discriminator_loss(of_real, of_fake, "hinge") + 0.1 * 4 * penalty(model, real)
    np.testing.assert_allclose(critic, expected, rtol=1e-5)
    right = (np.mean(of_real > 0) + np.mean(of_fake < 0)) / 2
    expected = {"real_logit": of_real.mean(), "fake_logit": of_fake.mean(), "discriminator_right": right}
    assert watched.keys() == expected.keys() and 0 < right < 1
    for name, value in expected.items():
        np.testing.assert_allclose(watched[name], value, rtol=1e-4)


def test_the_generators_term_begins_at_its_step_and_the_discriminator_learns_before():
    run = terms("hinge")
    for step in range(5):
        (params, _, fake), ((generator, critic), _) = run(step)
        assert bool(np.any(generator)) == bool(np.any(fake)) == (step >= 3), step
        assert np.any(critic) and any(moved(params))


def test_r1_comes_at_its_steps_and_on_average_as_weighed():
    model, real, fake = patchgan(1, 2), images(0, 3, 12, 12, 3), images(1, 3, 12, 12, 3)
    plain = discriminator_loss(judge(model, real), judge(model, fake), "hinge")
    more = [np.asarray(terms("hinge")(step)[1][0][1] - plain) for step in range(8)]
    np.testing.assert_allclose(np.mean(more, 0), 0.1 * penalty(model, real), rtol=1e-4)
    assert [bool(np.any(x > 1e-6)) for x in more] == [True, False, False, False] * 2


def test_without_a_weight_there_is_no_r1():
    model, image = patchgan(1, 2), images(0, 3, 12, 12, 3)
    settings = {"kind": "hinge", "start": 0, "r1_every": 1}
    text = lambda weight: str(
        jax.make_jaxpr(lambda x: adversarial(model, x, x, 0, r1_weight=weight, **settings)[:2])(image)
    )
    assert text(1e-3).count("conv_general_dilated[") > text(0.0).count("conv_general_dilated[") == 9


def test_a_discriminator_learns_to_tell_and_images_to_pass():
    """Forty steps by hand: of a shape that reconstructions lack, and pixels that then learn to have it."""
    graphdef, params = nnx.split(patchgan(1, 4))
    params = nnx.to_pure_dict(params)
    stripes = np.sign(np.sin(np.arange(12) * np.pi / 2 + 0.1))[:, None] * np.ones((4, 12, 12, 3))
    real, fake = 0.5 * stripes + 0.1 * images(0, 4, 12, 12, 3), jnp.asarray(0.1 * images(1, 4, 12, 12, 3))

    @jax.jit
    def step(params, fake, at, start):
        def total(params, fake):
            settings = {"kind": "hinge", "start": start, "r1_weight": 1e-3, "r1_every": 4}
            generator, critic, watched = adversarial(nnx.merge(graphdef, params), real, fake, at, **settings)
            return (generator + critic).mean(), watched

        (of_params, of_fake), watched = jax.grad(total, (0, 1), has_aux=True)(params, fake)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, of_params), fake - 4.0 * of_fake, watched

    for at in range(40):
        params, fake, watched = step(params, fake, at, 40)
    assert watched["discriminator_right"] > 0.95 and np.abs(fake).max() <= 0.1
    frozen, before = params, float(watched["fake_logit"])
    for at in range(40, 50):
        _, fake, watched = step(frozen, fake, at, 40)
    assert watched["fake_logit"] > before + 1


MESH = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from ml_collections import ConfigDict
from mmgen.models.discriminators import PatchGAN, adversarial
from mmgen.runtime import mesh as meshes
from mmgen.runtime.presets import SHARDING
graphdef, state = nnx.split(PatchGAN(ConfigDict({"layers": 1, "width": 4}), nnx.Rngs(0), dtype=jnp.float32))
params = nnx.to_pure_dict(state)
real, fake = np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 6, 3)).astype(np.float32)
def total(params, real, fake):
    settings = dict(kind="hinge", start=0, r1_weight=0.1, r1_every=1)
    a, b, _ = adversarial(nnx.merge(graphdef, params), real, fake, 2, **settings)
    return (a + b).sum()
step = jax.value_and_grad(total, (0, 2))
alone = jax.jit(step)(params, real, fake)
mesh = meshes.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
with meshes.use(mesh, SHARDING):
    rows = jax.NamedSharding(mesh, meshes.spec(("batch",), SHARDING))
    layout = meshes.param_shardings(state, mesh, SHARDING)
    run = jax.jit(step, in_shardings=(layout, rows, rows), out_shardings=(None, (layout, rows)))
    found = run(jax.device_put(params, layout), *jax.device_put((real, fake), rows))
print(json.dumps(max(float(np.abs(x - y).max() / np.abs(x).max())
                     for x, y in zip(*map(jax.tree.leaves, (alone, found))))))
"""


@pytest.mark.soak
def test_four_devices_learn_what_one_does():
    assert json.loads(run_python(MESH, devices=4).stdout.splitlines()[-1]) < 1e-4
