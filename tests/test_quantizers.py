"""FSQ: codes and levels are in exact bijection, every level is in reach, and gradients pass straight.

All others: values, losses and moving averages against slow float64 references, and who learns from what.
"""

import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from mmgen.models.quantizers import BSQ, FSQ, LFQ, QUANTIZERS, VQ, FinerFSQ, Residual, make_quantizer
from mmgen.runtime.optimizer import _each
from tests.conftest import run_python

# Most of the time of these tests is compilation: LLVM need not try hard.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SETS = [(8, 5, 5, 5), (8, 8, 8, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5), (2, 3, 2)]


@pytest.mark.smoke
@pytest.mark.parametrize("levels", SETS)
def test_every_code_packs_back_to_itself(levels):
    fsq = FSQ(levels)
    codes = jnp.arange(fsq.codes)
    values = np.asarray(jit(fsq.unpack)(codes))
    assert fsq.codes == math.prod(levels) and values.shape == (fsq.codes, len(levels))
    assert np.array_equal(jit(fsq.pack)(values), codes)
    assert len(np.unique(values, axis=0)) == fsq.codes  # no two codes share their values
    assert np.abs(values).max() <= 1


@pytest.mark.parametrize("levels", SETS)
def test_what_is_quantized_are_the_values_of_a_code(levels):
    fsq = FSQ(levels)
    values = jit(fsq.quantize)(features(2_000, len(levels), scale=4.0))
    np.testing.assert_allclose(jit(lambda values: fsq.unpack(fsq.pack(values)))(values), values, atol=1e-6)


