"""GRPO's arithmetic: rows of what was drawn, its probabilities, advantages, and the loss by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen import world
from mmgen.document import Document
from mmgen.runtime import mesh as meshes
from mmgen.sampling import sampler as samplers
from mmgen.sampling.strategies import choose
from mmgen.stages import policy, program, reinforce
from mmgen.world import wishes
from tests.conftest import config_of, whole_model

# ---- the policy


TEMPERATURE = 0.6


@pytest.fixture(scope="module")
def drawn(sampler):
    """Sixteen pictures for two prompts, as the rows of a batch."""
    items = [world.item(0, "train", i, category="counting") for i in np.repeat([0, 1], 8)]
    data = config_of(["--config", "reinforce:tiny", f"--config.data.temperature={TEMPERATURE}"]).data
    tokens, pixels = reinforce._draw(sampler, items, [*range(8)] * 2, (8, 8), data)
    batch, at = policy.rows(tokens, sampler.grammar, 64, data.longest)
    return items, tokens, pixels, batch, at


@pytest.fixture(scope="module")
def measured(space, sampler, drawn):
    """temperature -> log-probabilities and entropies of what was drawn; and all logits of its rows."""
    model, batch = nnx.merge(*whole_model(space.transformer)), drawn[3]
    measure = functools.partial(policy.log_probs, grammar=sampler.grammar, codes=64)
    jitted = jax.jit(lambda temperature: measure(model, batch, temperature=temperature))
    rows = (batch[name] for name in ("tokens", "segments", "positions"))
    logits = jax.jit(lambda *rows: model.logits(model(*rows)))(*rows)
    return jitted, np.asarray(logits, np.float64)


def test_rows_are_what_was_drawn(sampler, drawn):
    items, tokens, pixels, batch, at = drawn
    assert len({answer.tobytes() for _, answer in tokens}) == 16  # other seeds, other prompts
    decoded = []
    for row, (item, (prompt, answer)) in enumerate(zip(items, tokens)):
        whole = np.concatenate([prompt, answer, [sampler.grammar.eos]])
        document = sampler.grammar.decode(whole, sampler.text)
        assert document.text() == item.prompt
        n = int(batch["segments"][row].sum())
        np.testing.assert_array_equal(batch["tokens"][row, :n], whole[:n])
        np.testing.assert_array_equal(batch["positions"][row, :n], sampler.grammar.positions(whole)[:n])
        assert batch["weights"][row].sum() == 64 and at[row, -1] == n - 1
        codes = batch["tokens"][row, at[row]] - sampler.grammar.code_start
        np.testing.assert_array_equal(codes.reshape(8, 8), document.turns[-1].parts[0].codes)
        decoded.append(codes.reshape(8, 8))
    np.testing.assert_array_equal(sampler.tokenizer.decode(np.stack(decoded), batch=4), pixels)


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_log_probs_are_of_what_the_grammar_allows(sampler, drawn, measured, temperature):
    """Beside all logits of the model, masked by the machine token by token, and a softmax in numpy."""
    (*_, batch, at), (jitted, logits), grammar = drawn, measured, sampler.grammar
    found, entropy = jitted(temperature)
    for row in (0, 9):
        for k in (0, 1, 31, 63):
            tokens = batch["tokens"][row, : at[row, k]]
            legal = grammar.allowed(grammar.feed(tokens), np.array([1000]), (8, 8), np.array([True]))[0]
            x = np.where(legal, logits[row, at[row, k] - 1] / temperature, -np.inf)
            p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
            assert found[row, k] == pytest.approx(np.log(p[batch["tokens"][row, at[row, k]]]), abs=1e-4)
            assert entropy[row, k] == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-4)
    assert legal.sum() == grammar.codes < grammar.vocab_size


def test_draws_follow_the_log_probs(measured):
    """-log p of what is drawn has the entropy as its mean, at the temperature of the draw and at no other."""
    spread = lambda t: np.asarray(-measured[0](t)[0] - measured[0](t)[1]).ravel()
    error = lambda x: abs(x.mean()) / (x.std() / len(x) ** 0.5)
    assert error(spread(TEMPERATURE)) < 4 < error(spread(1.0))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_policy_with_the_mode_kept_is_what_the_sampler_chooses_by(temperature):
    """Against `choose`, asked 4,096 times for each row: the likeliest above a half, or written before, or neither."""
    logits = np.array([[3, 0, 0.5, -1, 0], *[[1, 0.7, 0.9, 0, -2]] * 3], np.float32)
    previous, n = np.array([-1, 0, 1, -1], np.int32), 4096
    row = lambda value, dtype: np.full(n, value, dtype)
    told, entropy = policy._chosen(
        np.repeat(logits[None], 5, 0), np.repeat(np.arange(5)[:, None], 4, 1), previous[None], temperature, True
    )
    p = np.exp(np.asarray(told)).T  # [rows, tokens]
    for each, before, expected in zip(logits, previous, p):
        found = choose(
            np.tile(each, (n, 1)), np.ones((n, 5), bool), (np.arange(n, dtype=np.float32) + 0.5) / n,
            row(before, np.int32), row(temperature, np.float32), row(0, np.int32), row(1, np.float32),
            row(0, np.float32), row(True, bool),
        )  # fmt: skip
        np.testing.assert_allclose(np.bincount(found, minlength=5) / n, expected, atol=2 / n)
    np.testing.assert_allclose(np.asarray(entropy)[0], -(p * np.log(p)).sum(1), rtol=1e-5)
    gradient = jax.grad(lambda x: policy._chosen(x, np.array([[1]]), np.array([[-1]]), temperature, True)[0].sum())
    assert np.isfinite(gradient(50 * logits[None, :1])).all()  # sure of another one


def test_draws_with_the_mode_kept_follow_their_log_probs(space, sampler):
    """As below, of pictures that were drawn so: their mean -log p is the entropy of that policy, not of another."""
    model = nnx.merge(*whole_model(space.transformer))
    data = config_of(["--config", "reinforce:tiny", "--config.data.temperature=0.3", "--config.data.keep_mode=True"]).data
    items = [world.item(0, "train", i, category="counting") for i in np.repeat([0, 1], 8)]
    batch, _ = policy.rows(
        reinforce._draw(sampler, items, [*range(8)] * 2, (8, 8), data)[0], sampler.grammar, 64, data.longest
    )
    measure = functools.partial(policy.log_probs, grammar=sampler.grammar, codes=64, temperature=0.3)
    error = lambda x: abs(x.mean()) / (x.std() / x.size**0.5)
    spread = lambda keep: -np.add(*map(np.asarray, measure(model, batch, keep_mode=keep)))
    assert error(spread(True)) < 4 < error(spread(False))


def test_the_same_sampler_with_other_weights_compiles_nothing(space, sampler):
    graphdef, params = whole_model(space.transformer)
    other = jax.tree.map(lambda x: x * 0.9, params)
    painter = reinforce._painter(sampler.config, sampler.grammar, sampler.text, sampler.tokenizer)
    items, data = [world.item(0, "train", 0)] * 2, config_of(["--config", "reinforce:tiny"]).data
    draw = lambda weights: reinforce._draw(painter(graphdef, weights), items, [0, 1], (8, 8), data)[0]
    compiled = []
    note = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(note)
    first, count = draw(params), len(compiled)
    second, again = draw(other), draw(params)
    jax.monitoring.unregister_event_duration_listener(note)
    assert count and len(compiled) == count
    same = lambda a, b: all(np.array_equal(x[1], y[1]) for x, y in zip(a, b))
    assert same(first, again) and not same(first, second)
    made = samplers.Sampler(graphdef, other, sampler.config, sampler.grammar, sampler.text, sampler.tokenizer)
    assert same(second, reinforce._draw(made, items, [0, 1], (8, 8), data)[0])


# ---- advantages and the loss


def test_advantages():
    rewards = np.array([[1.0, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [5, 1, 1, 1]])
    plain, normed = (policy.advantages(rewards, n).reshape(3, 4) for n in (False, True))
    np.testing.assert_allclose(plain, [[0.5, -0.5, -0.5, 0.5], [0] * 4, [3, -1, -1, -1]])
    np.testing.assert_allclose(normed.std(1), [1, 0, 1], atol=1e-3)
    assert (plain[1] == 0).all() and (normed[1] == 0).all()  # to the last bit: no gradient
    np.testing.assert_allclose(policy.advantages(rewards + 7).reshape(3, 4), plain, atol=1e-6)


def test_the_loss_by_hand():
    """Against loops over rows and codes; and what is beyond the clip has no gradient."""
    rng = np.random.default_rng(0)
    B, T, n, at, clip, kl = 4, 9, 5, 3, (0.1, 0.3), 0.5
    logs, old, reference = (rng.normal(-2, 0.4, (B, n)).astype(np.float32) for _ in range(3))
    gains = np.array([1.0, -1.0, 2.0, 0.0], np.float32)
    place = lambda x: np.pad(x, ((0, 0), (at, T - at - n)))
    row = lambda x: np.repeat(np.float32(x)[:, None], T, 1)
    batch = {
        "weights": place(np.ones((B, n), np.float32)), "old": place(old), "reference": place(reference),
        "advantage": row(gains), "flat": row([0, 0, 0, 1]), "reward": row([3, 1, 4, 1]),
    }  # fmt: skip
    run = functools.partial(
        policy.loss, key=None, measure=lambda model, batch: (model, -model), clip=clip, kl=kl, n=n
    )
    expected, outside = {"loss": 0.0, "kl": 0.0, "clipped": 0.0}, np.zeros((B, n), bool)
    for b in range(B):
        for k in range(n):
            ratio = np.exp(logs[b, k] - old[b, k])
            held = min(max(ratio, 1 - clip[0]), 1 + clip[1])
            outside[b, k] = ratio * gains[b] > held * gains[b]
            d = reference[b, k] - logs[b, k]
            expected["kl"] += np.exp(d) - d - 1
            expected["clipped"] += outside[b, k]
            expected["loss"] += -min(ratio * gains[b], held * gains[b]) + kl * (np.exp(d) - d - 1)
    found = run(jnp.asarray(logs), batch)
    for name, value in expected.items():
        assert float(found[name][0]) == pytest.approx(value, rel=1e-5) and float(found[name][1]) == B * n
    assert [float(x) for x in found["reward"]] == [9, 4] and [float(x) for x in found["flat"]] == [1, 4]
    assert 0 < outside.sum() < B * n
    slope = lambda batch, kl: jax.grad(lambda x: run(x, batch, kl=kl)["loss"][0])(jnp.asarray(logs))
    assert ((np.asarray(slope(batch, 0.0)) == 0) == (outside | (gains == 0)[:, None])).all()
    # Where the model that drew is the one that learns: the plain policy gradient.
    del batch["old"]
    np.testing.assert_allclose(slope(batch, 0.0), -np.repeat(gains[:, None], n, 1), rtol=1e-6)
    # Without a penalty a part of flat groups alone is not computed, and counts in the mean of the others.
    flat = batch | {"advantage": row([0] * B)}
    found = {name: [float(x) for x in value] for name, value in run(jnp.asarray(logs), flat, kl=0.0).items()}
    assert found["loss"] == [0, B * n] and found["entropy"] == [0, 0] and found["reward"] == [9, 4]
    assert not np.asarray(slope(flat, 0.0)).any()
    # The penalty draws towards the reference, and is nothing there.
    assert (
        np.sign(np.asarray(slope(batch | {"advantage": row([0] * B)}, 1.0))) == np.sign(logs - reference)
    ).all()


@pytest.mark.parametrize("updates, parts", [(1, 1), (1, 4), (2, 2), (2, 4)])
def test_rows_that_teach_fill_the_first_parts_of_each_update(updates, parts):
    idle = np.random.default_rng(0).random(32) < 0.6
    order = policy.first_parts(idle, updates, parts)
    assert sorted(order) == [*range(32)]
    teach = np.asarray(program.parts(~idle[order], updates)).reshape(updates, -1)
    teach = np.stack([program.parts(each, parts) for each in teach])  # [updates, parts, rows]
    most = 32 // updates // parts
    assert (np.diff((teach.sum(2) > 0).astype(int), axis=1) <= 0).all()  # no idle part before one that teaches
    assert (teach.any(2).sum() - updates) * most <= (~idle).sum()


def test_updates_are_steps_one_after_the_other():
    config = config_of(["--config", "reinforce:tiny", "--config.optimizer.warmup=0"])
    more = config_of(["--config", "reinforce:tiny", "--config.optimizer.warmup=0", "--config.updates=2"])
    with config.unlocked(), more.unlocked():
        config.steps, more.steps = 4, 2

    class Line(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(3), axes=("embed",))

    loss = lambda line, batch, key: {
        "loss": (jnp.square(batch["x"] @ line.w[...] - 1).sum(), jnp.float32(len(batch["x"])))
    }
    batch = {"x": np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)}
    mesh = meshes.make_mesh({"data": -1})
    with meshes.use(mesh, dict(config.sharding)):
        one, two = (program.build(each, Line, loss, mesh) for each in (config, more))
        state = one.init(jax.random.key(0))
        for i in (0, 1):
            state, measured = one.step(state, {"x": batch["x"][i::2]})
        both, found = two.step(two.init(jax.random.key(0)), batch)
    np.testing.assert_allclose(both["params"]["w"], state["params"]["w"], rtol=1e-6)
    assert (
        int(both["optimizer"]["step"]) == 2
        and np.isfinite(found["loss"])
        and found["loss"] > measured["loss"]
    )
    assert not np.allclose(both["params"]["w"], 1)


# ---- words about pictures


WORDS = [
    "--config", "reinforce:tiny", "--config.data.categories=('caption',)", "--config.data.words=40", "--config.data.longest=140",
]  # fmt: skip


@pytest.fixture(scope="module")
def told(sampler):
    """Sixteen answers to two captions that are asked for, and four of them again."""
    items = [wishes.wish(0, "train", i, "caption", "en", (32, 32)) for i in np.repeat([0, 1], 10)]
    data = config_of([*WORDS, f"--config.data.temperature={TEMPERATURE}"]).data
    seeds = [*range(8), 0, 1] * 2
    return items, *reinforce._draw(sampler, items, seeds, None, data)


def test_what_is_told(sampler, told):
    items, tokens, texts = told
    assert {len(answer) == 40 for _, answer in tokens} == {True, False}
    for item, (prompt, answer), text in zip(items, tokens, texts):
        whole = np.concatenate([prompt, answer, [sampler.grammar.eos]])
        asked, said = sampler.grammar.decode(whole, sampler.text).turns
        assert Document((asked,)).text() == item.prompt and len(Document((asked,)).images()) == 1
        assert Document((said,)).text().strip() == text


def test_answers_in_one_row_are_as_in_rows_of_their_own(space, sampler, told):
    """Log-probabilities and entropies by branches beside those of each whole row, masked by the grammar token by token; every answer
    is there as often as it was drawn, and with its advantage."""
    (_, tokens, _), grammar, model = told, sampler.grammar, nnx.merge(*whole_model(space.transformer))
    T, apart = 400, 140  # which holds one answer
    logits_of = jax.jit(lambda *row: model.logits(model(*row)))
    gains = np.arange(20, dtype=np.float32)
    gains[[8, 9, 18, 19]] = gains[[0, 1, 10, 11]]
    batch = policy.trees(tokens, gains, 10, grammar, 40, T, space_before := model.config.before, True)
    assert space_before == 3 and (batch["weights"].sum(1) > 0).sum() == 4
    found, entropy = policy.text_log_probs(model, batch, grammar=grammar, temperature=TEMPERATURE)
    trees = {}
    for row, branches in enumerate(batch["branches"]):
        for branch in range(1, branches.max() + 1):
            at = np.flatnonzero(branches == branch)
            prompt = batch["tokens"][row, batch["segments"][row] * (branches == 0) > 0]
            trees[prompt.tobytes(), batch["tokens"][row, at].tobytes()] = row, at
    assert len(trees) == len({(p.tobytes(), a.tobytes()) for p, a in tokens}) == 16
    spread = []
    for i, (prompt, answer) in enumerate(tokens):
        row, at = trees[prompt.tobytes(), answer.tobytes()]
        times = 2 if i % 10 in (0, 1, 8, 9) else 1
        np.testing.assert_array_equal(batch["weights"][row, at], times * (np.arange(len(answer)) < 39))
        assert (batch["advantage"][row, at] == gains[i]).all()
        whole = np.concatenate([prompt, answer])
        np.testing.assert_array_equal(batch["positions"][row, at], grammar.positions(whole)[len(prompt) :])
        pad = lambda x: np.pad(x, [(0, apart - len(x))] + [(0, 0)] * (x.ndim - 1))[None]
        alone = logits_of(pad(whole), pad(np.ones_like(whole)), pad(grammar.positions(whole)))
        logits = np.asarray(alone, np.float64)[0, len(prompt) - 1 :]
        for k in range(min(len(answer), 39)):
            state = grammar.feed(np.concatenate([prompt, answer[:k]]))
            legal = grammar.allowed(state, np.array([41 - k]), text_only=np.array([True]), refuse=np.array([False]))[0]
            x = np.where(legal, logits[k] / TEMPERATURE, -np.inf)
            p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
            assert found[row, at[k]] == pytest.approx(np.log(p[answer[k]]), abs=1e-4)
            assert entropy[row, at[k]] == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum(), abs=1e-4)
            spread.append(-found[row, at[k]] - entropy[row, at[k]])
    spread = np.array(spread)
    assert abs(spread.mean()) < 4 * spread.std() / len(spread) ** 0.5  # as they were drawn
    # With the mode kept, as the sampler's strategies have it; the gradient of other packings.
    row, at = trees[prompt.tobytes(), answer.tobytes()]
    legal = np.append(np.arange(grammar.pieces), grammar.end)
    said, before = np.minimum(answer, grammar.pieces)[None], np.append(-1, answer[:-1])[None]
    expected = policy._chosen(np.float32(logits[None, : len(answer), legal]), said, before, 0.3, True)
    kept = policy.text_log_probs(model, batch, grammar=grammar, temperature=0.3, keep_mode=True)
    np.testing.assert_allclose(np.stack(kept)[:, row, at], np.stack(expected)[:, 0], atol=1e-4)
    graphdef, params = nnx.split(model)
    measure = functools.partial(policy.text_log_probs, grammar=grammar, temperature=1.0)
    how = dict(key=None, measure=measure, clip=(0.2, 0.2), kl=0.0, n=40, whole=True)
    of = lambda batch: jax.grad(lambda params: policy.loss(nnx.merge(graphdef, params), batch, **how)["loss"][0])(params)
    each = policy.trees(tokens, gains, 10, grammar, 40, apart, 3, True)
    assert (each["weights"].sum(1) > 0).sum() == 16
    for a, b in zip(*(jax.tree.leaves(of(rows)) for rows in (batch, each))):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6)
    few = policy.trees(tokens, gains * (np.arange(20) < 10), 10, grammar, 40, T, 3, False)
    assert (few["branches"] > 0).any(1).sum() <= (batch["branches"] > 0).any(1).sum() // 2
    assert not few["weights"][few["advantage"] == 0].any()


def test_what_a_loss_of_words_is_a_mean_over():
    """Each word of each answer counts alike, whatever the answer's length, and as often as it was drawn; what has no weight counts
    nowhere, be it infinite."""
    B, T, n = 2, 6, 4
    weights = np.zeros((B, T), np.float32)
    weights[0, 1:5], weights[1, 2:4] = 1, 3
    row = lambda x: np.repeat(np.float32(x)[:, None], T, 1)
    batch = {"weights": weights, "advantage": row([1, -2]), "flat": row([0, 0]), "reward": row([1, 0])}
    measure = lambda model, batch: (model, 3 * jnp.ones((B, T)))
    run = lambda logs: policy.loss(logs, batch, None, measure=measure, clip=(0.2, 0.2), kl=0.0, n=n, whole=True)
    logs = jnp.where(weights > 0, 0.0, -jnp.inf)
    found = run(logs)
    assert [float(x) for x in found["loss"]] == [8, 8] and [float(x) for x in found["entropy"]] == [30, 10]
    slope = jax.grad(lambda logs: run(logs)["loss"][0])(logs)
    np.testing.assert_array_equal(slope, [[0, -1, -1, -1, -1, 0], [0, 0, 6, 6, 0, 0]])
