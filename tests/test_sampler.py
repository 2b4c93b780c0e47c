"""Sampling: what is written is legal, is what the model says, and does not depend on who else is asked."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen.document import Document, Image, Text, Turn
from mmgen.grammar import CODES
from mmgen.runtime.checkpoint import CheckpointError
from mmgen.sampling import strategies
from mmgen.sampling.sampler import Request, Sampler, load
from mmgen.sampling.strategies import Strategy, choose
from tests.conftest import whole_model

BATCH = 4  # one batch size, so that few programs are compiled


def ask(prompt, size=(8, 8), *, seed=0, image=Strategy(), text=Strategy(), before=(), **options):
    document = Document((*before, Turn("user", (Text(prompt),))))
    return Request(document=document, size=size, seed=seed, image=image, text=text, **options)


def random_model(space, sampler, scale=1.0, **options):
    """The sampler with random weights, nearly uniform, so that it tries everything it may; and these."""
    graphdef, params = whole_model(space.transformer)
    leaves, definition = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [
        scale * jax.random.normal(k, x.shape) * x.shape[-2 % x.ndim] ** -0.5 for k, x in zip(keys, leaves)
    ]
    params = jax.tree.unflatten(definition, drawn)
    parts = sampler.config, sampler.grammar, sampler.text, sampler.tokenizer
    return Sampler(graphdef, params, *parts, **options), params


# ---- the whole sampler ---------------------------------------------------------------------------


def requests():
    """Four that differ in everything; with them every batch has guidance and room for 8 x 8."""
    picture = Turn("assistant", (Image(codes=np.arange(4, dtype=np.int32).reshape(2, 2)),))
    before = (Turn("user", (Text("a"),)), picture)
    return [
        ask("a red circle", seed=1, guidance=3.0),
        ask("a small blue star", seed=2, image=Strategy(0.7, top_k=50, keep_mode=True)),
        ask("x", size=(2, 5), seed=3, image=Strategy(2.0, top_p=0.5), guidance=1.5),
        ask("bigger", seed=4, image=Strategy(0.0), before=before),
    ]


@pytest.fixture(scope="module")
def answers(sampler):
    return sampler.generate(requests(), BATCH)


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2)])
def test_a_request_does_not_depend_on_its_slot(sampler, answers, order):
    mine = requests()
    for place, turn in zip(order, sampler.generate([mine[place] for place in order], BATCH)):
        assert turn == answers[place]


def test_a_request_does_not_depend_on_its_neighbours(sampler, answers):
    others = [ask("a red circle", seed=9, image=Strategy(1.0, 3, 0.9), guidance=7.0), ask("green", seed=8)]
    for mine in range(4):
        company = [others[0], requests()[mine], others[1], others[1]]
        assert sampler.generate(company, BATCH)[1] == answers[mine]


def test_a_request_does_not_depend_on_whether_others_are_guided(sampler, answers):
    assert sampler.generate([requests()[1]] * 2 + [requests()[3]], BATCH) == [
        answers[1],
        answers[1],
        answers[3],
    ]


def test_more_requests_than_a_batch_come_back_in_order(sampler, answers):
    long = ask("a large red circle above a small blue star " * 2, seed=5, guidance=2.0)
    mine = [long, *requests(), long, requests()[0]]
    turns = sampler.generate(mine, BATCH)
    assert turns[1:5] == answers and turns[6] == answers[0] and turns[0] == turns[5]


def test_seeds_prompts_and_guidance_matter(sampler, answers):
    first = requests()[0]
    changed = [dataclasses.replace(first, seed=99), dataclasses.replace(first, guidance=2.0), first]
    turns = sampler.generate(changed, BATCH)
    assert turns[0] != answers[0] and turns[1] != answers[0] and turns[2] == answers[0]


@pytest.mark.smoke
def test_a_tiny_model_draws(sampler, answers):
    for request, turn in zip(requests(), answers):
        (image,) = turn.parts
        height, width = request.size
        assert turn.role == "assistant" and image.codes.shape == request.size
        assert image.pixels.shape == (height * sampler.tokenizer.patch, width * sampler.tokenizer.patch, 3)
        assert image.pixels.dtype == np.uint8
        np.testing.assert_array_equal(sampler.tokenizer.decode(image.codes[None])[0], image.pixels)


WISHES = [
    dict(output="image", size=None), dict(output="image", size=(8, 8)), dict(output="image", size=(1, 6)),
    dict(output="text", size=None), dict(output="any", size=None), dict(output="any", size=(3, 2)),
    dict(output="any", size=None), dict(output="text", size=(2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.soak), 3.0])
def test_a_random_model_writes_nothing_illegal(space, sampler, guidance):
    """Every output decodes by the grammar, even at temperature 2, and is what was wished for."""
    wild = Strategy(temperature=2.0)
    model, _ = random_model(space, sampler, 2.0)
    # "any" leaves room for all that fits a row, so that all batches are one program.
    wishes = [
        ask(f"p {n}", seed=n, image=wild, text=wild, guidance=guidance, **w) for n, w in enumerate(WISHES)
    ]
    wishes += [dataclasses.replace(wish, seed=wish.seed + 50) for wish in wishes]
    order = np.argsort([wish.output != "any" for wish in wishes], kind="stable")  # one "any" in each batch
    wishes = [wishes[i] for i in order.reshape(BATCH, -1).T.ravel()]
    rows = {}
    turn_of = model.turn
    model.turn = lambda request, row, *done: rows.update({request.seed: row}) or turn_of(request, row, *done)
    for wish, turn in zip(wishes, model.generate(wishes, BATCH), strict=True):
        row = rows[wish.seed]
        images = [part for part in turn.parts if isinstance(part, Image)]
        whole = np.concatenate([model.prompts(wish)[0], row, [model.grammar.eos]])
        read = model.grammar.decode(whole, model.text).turns[-1].parts
        assert [part for part in read if isinstance(part, Text)] == [
            p for p in turn.parts if isinstance(p, Text)
        ]
        assert [part.codes.tolist() for part in read if isinstance(part, Image)] == [
            i.codes.tolist() for i in images
        ]
        assert len(whole) <= model.longest
        if wish.output == "image":
            assert len(turn.parts) == len(images) == 1
        if wish.output == "text":
            assert not images
        if wish.size:
            assert all(image.codes.shape == wish.size for image in images)


@pytest.fixture(scope="module")
def forward(space):
    """Logits [V] after some tokens by the full model, without a cache: (params, grammar, tokens)."""
    graphdef, width = whole_model(space.transformer)[0], 160

    @jax.jit
    def run(params, tokens, positions):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, jnp.ones_like(tokens), positions))

    def of(params, grammar, tokens):
        padded, positions = np.zeros((1, width), np.int32), np.zeros((1, width, 3), np.int32)
        padded[0, : len(tokens)], positions[0, : len(tokens)] = tokens, grammar.positions(np.array(tokens))
        return np.asarray(run(params, padded, positions)[0, : len(tokens)], np.float64)

    return of


PICTURE = Image(codes=np.arange(12, dtype=np.int32).reshape(3, 4))
GUIDANCE = [
    (dict(), (3, 4)),
    (dict(guidance=3.0), (2, 5)),
    pytest.param(dict(guidance=2.0, image_guidance=1.7), (3, 3), marks=pytest.mark.soak),
    (dict(guidance=3.0, guidance_interval=(0.25, 0.75), guidance_rescale=0.7), (2, 6)),
]


@pytest.mark.parametrize("guidance, size", GUIDANCE)
def test_greedy_is_the_argmax_of_the_full_model(space, sampler, forward, guidance, size):
    """Cache, machine, positions and guidance, all against the uncached model and the formula; the document has an
    image, and its prompt more than one chunk."""
    grammar, greedy = sampler.grammar, Strategy(0.0)
    model, params = random_model(space, sampler, 1.5)
    before = (
        Turn("user", (PICTURE, Text("what is this? say it in some more words"))),
        Turn("assistant", (Text("two"),)),
    )
    request = ask("two red stars", size, image=greedy, text=greedy, before=before, **guidance)
    branches = [list(tokens) for tokens in model.prompts(request)]
    assert (
        len({len(tokens) for tokens in branches})
        == len(branches)
        == 1 + len(set(guidance) & {"guidance", "image_guidance"})
    )
    start, room, total = len(branches[0]), model.room(request, branches[0]), size[0] * size[1]
    assert start > model.chunk
    low, high = request.guidance_interval
    while branches[0][-1] != grammar.end:
        state = grammar.feed(branches[0])
        left = np.array([room - len(branches[0]) + start])
        legal = grammar.allowed(state, left, np.array([size]), np.array([True]), refuse=False)[0]
        full, *others = (forward(params, grammar, tokens)[-1] for tokens in branches)
        logits = full
        share = (total - state.remaining[0]) / total
        if others and not (state.mode == CODES and not low <= share < high):
            logits = others[0] + request.guidance * (full - others[0])
            if len(others) == 2:
                logits = (
                    others[1]
                    + request.image_guidance * (others[0] - others[1])
                    + request.guidance * (full - others[0])
                )
            narrow = logits * (full[legal].std() / max(logits[legal].std(), 1e-30))
            logits = logits + request.guidance_rescale * (narrow - logits)
        token = int(np.argmax(np.where(legal, logits, -np.inf)))
        branches = [[*tokens, token] for tokens in branches]
    (image,) = model.generate([request, requests()[0]], BATCH)[0].parts
    written = np.array(branches[0][start:])
    np.testing.assert_array_equal(
        image.codes.ravel(), written[written >= grammar.code_start] - grammar.code_start
    )


# ---- bad input -----------------------------------------------------------------------------------


def test_wrong_requests(sampler):
    with pytest.raises(ValueError, match="at least one"):
        sampler.generate([])
    with pytest.raises(ValueError, match="too long: .* shorten"):
        sampler.generate([ask("a large red circle " * 40)])
    with pytest.raises(ValueError, match="too long"):
        sampler.generate([ask("x", size=(16, 16))])
    with pytest.raises(ValueError, match="sides go up to"):
        sampler.generate([ask("x", size=(1, sampler.grammar.max_side + 1))])
    with pytest.raises(ValueError, match="'image', 'text' or 'any'"):
        ask("x", output="picture")
    for wrong in (dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(min_p=2.0)):
        with pytest.raises(ValueError, match="expected temperature"):
            Strategy(**wrong)


def test_wrong_checkpoints(space, tmp_path):
    with pytest.raises(CheckpointError, match="not a workdir"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="not a workdir"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="holds a tokenizer run"):
        load(space.tokenizer)
    begun = tmp_path / "begun"
    shutil.copytree(space.transformer, begun, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        shutil.copytree(space.shards / "tokenizer", begun / "tokenizer", dirs_exist_ok=True)
        load(begun)


def test_a_workdir_can_be_moved_and_needs_nothing_else(space, tmp_path, sampler, answers):
    moved = shutil.copytree(space.transformer, tmp_path / "moved")
    assert load(moved).generate(requests(), BATCH) == answers


def test_another_tokenizer_or_text_model_is_refused(space, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(space.transformer, workdir)
    manifest = json.loads((workdir / "vocabulary.json").read_text())
    for name in ("text", "tokenizer"):
        (workdir / "vocabulary.json").write_text(json.dumps(manifest | {f"{name}_hash": "0" * 12}))
        with pytest.raises(CheckpointError, match=f"the {name} in it is not the one"):
            load(workdir)
    (workdir / "vocabulary.json").write_text(json.dumps(manifest))
    from mmgen.stages import loop
    from tests.conftest import config_of

    other = tmp_path / "other"
    loop.train(config_of([*space.tokenizer_flags, "--config.seed=5"]), other, stop_at=1)
    shutil.rmtree(workdir / "tokenizer")
    shutil.copytree(other, workdir / "tokenizer")
    with pytest.raises(CheckpointError, match="the tokenizer in it is not the one"):
        load(workdir)


# ---- choosing one token --------------------------------------------------------------------------


def draw(
    logits, legal, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, keep_mode=False, previous=-1
):
    """`choose` with one setting for all rows of uniform [B], from the same logits [V]."""
    B = len(uniform)
    row = lambda value, dtype: jnp.full(B, value, dtype)
    return np.asarray(_choose(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (B, len(logits))),
        jnp.broadcast_to(jnp.asarray(legal), (B, len(logits))), jnp.asarray(uniform, jnp.float32),
        row(previous, jnp.int32),
        row(temperature, jnp.float32), row(top_k, jnp.int32), row(top_p, jnp.float32), row(min_p, jnp.float32),
        row(keep_mode, bool),
    ))  # fmt: skip


_choose = jax.jit(choose)
UNIFORM = (np.arange(20_000) + 0.5) / 20_000  # every quantile once
ALMOST_ONE = np.nextafter(np.float32(1), np.float32(0))


def softmax(x):
    p = np.exp(x - np.max(x))
    return p / p.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax_of_what_is_legal(temperature):
    logits, legal = np.random.default_rng(0).normal(size=12) * 2, np.arange(12) % 3 != 0
    counts = np.bincount(draw(logits, legal, UNIFORM, temperature), minlength=12) / len(UNIFORM)
    expected = softmax(np.where(legal, logits / temperature, -np.inf))
    np.testing.assert_allclose(counts, expected, atol=2e-4)


def test_keep_mode_sharpens_only_what_is_not_the_likeliest():
    p = np.array([0.9, 0.06, 0.03, 0.01])
    legal = np.ones(4, bool)
    share = lambda p, **options: (
        np.bincount(draw(np.log(p), legal, UNIFORM, **options), minlength=4) / len(UNIFORM)
    )
    rest = p[1:] ** 2 / (p[1:] ** 2).sum()
    np.testing.assert_allclose(share(p, temperature=0.5, keep_mode=True), [0.9, *(0.1 * rest)], atol=1e-3)
    # Where nothing is likelier than all else together, temperature is what it always is.
    even = np.array([0.45, 0.35, 0.15, 0.05])
    np.testing.assert_array_equal(share(even, temperature=0.5, keep_mode=True), share(even, temperature=0.5))
    assert share(p, temperature=0.5)[0] > 0.99
    # Unless it goes on with what was just written: a run may end as often as was learned.
    rest = even[1:] ** 2 / (even[1:] ** 2).sum()
    kept = share(even, temperature=0.5, keep_mode=True, previous=0)
    np.testing.assert_allclose(kept, [0.45, *(0.55 * rest)], atol=1e-3)
    for other in ({"previous": 1, "keep_mode": True}, {"previous": 0}):
        np.testing.assert_array_equal(share(even, temperature=0.5, **other), share(even, temperature=0.5))
    # Greedy stays greedy, and an illegal mode counts for nothing.
    assert share(p, temperature=0.0, keep_mode=True)[0] == 1
    legal[0] = False
    assert share(p, temperature=1e-30, keep_mode=True)[0] == 0


def test_top_k_keeps_k_and_top_p_the_nucleus():
    rng = np.random.default_rng(1)
    for _ in range(5):
        logits = rng.normal(size=12) * 2
        legal = rng.random(12) < 0.7
        legal[3] = True
        p = softmax(np.where(legal, logits, -np.inf))
        ranked = np.argsort(-p)
        for k in (1, 3, 100):
            kept = ranked[: min(k, legal.sum())]
            counts = np.bincount(draw(logits, legal, UNIFORM, top_k=k), minlength=12) / len(UNIFORM)
            np.testing.assert_allclose(counts[kept], p[kept] / p[kept].sum(), atol=2e-4)
            assert counts[kept].sum() == pytest.approx(1)
        for top_p in (1e-6, 0.3, 0.9):
            nucleus = ranked[
                : np.searchsorted(np.cumsum(p[ranked]), top_p) + 1
            ]  # the fewest of weight >= top_p
            counts = np.bincount(draw(logits, legal, UNIFORM, top_p=top_p), minlength=12) / len(UNIFORM)
            np.testing.assert_allclose(counts[nucleus], p[nucleus] / p[nucleus].sum(), atol=2e-4)
            assert counts[nucleus].sum() == pytest.approx(1)
        for min_p in (0.05, 1.0):
            counts = np.bincount(draw(logits, legal, UNIFORM, min_p=min_p), minlength=12)
            assert np.array_equal(counts > 0, p >= min_p * p.max())


def test_what_is_kept_is_what_sorting_keeps():
    """To the last bit, of a vocabulary's size, with ties, tiny weights and illegal tokens."""
    V, B, rng = 3_000, 64, np.random.default_rng(4)
    p = rng.exponential(size=(B, V)).astype(np.float32) ** 6 * (rng.random((B, V)) < 0.7)
    p[::3] = p[::3].round(1)
    p[1, 5:], p[2] = 0, 1e-40
    p[2, 0] = 1
    p /= p.sum(1, keepdims=True)
    top_k = rng.choice([0, 1, 7, 100, V], B).astype(np.int32)
    top_p = rng.choice([1.0, 1e-6, 0.5, 0.99], B).astype(np.float32)
    kept = np.asarray(jax.jit(strategies._keep_top)(p, top_k, top_p, np.zeros(B, np.float32)))
    for row, found, k, weight in zip(p, kept, top_k, top_p):
        ordered = -np.sort(-row)
        least = 0.0 if k == 0 else ordered[k - 1]
        if weight < 1:
            reached = np.searchsorted(np.cumsum(ordered.astype(float)), weight)
            near = ordered[max(reached - 1, 0)], ordered[min(reached + 1, V - 1)]  # as sums are rounded
            assert max(near[1], least) <= found[found > 0].min() <= max(near[0], least)
            least = found[found > 0].min()
        np.testing.assert_array_equal(found, np.where(row >= least, row, 0))


