"""GRPO: probabilities of what was drawn, the loss by hand, and runs that learn and resume exactly."""

import functools
import itertools
import signal
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen import world
from mmgen.document import Document, Image, Text, Turn
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError
from mmgen.sampling import sampler as samplers
from mmgen.sampling.sampler import Request
from mmgen.sampling.strategies import Strategy, choose
from mmgen.stages import loop, program, reinforce
from mmgen.world import captions, tasks, wishes
from mmgen.world.render import render
from mmgen.world.scene import BACKGROUNDS
from tests.conftest import arrays, assert_same_arrays, config_of, mmgen, records, run_python, whole_model

STEPS = 6

# Dies when the prompts of step `sys.argv[1]` are asked for.
KILLED = """
import os, signal, sys
from mmgen.__main__ import main
from mmgen.stages.reinforce import Prompts

def rows_of(self, step, rows, rows_of=Prompts.rows_of):
    if self.split == "train" and step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rows_of(self, step, rows)
Prompts.rows_of = rows_of
main(sys.argv[2:])
"""


def bright(pixels, item):
    """A reward that every picture has some of."""
    return float(pixels.mean()) / 255


def short(text, item):
    """A reward of few letters."""
    return -len(text) / 10


nameless = lambda pixels, item: 0.0  # noqa: E731  no other process finds it by its name


