"""FSQ: codes and levels are in exact bijection, every level is in reach, and gradients pass straight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.models.quantizers import FSQ

SETS = [(8, 5, 5, 5), (8, 8, 8, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5), (2, 3, 2)]


@pytest.mark.smoke
@pytest.mark.parametrize("levels", SETS)
def test_every_code_packs_back_to_itself(levels):
    fsq = FSQ(levels)
    codes = jnp.arange(fsq.codes)
    values = fsq.unpack(codes)
    assert fsq.codes == math.prod(levels) and values.shape == (fsq.codes, len(levels))
    assert np.array_equal(fsq.pack(values), codes)
    assert len(np.unique(np.asarray(values), axis=0)) == fsq.codes  # no two codes share their values
    assert np.abs(values).max() <= 1


@pytest.mark.parametrize("levels", SETS)
def test_what_is_quantized_are_the_values_of_a_code(levels):
    fsq = FSQ(levels)
    values = fsq.quantize(4 * jax.random.normal(jax.random.key(0), (2_000, len(levels))))
    np.testing.assert_allclose(fsq.unpack(fsq.pack(values)), values, atol=1e-6)


@pytest.mark.parametrize("levels", [(2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12), (13, 14, 15, 16)])
def test_every_level_is_reached_in_order(levels):
    """Channels are alike and alone, so that every combination of levels is reached as well."""
    fsq = FSQ(levels)
    z = jnp.linspace(-20, 20, 40_001)
    values = np.asarray(fsq.quantize(jnp.stack([z] * len(levels), -1)))
    for level, channel in zip(levels, values.T):
        assert len(np.unique(np.round(channel, 4))) == level and (np.diff(channel) >= 0).all()
        assert level > 7 or len(np.unique(np.round(channel[np.abs(z) < 2], 4))) == level  # and not far out


def test_a_level_of_two_splits_at_zero():
    """It needs a bound of its own: shifted like other even levels, one of its values has no gradient."""
    fsq = FSQ((2,))
    z = jnp.array([[-3.0], [-1e-3], [1e-3], [3.0]])
    assert fsq.pack(fsq.quantize(z)).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("levels", SETS)
def test_the_gradient_is_that_of_the_bound(levels):
    fsq = FSQ(levels)
    z = jax.random.normal(jax.random.key(1), (64, len(levels)))
    gradient = jax.grad(lambda z: fsq.quantize(z).sum())(z)
    expected = jax.grad(lambda z: (fsq.bound(z) / (fsq.levels // 2)).sum())(z)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    at_zero = jax.grad(lambda z: fsq.quantize(z).sum())(jnp.zeros(len(levels)))
    assert (np.asarray(at_zero) > 0.1).all()


@pytest.mark.parametrize("levels", SETS)
def test_bfloat16_features_and_values_stay_exact(levels):
    fsq = FSQ(levels)
    z = (30 * jax.random.normal(jax.random.key(2), (4_096, len(levels)))).astype(jnp.bfloat16)
    z = jnp.concatenate([z, jnp.array([[3e38], [-3e38], [0.0]], jnp.bfloat16).repeat(len(levels), 1)])
    values = fsq.quantize(z)
    codes = fsq.pack(values)
    assert values.dtype == jnp.float32 and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() < fsq.codes
    assert np.array_equal(codes, fsq.pack(fsq.quantize(z.astype(jnp.float32))))
    every = jnp.arange(fsq.codes)
    assert np.array_equal(fsq.pack(fsq.unpack(every).astype(jnp.bfloat16)), every)


@pytest.mark.parametrize("levels", [(8, 1, 5), (0,), (), (-3, 5)])
def test_too_few_levels(levels):
    with pytest.raises(ValueError, match="at least 2"):
        FSQ(levels)


def test_too_many_codes_for_int32():
    with pytest.raises(ValueError, match="int32"):
        FSQ((16,) * 8)