def test_greedy_is_the_best_legal_token_whatever_the_draw():
    logits, legal = np.array([5.0, 1.0, 3.0, 2.0]), np.array([False, True, True, True])
    for options in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-30)):
        assert (draw(logits, legal, [0.0, 0.5, ALMOST_ONE], **options) == 2).all()


@pytest.mark.smoke
@pytest.mark.parametrize("options", [{}, dict(top_k=200), dict(top_p=0.99), dict(min_p=0.01)])
def test_no_illegal_token_however_the_sums_are_rounded(options):
    """Uniforms at the very border between two tokens, at 0 and just under 1: a parallel cumulative sum is
    not monotone there."""
    V, rng = 3_000, np.random.default_rng(2)
    for _ in range(8):
        legal = rng.random(V) < 0.3
        logits = rng.normal(size=V).astype(np.float32) * 3
        p = jax.nn.softmax(jnp.where(legal, logits, -jnp.inf))
        borders = np.asarray(jnp.cumsum(p))[rng.integers(0, V, 253)]
        uniform = np.clip(np.concatenate([borders / borders.max(), [0.0, 0.5, ALMOST_ONE]]), 0, ALMOST_ONE)
        assert legal[draw(logits, legal, uniform, **options)].all()
    only = np.zeros(V, bool)
    only[1234] = True
    assert (draw(logits, only, uniform, **options) == 1234).all()


def test_a_row_does_not_see_its_neighbours_settings():
    """Alone or beside rows that cut: the same token, at every quantile."""
    V, B, rng = 2_000, 256, np.random.default_rng(3)
    logits, legal = rng.normal(size=(B, V)).astype(np.float32), rng.random((B, V)) < 0.5
    uniform = rng.random(B).astype(np.float32)
    ones = np.ones(B, np.float32)
    none = np.zeros(B, bool)
    previous = np.argmax(np.where(legal, logits, -np.inf), axis=-1).astype(np.int32)
    alone = _choose(logits, legal, uniform, previous, ones, np.zeros(B, np.int32), ones, 0 * ones, none)
    odd = np.arange(B) % 2 == 1
    cut = np.where(odd, 5, 0), np.where(odd, np.float32(0.5), ones), np.where(odd, np.float32(0.01), 0 * ones)
    beside = _choose(logits, legal, uniform, previous, ones, *cut, odd)
    np.testing.assert_array_equal(alone[~odd], beside[~odd])
    assert (alone[odd] != beside[odd]).any()