@pytest.mark.parametrize("levels", [(2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12), (13, 14, 15, 16)])
def test_every_level_is_reached_in_order(levels):
    """Channels are alike and alone, so that every combination of levels is reached as well."""
    fsq = FSQ(levels)
    z = np.linspace(-20, 20, 40_001, dtype=np.float32)
    values = np.asarray(jit(fsq.quantize)(np.stack([z] * len(levels), -1)))
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
    slopes = jit(lambda z: (
        jax.grad(lambda z: fsq.quantize(z).sum())(z),
        jax.grad(lambda z: (fsq.bound(z) / (fsq.levels // 2)).sum())(z),
    ))  # fmt: skip
    z = features(64, len(levels)).at[0].set(0.0)
    gradient, expected = slopes(z)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert (np.asarray(gradient)[0] > 0.1).all()


@pytest.mark.parametrize("levels", SETS)
def test_bfloat16_features_and_values_stay_exact(levels):
    fsq = FSQ(levels)
    z = features(4_096, len(levels), scale=30.0).astype(jnp.bfloat16)
    z = z.at[:3].set(jnp.array([[3e38], [-3e38], [0.0]], jnp.bfloat16))

    @jit
    def everything(z, every):
        values = fsq.quantize(z)
        high = fsq.pack(fsq.quantize(z.astype(jnp.float32)))
        return values, fsq.pack(values), high, fsq.pack(fsq.unpack(every).astype(jnp.bfloat16))

    every = np.arange(fsq.codes)
    values, codes, high, back = everything(z, every)
    assert values.dtype == jnp.float32 and codes.dtype == jnp.int32
    assert codes.min() >= 0 and codes.max() < fsq.codes
    assert np.array_equal(codes, high) and np.array_equal(back, every)


@pytest.mark.parametrize("levels", [(8, 1, 5), (0,), (), (-3, 5)])
def test_too_few_levels(levels):
    with pytest.raises(ValueError, match="at least 2"):
        FSQ(levels)


def test_too_many_codes_for_int32():
    with pytest.raises(ValueError, match="int32"):
        FSQ((16,) * 8)


# ---- all quantizers -------------------------------------------------------------------------


def residual_vq(rngs, depth, **options):
    return Residual(lambda stage, rngs: VQ(7, 4, rngs, normalize=stage == 0, **options), depth, rngs)


def residual_fsq(levels, depth):
    return Residual(lambda stage, _: FinerFSQ(levels, stage) if stage else FSQ(levels, True), depth, None)


EACH = {
    "fsq": lambda: FSQ((8, 5, 5, 2)),
    "vq": lambda: VQ(16, 4, nnx.Rngs(0), entropy=0.1),
    "vq not normalized": lambda: VQ(16, 4, nnx.Rngs(0), normalize=False),
    "vq by gradient": lambda: VQ(16, 4, nnx.Rngs(0), decay=0, normalize=False, entropy=0.1),
    "lfq": lambda: LFQ(4, group=3),
    "bsq": lambda: BSQ(4),
    "residual vq": lambda: residual_vq(nnx.Rngs(0), depth=2),
    "residual fsq": lambda: residual_fsq((3, 4, 2, 5), 2),
}


@functools.partial(jit, static_argnums=0)
def _run(graphdef, params, z):
    def value(params, z):
        values, loss, watched = nnx.merge(graphdef, params)(z)
        return loss, (values, watched)

    (loss, (values, watched)), grads = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, z)
    quantizer = nnx.merge(graphdef, params)
    codes = quantizer.index(z)
    return values, loss, watched, *grads, codes, quantizer.lookup(codes)


def run(quantizer, z):
    """All that a quantizer says of features z, and the gradients of its loss."""
    graphdef, state = nnx.split(quantizer)
    found = _run(graphdef, nnx.to_pure_dict(state), z)
    return SimpleNamespace(
        **dict(zip(("values", "loss", "watched", "dparams", "dz", "codes", "lookup"), found))
    )


def learn(quantizer, gradients):
    """The quantizer with its moving averages moved as the optimizer is to move them."""
    graphdef, state = nnx.split(quantizer)
    decays = _each(state, lambda variable: variable.get_metadata()["average"])
    move = lambda param, gradient, decay: param - (1 - decay) * gradient
    return nnx.merge(graphdef, jax.tree.map(move, nnx.to_pure_dict(state), gradients, decays))


def features(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def high(x):
    return np.asarray(x, np.float64)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def entropy(p):
    p = p[p > 0]
    return -np.sum(p * np.log(p))


def distances(z, words):
    return np.square(z[:, None] - words).sum(-1)


def soft_entropies(distance, temperature=0.01):
    """Mean entropy of the rows' softmax, entropy of the mean softmax, and the softmax [N, K]."""
    p = np.exp((distance.min(-1, keepdims=True) - distance) / temperature)
    p /= p.sum(-1, keepdims=True)
    return np.mean([entropy(row) for row in p]), entropy(p.mean(0)), p


@pytest.mark.smoke
@pytest.mark.parametrize("name", EACH)
def test_the_interface(name):
    quantizer, z = EACH[name](), features(2, 5, 3, 4, seed=1).astype(jnp.bfloat16)
    graphdef, state = nnx.split(quantizer)
    weight = features(*z.shape, seed=2)

    @jit
    def everything(params, z):
        merge = functools.partial(nnx.merge, graphdef)
        of = lambda z: (
            merge(params)(z),
            merge(params).index(z),
            merge(params).lookup(merge(params).index(z)),
        )
        full = z.astype(jnp.float32)
        passed = jax.grad(lambda p, z: jnp.sum(weight * merge(p)(z)[0]), argnums=(0, 1))(params, full)
        return of(z), of(full), passed, jax.grad(lambda z: jnp.sum(weight * merge(params).squash(z)))(full)

    found, expected, passed, slope = everything(nnx.to_pure_dict(state), z)
    (values, loss, watched), codes, lookup = found
    assert values.shape == z.shape and values.dtype == jnp.float32
    assert codes.shape == z.shape[:-1] and codes.dtype == jnp.int32
    assert 0 <= codes.min() and codes.max() < quantizer.codes == math.prod(quantizer.levels)
    np.testing.assert_allclose(lookup, values, atol=2e-7)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in (loss, *watched.values()))
    assert (loss == 0) == ("fsq" in name)
    assert quantizer.channels == 4 and len(np.unique(codes)) > 5
    # bfloat16 is computed with in float32.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Values pass their gradient straight to what they approximate, and to nothing else.
    np.testing.assert_allclose(passed[1], slope, rtol=1e-5, atol=1e-6)
    assert np.abs(slope).max() > 0.1 and not any(np.any(leaf) for leaf in jax.tree.leaves(passed[0]))

    digits = np.asarray(quantizer.digits(codes)).reshape(-1, len(quantizer.levels))
    assert (digits < quantizer.levels).all() and np.array_equal(quantizer.join(digits), codes.ravel())
    shares = [np.bincount(each, minlength=n) / each.size for each, n in zip(digits.T, quantizer.levels)]
    assert all(p.max() < 1 for p in shares)
    if not name.startswith("residual"):  # whose are means over stages
        normalized = np.mean([entropy(p) / np.log(len(p)) for p in shares])
        np.testing.assert_allclose(watched["digit_entropy"], normalized, rtol=1e-5)
        np.testing.assert_allclose(watched["usage"], len(np.unique(codes)) / quantizer.codes, rtol=1e-6)


def test_only_learned_codewords_are_parameters():
    shapes = lambda quantizer: jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.split(quantizer)[1]))
    assert shapes(FSQ((8, 5))) == shapes(LFQ(3)) == shapes(BSQ(3)) == shapes(residual_fsq((3,), 2)) == {}
    averages = {"counts": (7,), "sums": (7, 4)}
    assert shapes(residual_vq(nnx.Rngs(0), 2)) == {"stage0": averages, "stage1": averages}
    assert shapes(VQ(7, 4, nnx.Rngs(0), decay=0)) == {"table": (7, 4)}


