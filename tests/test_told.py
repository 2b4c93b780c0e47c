"""Codes told in two steps (`model.outline`), and what the images before have at a place (`model.beneath`)."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen.document import Document, Image, Text, Turn
from mmgen.models import transformer
from mmgen.runtime import config as configs
from mmgen.sampling.sampler import Request
from mmgen.sampling.strategies import Strategy, choose
from mmgen.stages import policy
from mmgen.stages.transformer import _grow as grow
from tests import test_cross_attention as crossed
from tests.test_cross_attention import around, built, logits, packed  # noqa: F401 (a fixture)
from tests.test_slots import documents


@pytest.fixture(scope="module")
def told(sampler, around):  # noqa: F811
    return built(sampler, around, "codes", seed=5, outline=16, beneath=2)


def test_the_loss_is_the_cross_entropy_of_the_logits(sampler, around, told):  # noqa: F811
    """A softmax over colours and one over outlines are one over all tokens, in value and in gradient."""
    tokens, segments, positions = packed(sampler, around, 2, seed=3)
    rng = np.random.default_rng(0)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    batch["weights"] = rng.random(tokens.shape).astype(np.float32) * (segments > 0)
    start = around[1].code_start

    def stepwise(params, z=0.0):
        found = transformer.loss(nnx.merge(told[0], params), batch, code_start=start, z=z, chunk=0)
        return found["loss"][0], found

    def whole(params):
        model = nnx.merge(told[0], params)
        logs = jax.nn.log_softmax(model.logits(model(tokens, segments, positions)))
        picked = np.take_along_axis if isinstance(logs, np.ndarray) else jax.numpy.take_along_axis
        return -(picked(logs[:, :-1], tokens[:, 1:, None], 2)[..., 0] * batch["weights"][:, 1:]).sum()

    once = functools.partial(jax.jit, compiler_options=crossed.HASTY)
    expected, wanted = once(jax.value_and_grad(whole))(told[1])
    (value, parts), found = once(jax.value_and_grad(stepwise, has_aux=True))(told[1])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    images, words = parts["image_loss"], parts["text_loss"]
    np.testing.assert_allclose(images[0] + words[0], expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, wanted)
    assert once(functools.partial(stepwise, z=0.1))(told[1])[0] > value


def test_a_code_has_the_logits_of_its_color_and_its_outline(sampler, around, told):  # noqa: F811
    model, (manifest, grammar) = nnx.merge(*told[:2]), around
    colors = int(np.prod(manifest["levels"][: manifest["color_digits"]]))
    assert model.colors == colors > 1
    row = packed(sampler, around, 1, seed=4)
    logs = np.asarray(jax.nn.log_softmax(logits(told, *row)), np.float64)
    codes = np.exp(logs[:, grammar.code_start :]).reshape(len(logs), -1, colors)
    # Each colour's share is what the head gives it, whatever the outlines.
    x = transformer.layers.rms_norm(jax.jit(lambda *row: model(*row), compiler_options=crossed.HASTY)(*row))[
        0
    ]
    head = np.asarray(jax.nn.log_softmax(x @ model.head_table()[: model.first].T))
    np.testing.assert_allclose(np.log(codes.sum(1)), head[:, grammar.code_start :], atol=1e-3)


def test_codes_beneath_by_hand(sampler, around):  # noqa: F811
    """Of images of one size those at the next place and beside it, the latest image first; of others nothing."""
    grammar = around[1]
    start, rng = grammar.code_start, np.random.default_rng(1)
    sizes = [(1, (2, 3)), (1, (2, 3)), (1, (3, 2)), (1, (2, 3)), (2, (2, 3)), (2, (2, 3))]
    tokens, segments, expected, before = [], [], [], []
    for segment, (H, W) in sizes:
        codes = start + rng.integers(0, grammar.codes, H * W)
        tokens += [3, grammar.h(H), grammar.w(W), *codes, 4]
        segments += [segment] * (H * W + 4)
        rows = np.full((H * W + 4, 2, 5), -1)
        for k in range(2):
            if len(before) > k and before[-1 - k][:2] == (segment, (H, W)):
                theirs = before[-1 - k][2]
                for i in range(H * W):
                    for j, at in enumerate((i, i - 1, i + 1, i - W, i + W)):
                        if 0 <= at < H * W:
                            rows[2 + i, k, j] = theirs[at]
                rows[2 + H * W, k, 1] = theirs[
                    -1
                ]  # after the last code only what is left of it and above is there
                rows[2 + H * W, k, 3] = theirs[H * W - W]
        before.append((segment, (H, W), codes))
        expected.append(rows.reshape(-1, 10))
    tokens, segments = np.array([tokens]), np.array([segments])
    begin = transformer.began(tokens, start, grammar.max_side)
    found = transformer.beneath_next(tokens, segments, *begin, start, 2)
    np.testing.assert_array_equal(found[0], np.concatenate(expected))


def test_near_is_the_same_wherever_it_is_asked(sampler, around, told):  # noqa: F811
    model, (_, grammar) = nnx.merge(*told[:2]), around
    place = type("Place", (), {"grammar": grammar})
    rows = [grammar.encode(document, sampler.text) for document in documents(place, 8, seed=6)]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    whole = jax.jit(model.near)(tokens, np.ones_like(tokens))
    some = jax.jit(model.near_at)(tokens, np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    for a, b in zip(whole, some, strict=True):
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(a[i, : len(row)], b[i, : len(row)])
    assert (whole[1][..., -10:] >= 0).any()  # codes beneath come up


def test_cached_decoding_is_the_full_pass(sampler, around, told):  # noqa: F811
    crossed.test_cached_decoding_is_the_full_pass(sampler, around, told)


def test_what_does_not_fit_is_refused(sampler, around):  # noqa: F811
    for changes, words in (
        (dict(outline=16, tied=True), "model.tied=False"),
        (dict(outline=16, factored=False), "model.factored=True"),
        (dict(beneath=1, context="cross"), 'context="cross"'),
    ):
        with pytest.raises(ValueError, match=words):
            built(sampler, around, changes.pop("context", "codes"), **changes)


def test_codes_are_read_by_halves_as_they_are_by_the_whole_table():
    """Training looks the two halves of a code up; sampling makes the whole table once and looks there."""
    config = configs.load("transformer:preview").model
    model = transformer.Transformer(
        config, 1400 + 3 * 5 * 4 * 2, nnx.Rngs(0), levels=(3, 5, 4, 2), color_digits=2, max_side=16
    )
    rng = np.random.default_rng(0)
    draw = lambda low, high, *more: jnp.asarray(rng.integers(low, high, (2, 50, *more)), jnp.int32)
    around = draw(-1, 120, transformer.AROUND)
    beneath = draw(-1, 120, 10)  # codes or nothing, unlike the three tokens before
    beneath = jnp.where(beneath < 0, -1, model.code_start + beneath)
    before = jnp.concatenate([draw(-1, model.vocab, 3), beneath], -1)
    given = draw(0, model.vocab), draw(0, 9, 3), around, before
    np.testing.assert_allclose(
        model.embed(*given), model.embed(*given, table=model.embedding_table()), atol=1e-5
    )
    by_digits = model.around(model._digits(around).reshape(2, 50, -1))
    model.place.w[...], model.before = jnp.zeros_like(model.place.w[...]), None
    np.testing.assert_allclose(model.embed(*given) - model._lookup_halves(given[0]), by_digits, atol=1e-5)


def test_log_probs_step_by_step_are_those_of_all_codes(around, told):  # noqa: F811
    """What `reinforce` learns from, without the logits of the codes that were not drawn; and each step of its own
    at another temperature."""
    model, grammar = nnx.merge(*told[:2]), around[1]
    rng = np.random.default_rng(2)
    codes = rng.integers(0, grammar.codes, (model.colors, 4))
    codes[:] = codes[0]
    codes[:, 3] = np.arange(model.colors)  # the last one in each colour, with the first outline
    prompt = [grammar.bos, grammar.roles["user"], 5, 6, grammar.end, grammar.roles["assistant"]]
    answers = [[grammar.boi, grammar.h(2), grammar.w(2), *(grammar.code_start + each)] for each in codes]
    batch, _ = policy.rows([(np.array(prompt), np.array(each)) for each in answers], grammar, 4, 16)
    rows = [batch[name] for name in ("tokens", "segments", "positions")]
    of = jax.jit(lambda t: policy.log_probs(model, batch, grammar=grammar, codes=4, temperature=t))
    hidden = jax.jit(lambda *rows: model(*rows))(*rows)[:, len(prompt) + 2 : len(prompt) + 6]
    logs = np.asarray(model.logits(hidden), np.float64)[..., grammar.code_start :]
    logs -= np.logaddexp.reduce(logs, -1, keepdims=True)
    of_colors = np.logaddexp.reduce(logs.reshape(*codes.shape, -1, model.colors), 2)
    for temperature in (1.0, 0.6):
        colors = of_colors / temperature
        colors -= np.logaddexp.reduce(colors, -1, keepdims=True)
        outlines = (logs.reshape(*codes.shape, -1, model.colors) - of_colors[:, :, None]) / temperature
        outlines -= np.logaddexp.reduce(outlines, 2, keepdims=True)
        expected = (colors[:, :, None] + outlines).reshape(logs.shape)
        if temperature == 1:
            np.testing.assert_allclose(expected, logs, atol=1e-6)
        chosen, entropy = of(temperature)
        by_hand = np.take_along_axis(expected, codes[..., None], 2)[..., 0]
        np.testing.assert_allclose(chosen, by_hand, atol=1e-4)
        # The entropies with each colour, weighed by how often it is drawn, are that of codes.
        whole = -(np.exp(expected) * expected).sum(-1)[0, 3]
        assert np.exp(colors[0, 3]) @ entropy[:, 3] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("guidance, image_guidance", [(1.0, 1.0), (2.5, 1.0), (2.5, 1.7)])
def test_a_greedy_code_is_the_best_color_and_then_its_best_outline(
    sampler, around, told, guidance, image_guidance  # noqa: F811
):  # fmt: skip
    """By the whole model's logits, both steps guided, token by token; in company, and by another device's half."""
    model, grammar = crossed.sampler_of(sampler, around, told), around[1]
    shown = Image(codes=np.arange(6, dtype=np.int32).reshape(2, 3))
    how = dict(size=(2, 3), guidance=guidance, image_guidance=image_guidance)
    asked = Request(Document([Turn("user", [shown, Text("two red stars")])]), image=Strategy(0.0), **how)
    branches = [[*tokens, grammar.boi, grammar.h(2), grammar.w(3)] for tokens in model.prompts(asked)]
    colors = nnx.merge(*told[:2]).colors
    codes = []
    for _ in range(6):
        found = []
        for tokens in branches:
            row = np.array([tokens], np.int32)
            row = logits(told, row, np.ones_like(row), grammar.positions(row[0])[None])[-1]
            found.append(row[grammar.code_start :].reshape(-1, colors))
        free = 1 if len(found) > 1 else 0
        guided = lambda x: x[-1] + image_guidance * (x[free] - x[-1]) + guidance * (x[0] - x[free])
        share = [np.logaddexp.reduce(each, 0) for each in found]
        color = int(np.argmax(guided(share)))
        outline = int(np.argmax(guided([a[:, color] - b[color] for a, b in zip(found, share)])))
        codes.append(color + colors * outline)
        branches = [[*tokens, grammar.code_start + codes[-1]] for tokens in branches]
    wild = Request(asked.document, image=Strategy(2.0), seed=7, **how)
    (image,) = model.generate([asked, wild, wild], 2)[0].parts
    assert image.codes.ravel().tolist() == codes


def test_keep_mode_is_of_each_step(sampler, around, told):  # noqa: F811
    """Draws again by hand: of colours that of the code before is the one that was there, and of outlines the one
    before where the colour is the same."""
    model, (_, grammar), temperature = crossed.sampler_of(sampler, around, told), around, 0.3
    strategy, document = Strategy(temperature, keep_mode=True), Document([Turn("user", [Text("red")])])
    asked = [Request(document, size=(8, 8), seed=i, image=strategy) for i in range(4)]
    prompt, colors = model.prompts(asked[0])[0], nnx.merge(*told[:2]).colors
    how = [np.array([x]) for x in (temperature, 0, 1.0, 0.0, True)]

    @jax.jit
    def draw(logits, previous, key):
        u = jax.random.uniform(key)
        return choose(logits[None], jnp.ones((1, len(logits)), bool), u[None], previous[None], *how)[0]

    matters = [0, 0]
    for request, turn in zip(asked, model.generate(asked, 4)):
        codes = turn.parts[0].codes.ravel()
        row = [*prompt, grammar.boi, grammar.h(8), grammar.w(8), *(grammar.code_start + codes)]
        row = np.array([row], np.int32)
        found = logits(told, row, np.ones_like(row), grammar.positions(row[0])[None])[len(prompt) + 2 :]
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(request.seed)))(np.arange(67))
        for k, code in enumerate(codes):
            y = found[k, grammar.code_start :].reshape(-1, colors)
            share, before = np.logaddexp.reduce(y, 0), codes[k - 1] if k else -1
            color = draw(share, before % colors if k else -1, keys[3 + k])
            given, key = y[:, color] - share[color], jax.random.fold_in(keys[3 + k], 1)
            same = k > 0 and color == before % colors
            outline = draw(given, before // colors if same else -1, key)
            assert color + colors * outline == code
            matters[0] += color != draw(share, -1, keys[3 + k])
            matters[1] += outline != draw(given, -1 if same else before // colors, key)
    assert min(matters) > 0, matters


def test_draws_follow_the_log_probs_of_both_steps(sampler, around, told):  # noqa: F811
    """-log p of what is drawn has the entropy as its mean, at the temperature of the draw and at no other."""
    model, (_, grammar) = crossed.sampler_of(sampler, around, told), around
    document = Document([Turn("user", [Text("two red stars")])])
    asked = [Request(document, size=(4, 4), seed=i, image=Strategy(0.6)) for i in range(64)]
    prompt = model.prompts(asked[0])[0]
    found = [turn.parts[0].codes.ravel() for turn in model.generate(asked, 64)]
    mark = [grammar.boi, grammar.h(4), grammar.w(4)]
    drawn = [(prompt, np.array([*mark, *(grammar.code_start + codes)])) for codes in found]
    batch, _ = policy.rows(drawn, grammar, 16, len(prompt) + 19)
    whole = nnx.merge(*told[:2])
    of = jax.jit(lambda t: policy.log_probs(whole, batch, grammar=grammar, codes=16, temperature=t))
    spread = lambda t: np.asarray(-of(t)[0] - of(t)[1]).ravel()
    error = lambda x: abs(x.mean()) / (x.std() / len(x) ** 0.5)
    assert error(spread(0.6)) < 4 < error(spread(1.0))


def test_rows_of_a_run_that_read_and_told_otherwise(tmp_path, sampler):  # noqa: F811
    """What stands before the next token, what beneath it, and the heads of colours are taken for what they were."""
    vocabulary = {
        "levels": [4, 2, 5, 5, 5], "color_digits": 2, "grammar": sampler.grammar.to_dict(), "tokenizer_hash": "a",
        "text_hash": "b",
    }  # fmt: skip
    first, rest, colors = sampler.grammar.code_start, sampler.grammar.codes, 4 * 2

    def spans(old, new, digits=2):
        ours, was = (configs.load("transformer:tiny").model for _ in range(2))
        for each, values in ((ours, new), (was, old)):
            each.before, each.beneath, each.outline = values
        (tmp_path / "config.json").write_text(json.dumps({"stage": "transformer", "model": was.to_dict()}))
        (tmp_path / "vocabulary.json").write_text(json.dumps({**vocabulary, "color_digits": digits}))
        return grow(vocabulary, ours, tmp_path), ours.width

    found, width = spans((3, 0, 0), (2, 1, 0))
    assert found["^before/w$"] == [(0, 0, 2 * width), (3 * width, 2 * width, 0)]
    assert found["^(embedding|head)$"][-1] == (first, first, rest)
    found, width = spans((3, 2, 16), (3, 1, 16))
    assert found["^before/w$"] == [(0, 0, 3 * width), (3 * width, 3 * width, transformer.BENEATH * width)]
    assert found["^head$"] == [*found["^embedding$"], (first, first, colors)]
    for old, digits in (((3, 0, 0), 2), ((3, 0, 16), 1)):  # a code's head is no colour's, nor is another colour's
        found, _ = spans(old, (3, 0, 16), digits)
        assert found["^head$"] == found["^embedding$"] and len(found["^head$"]) == 4
