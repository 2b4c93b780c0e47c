"""The autoencoder, the stage that trains it, and what is measured of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmgen.models.autoencoders import (
    Autoencoder,
    ConvBlock,
    Prior,
    ResidualBlock,
    Tokenizer,
    patchify,
    to_float,
    to_uint8,
    unpatchify,
    windows,
)
from mmgen.models.quantizers import FSQ
from mmgen.runtime import config as configs
from mmgen.stages import tokenizer as stage
from tests.conftest import run_python

KINDS = ("patch", "conv", "attention", "cnn")
LEVELS = (4, 2, 5, 5, 5)
# All of 5 channels: to draw a parameter of another shape takes a third of a second.
QUANTIZERS = {
    "fsq": dict(kind="fsq", depth=1, levels=LEVELS),
    "fsq twice": dict(kind="fsq", depth=2, levels=(3, 2, 2, 2, 2)),
    "vq": dict(
        kind="vq", depth=1, codes=32, channels=5, decay=0.99, commitment=0.25, normalize=True, restart=1.0,
        entropy=0.0,
    ),
    "lfq": dict(kind="lfq", depth=1, bits=5, entropy=0.1, diversity=1.0, commitment=0.25),
}  # fmt: skip


def config_of(encoder="conv", decoder="conv", **options):
    config = configs.load("tokenizer:tiny").model
    with config.unlocked():
        config.encoder, config.decoder = encoder, decoder
        config.quantizer, config.alpha = QUANTIZERS["fsq"], False
        config.channels, config.blocks = (8, 8, 12), 1
        if decoder == "cnn":
            config.cell_layers = 0
        config.update(options)
    return config


def make(*towers, **options):
    return Autoencoder(config_of(*towers, **options), nnx.Rngs(0))


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


def test_unknown_encoders_and_decoders_are_named():
    with pytest.raises(ValueError, match="unknown encoder 'cnnn'; known: conv, attention, patch, cnn"):
        make("cnnn")
    with pytest.raises(ValueError, match="unknown decoder 'cnnn'; known: conv, attention, patch, cnn"):
        make("cnn", "cnnn")


@pytest.mark.parametrize("towers", [*zip(KINDS, KINDS), ("attention", "cnn"), ("cnn", "patch")])
def test_any_size_that_the_patch_divides(towers):
    tokenizer = Tokenizer(make(*towers))
    images = noise(3, 12, 20, 3)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 3, 5) and codes.max() < tokenizer.codes
    assert tokenizer.decode(codes).shape == images.shape


@pytest.mark.parametrize("tower, reach", [("patch", 0), ("conv", 2), ("attention", 5)])
def test_a_code_sees_as_far_as_its_tower_reaches(tower, reach):
    model = make(tower, encoder_layers=2)
    images = to_float(noise(1, 24, 24, 3))
    # Each pixel's influence on the features of the place (0, 0).
    slope = jax.jit(jax.grad(lambda x: jnp.sum(model.features(x)[0, 0, 0])))(images)
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
    model = make("patch", "patch", cell_layers=cell_layers)

    def rows(values):
        return model.decode(values)[0, :4].sum((1, 2))  # of the upper patch's pixels

    values = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 5)), jnp.float32)
    slope = jax.jit(jax.jacobian(rows))(values)[:, 0, 1]
    seen = np.abs(slope).sum((1, 2)) > 0
    assert np.array_equal(seen, np.isin(np.arange(4) // 2, cells))


def test_cells_need_an_even_patch():
    with pytest.raises(ValueError, match="need a patch that 2 divides, found 3"):
        make(patch=3)


def test_codes_and_values_decode_alike():
    model = make()
    images = to_float(noise(2, 16, 16, 3))
    np.testing.assert_allclose(
        model.decode_codes(model.encode_codes(images)), model.decode(model.encode(images)), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["conv", "cnn"])
def test_an_image_is_the_same_in_any_batch(kind):
    tokenizer, images = Tokenizer(make(kind, kind)), noise(5, 16, 16, 3)
    codes = tokenizer.encode(images)
    assert np.array_equal(tokenizer.encode(images, batch=2), codes)
    pixels = [tokenizer.decode(codes, batch=batch).astype(int) for batch in (3, 64)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1  # another compiled program rounds otherwise


def test_of_many_sizes_few_programs_are_kept(monkeypatch):
    monkeypatch.setattr("mmgen.models.autoencoders.PROGRAMS", 3)
    tokenizer = Tokenizer(make())
    first = tokenizer.decode(np.zeros((1, 1, 1), np.int32), batch=1)
    for h in range(1, 9):
        tokenizer.decode(np.zeros((1, h, 1), np.int32), batch=1)
        assert tokenizer._decode._cache_size() <= 3
    np.testing.assert_array_equal(tokenizer.decode(np.zeros((1, 1, 1), np.int32), batch=1), first)


def test_the_hash_is_of_the_weights():
    model = make()
    first = Tokenizer(model).hash
    assert Tokenizer(make()).hash == first
    model.decoder.head.b[...] += 1e-6
    assert Tokenizer(model).hash != first


# ---- the pyramid ---------------------------------------------------------------------------


def test_a_shortcut_is_of_the_blocks_input():
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 8))
    for outputs in (8, 12):
        block = ResidualBlock(8, outputs, nnx.Rngs(0), shrink=0.5, dtype=jnp.float32)
        block.out.w[...] = jnp.zeros_like(block.out.w[...])  # the branch adds nothing
        expected = x if outputs == 8 else x @ block.shortcut.w[...]
        np.testing.assert_allclose(block(x), expected, atol=1e-6)


def test_a_pyramid_needs_the_patch_of_its_scales():
    match = r"the 2 of model.channels need a patch of 2\*\*\(2 - 1\), found 4"
    for which in (("cnn", "conv"), ("conv", "cnn")):
        with pytest.raises(ValueError, match=match):
            make(*which, channels=(8, 8))
    with pytest.raises(ValueError, match="at least 1 block a scale, found model.blocks 0"):
        make("cnn", blocks=0)
    with pytest.raises(ValueError, match="model.cell_layers are a part of decoders of patches"):
        make("cnn", "cnn", cell_layers=1)


@pytest.mark.parametrize("kind, rim", [("conv", 1), ("cnn", 6)])
def test_a_shift_by_a_patch_shifts_codes_by_one(kind, rim):
    model = make(kind, patch=2, channels=(8, 8))
    images = to_float(noise(1, 36, 32, 3))
    whole, shifted = jax.jit(model.features)(images), jax.jit(model.features)(images[:, 4:])
    inside = lambda x, top: x[:, top + rim : top + 16 - rim, rim : 16 - rim]
    np.testing.assert_allclose(inside(whole, 2), inside(shifted, 0), atol=1e-5)
    assert np.abs(whole[:, 2:3] - shifted[:, :1]).max() > 1e-3  # at the border it sees other things


def test_a_pyramid_encodes_on_eight_devices_as_on_one():
    run_python(
        """