@pytest.mark.parametrize("make", [lambda: LFQ(31), lambda: residual_fsq((8, 8, 8), 4)])
def test_too_many_codes_of_others(make):
    with pytest.raises(ValueError, match="int32"):
        make()


CONFIG = {
    "kind": "vq", "levels": (4, 3), "codes": 16, "channels": 4, "decay": 0.9, "commitment": 0.5,
    "normalize": True, "restart": 0.25, "entropy": 0.2, "bits": 5, "diversity": 2.0, "depth": 1,
}  # fmt: skip


def test_a_config_says_which_quantizer():
    make = lambda **changes: make_quantizer(ml_collections.ConfigDict(CONFIG | changes), nnx.Rngs(0))
    vq = make()
    assert (type(vq), vq.codes, vq.channels, vq.decay, vq.commitment) == (VQ, 16, 4, 0.9, 0.5)
    assert (vq.normalize, vq.restart, vq.entropy) == (True, 0.25, 0.2)
    assert make(kind="fsq").levels.tolist() == [4, 3]
    for kind, bits in (("lfq", LFQ), ("bsq", BSQ)):
        found = make(kind=kind)
        assert (type(found), found.codes, found.channels) == (bits, 32, 5)
        assert (found.entropy, found.diversity, found.commitment) == (0.2, 2.0, 0.5)
        with pytest.raises(ValueError, match="'fsq' or 'vq'"):
            make(kind=kind, depth=2)
    deep = make(depth=3)
    assert deep.levels.tolist() == [16] * 3 and [stage.normalize for stage in deep.stages] == [
        True,
        False,
        False,
    ]
    assert make(kind="fsq", depth=2).levels.tolist() == [4, 3, 4, 3]
    with pytest.raises(ValueError, match=f"'pq'; known: {', '.join(QUANTIZERS)}"):
        make(kind="pq")


# ---- VQ -------------------------------------------------------------------------------------


