"""Losses of images against direct loops in float64, and where their slopes could break."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mmgen.models import image_losses as losses
from tests.conftest import run_python

ms_ssim = jax.jit(losses.ms_ssim, static_argnames="levels")
LOSSES = {
    "l1": jax.jit(losses.l1),
    "l2": jax.jit(losses.l2),
    "ms_ssim": lambda a, b: 1 - ms_ssim(a, b),
    "ssim": lambda a, b: 1 - ms_ssim(a, b, levels=1),
    "focal_frequency": jax.jit(losses.focal_frequency),
    "gradient": jax.jit(losses.gradient),
}
every = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def images(seed, *shape):
    """Smooth noise in [-1, 1], float32."""
    x = np.random.default_rng(seed).uniform(-1, 1, shape)
    return ndimage.uniform_filter(x, (0, 3, 3, 0)).astype(np.float32)


def noisy(a, amount, seed=9):
    return (a + amount * np.random.default_rng(seed).normal(size=a.shape)).astype(np.float32)


# ---- what each is --------------------------------------------------------------------------------


def test_l1_and_l2_of_known_images():
    a = np.zeros((2, 4, 6, 3), np.float32)
    b = a.copy()
    b[1, :, :3] = 0.5
    assert losses.l1(a, b).tolist() == [0, 0.25] and losses.l2(a, b).tolist() == [0, 0.125]


def halved(x):
    """One channel [H, W], pixel by pixel."""
    h, w = x.shape[0] // 2, x.shape[1] // 2
    return np.array([[x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(w)] for i in range(h)])


def similarity(a, b):
    """Means of luminance * contrast and of contrast, of one channel [H, W] in [0, 255], window by window."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    whole, contrasts = [], []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            contrasts.append((2 * cov + 58.5225) / (vx + vy + 58.5225))
            whole.append(contrasts[-1] * (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025))
    return np.mean(whole), np.mean(contrasts)


def reference_ms_ssim(a, b, scales):
    """Of one image [H, W, C]."""
    a, b = (127.5 * (x.astype(np.float64) + 1) for x in (a, b))
    found = []
    for x, y in zip(np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0)):
        value, weights = 1.0, np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
        for scale, weight in enumerate(weights / weights.sum()):
            whole, contrast = similarity(x, y)
            value *= (whole if scale == scales - 1 else contrast) ** weight
            x, y = halved(x), halved(y)
        found.append(value)
    return np.mean(found)


@pytest.mark.parametrize(
    "size, levels, scales", [((11, 14), 5, 1), ((23, 31), 5, 2), ((45, 46), 5, 3), ((24, 23), 1, 1)]
)
def test_ms_ssim_is_that_of_direct_loops(size, levels, scales):
    """On as many scales as fit, odd sides among them."""
    a = images(0, 1, *size, 1 if scales == 3 else 2)
    b = noisy(a, 0.1)
    expected = reference_ms_ssim(a[0], b[0], scales)
    np.testing.assert_allclose(ms_ssim(a, b, levels=levels)[0], expected, atol=2e-6)
    assert 0.2 < expected < 0.99  # so that it says something


@pytest.mark.parametrize(
    "side, scales", [(11, 1), (21, 1), (22, 2), (44, 3), (88, 4), (175, 4), (176, 5), (500, 5)]
)
def test_as_many_scales_count_as_fit(monkeypatch, side, scales):
    seen, similarity = [], losses._similarity
    monkeypatch.setattr(losses, "_similarity", lambda a, b: seen.append(a.shape) or similarity(a, b))
    image = jax.ShapeDtypeStruct((1, 2 * side, side, 3), jnp.float32)
    jax.eval_shape(losses.ms_ssim, image, image)
    assert seen == [(1, 2 * side >> level, side >> level, 3) for level in range(scales)]


def test_ms_ssim_of_known_images():
    a = np.full((1, 32, 32, 3), -0.5, np.float32)
    b = np.full((1, 32, 32, 3), 0.25, np.float32)
    luminance = (2 * 0.5 * 1.25 + 0.0004) / (0.5**2 + 1.25**2 + 0.0004)  # of 0 to 2
    np.testing.assert_allclose(ms_ssim(a, b, levels=1), luminance, rtol=1e-5)  # there is no contrast
    assert ms_ssim(0 * a + 0.02, 0 * a - 0.02, levels=1) > 0.999  # grays, both as good as middle ones
    rough = 0.5 * images(1, 1, 32, 32, 3)
    a, b = 0.5 + rough, 0.5 - rough
    assert ms_ssim(a, b, levels=1) < -0.5
    np.testing.assert_allclose(ms_ssim(a, b), 1e-4, rtol=1e-4)  # two scales, each counts the least


