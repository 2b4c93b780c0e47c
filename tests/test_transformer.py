"""The transformer: segments and time do not leak, cached decoding is the full pass, the loss its formula."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from mmgen.grammar import Grammar
from mmgen.models import lookup, transformer
from mmgen.models.quantizers import FSQ
from mmgen.runtime import config as configs
from mmgen.runtime import mesh as meshes
from mmgen.sampling import cache as caches

LEVELS = (5, 3, 2)
GRAMMAR = Grammar(pieces=20, max_side=4, codes=30)
V, T = GRAMMAR.vocab_size, 14


def config(**changes):
    return ml_collections.ConfigDict({**configs.load("transformer:tiny").model.to_dict(), **changes})


def build(levels=(), **changes):
    return transformer.Transformer(config(**changes), V, nnx.Rngs(0), levels, 1 if levels else 0, 4)


@pytest.fixture(scope="module", params=["tied", "factored"])
def model(request):
    if request.param == "tied":
        return build(tied=True, heads=4, kv_heads=2, unroll=False, before=0)
    return build(levels=LEVELS, tied=False)


@pytest.fixture(scope="module")
def batch():
    """Two packed rows: segments of unequal length, and padding behind the second."""
    rng = np.random.default_rng(0)
    segments = np.array([[1] * 5 + [2] * 9, [1] * 8 + [2] * 4 + [0] * 2])
    return {
        "tokens": rng.integers(0, V, (2, T)).astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": rng.integers(0, 12, (2, T, 3)).astype(np.int32),
        "weights": (rng.random((2, T)) * (rng.random((2, T)) < 0.7) * (segments > 0)).astype(np.float32),
    }


@jax.jit
def forward(model, tokens, segments, positions):
    return model(tokens, segments, positions)


def hidden(model, batch):
    return np.asarray(forward(model, batch["tokens"], batch["segments"], batch["positions"]))


def changed(batch, where):
    """The batch with other tokens and positions where `where` is True."""
    return batch | {
        "tokens": np.where(where, (batch["tokens"] + 7) % V, batch["tokens"]).astype(np.int32),
        "positions": np.where(where[..., None], batch["positions"] + 3, batch["positions"]).astype(np.int32),
    }


def test_segments_do_not_leak(model, batch):
    before = hidden(model, batch)
    for segment in (1, 2):
        where = batch["segments"] == segment
        after = hidden(model, changed(batch, where))
        np.testing.assert_allclose(after[~where], before[~where], atol=1e-6)
        assert np.abs(after[where] - before[where]).max(-1).min() > 1e-3


def test_later_tokens_do_not_matter(model, batch):
    before = hidden(model, batch)
    for t in (1, 6, T - 1):
        where = np.broadcast_to(np.arange(T) >= t, (2, T))
        np.testing.assert_allclose(hidden(model, changed(batch, where))[:, :t], before[:, :t], atol=1e-6)


def test_a_packed_segment_is_the_segment_alone(model, batch):
    together = hidden(model, batch)
    for row, segment in ((0, 1), (0, 2), (1, 2)):
        here = batch["segments"][row] == segment
        alone = {name: value[row][here][None] for name, value in batch.items()}
        np.testing.assert_allclose(hidden(model, alone)[0], together[row][here], atol=1e-5)


@pytest.mark.smoke
def test_around_next_are_the_codes_beside_the_next_place():
    """By hand, for images of several widths in one document, packed behind another document."""
    start, side = GRAMMAR.code_start, GRAMMAR.max_side
    rng, tokens, segments, expected = np.random.default_rng(5), [], [], []
    for segment, sizes in enumerate([[(2, 3)], [(3, 4), (4, 1), (1, 4), (3, 2)]], 1):
        for H, W in sizes:
            codes = rng.integers(0, GRAMMAR.codes, H * W)
            tokens += [3, start - side + W - 1, *(start + codes), 4]
            segments += [segment] * (H * W + 3)
            expected += [[-1] * transformer.AROUND] * 2
            at = np.arange(H * W)[:, None]
            places = at + 1 + np.array([-W - 1, -W, -W + 1, -2 * W, -2])
            known = (places >= 0) & (places <= at)
            expected += np.where(known, codes[places.clip(0, H * W - 1)], -1).tolist() + [
                [-1] * transformer.AROUND
            ]
    tokens = np.array([tokens])
    begin = transformer.began(tokens, start, side)
    found = transformer.around_next(tokens, np.array([segments]), *begin, start)
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.smoke
def test_tokens_before_stay_in_their_segment():
    tokens, segments = np.array([[5, 6, 7, 8, 9, 3]]), np.array([[1, 1, 1, 2, 2, 0]])
    found = transformer.tokens_before(tokens, segments, 2)
    expected = [[-1, -1], [5, -1], [6, 5], [-1, -1], [8, -1], [-1, -1]]
    np.testing.assert_array_equal(found[0], expected)


def test_the_tokens_before_are_mixed_in_by_place():
    """The input of a token is its own and, by the matrix of each distance, those of the two before it."""
    model = build(before=2)
    tokens = np.array([[4, 9, 2, 4]])
    near = model.near(tokens, np.ones_like(tokens))
    found = model.embed(tokens, np.zeros((1, 4, 3), int), *near)[0]
    rows, (near, far) = (
        np.asarray(model.embedding[...])[tokens[0]],
        np.split(np.asarray(model.before.w[...]), 2),
    )
    for t in range(4):
        expected = rows[t] + (rows[t - 1] @ near if t > 0 else 0) + (rows[t - 2] @ far if t > 1 else 0)
        np.testing.assert_allclose(found[t], expected, atol=1e-5)


def document(seed, length):
    rng = np.random.default_rng(seed)
    return rng.integers(0, V, length).astype(np.int32), rng.integers(0, 9, (length, 3)).astype(np.int32)


def whole(model, tokens, positions):
    """Logits [T, V] of one document by the full forward pass."""
    x = forward(model, tokens[None], jnp.ones((1, len(tokens)), jnp.int32), positions[None])
    return np.asarray(model.logits(x)[0])


@pytest.fixture(scope="module")
def cached():
    return jax.jit(
        lambda model, *fed: caches.step(model, caches.prepare(model, jnp.float32), *fed)
    )


@pytest.mark.smoke
def test_token_by_token_is_the_full_pass(model, cached):
    tokens, positions = document(1, 7)
    cache, logits = caches.empty(model.config, 1, 9, jnp.float32), []
    for t in range(7):
        x, cache = cached(model, cache, tokens[None, t : t + 1], positions[None, t : t + 1], jnp.array([t]))
        logits.append(model.logits(x)[0, 0])
    np.testing.assert_allclose(np.stack(logits), whole(model, tokens, positions), atol=1e-4)


def test_prefill_of_unequal_prompts_then_decode_is_the_full_pass(model, cached):
    """Prompts are padded on the right; what is decoded overwrites the padding's slots."""
    documents, lengths = [document(2, 8), document(3, 6), document(4, 9)], np.array([5, 1, 4])
    tokens, positions = np.full((3, 5), 3, np.int32), np.full((3, 5, 3), 2, np.int32)
    for row, ((t, p), n) in enumerate(zip(documents, lengths)):
        tokens[row, :n], positions[row, :n] = t[:n], p[:n]
    x, cache = cached(
        model, caches.empty(model.config, 3, 12, jnp.float32), tokens, positions, jnp.zeros(3, int)
    )
    expected = [whole(model, *each) for each in documents]
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(model.logits(x)[row, :n], expected[row][:n], atol=1e-4)
    for i in range(3):
        at = lengths + i
        new = np.stack([d[0][at[row]] for row, d in enumerate(documents)])[:, None]
        where = np.stack([d[1][at[row]] for row, d in enumerate(documents)])[:, None]
        x, cache = cached(model, cache, new, where, jnp.array(at))
        for row in range(3):
            np.testing.assert_allclose(model.logits(x)[row, 0], expected[row][at[row]], atol=1e-4)