def codewords(counts, sums, normalize):
    total = counts.sum()
    words = sums / ((counts + 1e-5) / (total + len(counts) * 1e-5) * total)[:, None]
    return unit(words) if normalize else words


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("decay", [0, 0.9])
def test_vq_is_the_nearest_codeword_and_its_losses(normalize, decay):
    z, beta, weight = features(300, 4, scale=0.7), 0.3, 0.2
    vq = VQ(16, 4, nnx.Rngs(1), decay=decay, normalize=normalize, commitment=beta, entropy=weight)
    if decay:  # counts that differ, so that it matters what the sums are divided by
        vq.counts[...] = jnp.linspace(0.5, 2, 16)
        vq.sums[...] = 1000 * vq.sums[...] * vq.counts[...][:, None]
        words = codewords(high(vq.counts[...]), high(vq.sums[...]), normalize)
    else:
        words = unit(high(vq.table[...])) if normalize else high(vq.table[...])
    squashed = unit(high(z)) if normalize else high(z)
    distance = distances(squashed, words)
    codes = distance.argmin(-1)
    found = run(vq, z)
    assert np.array_equal(found.codes, codes)
    np.testing.assert_allclose(found.values, words[codes], atol=1e-6)

    off = np.square(squashed - words[codes]).mean()
    sure, spread, _ = soft_entropies(distance)
    expected = (beta + (decay == 0)) * off + weight * (sure - spread)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4)
    assert 0.01 < sure < spread


def test_vq_commitment_weighs_the_encoder_and_one_the_codewords():
    """The term with beta must move the encoder alone, the other only the codewords that were chosen."""
    z, beta = features(30, 4), 0.25
    vq = VQ(64, 4, nnx.Rngs(1), decay=0, normalize=False, commitment=beta)
    found, table = run(vq, z), high(vq.table[...])
    off = high(z) - table[found.codes]
    np.testing.assert_allclose(found.dz, 2 * beta * off / off.size, atol=1e-7)
    expected = np.zeros_like(table)
    np.add.at(expected, found.codes, -2 * off / off.size)
    np.testing.assert_allclose(found.dparams["table"], expected, atol=1e-6)
    unused = np.setdiff1d(np.arange(64), found.codes)
    assert len(unused) > 10 and not found.dparams["table"][unused].any() and expected.any()
    # Of moving averages, the commitment and the entropy are none of the business.
    averaged = [VQ(64, 4, nnx.Rngs(1), commitment=c, entropy=e) for c, e in ((0.0, 0.0), (9.0, 9.0))]
    none, much = (run(vq, z) for vq in averaged)
    assert none.loss == 0 and not none.dz.any() and much.loss != 0 and much.dz.any()
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, none.dparams, much.dparams)))


def test_the_entropy_terms_have_the_slopes_of_their_references():
    """Which are differences of float64 enumerations."""

    def slope(reference, z, along, step=1e-6):
        return (reference(high(z) + step * along) - reference(high(z) - step * along)) / (2 * step)

    along = high(features(20, 4, seed=5))
    z = features(20, 4, scale=0.7)
    vq = VQ(16, 4, nnx.Rngs(1), decay=0.9, normalize=False, commitment=0.0, entropy=0.5)
    words = high(vq.codewords())

    def of_vq(z):
        sure, spread, _ = soft_entropies(distances(z, words))
        return 0.5 * (sure - spread)

    expected = slope(of_vq, z, along)
    np.testing.assert_allclose(np.sum(high(run(vq, z).dz) * along), expected, rtol=1e-3)

    z = features(20, 4, scale=0.01)
    every = np.array(list(itertools.product([-1, 1], repeat=4)))

    def of_lfq(z):
        sure, spread, _ = soft_entropies(distances(z, every))
        return 0.5 * (sure - 3.0 * spread)

    lfq = LFQ(4, entropy=0.5, diversity=3.0, commitment=0.0)
    np.testing.assert_allclose(np.sum(high(run(lfq, z).dz) * along), slope(of_lfq, z, along), rtol=1e-3)