import jax, numpy as np
from mmgen.models.autoencoders import Tokenizer
from test_autoencoders import QUANTIZERS, make, noise

config = dict(patch=2, channels=(8, 8), width=8, quantizer=QUANTIZERS["lfq"])
model, images = make("cnn", "cnn", **config), noise(9, 8, 12, 3)
one, eight = Tokenizer(model), Tokenizer(model, devices=jax.devices())
codes = one.encode(images, batch=16)
assert len(jax.devices()) == 8 and len(np.unique(codes)) > 20
assert np.array_equal(eight.encode(images, batch=16), codes)
pixels = [each.decode(codes, batch=16, tile=2).astype(int) for each in (one, eight)]
assert np.abs(pixels[0] - pixels[1]).max() <= 1
""",
        devices=8,
    )


# ---- quantizers and alpha ------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_any_quantizer(kind):
    model, images = make("patch", "patch", quantizer=QUANTIZERS[kind]), noise(2, 8, 8, 3)
    tokenizer = Tokenizer(model)
    codes = tokenizer.encode(images)
    assert tokenizer.codes == np.prod(tokenizer.levels) and len(np.unique(codes)) > 1
    assert codes.min() >= 0 and codes.max() < tokenizer.codes
    values = nnx.jit(lambda model: model.encode(to_float(images)))(model)
    np.testing.assert_allclose(values, model.quantizer.lookup(codes), atol=1e-5)
    assert (model.prior is not None) == (kind == "fsq")
    back = lambda model: jnp.square(model.decode(model.encode(to_float(images)))).mean()
    slope = nnx.jit(nnx.grad(back))(model)
    assert np.abs(slope["encoder"]["stem"]["w"][...]).max() > 0


@pytest.mark.parametrize("kind, dtype", [("conv", "float32"), ("cnn", "bfloat16")])
def test_alpha_is_a_fourth_channel(kind, dtype):
    tokenizer = Tokenizer(make(kind, kind, alpha=True, dtype=dtype))
    images = noise(2, 8, 8, 4)
    codes = tokenizer.encode(images)
    assert tokenizer.alpha and tokenizer.decode(codes).shape == images.shape
    clear, opaque = images.copy(), images.copy()
    clear[..., 3], opaque[..., 3] = 0, 255
    assert not np.array_equal(tokenizer.encode(clear), tokenizer.encode(opaque))
    assert np.array_equal(tokenizer.encode(images[..., :3]), tokenizer.encode(opaque))


def test_alpha_is_not_dropped_in_silence():
    match = "expects images of 3 channels, found 4: lay them over a background, or train a tokenizer with"
    with pytest.raises(ValueError, match=match):
        Tokenizer(make()).encode(noise(1, 8, 8, 4))
    with pytest.raises(ValueError, match="expects images of 4 channels, found 3: add an alpha of 1"):
        make(alpha=True).features(to_float(noise(1, 8, 8, 3)))


# ---- tiles ---------------------------------------------------------------------------------

# Decoders of convolutions, and how far a code of theirs reaches.
REACHES = [
    (dict(decoder="patch", cell_layers=0), 0),
    (dict(decoder="patch", cell_layers=1), 1),
    (dict(decoder="patch", cell_layers=3), 2),
    (dict(decoder="conv", layers=2, cell_layers=0), 2),
    (dict(decoder="conv", layers=1, cell_layers=2), 2),
    (dict(decoder="attention", layers=2, window=2, cell_layers=1), 5),
    (dict(decoder="cnn", patch=1, channels=(8,)), 6),
    (dict(decoder="cnn", patch=2, channels=(8, 8)), 7),  # ((1 + 2 + 2) * 2 + 2 + 1) / 2
    (dict(decoder="cnn", patch=4, channels=(8, 8, 12)), 7),  # (((1 + 2 + 2) * 2 + 2) * 2 + 2 + 1) / 4
    (dict(decoder="cnn", patch=2, channels=(8, 8), blocks=2), 12),
]


@pytest.mark.parametrize("options, reach", REACHES)
def test_a_code_reaches_exactly_as_far_as_is_said(options, reach):
    model = make("patch", **options)
    assert Tokenizer(model).halo == model.reach == reach
    n = 2 * reach + 3
    values = jax.random.normal(jax.random.key(0), (1, n, n, len(LEVELS)))
    # A change that is infinitely small, so that none is too small for float32.
    change = jnp.zeros_like(values).at[0, n // 2, n // 2].set(1.0)
    moved = jax.jit(lambda values, change: jax.jvp(model.decode, (values,), (change,))[1])(values, change)
    seen = np.abs(patchify(moved, model.patch)[0]).sum(-1) > 0
    distance = np.maximum(*np.abs(np.mgrid[:n, :n] - n // 2))
    assert np.array_equal(seen, distance <= reach)


@pytest.mark.parametrize("options", [options for options, _ in REACHES[1:9:2]])
def test_tiles_are_what_the_whole_is(options):
    tokenizer = Tokenizer(make("patch", **options))
    size, tile = 3 + 2 * tokenizer.halo, 3
    rng = np.random.default_rng(0)
    # Grids that tiles divide and that they don't, longer than a window along both axes, one and none.
    for h, w in ((size + 3, size + 7), (size - 1, size + 1), (size - 2, size)):
        codes = rng.integers(0, tokenizer.codes, (2, h, w), dtype=np.int32)
        tiled, whole = tokenizer.decode(codes, 4, tile), tokenizer.decode(codes, 4)
        off = np.abs(tiled.astype(int) - whole)
        assert tiled.dtype == np.uint8 and whole.std() > 10 and off.max() <= 1
        # Equal to the bit where this was written; another program may round otherwise, but only at times.
        assert np.mean(off > 0) < 1e-4


def test_large_images_share_one_program_of_tiles():
    tokenizer = Tokenizer(make("patch", "conv"))
    for h, w in ((9, 10), (12, 17), (20, 9)):
        tokenizer.decode(np.zeros((1, h, w), np.int32), 4, 3)
    assert tokenizer._decode._cache_size() == 1


def test_a_tile_has_a_code_at_least():
    with pytest.raises(ValueError, match="at least 1 code along each side, found 0"):
        Tokenizer(make()).decode(np.zeros((1, 2, 2), np.int32), tile=0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("n", [3, 12, 13, 14, 20, 31])
def test_windows_cover_an_axis_and_count_for_one(exact, n):
    halo, p = 4, 3
    starts, size, weights = windows(n, 5, halo, p, exact)
    assert size == min(n, 5 + 2 * halo) and starts[0] == 0 and starts[-1] == n - size
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
    assert not exact or set(weights.ravel()) <= {0.0, 1.0}
    pixels = np.arange(n * p)
    for start, weight in zip(starts, weights):
        outside = (pixels < start * p) | (pixels >= (start + size) * p)
        assert weight.min() >= 0 and not weight[outside].any()


def test_tiles_of_attention_are_as_like_the_image_as_the_whole_and_have_no_seams():
    """Of a decoder that learned from 8x8 codes, 24x28 codes in windows of 16x16."""
    rng = np.random.default_rng(0)
    coarse = jnp.asarray(rng.uniform(-1, 1, (9, 12, 14, 3)), jnp.float32)
    images = jax.image.resize(coarse, (9, 96, 112, 3), "cubic").clip(-1, 1)
    graphdef, params = nnx.split(make("patch", "attention", cell_layers=0))
    tx = optax.adam(3e-3)
    moments = tx.init(params)

    @jax.jit
    def step(params, moments, images):
        def loss(params):
            model = nnx.merge(graphdef, params)
            return jnp.mean(jnp.square(model.decode(model.encode(images)) - images))

        updates, moments = tx.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    for _ in range(60):
        y, x = rng.integers(0, 16, 2) * 4
        params, moments = step(params, moments, images[1:, y : y + 32, x : x + 32])
    tokenizer, image = Tokenizer(nnx.merge(graphdef, params)), np.asarray(to_uint8(images[:1])).astype(int)
    codes = tokenizer.encode(image.astype(np.uint8), 1)
    tiled, whole = (tokenizer.decode(codes, 2, tile).astype(int) for tile in (8, None))
    psnr = lambda a, b: 10 * np.log10(255**2 / np.mean(np.square(a - b)))
    assert tokenizer.decode(codes, 1, 28).astype(int).tolist() == whole.tolist()  # one window
    assert psnr(tiled, image) > psnr(whole, image) - 0.1 and psnr(tiled, whole) > 25
    # Where a window begins or ends, neighbouring pixels differ as much as they do without windows.
    cuts = 4 * np.array([8, 12, 16])
    jumps = [np.abs(np.diff(each, axis=2))[:, :, cuts - 1].mean() for each in (tiled, whole)]
    assert jumps[0] < 1.1 * jumps[1]


# ---- the rate ------------------------------------------------------------------------------


NOTHING = dict.fromkeys(configs.load("tokenizer:tiny").loss.weights, 0.0)


def loss(model, batch, **options):
    usual = dict(weights=NOTHING, floor=1e-3, noise=0.0, recolor=0.0, color_digits=1, gan={})
    return stage.loss(model, batch, None, **{**usual, **options})


def test_the_prior_reads_only_the_four_places_before():
    quantizer, prior = FSQ(LEVELS), make().prior
    features = jax.random.normal(jax.random.key(1), (1, 5, 5, len(LEVELS)))
    digits = quantizer.bound(features)
    nats = lambda values: prior(values, digits)[0, 2, 2]
    slope = jax.jit(jax.grad(nats))(quantizer.quantize(features))
    read = np.argwhere(np.abs(slope[0]).sum(-1) > 0).tolist()
    assert read == [[1, 1], [1, 2], [1, 3], [2, 1]]


def test_the_prior_tells_the_edge_from_a_code_of_zeros():
    nothing = jnp.zeros((1, 3, 3, len(LEVELS)))
    nats = make().prior(nothing, nothing)
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
        weights = {**NOTHING, "log_mse": 0.1, "rate": 1.0}
        sums = loss(nnx.merge(graphdef, params), {"images": images}, weights=weights)
        return sums["loss"][0], sums

    (_, before), slope = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    stem = slope["encoder"]["stem"]["w"][...]
    assert np.abs(stem).max() > 0
    params["encoder"]["stem"]["w"][...] -= 1e-3 * stem / jnp.abs(stem).max()
    assert jax.jit(value)(params)[1]["rate"][0] < before["rate"][0]


# ---- other colours -------------------------------------------------------------------------


def test_recolored_images_come_from_their_colors_and_the_others_digits():
    model, images, other = make(), noise(4, 16, 16, 3), noise(4, 16, 16, 3, seed=1)
    batch = {"images": images, "recolored": other}
    psnr_of = lambda share: loss(model, batch, recolor=share, color_digits=2)["batch_psnr"][0] / len(images)
    a, b = model.encode(to_float(images)), model.encode(to_float(other))

    def psnr(values, of):
        error = np.asarray(model.decode(values) - to_float(of))
        return np.mean(10 * np.log10(4 / np.mean(error**2, axis=(1, 2, 3))))

    mixed = jnp.concatenate([b[..., :2], a[..., 2:]], -1)
    plain, half, whole = (psnr_of(share) for share in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(plain, psnr(a, images), rtol=1e-4)
    np.testing.assert_allclose(whole, psnr(mixed, other), rtol=1e-4)
    np.testing.assert_allclose(half, (psnr(mixed[:2], other[:2]) + psnr(a[2:], images[2:])) / 2, rtol=1e-4)


# ---- the noise -----------------------------------------------------------------------------


def test_noise_replaces_up_to_its_share_by_other_values_of_the_batch():
    values = jnp.arange(32 * 8 * 8, dtype=jnp.float32).reshape(32, 8, 8, 1)
    changed = stage.disturbed(values, jax.random.key(0), 0.4)
    shares = np.mean(np.asarray(changed != values), axis=(1, 2, 3))
    assert 0.1 < shares.mean() < 0.3 and shares.max() < 0.6 and shares.min() < 0.1
    assert np.isin(changed, values).all()
    assert np.array_equal(changed, stage.disturbed(values, jax.random.key(0), 0.4))


def test_no_gradient_flows_where_a_code_was_lost():
    values = jnp.arange(8 * 4 * 4, dtype=jnp.float32).reshape(8, 4, 4, 1)
    disturb = lambda values: stage.disturbed(values, jax.random.key(3), 0.9)
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
    assert stage.usage(np.array([0, 0, 1, 1]), (2, 4)) == {
        "code_usage": 0.25,
        "code_perplexity": pytest.approx(2.0),
        "digit_entropy_least": 0.0,
        "digit_entropy_mean": pytest.approx(0.5),
    }