def test_the_loss_by_brute_force(model, batch):
    z_loss = 0.01
    logits = np.asarray(model.logits(hidden(model, batch)), np.float64)
    sums = {"all": [0.0, 0.0], "image_loss": [0.0, 0.0], "text_loss": [0.0, 0.0]}
    for row, t in np.ndindex(2, T - 1):
        target, weight = batch["tokens"][row, t + 1], float(batch["weights"][row, t + 1])
        log_z = np.log(np.exp(logits[row, t]).sum())
        entropy = log_z - logits[row, t, target]
        kind = "image_loss" if target >= GRAMMAR.code_start else "text_loss"
        for name, value in (("all", entropy + z_loss * log_z**2), (kind, entropy)):
            sums[name][0] += weight * value
            sums[name][1] += weight
    for chunk in (0, 5):
        found = jax.jit(
            functools.partial(transformer.loss, code_start=GRAMMAR.code_start, z=z_loss, chunk=chunk)
        )(model, batch)
        mean = {name: float(total / weight) for name, (total, weight) in found.items()}
        assert mean["loss"] == pytest.approx(sums["all"][0] / sums["all"][1], rel=1e-4)
        for name in ("image_loss", "text_loss"):
            assert mean[name] == pytest.approx(sums[name][0] / sums[name][1], rel=1e-4)
            assert float(found[name][1]) == pytest.approx(sums[name][1])