@pytest.mark.parametrize("normalize, restart", [(True, 0.3), (False, 0.0)])
def test_vq_averages_and_restarts_by_hand(normalize, restart):
    """Five batches, in float64, with the optimizer's rule; rare codes die, wait, and come again."""
    K, C, N, decay = 16, 4, 60, 0.5
    vq = VQ(K, C, nnx.Rngs(3), decay=decay, normalize=normalize, restart=restart, commitment=0.0)
    counts, sums = high(vq.counts[...]), high(vq.sums[...])
    restarted = []
    for step in range(5):
        # Two tight clusters, of which one vanishes: codes that have no feature near them, or no longer.
        z = features(N, C, seed=step, scale=0.1).at[: N // 2].add(1.0)
        z = z.at[N // 2 :].add(1.0 if step > 1 else jnp.array([-2.0, 0.0, 0.0, 0.0]))
        f = unit(high(z)) if normalize else high(z)
        codes = distances(f, codewords(counts, sums, normalize)).argmin(-1)
        n, total = np.bincount(codes, minlength=K), np.zeros((K, C))
        np.add.at(total, codes, f)
        new_counts, new_sums = decay * counts + (1 - decay) * n, decay * sums + (1 - decay) * total
        few = np.sum(new_counts < (restart or 0.1 * N / K))
        dead = np.flatnonzero(new_counts < restart)
        for rank, code in enumerate(dead):
            place = (rank * max(N // len(dead), 1) + codes.sum()) % N
            new_counts[code], new_sums[code] = 1.0, f[place]
        found = run(vq, z)
        assert np.array_equal(found.codes, codes) and found.loss == 0 and not found.dz.any()
        np.testing.assert_allclose(found.watched["dead"], few / K, rtol=1e-6)
        vq, counts, sums = learn(vq, found.dparams), new_counts, new_sums
        np.testing.assert_allclose(vq.counts[...], counts, rtol=1e-5)
        np.testing.assert_allclose(vq.sums[...], sums, rtol=1e-4, atol=1e-5)
        restarted.append(len(dead))
    assert (min(restarted[0], sum(restarted[3:])) > 0) == (restart > 0), restarted


def test_a_restarted_code_is_chosen_next():
    """What a restart that forgets the averages' state never achieves."""
    z = features(64, 4, scale=0.1) + jnp.array([1.0, 2.0, 0.0, 0.0])
    vq = VQ(16, 4, nnx.Rngs(0), restart=0.2, normalize=False)
    before = run(vq, z)
    after = run(learn(vq, before.dparams), z)
    assert len(np.unique(before.codes)) <= 3 and before.watched["dead"] > 0.8
    assert len(np.unique(after.codes)) >= 13 and after.watched["dead"] == 0
    gone = np.setdiff1d(np.arange(16), before.codes)
    assert np.isin(gone, after.codes).all()


def test_more_dead_codes_than_features_wait_for_the_next_batch():
    vq, dead = VQ(64, 4, nnx.Rngs(0), decay=0.5, normalize=False), []
    for step in range(3):
        found = run(vq, features(16, 4, seed=step))
        vq = learn(vq, found.dparams)
        dead.append(64 * found.watched["dead"])
        assert (np.abs(vq.counts[...] - 1) < 1e-5).sum() >= min(16, dead[-1])  # as many restart as can
        words = np.asarray(vq.codewords())
        assert len(np.unique(words.round(4), axis=0)) == 64  # no feature restarts two codes
    assert dead[0] >= 48 and dead[0] - 32 <= dead[1] <= dead[0] - 16 and dead[2] < dead[1]
    # Merely rare codes of a small batch do not die, though none has one feature a batch.
    fair = VQ(64, 4, nnx.Rngs(0), restart=1.0)
    fair.counts[...] = jnp.full(64, 0.25)
    assert run(fair, features(16, 4)).watched["dead"] == 0
    fair.counts[...] = jnp.full(64, 0.02)
    assert run(fair, features(16, 4)).watched["dead"] > 0.5


# ---- LFQ and BSQ ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, bits, group", [(LFQ, 1, 9), (LFQ, 8, 9), (BSQ, 5, 9), (BSQ, 8, 3)])
def test_binary_losses_by_enumeration(kind, bits, group):
    size = bits**-0.5 if kind is BSQ else 1.0
    # Biased, and about as far from 0 as the temperature is: no entropy is near its extremes.
    z = features(50, bits, scale=0.01) + 0.002 * jnp.arange(bits)
    quantizer = kind(bits, entropy=0.5, diversity=3.0, commitment=0.1, temperature=0.02, group=group)
    found = run(quantizer, z)
    signs = np.array(list(itertools.product([0, 1], repeat=bits)))[:, ::-1]  # the first bit least significant
    squashed = unit(high(z)) if kind is BSQ else high(z)
    every = size * (2 * signs - 1)
    distance = distances(squashed, every)
    assert np.array_equal(found.codes, distance.argmin(-1))
    np.testing.assert_allclose(found.values, every[found.codes], rtol=1e-6)
    np.testing.assert_allclose(quantizer.lookup(jnp.arange(2**bits)), every, rtol=1e-6)

    sure, _, p = soft_entropies(distance, 0.02)
    spread = 0
    for start in range(0, bits, group):
        part = signs[:, start : start + group]
        runs = part @ 2 ** np.arange(part.shape[1])
        spread += entropy(np.bincount(runs, weights=p.mean(0)))
    expected = 0.5 * (sure - 3.0 * spread) + 0.1 * np.square(squashed - every[found.codes]).mean()
    np.testing.assert_allclose(found.loss, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_certain_codes_all_equally_frequent_are_the_best(kind):
    """The sign of each entropy; and features far from 0 or at it are no trouble."""
    quantizer = kind(6, entropy=1.0, commitment=0.0, temperature=0.1)
    every = quantizer.lookup(jnp.arange(64))
    losses = {}
    for name, z in (
        ("uniform", 1e3 * every),
        ("collapsed", 1e3 * jnp.tile(every[:1], (64, 1))),
        ("one bit dead", 1e3 * every.at[:, 2].set(every[0, 2])),
        ("unsure", 1e-3 * every if kind is LFQ else jnp.zeros((64, 6))),
    ):
        found = run(quantizer, z)
        losses[name] = float(found.loss)
        assert np.isfinite(found.dz).all()
    best = -math.log(64)
    np.testing.assert_allclose(losses["uniform"], best, atol=0.15 if kind is BSQ else 1e-4)
    assert losses["uniform"] < losses["one bit dead"] - 0.5 < losses["collapsed"] - 1.0
    np.testing.assert_allclose([losses["collapsed"], losses["unsure"]], 0, atol=0.2)


def test_no_feature_ever_has_all_codes_of_18_bits():
    """2**18 of float32 for each of 512 features were half a gigabyte."""
    graphdef, state = nnx.split(LFQ(18))
    gradient = lambda z: jax.grad(lambda z: nnx.merge(graphdef, state)(z)[1])(z)
    memory = jit(gradient).lower(jnp.zeros((512, 18))).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 2e6


# ---- every code, and residuals --------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: VQ(64, 4, nnx.Rngs(0)), lambda: VQ(64, 4, nnx.Rngs(0), decay=0, normalize=False), lambda: LFQ(7),
    lambda: BSQ(7),
])  # fmt: skip
def test_every_code_is_found_again_from_its_values(make):
    quantizer = make()
    every = jnp.arange(quantizer.codes).reshape(-1, 4)
    values = jit(quantizer.lookup)(every)
    assert np.array_equal(jit(quantizer.index)(values), every) and values.shape[:-1] == every.shape


def test_residual_fsq_divides_each_channel_evenly():
    levels, depth = (3, 4, 2), 2
    quantizer = residual_fsq(levels, depth)
    every = jnp.arange(quantizer.codes)
    values = np.asarray(jit(quantizer.lookup)(every))
    assert quantizer.levels.tolist() == [3, 4, 2, 3, 4, 2] and quantizer.codes == 24**2
    for level, channel in zip(levels, values.T):
        found = np.unique(channel.round(5))
        assert len(found) == level**depth
        np.testing.assert_allclose(np.diff(found), 1 / (level // 2) / level ** (depth - 1), atol=1e-4)
    # Features whose squashed ones these are have these codes: the tanh reaches all.
    fsq = FSQ(levels, whole=True)
    half = fsq.levels * (1 - 1e-4) / 2
    offset = np.where(fsq.levels % 2 == 0, 0.5, 0.0)
    shift = np.where(fsq.levels == 2, 0, np.arctanh(np.where(fsq.levels == 2, 0, offset / half)))
    inner = (values * (fsq.levels // 2) + offset) / half
    z = jnp.asarray(np.arctanh(inner) - shift, jnp.float32)
    assert np.array_equal(jit(quantizer.index)(z), every)
    z = features(500, 3, seed=4, scale=2.0)
    for depth, one in ((1, fsq), (2, quantizer), (4, residual_fsq(levels, 4))):
        off = np.abs(jit(lambda z, one=one: one.lookup(one.index(z)) - fsq.squash(z))(z)).max(0)
        step = 1 / (fsq.levels // 2) / fsq.levels.astype(float) ** (depth - 1)
        assert (off <= step / 2 + 2e-3).all() and (depth == 4 or (off > 0.8 * step / 2).all())


def test_residual_error_falls_with_every_stage():
    z = features(256, 4)
    quantizer = residual_vq(nnx.Rngs(0), depth=3, decay=0.8, restart=0.5, commitment=0.25)
    for _ in range(15):
        found = run(quantizer, z)
        quantizer = learn(quantizer, found.dparams)
    found = run(quantizer, z)
    digits = np.asarray(quantizer.digits(found.codes)).T
    parts = [np.asarray(stage.lookup(jnp.asarray(d))) for stage, d in zip(quantizer.stages, digits)]
    np.testing.assert_allclose(sum(parts), found.values, atol=1e-6)
    left, errors = unit(high(z)), []
    for part, stage in zip(parts, quantizer.stages):
        assert np.array_equal(distances(left, high(stage.codewords())).argmin(-1), digits[len(errors)])
        left = left - part
        errors.append(np.square(left).mean())
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]
    np.testing.assert_allclose(found.loss, 0.25 * sum(errors), rtol=1e-4)  # each stage commits to its own


# ---- many devices ---------------------------------------------------------------------------

EIGHT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from mmgen.models.quantizers import LFQ, VQ
from mmgen.runtime import mesh as meshes
from mmgen.runtime.presets import SHARDING
from tests.test_quantizers import features, jit

assert jax.device_count() == 8
make = {
    "average": lambda: VQ(48, 8, nnx.Rngs(0), entropy=0.1),
    "gradient": lambda: VQ(48, 8, nnx.Rngs(0), decay=0, entropy=0.1),
    "lfq": lambda: LFQ(8, group=5),
}
split = {name: nnx.split(one()) for name, one in make.items()}
params = {name: nnx.to_pure_dict(state) for name, (_, state) in split.items()}
z = features(16, 4, 4, 8, scale=0.3) + jnp.arange(8) / 8

@jit
def run(params, z):
    def value(params, z):
        found = {name: nnx.merge(split[name][0], params[name])(z) for name in split}
        return sum(loss for _, loss, _ in found.values()), found
    (_, found), grads = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, z)
    return found, grads

leaves = jax.tree_util.tree_leaves_with_path
flat = lambda tree: {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves(tree)}
expected = flat(run(params, z))
assert 0.1 < expected["[0]['average'][2]['dead']"] < 1  # some are restarted
for shape, rule in (({"data": 8}, None), ({"data": 4, "tensor": 2}, "tensor")):
    mesh = meshes.make_mesh(shape)
    with meshes.use(mesh, SHARDING):
        lay = lambda p: jax.device_put(p, NamedSharding(mesh, P(rule) if p.shape[0] == 48 else P()))
        found = flat(run(jax.tree.map(lay, params), jax.device_put(z, NamedSharding(mesh, P("data")))))
    assert found.keys() == expected.keys()
    for name in expected:
        size = max(1.0, np.abs(expected[name]).max())
        np.testing.assert_allclose(found[name] / size, expected[name] / size, 1e-5, 1e-5, err_msg=name)
print(len(expected))
"""


def test_eight_devices_find_what_one_does():
    """Losses, gradients and moving averages of the whole batch, whoever holds which of its images."""
    assert int(run_python(EIGHT, devices=8).stdout) == 20