def test_ms_ssim_says_what_it_cannot_compare():
    with pytest.raises(ValueError, match="11x11 pixels, found images of 40x10"):
        losses.ms_ssim(np.zeros((1, 10, 40, 3)), np.zeros((1, 10, 40, 3)))
    for levels in (0, 6):
        with pytest.raises(ValueError, match=f"found {levels}"):
            losses.ms_ssim(np.zeros((1, 32, 32, 3)), np.zeros((1, 32, 32, 3)), levels=levels)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_focal_frequency_is_that_of_a_direct_transform(alpha):
    a, b = images(0, 2, 6, 5, 3), images(1, 2, 6, 5, 3)
    for x, y, found in zip(a, b, losses.focal_frequency(a, b, alpha)):
        error, power = (x - y).astype(np.float64), np.zeros((6, 5, 3))
        for u in range(6):
            for v in range(5):
                phase = u * np.arange(6)[:, None] / 6 + v * np.arange(5) / 5
                wave = np.exp(-2j * np.pi * phase)[..., None] / np.sqrt(30)
                power[u, v] = np.abs((error * wave).sum((0, 1))) ** 2
        weight = np.sqrt(power) ** alpha
        np.testing.assert_allclose(found, (weight / weight.max() * power).mean(), rtol=1e-5)


def test_focal_frequency_of_known_images():
    a, b = images(0, 2, 8, 8, 3), images(1, 2, 8, 8, 3)
    np.testing.assert_allclose(losses.focal_frequency(a, b, 0.0), losses.l2(a, b), rtol=1e-5)  # Parseval
    # A single wave has a single frequency and its mirror image, both of the greatest weight.
    wave = np.cos(2 * np.pi * np.arange(8) / 8)[None, :, None, None] * np.ones((1, 8, 8, 3))
    np.testing.assert_allclose(losses.focal_frequency(wave, 0 * wave), losses.l2(wave, 0 * wave), rtol=1e-5)


def test_the_focal_weight_has_no_gradient():
    """Were it not detached, the slope would be (2 + alpha) times an error and not 2 times."""
    wave = jnp.cos(2 * jnp.pi * jnp.arange(8) / 8)[None, :, None, None] * jnp.ones((1, 8, 8, 1))
    slope = jax.grad(lambda a: losses.focal_frequency(a, 0 * a, 3.0).sum())(wave)
    np.testing.assert_allclose(slope, 2 * wave / wave.size, atol=1e-7)


def test_gradient_is_that_of_direct_loops():
    a, b = images(0, 2, 13, 10, 2), images(1, 2, 13, 10, 2)
    for x, y, found in zip(a, b, losses.gradient(a, b)):
        channels = [(x - y)[..., c].astype(np.float64) for c in range(2)]
        scales = []
        for _ in range(3):
            down = [
                abs(e[i + 1, j] - e[i, j])
                for e in channels
                for i in range(len(e) - 1)
                for j in range(e.shape[1])
            ]
            along = [
                abs(e[i, j + 1] - e[i, j])
                for e in channels
                for i in range(len(e))
                for j in range(e.shape[1] - 1)
            ]
            scales.append(np.mean(down) + np.mean(along))
            channels = [halved(e) for e in channels]
        np.testing.assert_allclose(found, np.mean(scales), rtol=1e-5)


def test_gradient_of_known_images():
    a = images(0, 1, 16, 16, 3)
    np.testing.assert_allclose(losses.gradient(a, a + 0.25), 0, atol=1e-6)  # lighter as a whole
    ramp = np.broadcast_to(0.01 * np.arange(16, dtype=np.float32)[:, None], (1, 16, 16, 3))
    steps = np.mean([0.01, 0.02, 0.04])  # of each scale, from a row to the next
    np.testing.assert_allclose(losses.gradient(a, a + ramp), steps, rtol=1e-4)
    with pytest.raises(ValueError, match="3 scales need images of 8x8, found 16x7"):
        losses.gradient(np.zeros((1, 7, 16, 3)), np.zeros((1, 7, 16, 3)))


# ---- what all of them are ------------------------------------------------------------------------


@every
def test_equal_images_lose_nothing(loss):
    a = images(0, 3, 24, 24, 3)
    found = loss(a, a)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0, atol=1e-6)


