"""The autoencoder, the stage that trains it, and what is measured of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen.models.autoencoders import (
    Autoencoder,
    ConvBlock,
    Prior,
    Tokenizer,
    patchify,
    to_float,
    to_uint8,
    unpatchify,
)
from mmgen.models.quantizers import FSQ
from mmgen.runtime import config as configs
from mmgen.stages import tokenizer as stage

TOWERS = ("patch", "conv", "attention")


def make(encoder="conv", decoder="conv", **options):
    config = configs.load("tokenizer:tiny").model
    with config.unlocked():
        config.encoder, config.decoder = encoder, decoder
        config.update(options)
    return Autoencoder(config, nnx.Rngs(0))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_every_byte_survives_the_way_to_floats_and_back():
    every = np.arange(256, dtype=np.uint8)
    assert np.array_equal(to_uint8(to_float(every)), every)
    assert np.array_equal(to_uint8(jnp.array([-9.0, 9.0])), [0, 255])


def test_patches_are_what_lies_in_them_and_go_back():
    images = noise(2, 8, 12, 3)
    patches = patchify(images, 4)
    assert np.array_equal(patches[1, 1, 2].reshape(4, 4, 3), images[1, 4:8, 8:12])
    assert np.array_equal(unpatchify(patches, 4), images)


def test_a_patch_that_does_not_divide_the_image_is_named():
    with pytest.raises(ValueError, match=r"patch \(4\) must divide the image, found 10x8"):
        make().encode(to_float(noise(1, 8, 10, 3)))


def test_an_unknown_tower_is_named():
    with pytest.raises(ValueError, match="unknown tower 'convolution'; known: conv, attention, patch"):
        make("convolution")


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_any_size_that_the_patch_divides(tower, size):
    tokenizer = Tokenizer(make(tower, tower))
    images = noise(3, *size, 3)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, size[0] // 4, size[1] // 4) and codes.max() < tokenizer.codes
    assert tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize("tower, reach", [("patch", 0), ("conv", 2), ("attention", 5)])
def test_a_code_sees_as_far_as_its_tower_reaches(tower, reach):
    model = make(tower, encoder_layers=2)
    images = to_float(noise(1, 24, 24, 3))
    # Each pixel's influence on the features of the place (0, 0).
    slope = jax.grad(lambda x: jnp.sum(model.features(x)[0, 0, 0]))(images)
    seen = np.abs(patchify(slope, 4)).sum((0, -1)) > 0
    assert np.array_equal(seen, np.maximum(*np.mgrid[:6, :6]) <= reach)


def test_a_convolution_is_a_matrix_over_its_window():
    config = configs.load("tokenizer:tiny").model
    block = ConvBlock(config, nnx.Rngs(0), dtype=jnp.float32)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, config.width)).astype(np.float32)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    padded = np.pad(normed, ((0, 0), (1, 1), (1, 1), (0, 0)))
    window = np.concatenate([padded[:, i : i + 3, j : j + 4] for i in range(3) for j in range(3)], -1)
    wide = window @ np.asarray(block.wide[...])
    expected = x + (wide / (1 + np.exp(-wide))) @ np.asarray(block.out.w[...])
    np.testing.assert_allclose(np.asarray(block(x)), expected, atol=1e-5)


@pytest.mark.parametrize("cell_layers, cells", [(0, []), (1, [1]), (2, [0, 1])])
def test_each_layer_on_cells_looks_one_cell_further(cell_layers, cells):
    """Which cells, from the top, of a patch the values of the patch below it have a part in."""
    model = make("patch", "patch", cell_layers=cell_layers, patch=8)

    def rows(values):
        return model.decode(values)[0, :8].sum((1, 2))  # of the upper patch's pixels

    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 5)), jnp.float32)
    slope = jax.jacobian(rows)(values)[:, 0, 1]
    seen = np.abs(slope).sum((1, 2)) > 0
    assert np.array_equal(seen, np.isin(np.arange(8) // 4, cells))


def test_cells_need_an_even_patch():
    with pytest.raises(ValueError, match="need a patch that 2 divides, found 3"):
        make(patch=3)


def test_codes_and_values_decode_alike():
    model = make()
    images = to_float(noise(2, 16, 16, 3))
    np.testing.assert_allclose(
        model.decode_codes(model.encode_codes(images)), model.decode(model.encode(images)), atol=1e-5
    )


def test_an_image_is_the_same_in_any_batch():
    tokenizer, images = Tokenizer(make()), noise(5, 16, 16, 3)
    codes = tokenizer.encode(images)
    assert np.array_equal(tokenizer.encode(images, batch=2), codes)
    pixels = [tokenizer.decode(codes, batch=batch).astype(int) for batch in (3, 64)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # another compiled program rounds otherwise


def test_the_hash_is_of_the_weights():
    model = make()
    first = Tokenizer(model).hash
    assert Tokenizer(make()).hash == first
    model.head.b[...] += 1e-6
    assert Tokenizer(model).hash != first


# ---- the rate ------------------------------------------------------------------------------


def test_the_prior_reads_only_the_four_places_before():
    quantizer = FSQ((8, 5))
    prior = Prior(2, 16, nnx.Rngs(0))
    features = jax.random.normal(jax.random.key(1), (1, 5, 5, 2))
    digits = quantizer.bound(features)
    slope = jax.grad(lambda values: prior(values, digits)[0, 2, 2])(quantizer.quantize(features))
    read = np.argwhere(np.abs(slope[0]).sum(-1) > 0).tolist()
    assert read == [[1, 1], [1, 2], [1, 3], [2, 1]]


def test_the_prior_tells_the_edge_from_a_code_of_zeros():
    prior = Prior(2, 16, nnx.Rngs(0))
    nats = prior(jnp.zeros((1, 3, 3, 2)), jnp.zeros((1, 3, 3, 2)))
    assert len(np.unique(np.round(nats, 5))) > 1


def test_the_prior_is_a_distribution_over_digits():
    prior = Prior(1, 16, nnx.Rngs(0))
    values = jnp.zeros((1, 1, 1, 1))
    total = sum(np.exp(-prior(values, jnp.full((1, 1, 1, 1), digit))) for digit in np.arange(-40.0, 41))
    np.testing.assert_allclose(total, 1, atol=1e-3)


def test_the_rate_moves_the_encoder_to_codes_that_are_easier_to_foresee():
    graphdef, params = nnx.split(make())
    images = noise(4, 16, 16, 3)

    def value(params):
        sums = stage.loss(
            nnx.merge(graphdef, params),
            {"images": images},
            None,
            floor=1e-3,
            noise=0.0,
            rate=1.0,
            recolor=0.0,
            color_digits=1,
        )
        return sums["loss"][0], sums

    (_, before), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    assert np.abs(slope["stem"]["w"][...]).max() > 0
    params["stem"]["w"][...] -= 1e-3 * slope["stem"]["w"][...] / jnp.abs(slope["stem"]["w"][...]).max()
    assert jax.jit(value)(params)[1]["code_nats"][0] < before["code_nats"][0]


# ---- other colours -------------------------------------------------------------------------


def test_recolored_images_come_from_their_colors_and_the_others_digits():
    model, images, other = make(), noise(4, 16, 16, 3), noise(4, 16, 16, 3, seed=1)
    batch = {"images": images, "recolored": other}
    loss = functools.partial(stage.loss, model, key=None, floor=0.0, noise=0.0, rate=0.0, color_digits=2)
    a, b = model.encode(to_float(images)), model.encode(to_float(other))

    def psnr(values, of):
        error = np.asarray(model.decode(values) - to_float(of))
        return np.mean(10 * np.log10(4 / np.mean(error**2, axis=(1, 2, 3))))

    mixed = jnp.concatenate([b[..., :2], a[..., 2:]], -1)
    plain, half, whole = (loss(batch, recolor=share)["batch_psnr"][0] / 4 for share in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(plain, psnr(a, images), rtol=1e-4)
    np.testing.assert_allclose(whole, psnr(mixed, other), rtol=1e-4)
    np.testing.assert_allclose(half, (psnr(mixed[:2], other[:2]) + psnr(a[2:], images[2:])) / 2, rtol=1e-4)


# ---- the noise -----------------------------------------------------------------------------


def test_noise_replaces_up_to_its_share_by_other_values_of_the_batch():
    values = jnp.arange(32 * 8 * 8, dtype=jnp.float32).reshape(32, 8, 8, 1)
    changed = stage._disturbed(values, jax.random.key(0), 0.4)
    shares = np.mean(np.asarray(changed != values), axis=(1, 2, 3))
    assert 0.1 < shares.mean() < 0.3 and shares.max() < 0.6 and shares.min() < 0.1
    assert np.isin(changed, values).all()
    assert np.array_equal(changed, stage._disturbed(values, jax.random.key(0), 0.4))


def test_no_gradient_flows_where_a_code_was_lost():
    values = jnp.arange(8 * 4 * 4, dtype=jnp.float32).reshape(8, 4, 4, 1)
    disturb = lambda values: stage._disturbed(values, jax.random.key(3), 0.9)
    slope = jax.grad(lambda values: disturb(values).sum())(values)
    lost = np.asarray(disturb(values) != values)
    assert lost.any() and not slope[lost].any()
    assert slope[~lost].mean() > 0.9  # a lost code may draw its own value


# ---- what is measured ----------------------------------------------------------------------


def test_psnr_and_ssim_of_known_errors():
    images = noise(2, 16, 16, 3) // 2
    same = stage.reconstruction(images, images)
    assert same["ssim"] == pytest.approx(1) and same["psnr"] > 70
    off = stage.reconstruction(images, images + 10)
    assert off["psnr"] == pytest.approx(20 * np.log10(255 / 10))
    assert off["ssim"] < 1


def test_usage_of_known_codes():
    assert stage.usage(np.array([0, 0, 1, 1]), 8) == {
        "code_usage": 0.25,
        "code_perplexity": pytest.approx(2.0),
    }