def test_what_weighs_nothing_teaches_nothing(model, batch):
    graphdef, params = nnx.split(model)
    loss = lambda p, batch: transformer.loss(nnx.merge(graphdef, p), batch, code_start=92, z=1e-2, chunk=0)[
        "loss"
    ][0]
    gradient = jax.jit(jax.grad(loss))
    silent = gradient(params, batch | {"weights": np.zeros_like(batch["weights"])})
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(silent))
    loud = gradient(params, batch)
    assert all(np.any(leaf) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(loud))


def test_tied_embeddings_have_no_head_and_start_alike():
    tied, untied = build(tied=True), build(tied=False)
    assert tied.head is None and untied.head.shape == (V, 32)
    x = jax.random.normal(jax.random.key(0), (64, 32))
    scales = [float(jnp.std(model.logits(x))) for model in (tied, untied)]
    assert scales[0] == pytest.approx(scales[1], rel=0.15) and 0.7 < scales[0] < 1.4


def test_padded_rows_of_the_vocabulary_are_never_read_written_or_learned(batch):
    """More rows than tokens, for a tensor axis: same shapes of logits, no gradient beyond them."""
    model = build(levels=LEVELS, vocab_multiple=16)
    assert model.embedding.shape[0] == model.head.shape[0] == -(-V // 16) * 16 > V
    assert model.logits(hidden(model, batch)).shape[-1] == V
    graphdef, params = nnx.split(model)

    def loss(params):
        return transformer.loss(nnx.merge(graphdef, params), batch, code_start=92, z=1e-2, chunk=0)["loss"][0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    for name in ("embedding", "head"):
        assert np.any(gradient[name][...][:V]) and not np.any(gradient[name][...][V:])
        params[name][...] = params[name][...].at[V:].set(9.0)
    assert float(jax.jit(loss)(params)) == float(value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_factored_code_is_its_own_row_and_its_digits(tied):
    model = build(levels=LEVELS, tied=tied)
    fsq = FSQ(LEVELS)
    for own, digits in ((model.embedding, model.digit_embedding), (model.head, model.digit_head))[
        : 1 if tied else 2
    ]:
        assert not np.any(own[GRAMMAR.code_start :])  # a code's own part starts at zero
        own[...] = jax.random.normal(jax.random.key(1), own.shape)
        table = np.array(own[...])
        for code in range(GRAMMAR.codes):
            values = np.asarray(fsq.unpack(jnp.array(code)))
            each = np.round(values * (fsq.levels // 2)).astype(int) + fsq.levels // 2
            for channel, digit in enumerate(each):
                table[GRAMMAR.code_start + code] += digits[sum(LEVELS[:channel]) + digit]
            color, outline = each[0], each[1] * LEVELS[2] + each[2]  # the first digit carries colours
            table[GRAMMAR.code_start + code] += digits[sum(LEVELS) + color]
            table[GRAMMAR.code_start + code] += digits[sum(LEVELS) + LEVELS[0] + outline]
        np.testing.assert_allclose(model._table(own, digits), table, atol=1e-5)
    tokens = np.arange(V)
    np.testing.assert_allclose(
        model.embed(tokens, np.zeros((V, 3), int), np.full((V, transformer.AROUND), -1), np.full((V, 3), -1)),
        model._table(model.embedding, model.digit_embedding),
        atol=1e-6,
    )


@pytest.mark.parametrize("count", [7, 40])  # fewer than a part, and several with one that is not full
def test_the_gradient_of_rows_is_the_same_by_a_product(count, monkeypatch):
    monkeypatch.setattr(lookup, "_PART", 16)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(-2, 9, size=(count // 7, 7)), jnp.int32)  # some not in the table
    weights = jnp.asarray(rng.normal(size=(*ids.shape, 3)), jnp.float32)
    of = lambda look: jax.value_and_grad(lambda table: (weights * look(table, ids)).sum())(table)
    (value, gradient), (value2, gradient2) = of(lookup._rows), of(lookup._rows_by_product)
    assert value == value2
    np.testing.assert_allclose(gradient, gradient2, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(of(lookup.rows_of)[1], gradient2)  # what GPUs take


def test_bfloat16_computes_finitely_on_float32_parameters(batch):
    model, exact = build(dtype="bfloat16"), build()
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(nnx.split(model)[1]))
    graphdef, params = nnx.split(model)
    loss = lambda graphdef: (
        lambda p: transformer.loss(nnx.merge(graphdef, p), batch, code_start=92, z=1e-4, chunk=0)["loss"][0]
    )
    value, gradient = jax.jit(jax.value_and_grad(loss(graphdef)))(params)
    assert all(np.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    assert float(value) == pytest.approx(float(jax.jit(loss(nnx.split(exact)[0]))(params)), rel=0.02)


# ---- the big presets, without their memory -----------------------------------------------------

BIG_LEVELS = (8, 8, 8, 6, 5)
VOCABULARY = 17_408 + math.prod(BIG_LEVELS)  # pieces, marks and codes: 32,768


@pytest.mark.parametrize("variant, billions", [("350m", 0.35), ("1b", 1.0), ("7b", 7.0)])
def test_big_presets_are_as_big_as_their_name_and_can_be_laid_out(variant, billions):
    config = configs.load(f"transformer:{variant}")
    make = lambda: transformer.Transformer(config.model, VOCABULARY, nnx.Rngs(0), BIG_LEVELS)
    abstract = nnx.split(nnx.eval_shape(make))[1]
    leaves = jax.tree.leaves(abstract)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)  # nothing was allocated
    count = sum(math.prod(leaf.shape) for leaf in leaves)
    assert abs(count / (billions * 1e9) - 1) < 0.15, f"{variant} has {count / 1e9:.3f}B parameters"
    # A plausible pod: every parameter is covered by a rule, divides, and matrices are really split.
    mesh = AbstractMesh((1, 2, 8, 1, 4), meshes.AXES)
    shardings = meshes.param_shardings(abstract, mesh, config.sharding)
    flat = jax.tree.leaves(shardings, is_leaf=lambda x: hasattr(x, "spec"))
    assert len(flat) == len(leaves)
    for leaf, sharding in zip(leaves, flat):
        share = math.prod(sharding.shard_shape(leaf.shape)) / math.prod(leaf.shape)
        assert share <= (1 / 32 if math.prod(leaf.shape) > 1e6 else 1 / 8), (leaf.shape, sharding.spec)
    assert config.model.heads % config.model.kv_heads == 0 and config.model.width % config.model.heads == 0


def test_on_gpus_rows_and_their_sums_are_the_same(monkeypatch):
    """The gradient is there a product with rows of one 1 and zeros, and each place's table is apart."""
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.normal(size=(5, 7, 3)), jnp.float32)
    ids = jnp.asarray(rng.integers(-1, 7, size=(4, 9, 5)))
    weights = jnp.asarray(rng.normal(size=(4, 9, 5, 3)), jnp.float32)

    def found():
        every = lambda tables: lookup.rows_of_each(tables, ids)
        one = lambda tables: lookup.rows_of(tables[0], ids)
        return [
            (look(tables), jax.grad(lambda tables: (look(tables) * weights).sum())(tables)) for look in (every, one)
        ]

    expected = found()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(lookup, "_PART", 50)  # ids in several parts
    for (rows, slope), (rows_too, slope_too) in zip(expected, found(), strict=True):
        np.testing.assert_array_equal(rows, rows_too)
        np.testing.assert_allclose(slope, slope_too, rtol=1e-5, atol=1e-6)
    assert not np.asarray(expected[0][0])[np.asarray(ids) < 0].any()