@every
def test_the_order_of_the_two_is_nothing_and_each_image_counts_for_itself(loss):
    a, b = images(0, 3, 24, 24, 3), noisy(images(0, 3, 24, 24, 3), 0.2)
    b[2] = a[2]
    found = loss(a, b)
    np.testing.assert_allclose(found, loss(b, a), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1:2], loss(a[1:2], b[1:2]), rtol=1e-5)
    assert found[0] > 1e-3 and abs(found[2]) < 1e-6


@every
def test_more_noise_loses_more(loss):
    a = images(0, 1, 24, 24, 3)
    found = [float(loss(a, noisy(a, amount))[0]) for amount in (0.0, 0.03, 0.1, 0.3, 1.0)]
    assert (np.diff(found) > 0).all() and found[-1] < 10  # and has the size of the others


@every
def test_slopes_are_finite_wherever_images_are_alike_or_even(loss):
    slope = jax.jit(jax.grad(lambda a, b: loss(a, b).sum()))
    rough = jnp.asarray(images(0, 1, 24, 24, 3))
    zero, one = jnp.zeros_like(rough), jnp.ones_like(rough)
    pairs = [
        (rough, rough),
        (zero, zero),
        (one, one),
        (one, -one),
        (zero, rough),
        (rough, zero),
        (rough, -rough),
    ]
    for a, b in pairs:
        found = np.asarray(slope(a, b))
        assert np.isfinite(found).all() and np.abs(found).max() < 1.0  # by a pixel, of which there are 1,728


@every
def test_slopes_are_those_of_differences(loss):
    if loss is LOSSES["focal_frequency"]:
        loss = lambda a, b: losses.focal_frequency(
            a, b, 0.0
        )  # else its weight, which has no slope, changes as well
    a = images(0, 1, 24, 24, 3)
    b = noisy(a, 0.2)
    way = a - b + 0.1 * images(1, 1, 24, 24, 3)
    along = (jax.jit(jax.grad(lambda a: loss(a, b).sum()))(a) * way).sum()
    difference = (loss(a + 0.01 * way, b) - loss(a - 0.01 * way, b)) / 0.02
    np.testing.assert_allclose(difference[0], along, rtol=0.02)


@every
def test_half_precision_is_computed_in_float32(loss):
    a = jnp.asarray(images(0, 1, 24, 24, 3), jnp.bfloat16)
    b = (a * 0.5).astype(jnp.bfloat16)
    found = loss(a, b)
    assert found.dtype == jnp.float32
    assert np.array_equal(found, loss(a.astype(jnp.float32), b.astype(jnp.float32)))


@every
def test_shapes_that_would_be_broadcast_are_refused(loss):
    for other in ((1, 24, 24, 3), (2, 24, 24, 1), (24, 24, 3)):
        with pytest.raises(ValueError, match="of one shape"):
            loss(jnp.zeros((2, 24, 24, 3)), jnp.zeros(other))


MESH = """
import json
import jax, jax.numpy as jnp, numpy as np
from mmgen.models import image_losses as losses
from mmgen.runtime import mesh as meshes
from mmgen.runtime.presets import SHARDING
a, b = np.random.default_rng(0).uniform(-1, 1, (2, 4, 12, 12, 3)).astype(np.float32)
def total(a, b):
    return sum((1 - f(a, b) if f is losses.ms_ssim else f(a, b)).sum() for f in
               (losses.l1, losses.l2, losses.ms_ssim, losses.focal_frequency, losses.gradient))
alone = jax.jit(jax.value_and_grad(total))(a, b)
mesh = meshes.make_mesh({"data": 2, "fsdp": 2})
with meshes.use(mesh, SHARDING):
    rows = jax.NamedSharding(mesh, meshes.spec(("batch",), SHARDING))
    step = jax.jit(jax.value_and_grad(total), out_shardings=(None, rows))
    compiled = step.lower(*jax.device_put((a, b), rows)).compile()
    found = compiled(*jax.device_put((a, b), rows))
pairs = zip(*map(jax.tree.leaves, (alone, found)))
worst = max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in pairs)
print(json.dumps({"worst": worst, "gathers": "all-gather" in compiled.as_text()}))
"""


def test_devices_keep_their_images_to_themselves():
    found = json.loads(run_python(MESH, devices=4).stdout.splitlines()[-1])
    assert found["worst"] < 1e-5 and not found["gathers"]