def flags_of(space, *more):
    return [
        "--config", "reinforce:tiny", f"--config.init={space.transformer}", f"--config.steps={STEPS}",
        "--config.updates=2", "--config.rewards=(('tests.test_reinforce:bright',1.0),('legible',0.1))", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(space, tmp_path_factory):
    """A run of STEPS steps, never stopped."""
    workdir = tmp_path_factory.mktemp("reinforce") / "run"
    assert mmgen("train", *flags_of(space), "--workdir", workdir) == 0
    return workdir


# ---- the policy


TEMPERATURE = 0.6


@pytest.fixture(scope="module")
def drawn(sampler):
    """Sixteen pictures for two prompts, as the rows of a batch."""
    items = [world.item(0, "train", i, category="counting") for i in np.repeat([0, 1], 8)]
    data = config_of(["--config", "reinforce:tiny", f"--config.data.temperature={TEMPERATURE}"]).data
    tokens, pixels = reinforce._draw(sampler, items, [*range(8)] * 2, (8, 8), data)
    batch, at = reinforce._rows(tokens, sampler.grammar, 64, data.longest)
    return items, tokens, pixels, batch, at


@pytest.fixture(scope="module")
def measured(space, sampler, drawn):
    """temperature -> log-probabilities and entropies of what was drawn; and all logits of its rows."""
    model, batch = nnx.merge(*whole_model(space.transformer)), drawn[3]
    measure = functools.partial(reinforce.log_probs, grammar=sampler.grammar, codes=64)
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
    told, entropy = reinforce._chosen(
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
    gradient = jax.grad(lambda x: reinforce._chosen(x, np.array([[1]]), np.array([[-1]]), temperature, True)[0].sum())
    assert np.isfinite(gradient(50 * logits[None, :1])).all()  # sure of another one


def test_draws_with_the_mode_kept_follow_their_log_probs(space, sampler):
    """As below, of pictures that were drawn so: their mean -log p is the entropy of that policy, not of another."""
    model = nnx.merge(*whole_model(space.transformer))
    data = config_of(["--config", "reinforce:tiny", "--config.data.temperature=0.3", "--config.data.keep_mode=True"]).data
    items = [world.item(0, "train", i, category="counting") for i in np.repeat([0, 1], 8)]
    batch, _ = reinforce._rows(
        reinforce._draw(sampler, items, [*range(8)] * 2, (8, 8), data)[0], sampler.grammar, 64, data.longest
    )
    measure = functools.partial(reinforce.log_probs, grammar=sampler.grammar, codes=64, temperature=0.3)
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
    plain, normed = (reinforce.advantages(rewards, n).reshape(3, 4) for n in (False, True))
    np.testing.assert_allclose(plain, [[0.5, -0.5, -0.5, 0.5], [0] * 4, [3, -1, -1, -1]])
    np.testing.assert_allclose(normed.std(1), [1, 0, 1], atol=1e-3)
    assert (plain[1] == 0).all() and (normed[1] == 0).all()  # to the last bit: no gradient
    np.testing.assert_allclose(reinforce.advantages(rewards + 7).reshape(3, 4), plain, atol=1e-6)


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
        reinforce.loss, key=None, measure=lambda model, batch: (model, -model), clip=clip, kl=kl, n=n
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
    order = reinforce._first_parts(idle, updates, parts)
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


def test_rewards_of_the_world():
    item = world.item(3, "test", 0, category="counting")
    picture, other = (
        render(each.scene, 32, 32) for each in (item, world.item(3, "test", 1, category="counting"))
    )
    judge, legible = (reinforce.reward(name) for name in ("judge", "legible"))
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    assert [judge(x, item) for x in (picture, other, noise)] == [1, 0, 0]
    assert [legible(x, item) for x in (picture, other, noise)] == [1, 1, 0]


def test_rewards_of_wishes():
    """What is right is worth 1; what was shown, and the answer to another wish, nothing. (Of little people in pixels the judge reads
    a few wrongly.)"""
    size = 64, 64
    shown = lambda scene: tasks.picture(scene, *size)
    for category in ("draw", "edit", "style", "mix", "sign"):
        found = [wishes.wish(3, "valid", i, category, "en", size) for i in range(8)]
        found = [each for each in found if each is not None]
        assert len(found) == 8 or category == "sign" and 0 < len(found) < 8
        assert sum(reinforce.reward("judge")(shown(item.scene), item) for item in found) >= len(found) - 1
        for item, other in itertools.pairwise(found):
            judge = reinforce.reward("judge")
            assert item.category == category
            assert judge(shown(other.scene), item) == 0
            turns = wishes.document(item, size).turns
            images = [part for part in turns[0].parts if isinstance(part, Image)]
            assert len(images) == {"edit": 1, "style": 1, "mix": 2}.get(category, len(images))
            assert Document(turns).text() == item.prompt
            assert not any(judge(image.pixels, item) for image in images)
    assert wishes.wish(3, "valid", 0, "counting", "zh", size) == world.item(3, "valid", 0, "counting", "zh")


def test_edits_are_drawn_from_what_was_shown(sampler):
    """The prompt has the codes of the user's picture, once for a group, and is as long as was counted for the room."""
    data = config_of([
        "--config", "reinforce:tiny", "--config.data.categories=('edit','position')", "--config.data.longest=170",
    ]).data  # fmt: skip
    prompts = reinforce.Prompts(data, 5, "train", sampler.text, 103, 64, 2)
    items = prompts.rows_of(0, range(4))[0]["items"]
    assert [item.category for item in items] == ["edit"] * 2 + ["position"] * 2
    drawn, pixels = reinforce._draw(sampler, items, range(4), (8, 8), data)
    batch, at = reinforce._rows(drawn, sampler.grammar, 64, data.longest)
    for row, (item, (prompt, answer)) in enumerate(zip(items, drawn)):
        assert len(prompt) == prompts._length(item) and at[row, 0] == len(prompt) + 3
        assert ((prompt >= sampler.grammar.code_start).sum() == 64) == (item.category == "edit")
    back = sampler.grammar.decode(np.concatenate([*drawn[0], [sampler.grammar.eos]]), sampler.text)
    source = tasks.picture(items[0].turn.before, 32, 32)
    np.testing.assert_array_equal(back.turns[0].parts[0].codes, sampler.tokenizer.encode(source[None])[0])
    assert (batch["weights"].sum(1) == 64).all() and pixels[0].shape == (32, 32, 3)
    with pytest.raises(ConfigError, match="config.data.longest"):
        reinforce.Prompts(data, 5, "train", sampler.text, 72, 64, 2).rows_of(0, range(2))


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
    batch = reinforce._trees(tokens, gains, 10, grammar, 40, T, space_before := model.config.before, True)
    assert space_before == 3 and (batch["weights"].sum(1) > 0).sum() == 4
    found, entropy = reinforce.text_log_probs(model, batch, grammar=grammar, temperature=TEMPERATURE)
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
    expected = reinforce._chosen(np.float32(logits[None, : len(answer), legal]), said, before, 0.3, True)
    kept = reinforce.text_log_probs(model, batch, grammar=grammar, temperature=0.3, keep_mode=True)
    np.testing.assert_allclose(np.stack(kept)[:, row, at], np.stack(expected)[:, 0], atol=1e-4)
    graphdef, params = nnx.split(model)
    measure = functools.partial(reinforce.text_log_probs, grammar=grammar, temperature=1.0)
    how = dict(key=None, measure=measure, clip=(0.2, 0.2), kl=0.0, n=40, whole=True)
    of = lambda batch: jax.grad(lambda params: reinforce.loss(nnx.merge(graphdef, params), batch, **how)["loss"][0])(params)
    each = reinforce._trees(tokens, gains, 10, grammar, 40, apart, 3, True)
    assert (each["weights"].sum(1) > 0).sum() == 16
    for a, b in zip(*(jax.tree.leaves(of(rows)) for rows in (batch, each))):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6)
    few = reinforce._trees(tokens, gains * (np.arange(20) < 10), 10, grammar, 40, T, 3, False)
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
    run = lambda logs: reinforce.loss(logs, batch, None, measure=measure, clip=(0.2, 0.2), kl=0.0, n=n, whole=True)
    logs = jnp.where(weights > 0, 0.0, -jnp.inf)
    found = run(logs)
    assert [float(x) for x in found["loss"]] == [8, 8] and [float(x) for x in found["entropy"]] == [30, 10]
    slope = jax.grad(lambda logs: run(logs)["loss"][0])(logs)
    np.testing.assert_array_equal(slope, [[0, -1, -1, -1, -1, 0], [0, 0, 6, 6, 0, 0]])


def test_rewards_of_words():
    """The world's own words are worth 1, and others that are as true and say as much; less, or another's, nothing."""
    judge = reinforce.reward("judge")
    for category, language in itertools.product(wishes.TOLD, ("en", "zh")):
        found = [wishes.wish(3, "valid", i, category, language, (64, 64)) for i in range(20)]
        assert all(judge(item.turn.says[0], item) == 1 for item in found)
        wrong = [judge(other.turn.says[0], item) for item, other in itertools.pairwise(found)]
        assert sum(wrong) <= (len(wrong) - 1 if category in ("question", "compare") else 1)
    rng, less, instead = np.random.default_rng(0), Counter(), 0
    for item in (wishes.wish(3, "valid", i, "caption", "en", (64, 64)) for i in range(60)):
        claim, right = item.claim, captions.parse(item.turn.says[0])
        without = lambda **left: replace(claim, groups=tuple(replace(group, **left) for group in claim.groups))
        shorter = {
            "color": without(color=None), "size": without(size=None), "pattern": without(pattern=None),
            "relation": replace(claim, relation=None), "background": replace(claim, background=None),
            "style": replace(claim, style=None),
        }  # fmt: skip
        for kind, told in shorter.items():
            text = world.say(told, "en", rng, bare=True)
            if captions.parse(text) != right:
                less[kind] += 1
                assert not judge(text, item), (kind, item.prompt, told)
                # Something else instead, that is as true.
                ground = item.scene.background if item.scene.background in BACKGROUNDS else None
                if kind == "size" and not right.background and ground:
                    assert judge(world.say(replace(told, background=ground), "en", rng, bare=True), item)
                    instead += 1
    assert instead > 5
    assert len(less) == 6


@pytest.mark.parametrize(
    "more", [["loss.kl=0.0", "accumulate=4"], ["loss.kl=0.01", "updates=2", "accumulate=2", "data.keep_mode=True"]]
)
def test_a_run_learns_what_to_say(space, tmp_path, more):
    """Words of fewer letters are worth more: the run's become shorter; with a penalty and more updates too."""
    flags = [
        *WORDS, f"--config.init={space.transformer}", "--config.steps=6", "--config.data.batch_size=16", "--config.data.group=8",
        "--config.rewards=(('tests.test_reinforce:short',1.0),)", "--config.held_out.prompts=4",
        "--config.optimizer.learning_rate=0.02", *(f"--config.{each}" for each in more),
    ]  # fmt: skip
    loop.train(config_of(flags), tmp_path)
    found = records(tmp_path)
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) and "held_out_reward" in found[-1]
    assert {"entropy", "flat"} <= found[-1].keys()
    if "updates=2" in more:
        assert found[-1]["kl"] > found[0]["kl"] >= 0 and found[-1]["clipped"] > 0


