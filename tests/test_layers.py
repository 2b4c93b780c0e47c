"""The shared layers against plain numpy, and what may not depend on what."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from mmgen.models import layers
from mmgen.models.attention import attention, bias_of

CONFIG = ml_collections.ConfigDict(dict(width=24, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=40))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def reference(q, k, v, bias):
    """Softmax attention, one query and head after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, C = q.shape
    group = N // k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        logits = k[b, :, n // group] @ q[b, t, n] / np.sqrt(C)
        if bias is not None:
            logits = logits + np.broadcast_to(bias, (B, T, k.shape[1]))[b, t]
        p = np.exp(logits - logits.max())
        out[b, t, n] = p / p.sum() @ v[b, :, n // group]
    return out


@pytest.mark.parametrize("heads, kv_heads, with_bias", [(4, 4, False), (4, 2, True), (6, 1, True)])
def test_attention_against_numpy(heads, kv_heads, with_bias):
    q, k, v = normal(0, 2, 5, heads, 8), normal(1, 2, 7, kv_heads, 8), normal(2, 2, 7, kv_heads, 8)
    bias = (
        np.where(np.random.default_rng(0).random((2, 5, 7)) < 0.4, -1e30, normal(3, 2, 5, 7))
        if with_bias
        else None
    )
    if with_bias:
        bias[:, :, 0] = 0.5  # every query sees something
        bias = bias.astype(np.float32)
    np.testing.assert_allclose(attention(q, k, v, bias), reference(q, k, v, bias), atol=2e-5)


def test_attention_takes_large_logits_and_other_names_are_errors():
    q, k, v = 300 * normal(0, 1, 4, 2, 8), 300 * normal(1, 1, 4, 2, 8), normal(2, 1, 4, 2, 8)
    np.testing.assert_allclose(attention(q, k, v), reference(q, k, v, None), atol=1e-4)
    with pytest.raises(ValueError, match="known: auto, xla"):
        attention(q, k, v, impl="flash")
    with pytest.raises(ValueError, match="multiple"):
        odd = ml_collections.ConfigDict({**CONFIG.to_dict(), "kv_heads": 3})
        layers.Attention(odd, nnx.Rngs(0), dtype=jnp.float32)


def test_rope_of_equal_coordinates_is_one_dimensional():
    line = jnp.arange(50)[None, :, None]
    one = layers.rope(line, 16, 100.0)
    for axes in (2, 3):
        many = layers.rope(jnp.repeat(line, axes, -1), 16, 100.0)
        for a, b in zip(one, many):
            np.testing.assert_array_equal(a, b)
    angle = 7 * 100.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(one[0][0, 7], np.cos(angle), atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rope_sees_only_differences(axes):
    q, k = normal(0, 1, 6, 2, 12), normal(1, 1, 6, 2, 12)
    here = jax.random.randint(jax.random.key(2), (1, 6, axes), 0, 30)
    there = jax.random.randint(jax.random.key(3), (1, 6, axes), 0, 30)

    def products(shift):
        rotated = [layers.rotate(x, layers.rope(p + shift, 12, 50.0)) for x, p in ((q, here), (k, there))]
        return jnp.einsum("btnc,bsnc->bnts", *rotated)

    np.testing.assert_allclose(products(0), products(jnp.arange(axes) * 5 + 11), atol=1e-4)
    assert np.abs(products(0) - jnp.einsum("btnc,bsnc->bnts", q, k)).max() > 0.1  # and does see them


def test_rope_keeps_lengths_and_every_axis_matters():
    x = normal(0, 1, 3, 1, 12)
    turned = layers.rotate(x, layers.rope(jnp.array([[[1, 5, 9], [40, 2, 0], [0, 0, 0]]]), 12, 50.0))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(turned[0, 2], x[0, 2])
    for axis in range(3):
        moved = layers.rotate(x, layers.rope(jnp.zeros((1, 3, 3), int).at[..., axis].set(3), 12, 50.0))
        assert np.abs(moved - x).max() > 0.1


def test_rms_norm_against_its_formula():
    x = 3 * normal(0, 4, 16)
    expected = np.asarray(x) / np.sqrt(np.mean(np.square(x), -1, keepdims=True))
    np.testing.assert_allclose(layers.rms_norm(x), expected, rtol=1e-5)
    assert layers.rms_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_linear_is_a_matrix_product_over_the_last_axis():
    linear = layers.Linear((6, 2, 3), ("embed", "gate", "mlp"), nnx.Rngs(0), bias=True)
    linear.b[...] = normal(1, 2, 3)
    x = normal(0, 4, 5, 6)
    np.testing.assert_allclose(
        linear(x), jnp.einsum("btd,dgf->btgf", x, linear.w[...]) + linear.b[...], atol=1e-5
    )


@pytest.fixture(scope="module")
def stack():
    blocks = layers.stack(lambda r: layers.Block(CONFIG, r, dtype=jnp.float32), CONFIG.layers, nnx.Rngs(0))
    cos_sin = layers.rope(jnp.arange(9)[None, :, None], 8, 100.0)
    return blocks, normal(5, 2, 9, CONFIG.width), cos_sin


@pytest.mark.parametrize(
    "options",
    [dict(remat="full"), dict(remat="attention", unroll=True), dict(remat="dots"), dict(unroll=True)],
)
def test_scan_remat_and_unroll_are_one_function(stack, options):
    blocks, x, cos_sin = stack
    graphdef, params = nnx.split(blocks)
    bias = bias_of(jnp.tril(jnp.ones((9, 9), bool)))[None]

    def value(params, **options):
        y = layers.scan(nnx.merge(graphdef, params), x, cos_sin, bias, **options)
        return jnp.square(y).mean(), y

    (_, y), gradient = jax.value_and_grad(value, has_aux=True)(params)
    (_, other), other_gradient = jax.value_and_grad(lambda p: value(p, **options), has_aux=True)(params)
    np.testing.assert_allclose(y, other, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_unstacked_layers_are_the_stack(stack):
    blocks, x, cos_sin = stack
    y = x
    for block in layers.unstack(blocks, CONFIG.layers):
        y = block(y, cos_sin)
    np.testing.assert_allclose(layers.scan(blocks, x, cos_sin), y, atol=1e-5)


def test_layers_of_a_stack_start_unlike_and_residuals_small(stack):
    weights = np.asarray(stack[0].mlp.wo.w[...])
    assert weights.shape == (3, 40, 24) and np.abs(weights[0] - weights[1]).max() > 0.01
    assert abs(weights.std() - (2 * 3) ** -0.5 * 40**-0.5) < 0.01
