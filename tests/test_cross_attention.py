"""Cross-attention to image features: nothing at first, then never of what is not finished or not one's own; sampling is
training, whatever comes, goes and is reused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen.document import Document, Image, Text, Turn
from mmgen.grammar import Grammar
from mmgen.models import layers, transformer
from mmgen.runtime import checkpoint
from mmgen.sampling import cache as caches
from mmgen.sampling.sampler import Request, Sampler
from mmgen.sampling.slots import Slots
from mmgen.stages import policy
from tests.conftest import run_python, whole_model
from tests.test_equality import CURVES, SIZES
from tests.test_slots import documents, run_all, some_requests

T = 128  # of rows, so that few programs are compiled
HASTY = {"xla_backend_optimization_level": 0}  # for what runs once


@pytest.fixture(scope="module")
def around(space, sampler):
    """(manifest, grammar) of images of up to 8 x 8 codes: less than a row, so that the window which they are sought in
    moves."""
    manifest = json.loads((space.transformer / "vocabulary.json").read_text())
    manifest["grammar"]["max_side"] = 8
    return manifest, Grammar.from_dict(manifest["grammar"])


def built(sampler, vocabulary, context, seed=None, **changes):
    """(graphdef, params, config) of a model as it begins or, with a seed, of random weights and open gates: each mistake
    shows."""
    manifest, grammar = vocabulary
    config = sampler.config.copy_and_resolve_references()
    config.model.update({"context": context} | changes)
    make = lambda rngs: transformer.of_codes(config.model, manifest, grammar.vocab_size, rngs)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: make(None)))
    if seed is None:
        init = lambda: nnx.to_pure_dict(nnx.split(make(nnx.Rngs(0)))[1])
        params = jax.jit(init, compiler_options=HASTY)()
        return graphdef, params, config
    leaves, definition = jax.tree.flatten(nnx.to_pure_dict(params))
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.array(1.5 * x.shape[-2 % x.ndim] ** -0.5 * rng.normal(size=x.shape), jnp.float32)
    params = jax.tree.unflatten(definition, list(map(draw, leaves)))
    if "cross" in params:
        params["cross"]["gate"] = 0.7 * jnp.ones_like(params["cross"]["gate"])
    return graphdef, params, config


@pytest.fixture(scope="module")
def models(sampler, around):
    """By their context: one has a cross-attention before each layer, the other before every second of four."""
    return {
        "both": built(sampler, around, "both", seed=5),
        "cross": built(sampler, around, "cross", seed=5, layers=4, cross_every=2),
    }


@pytest.fixture(params=["both", "cross"])
def whole(request, models):
    return models[request.param]


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, *row):
    model = nnx.merge(graphdef, params)
    return model.logits(model(*row))


def logits(model, *row):
    """Of a row of up to T tokens -> [T', V]."""
    padded = [np.pad(x, [(0, 0), (0, T - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in row]
    return np.asarray(_logits(model[0], model[1], *padded))[0, : row[0].shape[1]]


def packed(sampler, around, n, seed):
    """Several documents in one row: tokens, segments [1, T'], positions [1, T', 3]."""
    _, grammar = around
    place = type("Place", (), {"grammar": grammar})
    rows = [grammar.encode(d, sampler.text) for d in documents(place, n, seed)]
    segments = np.repeat(np.arange(1, n + 1, dtype=np.int32), list(map(len, rows)))
    tokens = np.concatenate(rows)
    return tokens[None], segments[None], grammar.positions(tokens)[None]


# ---- the model ------------------------------------------------------------------------------------


@pytest.mark.soak
def test_it_begins_at_no_effect(sampler, around):
    """The same parameters, the same logits to the last bit; then it is the gates that are learned first."""
    row = packed(sampler, around, 3, seed=2)
    base, more = (built(sampler, around, context) for context in ("codes", "both"))
    assert more[1].keys() - base[1].keys() == {"cross", "encoder"}
    for name in base[1]:
        jax.tree.map(np.testing.assert_array_equal, base[1][name], more[1][name])
    np.testing.assert_array_equal(logits(more, *row), logits(base, *row))
    loss = lambda p: jnp.square(nnx.merge(more[0], p)(*row)[..., ::3]).mean()
    gradient = jax.jit(jax.grad(loss), compiler_options=HASTY)(more[1])
    assert np.all(gradient["cross"].pop("gate") != 0)
    assert not any(np.any(x) for x in jax.tree.leaves([gradient["cross"], gradient["encoder"]]))


def test_images_and_when_they_are_finished():
    """By hand: runs of codes, of two documents, and one run that another document cuts."""
    tokens = np.array([[1, 9, 9, 2, 9, 3, 9, 9, 9, 0]])
    segments = np.array([[1, 1, 1, 1, 1, 1, 1, 2, 2, 2]])
    images, finished = transformer.images_of(tokens, segments, 9)
    assert images.tolist() == [[0, 1, 1, 0, 2, 0, 3, 4, 4, 0]]
    assert finished.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, 3, 4]]
    see = transformer.sees_features(finished, images)[0]
    assert [np.flatnonzero(row).tolist() for row in see[:6]] == [[], [], [], [1, 2], [1, 2], [1, 2, 4]]


def test_who_sees_what(sampler, around, whole):
    """A code changes nothing before it and nothing in other documents, but all that comes after it in its own."""
    tokens, segments, positions = packed(sampler, around, 3, seed=2)
    start, before = around[1].code_start, logits(whole, tokens, segments, positions)
    places = np.flatnonzero(tokens[0] >= start)
    for at in places[:: len(places) // 6]:
        other = tokens.copy()
        other[0, at] = start + (other[0, at] - start + 1) % around[1].codes
        change = np.abs(logits(whole, other, segments, positions) - before).max(-1)
        mine = segments[0] == segments[0, at]
        assert change[~mine].max() < 1e-4 and change[:at].max() < 1e-4
        assert change[mine & (np.arange(len(change)) >= at)].min() > 1e-4


def test_packed_is_alone(sampler, around, whole):
    tokens, segments, positions = packed(sampler, around, 3, seed=3)
    together = logits(whole, tokens, segments, positions)
    for segment in (1, 2, 3):
        here = segments[0] == segment
        alone = logits(whole, tokens[:, here], segments[:, here], positions[:, here])
        np.testing.assert_allclose(alone, together[here], atol=3e-4)


def test_answers_of_one_row_are_as_in_rows_of_their_own(sampler, around, whole):
    """Two branches, as `reinforce` has them, after a prompt with two images."""
    grammar, rng, before = around[1], np.random.default_rng(0), sampler.config.model.before
    images = [Image(codes=rng.integers(0, grammar.codes, size)) for size in ((3, 4), (4, 2))]
    turns = Turn("user", (*images, Text("a red circle"))), Turn("assistant", ())
    prompt = grammar.encode(Document(turns), sampler.text, close=False)
    answers = [np.append(rng.integers(0, grammar.pieces, n), grammar.end).astype(np.int32) for n in (5, 9)]
    gains = np.ones(2, np.float32)
    tree = policy.trees([(prompt, each) for each in answers], gains, 2, grammar, 40, T, before, False)
    row = [tree[name][:1] for name in ("tokens", "segments", "positions", "branches")]
    found = logits(whole[:2], *row)
    for branch, answer in enumerate(answers, 1):
        at = tree["sources"][0, tree["branches"][0] == branch]
        tokens = np.concatenate([prompt, answer])
        alone = logits(whole[:2], tokens[None], np.ones_like(tokens)[None], grammar.positions(tokens)[None])
        np.testing.assert_allclose(found[at], alone[len(prompt) - 1 : -1], atol=1e-4)


def test_an_encoder_sees_a_whole_image(models):
    """Features of an image's first code depend on its last, and not on what is around the image."""
    model = nnx.merge(*models["both"][:2])
    x = jax.random.normal(jax.random.key(0), (1, 9, model.config.width))
    images, positions = np.array([[0, 1, 1, 1, 0, 2, 2, 0, 0]]), np.ones((1, 9, 3), np.int32)
    run = jax.jit(lambda x: model.features(x, images, positions))
    for at in (1, 3, 5):
        changed = np.abs(run(x.at[0, at].add(1.0)) - run(x)).max(-1)[0] > 1e-6
        assert (changed == (images[0] == images[0, at])).all()


def test_by_cross_attention_alone(sampler, around, whole):
    """With closed gates of "cross" nothing of an image reaches what comes after it; with "both" it does."""
    graphdef, params, config = whole
    closed = graphdef, params | {"cross": params["cross"] | {"gate": 0 * params["cross"]["gate"]}}
    tokens, segments, positions = packed(sampler, around, 1, seed=2)
    images, finished = transformer.images_of(tokens, segments, around[1].code_start)
    other = np.where(images == 1, around[1].code_start + 1, tokens)
    change = np.abs(
        logits(closed, other, segments, positions) - logits(closed, tokens, segments, positions)
    ).max(-1)
    assert change[images[0] == 1].max() > 1e-3
    assert (change[finished[0] >= 1].max() > 1e-3) == (config.model.context == "both")


def test_layers_are_in_order_in_any_layout(sampler, around, models):
    """One after the other by hand, and as they are scanned, and computed again for the gradient."""
    row = packed(sampler, around, 2, seed=2)
    graphdef, params, _ = models["cross"]

    def by_hand(params):
        model = nnx.merge(graphdef, params)
        tokens, segments, positions = row
        x = model.embed(tokens, positions, *model.near(tokens, segments))
        images, finished = transformer.images_of(tokens, segments, model.code_start)
        features = model.features(x, images, positions)
        same = segments[:, :, None] == segments[:, None]
        own = jnp.tril(same[0])[None] & ((images == 0)[:, None] | (images[:, None] == images[..., None]))
        see = same & (images > 0)[:, None] & (images[:, None] <= finished[..., None])
        cross, blocks = layers.unstack(model.cross, 2), layers.unstack(model.blocks, 4)
        for n, block in enumerate(blocks):
            if n % 2 == 0:
                x = cross[n // 2](x, model.cross_rope(positions), features, see)
            x = block(x, model.rope(positions), layers.bias_of(own))
        return jnp.square(x[..., ::3]).mean()

    scanned, *_ = built(sampler, around, "cross", 5, layers=4, cross_every=2, unroll=False, remat="attention")
    by_scan = lambda params: jnp.square(nnx.merge(scanned, params)(*row)[..., ::3]).mean()
    both = (jax.jit(jax.value_and_grad(loss), compiler_options=HASTY)(params) for loss in (by_hand, by_scan))
    expected, found = both
    assert all(np.any(x) for x in jax.tree.leaves([expected[1]["cross"], expected[1]["encoder"]]))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7)
    jax.tree.map(close, found, expected)


def test_any_tokenizer(sampler, around):
    """Codes that are not factored are known by the grammar alone."""
    graphdef, params, _ = built(sampler, around, "both", seed=5, factored=False, around=False)
    assert "digit_embedding" not in params
    assert nnx.merge(graphdef, params).code_start == around[1].code_start < around[1].vocab_size


def test_what_is_wrong_is_said_and_runs_from_before_have_codes_alone(sampler):
    config = sampler.config.model.copy_and_resolve_references()
    config.context = "pixels"
    with pytest.raises(ValueError, match="one of codes, cross, both; found 'pixels'"):
        transformer.crossings(config)
    config.context, config.cross_every = "both", 3
    with pytest.raises(ValueError, match="cross_every=3 does not divide config.model.layers=2"):
        transformer.crossings(config)
    del config.context
    assert transformer.crossings(config) == 0


# ---- sampling -------------------------------------------------------------------------------------


def sampler_of(sampler, around, model, **options):
    return Sampler(*model, around[1], sampler.text, sampler.tokenizer, **options)


@pytest.fixture(scope="module")
def random(sampler, around, models):
    return sampler_of(sampler, around, models["cross"])


def test_cached_decoding_is_the_full_pass(sampler, around, whole):
    """Token by token, and in chunks that images lie across (`nats`); of edits and dialogues."""
    model = sampler_of(sampler, around, whole)
    answer = Turn("assistant", [Image(codes=np.full((3, 4), 7, np.int32)), Text("so")])
    more = Turn("user", [Text("now a blue star of the same size")])
    asked = [d for d in documents(model, 12, seed=2) if len(list(d.images())) > 1][:2]
    asked.append(Document([*big(model, 8).turns, answer, more]))
    rows = [model.grammar.encode(d, model.text) for d in asked]
    B, most = len(rows), max(map(len, rows))
    assert model.chunk + 64 < most <= T
    tokens, positions = np.zeros((B, T), np.int32), np.zeros((B, T, 3), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], positions[i, : len(row)] = row, model.grammar.positions(row)

    @jax.jit
    def one(cache, tokens, positions, at):
        small = nnx.merge(model.graphdef, model.params)
        x, cache = caches.step(small, model.weights, cache, tokens, positions, at)
        return caches.logits(small, model.weights, x)[:, 0], cache

    cache, found = caches.empty(model.model_config, B, T, jnp.float32), []
    for t in range(most):
        now, cache = one(cache, tokens[:, t : t + 1], positions[:, t : t + 1], jnp.full(B, t))
        found.append(np.asarray(now))
    nats = model.nats(asked, batch_size=B)
    for i, row in enumerate(rows):
        expected = logits(
            whole, row[None], np.ones((1, len(row)), np.int32), positions[i : i + 1, : len(row)]
        )
        told = expected
        if model.weights["head"].shape[1] < expected.shape[1]:  # colours first, whatever their outlines
            codes = expected[:, model.grammar.code_start :]
            codes = codes.reshape(len(row), -1, codes.shape[1] // nnx.merge(*whole[:2]).outline.outlines)
            told = [expected[:, : model.grammar.code_start], np.logaddexp.reduce(codes, 1)]
            told = np.concatenate(told, 1)
        np.testing.assert_allclose(np.stack(found, 1)[i, : len(row)], told, atol=5e-4)
        logs = expected - np.logaddexp.reduce(expected, -1, keepdims=True)
        by_hand = [-logs[t, row[t + 1]] for t in range(len(row) - 1)]
        np.testing.assert_allclose(nats[i], [0, *by_hand], atol=5e-4)


def big(model, side, *changes):
    """An edit of an image of side x side codes, of which the last `n` of the (n, code) in `changes` are that code."""
    codes = np.random.default_rng(0).integers(0, model.grammar.codes, side * side).astype(np.int32)
    for n, code in changes:
        codes[len(codes) - n :] = code
    return Document([Turn("user", [Image(codes=codes.reshape(side, side)), Text("red")])])


@pytest.mark.soak
def test_branches_of_guidance_are_what_training_sees(random, models):
    """Prompts without text, and without images too, read in chunks: the logits that the full pass has."""
    slots = Slots(random, 4, 3, 160)
    asked = [
        d
        for d in documents(random, 12, seed=4)
        if any(t.role == "user" and len(t.parts) > 1 for t in d.turns)
    ]
    asked = [Request(d, size=(2, 2), guidance=2.0, image_guidance=1.5) for d in (*asked[:3], big(random, 8))]
    for request in asked:
        slots.add(request)
    slots.run(1)
    for place, request in enumerate(asked):
        prompts = random.prompts(request)
        assert len(prompts) == 3
        for branch, tokens in enumerate(prompts):
            row = tokens[None], np.ones((1, len(tokens)), np.int32), random.grammar.positions(tokens)[None]
            hidden = slots._state.prompt[branch * 4 + place]
            found = nnx.merge(*models["cross"][:2]).logits(hidden)
            np.testing.assert_allclose(found, logits(models["cross"], *row)[-1], atol=5e-4)


@pytest.mark.soak
def test_who_comes_and_goes_changes_nobodys_tokens(random):
    requests, expected = list(some_requests(random, 8, 5)), []
    assert sum(len(list(request.document.images())) for request in requests) > 6
    for request in requests:
        alone = Slots(random, 4, 3, 160)
        alone.add(request)
        expected.append(alone.run()[0].tokens.tolist())
    order = np.random.default_rng(2).permutation(len(requests))
    done, _ = run_all(random, [requests[i] for i in order], Slots(random, 4, 3, 160), 2)
    assert len(done) == len(requests)
    for k, tokens in done.items():
        assert tokens == expected[order[k]]


def test_what_is_reused_is_what_would_be_computed(random):
    """Prompts that begin alike and differ within an image that lies across chunks, in the same row."""
    changes = [(), ((4, 1),), ((30, 2),), ((64, 3),)]
    slots, found = Slots(random, 4, 3, 160), []
    for each in [*changes, *changes[::-1]]:
        request = Request(big(random, 8, *each), size=(2, 2), seed=1)
        slots.add(request)
        fill, admit = [], slots._admit
        slots._admit = lambda: fill.append(admit()) or fill[-1]
        found.append(slots.run()[0].tokens.tolist())
        slots._admit = admit
        fresh = Slots(random, 4, 3, 160)
        fresh.add(request)
        assert fresh.run()[0].tokens.tolist() == found[-1]
        row = fill[0]["row"][0]
        np.testing.assert_array_equal(slots._state.prompt[row], fresh._state.prompt[0])
    assert found[:4] == found[:3:-1]


@pytest.mark.soak
def test_eight_bits_are_near(sampler, around, models):
    small = sampler_of(sampler, around, models["cross"], int8=True, int8_cache=True)
    assert {str(x.dtype) for x in jax.tree.leaves(small.weights["cross"])} == {"int8", "float32"}
    row = small.grammar.encode(big(small, 8), small.text)
    near = small.nats([row], batch_size=1)[0][1:]
    expected = logits(
        models["cross"], row[None], np.ones((1, len(row)), np.int32), small.grammar.positions(row)[None]
    )
    exact = (
        np.logaddexp.reduce(expected, -1)[:-1] - np.take_along_axis(expected[:-1], row[1:, None], -1)[:, 0]
    )
    assert 0 < np.abs(near - exact).mean() < 0.1 * exact.mean()


# ---- training -------------------------------------------------------------------------------------


def test_a_run_begins_with_one_that_had_codes_alone(space, sampler):
    """All of its weights are taken, and its logits are the same to the last bit."""
    manifest = json.loads((space.transformer / "vocabulary.json").read_text())
    here = manifest, sampler.grammar
    graphdef, params, _ = built(sampler, here, "both", seed=5)
    params["cross"]["gate"] *= 0
    taken, report = checkpoint.restore_weights(space.transformer, params)
    assert {name.split("/")[0] for name in report["left"]} == {"cross", "encoder"} and not report["unused"]
    row = packed(sampler, here, 2, seed=2)
    expected = logits(whole_model(space.transformer), *row)
    np.testing.assert_array_equal(logits((graphdef, taken), *row), expected)


SHARED = """
import sys
import numpy as np
from mmgen.document import Document, Image, Text, Turn
from mmgen.sampling.sampler import Request, load

codes = np.arange(9, dtype=np.int32).reshape(3, 3)
asked = [Request(Document([Turn("user", [Image(codes=codes), Text(w)])]), size=(3, 3), seed=i) for i, w in enumerate("ab")]
nats = []
for tensor in (1, 2):
    model = load(sys.argv[1], tensor=tensor)
    nats.append(model.nats([request.document for request in asked]))
    assert len(model.generate(asked, 2)) == 2
assert len({x.sharding.spec for x in model.weights["cross"][0].values()}) > 1
for one, two in zip(*nats):
    np.testing.assert_allclose(one, two, atol=1e-4)
"""


@pytest.mark.soak
def test_devices_that_share_a_model_read_the_same(space, tmp_path):
    from mmgen.stages import loop
    from tests.conftest import config_of

    sizes = ["kv_heads=2", "vocab_multiple=2", "encoder.kv_heads=2", "context=both"]
    flags = [*space.transformer_flags, *(f"--config.model.{size}" for size in sizes)]
    loop.train(config_of(flags), tmp_path / "run", stop_at=2)
    run_python(SHARED, tmp_path / "run", devices=2)


@pytest.mark.soak
@pytest.mark.parametrize("context", ["both", "cross"])
def test_eight_devices_learn_what_one_does(space, tmp_path, context):
    encoder = dict(width=16, layers=1, heads=4, kv_heads=4, head_dim=8, mlp=32)
    settings = SIZES | {"model.context": context} | {f"model.encoder.{k}": v for k, v in encoder.items()}
    meshes = {
        "one": ({}, {}),
        "all": ({"context": 2, "tensor": 2, "fsdp": 2}, {"sharding.stream": "context,tensor"}),
    }
    out = tmp_path / "curves.json"
    run_python(
        CURVES, space.shards, "float64", 20, tmp_path / "work", json.dumps(settings), json.dumps(meshes), out,
        devices=8,
    )  # fmt: skip
    curves = json.loads(out.read_text())
    np.testing.assert_allclose(curves["all"], curves["one"], rtol=1e-9)
    assert curves["one"][-1] < 0.9 * curves["one"][0]