# ---- runs


def test_prompts_are_a_function_of_the_step_and_fit(sampler):
    data = config_of(["--config", "reinforce:tiny", "--config.data.categories=('counting','position')"]).data
    prompts = lambda room: reinforce.Prompts(data, 5, "train", sampler.text, room, 64, 2)
    everything, replaced = prompts(100).rows_of(7, range(4))
    kinds = [item.category for item in everything["items"]]
    assert kinds == ["counting"] * 2 + ["position"] * 2 and not replaced
    assert everything["items"][0] is everything["items"][1]  # a group has one prompt
    step, part, _ = next(prompts(100).prefetch(7, np.array([2, 3])))
    assert step == 7 and part["items"] == everything["items"][2:]
    lengths = [len(sampler.text.encode(item.prompt)) for item in everything["items"]]
    most = max(lengths) - 1
    short, replaced = prompts(4 + most).rows_of(7, range(4))
    assert replaced and all(len(sampler.text.encode(item.prompt)) <= most for item in short["items"])
    with pytest.raises(ConfigError, match="parts of groups"):
        next(prompts(100).prefetch(0, np.array([0, 1, 2])))
    with pytest.raises(ConfigError, match="config.data.longest"):
        prompts(4).rows_of(0, range(4))


def test_killed_and_resumed_is_bit_identical(space, run, tmp_path):
    """And rewarded by other processes, which end with the one that is killed."""
    apart = "--config.data.workers=2"
    command = ["train", *flags_of(space, apart), "--workdir", tmp_path]
    killed = run_python(KILLED, 5, *command, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(tmp_path) in (2, 4)  # the last may not be whole yet
    assert (
        mmgen(
            "train", *flags_of(space)[:2], *flags_of(space, "--config.init=/gone", apart)[3:], "--workdir", tmp_path
        )
        == 0
    )
    assert records(tmp_path) == records(run)
    assert_same_arrays(arrays(tmp_path, STEPS), arrays(run, STEPS))


def test_what_a_run_leaves_is_opened_as_a_transformer_run(space, run, tmp_path):
    found = records(run)
    first, last = found[0], found[-1]
    assert {
        "reward",
        "reward_legible",
        "reward_tests.test_reinforce:bright",
        "flat",
        "entropy",
        "clipped",
    } <= set(last)
    assert first["kl"] < last["kl"] and "held_out_reward" in last
    before, after = arrays(space.transformer, 8), arrays(run, STEPS)
    assert any(not np.array_equal(before[name], after[name]) for name in before if name.startswith("params"))
    moved = run.rename(tmp_path / "moved")
    try:
        request = Request(
            Document((Turn("user", (Text("a red circle"),)),)), size=(8, 8), image=Strategy(0.5)
        )
        ours = samplers.load(moved)
        assert ours.step == STEPS and ours.generate([request])[0].parts[0].pixels.shape == (32, 32, 3)
        picture = tmp_path / "picture.png"
        assert (
            mmgen(
                "sample",
                "--checkpoint",
                moved,
                "--prompt",
                "a red circle",
                "--size",
                "32x32",
                "--out",
                picture,
            )
            == 0
        )
        assert picture.exists()
    finally:
        moved.rename(run)


def test_rewards_rise(space, tmp_path):
    flags = flags_of(space, "--config.data.batch_size=16", "--config.data.group=8", "--config.updates=1")
    flags += [
        "--config.rewards=(('tests.test_reinforce:bright',1.0),)",
        "--config.held_out.prompts=0",
        "--config.steps=8",
    ]
    flags += ["--config.optimizer.learning_rate=0.03", "--config.loss.kl=0.0", "--config.loss.normalise=True"]
    loop.train(config_of(flags), tmp_path)
    rewards = [line["reward"] for line in records(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    assert not (tmp_path / reinforce.REFERENCE).exists() and "kl" not in records(tmp_path)[-1]


@pytest.mark.soak
@pytest.mark.parametrize(
    "mesh", [["mesh.data=4"], ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "sharding.kv_heads="]]
)
def test_four_devices_learn_what_one_does(space, tmp_path, mesh):
    code = "import sys; from mmgen.__main__ import main; sys.exit(main(sys.argv[1:]))"
    more = ["--config.data.batch_size=8", "--config.data.slots=8"]
    flags = flags_of(space, *more, *(f"--config.{setting}" for setting in mesh))
    run_python(code, "train", *flags, "--workdir", tmp_path / "four", devices=4)
    loop.train(config_of(flags_of(space, *more)), tmp_path / "one")
    for ours, alone in zip(records(tmp_path / "four"), records(tmp_path / "one"), strict=True):
        assert ours.keys() == alone.keys()
        for name in ("reward", "entropy", "kl", "grad_norm"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("init=", "--config.init=DIR"), ("data.group=3", "divides"), ("data.group=1", "at least 2"),
        ("updates=3", "must divide"), ("data.size=(30,32)", "multiples of"), ("data.longest=60", "must hold"),
        ("data.categories=('style',)", "style needs a short side of 48"), ("data.temperature=0.0", "at least 0.001"), ("data.keep_mode=true --config.data.temperature=0.05", "at least 0.1"), ("loss.clip=(0.2,)", "clip"), ("data.categories=('count',)", "counting"), ("data.categories=('caption','edit')", "learns from one of both"), ("data.words=1", "at least 2"), ("data.categories=('caption',) --config.data.longest=110", "words=48 about it: 123"),
        ("data.categories=('caption',) --config.data.longest=140", "legible is of pictures"),
        ("data.languages=('fr',)", "language"), ("rewards=('judge',)", "NAME, WEIGHT"), ("rewards=(('jugde',1),)", "'judge'"),
        ("data.workers=1 --config.rewards=(('tests.test_reinforce:nameless',1.0),)", "other processes"), ("data.workers=-1", "at least 0"),
        ("rewards=(('nowhere:judge',1),)", "imported"), ("model.width=64", "config.model"),
    ],
)  # fmt: skip
def test_mistakes_are_named(space, tmp_path, mistake, words):
    with pytest.raises(ValueError if "model" not in mistake else checkpoint.CheckpointError, match=words):
        loop.train(config_of(flags_of(space, *f"--config.{mistake}".split(" "))), tmp_path)


def test_only_a_transformer_run_can_be_begun_with(space, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="expected a transformer or a reinforce run"):
        loop.train(config_of(flags_of(space, f"--config.init={space.tokenizer}")), tmp_path)
