"""Slots, the cache below them and dialogues above: whoever comes, goes or is cancelled, a request's tokens are its own."""

import copy
import dataclasses
import gc
import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmgen.document import Document, Image, Text, Turn
from mmgen.sampling import best
from mmgen.sampling import cache as caches
from mmgen.sampling import slots as slots_module
from mmgen.sampling.best import best_of
from mmgen.sampling.dialogue import Dialogue
from mmgen.sampling.sampler import Request, Sampler
from mmgen.sampling.slots import Slots
from mmgen.sampling.strategies import Strategy
from tests.conftest import run_python, whole_model

WILD = Strategy(1.5)


@pytest.fixture(scope="module")
def random(space, sampler):
    """(sampler with random weights, its graphdef and params): every choice is open, so that any mistake shows."""
    graphdef, params = whole_model(space.transformer)
    leaves, definition = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = [1.5 * jax.random.normal(k, x.shape) * x.shape[-2 % x.ndim] ** -0.5 for k, x in zip(keys, leaves)]
    params = jax.tree.unflatten(definition, drawn)
    return of(sampler, graphdef, params), graphdef, params


def of(sampler, graphdef, params, **options):
    return Sampler(
        graphdef, params, sampler.config, sampler.grammar, sampler.text, sampler.tokenizer, **options
    )


def picture(rng, model, most=4):
    return Image(codes=rng.integers(0, model.grammar.codes, rng.integers(1, most + 1, 2)).astype(np.int32))


def documents(model, n, seed=0):
    """Dialogues with several images of several sizes, the last turn the user's."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        turns = []
        for _ in range(rng.integers(1, 3)):
            words = Text(" ".join(rng.choice(["a", "red", "small", "star", "now"], rng.integers(1, 5))))
            asks = [picture(rng, model), words] if rng.random() < 0.6 else [words]
            turns += [
                Turn("user", asks),
                Turn("assistant", [picture(rng, model), Text("so")][: rng.integers(1, 3)]),
            ]
        yield Document(turns[:-1])


# ---- the cache ------------------------------------------------------------------------------------


def test_every_position_is_as_in_the_full_forward_pass(random):
    """Random documents with several images of several sizes, token by token and as one: logits of both."""
    model, graphdef, params = random
    rows = [model.grammar.encode(d, model.text) for d in documents(model, 6, seed=1)]
    B, T = len(rows), max(map(len, rows))
    tokens, positions = np.zeros((B, T), np.int32), np.zeros((B, T, 3), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], positions[i, : len(row)] = row, model.grammar.positions(row)

    @jax.jit
    def whole(tokens, positions):
        full = nnx.merge(graphdef, params)
        return full.logits(full(tokens, jnp.ones_like(tokens), positions))

    @jax.jit
    def one(cache, tokens, positions, at):
        small = nnx.merge(model.graphdef, model.params)
        x, cache = caches.step(small, model.weights, cache, tokens, positions, at)
        return caches.logits(small, model.weights, x)[:, 0], cache

    expected = np.asarray(whole(tokens, positions))
    cache, found = caches.empty(model.model_config, B, T, jnp.float32), []
    for t in range(T):
        logits, cache = one(cache, tokens[:, t : t + 1], positions[:, t : t + 1], jnp.full(B, t))
        found.append(np.asarray(logits))
    found = np.stack(found, 1)
    nats = model.nats(documents(model, 6, seed=1), batch_size=4)
    logs = expected - np.logaddexp.reduce(expected, -1, keepdims=True)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(found[i, : len(row)], expected[i, : len(row)], atol=1e-4)
        by_hand = [-logs[i, t, row[t + 1]] for t in range(len(row) - 1)]
        np.testing.assert_allclose(nats[i], [0, *by_hand], atol=1e-4)


def test_chunks_of_a_prompt_are_the_whole(random):
    """Prefill in chunks, of a row of a cache that others use too."""
    model, graphdef, params = random
    slots = Slots(model, 3, 2, 160)
    asked = [Request(d, size=(2, 2), guidance=2.0, seed=i) for i, d in enumerate(documents(model, 3, seed=4))]
    for request in asked:
        slots.add(request)
    prompts = [model.prompts(request) for request in asked]
    assert max(len(p[0]) for p in prompts) > model.chunk
    slots.run(1)
    whole = jax.jit(lambda *fed: nnx.merge(graphdef, params)(*fed))
    for place, branches in enumerate(prompts):
        for branch, tokens in enumerate(branches):
            pad = (0, 160 - len(tokens))
            positions = np.pad(model.grammar.positions(tokens), (pad, (0, 0)))
            hidden = whole(np.pad(tokens, pad)[None], np.ones((1, 160), np.int32), positions[None])
            expected = hidden[0, len(tokens) - 1]
            np.testing.assert_allclose(
                slots._state.prompt[branch * 3 + place], expected, rtol=1e-5, atol=1e-4
            )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(int8=True), marks=pytest.mark.soak),
        pytest.param(dict(int8_cache=True), marks=pytest.mark.soak),
        dict(int8=True, int8_cache=True),
    ],
)
def test_eight_bits_are_near(sampler, random, options):
    """By the divergence of distributions, and what is stored is really in 8 bits."""
    model, graphdef, params = random
    small = of(sampler, graphdef, params, **options)
    leaves = jax.tree.leaves(small.weights["layers"])
    assert any(x.dtype == jnp.int8 for x in leaves) == options.get("int8", False)
    logits, rows = {}, [model.grammar.encode(d, model.text)[:40] for d in documents(model, 6, seed=3)]
    rows = np.stack([row for row in rows if len(row) == 40])
    positions = np.stack([model.grammar.positions(row) for row in rows])
    for each in (model, small):
        cache = caches.empty(each.model_config, len(rows), 40, each.dtype, each.int8_cache)
        part = nnx.merge(each.graphdef, each.params)
        step = jax.jit(lambda *fed: caches.step(part, each.weights, *fed))
        x, cache = step(cache, rows, positions, jnp.zeros(len(rows), jnp.int32))
        logits[each] = np.asarray(jax.nn.log_softmax(caches.logits(part, each.weights, x)))
        assert (cache["layers"][0][0][0].dtype == jnp.int8) == each.int8_cache
    divergence = (np.exp(logits[model]) * (logits[model] - logits[small])).sum(-1)
    assert 0 < divergence.mean() < 0.02 * np.log(model.grammar.vocab_size)
    if len(options) == 2:
        (turn,) = small.generate([Request(Document([Turn("user", [Text("x")])]), size=(2, 2))], 2)
        assert turn.parts[0].codes.shape == (2, 2)


def test_bits_do_not_depend_on_how_far_the_cache_or_others_reach(random):
    """What attention does not look at, or looks at in vain, is nothing (on CPU; elsewhere the length names the program)."""
    model, *_ = random
    by_length = sorted(documents(model, 40, seed=5), key=lambda d: len(model.grammar.encode(d, model.text)))
    asked, other = (Request(by_length[n], size=(2, 2), seed=1, guidance=2.0) for n in (0, -1))
    assert len(model.prompts(other)[0]) > len(model.prompts(asked)[0]) + 32

    def hidden(length, company):
        slots = Slots(model, 2, 2, length)
        for request in [asked, other][: 1 + company]:
            slots.add(request)
        slots.run(4)
        return np.asarray(slots._state.hidden[::2])  # of the first slot's two rows

    expected = hidden(160, False)
    assert np.isfinite(expected).all()
    for length, company in ((160, True), (320, False), (320, True)):
        np.testing.assert_array_equal(hidden(length, company), expected)


def test_quantized_matrices_are_within_half_a_step():
    x = jax.random.normal(jax.random.key(0), (50, 7, 3)).at[:, 2].set(0)
    values, scale = caches.quantize(x, 0)
    assert values.dtype == jnp.int8 and scale.shape == (7, 3)
    assert (np.abs(values * scale - x) <= scale / 2 * 1.001).all() and (
        jnp.abs(values).max(0)[0] == 127
    ).all()


# ---- slots ----------------------------------------------------------------------------------------


def some_requests(model, n, seed, three=True):
    """Requests of all kinds; `three`: branches too."""
    rng = np.random.default_rng(seed)
    for i, document in enumerate(documents(model, n, seed)):
        output = str(rng.choice(["image", "image", "text", "any"]))
        yield Request(
            document,
            output=output,
            size=tuple(int(x) for x in rng.integers(1, 4, 2)) if output == "image" else None,
            seed=i,
            guidance=float(rng.choice([1.0, 2.0])),
            image_guidance=float(rng.choice([1.0, 1.5])) if three else 1.0,
            image=WILD,
            text=Strategy(1.5, top_k=int(rng.choice([0, 20])), top_p=float(rng.choice([1.0, 0.9]))),
            max_tokens=20 if output != "image" else None,
        )


def run_all(model, requests, slots, seed=0, cancel=0.0, most=7):
    """Through `slots`, a few arriving at a time -> {index: tokens}, the indices cancelled."""
    rng, waiting, tickets = np.random.default_rng(seed), list(enumerate(requests)), {}
    done, gone, shown = {}, set(), {}
    while waiting or slots.busy:
        for i, request in waiting[: rng.integers(0, 4)]:
            tickets[slots.add(request)] = i
            waiting = waiting[1:]
        for progress in slots.run(int(rng.integers(1, most))):
            i = tickets[progress.ticket]
            assert i not in gone and i not in done and progress.request is requests[i]
            before = shown.get(i, [])
            assert progress.tokens[: len(before)].tolist() == before  # what was shown once stays
            shown[i] = progress.tokens.tolist()
            if progress.done:
                done[i] = progress.tokens.tolist()
        alive = [t for t, i in tickets.items() if i not in done and i not in gone]
        if alive and rng.random() < cancel:
            ticket = int(rng.choice(alive))
            assert slots.cancel(ticket) and not slots.cancel(ticket)
            gone.add(tickets[ticket])
    assert done.keys() | gone == set(range(len(requests))) and not done.keys() & gone
    return done, gone


@pytest.fixture(scope="module")
def alone(random):
    """Requests and the tokens of each, alone in fresh slots of the same shape."""
    model = random[0]
    requests, found = list(some_requests(model, 12, 5)), []
    for request in requests:
        slots = Slots(model, 4, 3, 160)
        slots.add(request)
        (progress,) = slots.run()
        assert progress.done
        found.append(progress.tokens.tolist())
    return requests, found


@pytest.mark.smoke
@pytest.mark.parametrize("seed, cancel", [(1, 0.0), (2, 0.3)])
def test_who_comes_and_goes_changes_nobodys_tokens(random, alone, seed, cancel):
    requests, expected = alone
    order = np.random.default_rng(seed).permutation(len(requests))
    done, gone = run_all(random[0], [requests[i] for i in order], Slots(random[0], 4, 3, 160), seed, cancel)
    assert bool(gone) == bool(cancel) and len(done) > 4
    for k, tokens in done.items():
        assert tokens == expected[order[k]]


def test_what_is_reused_is_what_would_be_computed(random, alone, monkeypatch):
    """Prompts that are there whole, in part, in other rows or other branches are taken over, to the last bit."""
    model, (requests, expected) = random[0], alone
    longer = [
        dataclasses.replace(
            r, document=Document((*r.document.turns, Turn("assistant"), Turn("user", [Text("on")])))
        )
        for r in requests
    ]
    mine = [i for i, r in enumerate(requests) if len(model.prompts(longer[i])[0]) + 66 < model.longest]
    slots, plain = Slots(model, 4, 3, 160), Slots(model, 4, 3, 160)
    fills = []
    admit = Slots._admit
    monkeypatch.setattr(Slots, "_admit", lambda self: fills.append(admit(self)) or fills[-1])
    for i in mine:
        plain._held = [np.zeros(0, np.int32)] * 12  # it remembers nothing
        for request, into in (
            (requests[i], slots),
            (requests[i], slots),
            (longer[i], slots),
            (longer[i], plain),
        ):
            into.add(request)
        first, second = slots.run(), plain.run()
        assert [p.tokens.tolist() for p in first[:2]] == [expected[i]] * 2
        assert first[2].tokens.tolist() == second[0].tokens.tolist()
    copied = sum(int(fill["copied"][: fill["count"]].sum()) for fill in fills[::2])
    assert copied > 2 * len(mine)


def test_samples_of_one_prompt_read_it_once(random):
    model = random[0]
    (document,) = documents(model, 1, seed=11)
    slots = Slots(model, 4, 2, 160)
    for seed in range(4):
        slots.add(Request(document, size=(2, 2), seed=seed, guidance=2.0, image=WILD))
    fill = slots._admit()
    read = fill["chunks"] - fill["copied"]
    chunks = [-(-len(p) // model.chunk) for p in model.prompts(Request(document, size=(2, 2), guidance=2.0))]
    assert fill["count"] == 8 and read[:8].sum() == sum(chunks)


def test_one_program_and_one_dispatch_a_batch(random, monkeypatch):
    model, calls = random[0], []
    dispatch = Slots._run
    monkeypatch.setattr(Slots, "_run", lambda *a: calls.append(1) or dispatch(*a))
    asked = [Request(d, size=(2, 3), image=WILD, seed=i) for i, d in enumerate(documents(model, 3, seed=1))]
    model.generate(asked, 4)
    assert len(calls) == 1

    slots, compiled = Slots(model, 4, 2, 160), []
    slots.add(asked[0])
    slots.run()
    note = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(note)
    run_all(model, list(some_requests(model, 8, 3, three=False)), slots)
    jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


def test_wrong_slots_and_requests(random):
    model = random[0]
    with pytest.raises(ValueError, match="1 to 3 branches"):
        Slots(model, 1, 4)
    slots = Slots(model, 1, 1, 64)
    with pytest.raises(ValueError, match="needs 2 branches, these slots have 1"):
        slots.add(Request(Document([Turn("user", [Text("x")])]), guidance=2.0, size=(1, 1)))
    with pytest.raises(ValueError, match="do not fit slots of 64"):
        slots.add(Request(Document([Turn("user", [Text("x")])]), size=(8, 8)))
    assert not slots.busy and slots.run() == []
    ask = lambda **options: Request(Document([Turn("user", [Text("x")])]), **options)
    for size in ((0, 8), (-1, -1), (2.5, 2), (3,)):
        with pytest.raises(ValueError, match="size must be"):
            ask(size=size)
    for wrong in (dict(guidance=1e39), dict(image_guidance=np.nan), dict(stop=(1,))):
        with pytest.raises(ValueError):
            ask(**wrong)
    for wrong in (dict(temperature=np.nan), dict(temperature=np.inf), dict(top_k=3_000_000_000)):
        with pytest.raises(ValueError, match="expected temperature"):
            Strategy(**wrong)
    with pytest.raises(ValueError, match="every 1 token"):
        list(model.stream([ask(size=(1, 1))], 1, every=0))


def test_a_model_beyond_use_is_an_error_and_slots_recover(random, alone, monkeypatch):
    """Not for ever a text piece, which is what the largest of no numbers is."""
    model, (requests, expected) = random[0], alone
    slots = Slots(model, 4, 3, 160)
    slots.add(requests[0])
    head, nothing = model.weights["head"], jnp.full_like(model.weights["head"], jnp.nan)
    monkeypatch.setitem(model.weights, "head", nothing)
    with pytest.raises(FloatingPointError, match="not finite"):
        slots.run()
    monkeypatch.setitem(model.weights, "head", head)
    assert not slots.busy
    # An exception between admission and dispatch loses the requests in slots, and never mixes up what comes after.
    slots.add(requests[1])
    with monkeypatch.context() as broken:
        broken.setattr(slots_module, "_dispatch", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            slots.run()
    for request in (requests[1], requests[0]):
        slots.add(request)
    assert [p.tokens.tolist() for p in slots.run()] == [expected[1], expected[0]]


@pytest.mark.soak
def test_two_thousand_requests(random):
    """None lost, none mixed up, memory flat."""
    model = random[0]
    requests, alone, slots, live = list(some_requests(model, 200, 9)), {}, Slots(model, 8, 3, 160), []
    compared = 0
    for part in range(10):
        order = np.random.default_rng(part).permutation(len(requests))
        done, gone = run_all(model, [requests[i] for i in order], slots, part, 0.4, most=24)
        for k, tokens in done.items():
            compared += int(order[k]) in alone
            assert alone.setdefault(int(order[k]), tokens) == tokens
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        live.append((sum(x.nbytes for x in jax.live_arrays()), resident))
        print(
            f"{part}: {len(done)} done, {len(gone)} cancelled, {compared} compared, bytes live and resident {live[-1]}"
        )
    assert compared > 1000
    arrays, pages = zip(*live[1:])
    assert max(arrays) == min(arrays) and max(pages) - pages[0] < 32 << 20


# ---- dialogues ------------------------------------------------------------------------------------


def test_a_dialogue_goes_on_from_any_turn_as_if_read_anew(random):
    model = random[0]
    words = ["one", "two red", "three"]
    ask = dict(image=WILD, text=WILD, max_tokens=20, guidance=1.5)
    whole = Dialogue(model, seed=7, **ask)
    turns = [whole.say(Text(word)) for word in words]
    assert whole.turns == 3 and len(whole.document.turns) == 6
    for n in range(3):
        fresh = Dialogue(model, Document(whole.document.turns[: 2 * n]), seed=7, **ask)
        assert [fresh.say(Text(word)) for word in words[n:]] == turns[n:]
    # Back, and the same words again; another seed draws something else.
    whole.rewind(1)
    assert len(whole.document.turns) == 2 and whole.say(Text("two red")) == turns[1]
    whole.rewind(1)
    whole.seed = 8
    assert whole.say(Text("two red")) != turns[1]
    whole.rewind(0)
    assert whole.document == Document()
    with pytest.raises(ValueError, match="expected 0 to 0 answers"):
        whole.rewind(1)


def test_a_warm_dialogue_compiles_nothing_and_answers_the_same(random):
    model = copy.copy(random[0])
    model.longest -= 3 * model.chunk  # of a length that nothing was compiled for
    ask = dict(image=WILD, text=WILD, max_tokens=20, guidance=1.5, seed=7)
    compiled = []
    note = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        warm = Dialogue(model, **ask)
        warm.warm()
        warm._ahead.join()
        before = len(compiled)
        turns = [warm.say(Text(word), output="text") for word in ("one", "two red")]
        assert 0 < before == len(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    cold = Dialogue(model, **ask)
    assert [cold.say(Text(word), output="text") for word in ("one", "two red")] == turns
    # What cannot be answered is not hidden by it: whoever asks is told.
    full = Dialogue(model, Document([Turn("system", [Text("x " * model.longest)])]))
    full.warm()
    with pytest.raises(ValueError, match="too long"):
        full.say(Text("one"))


def test_a_dialogue_of_nothing_said(random):
    told = Document([Turn("system", [Text("be brief")])])
    dialogue = Dialogue(random[0], told, seed=-3, output="image", size=(2, 2), image=WILD)
    dialogue.rewind(0)
    assert dialogue.document == told
    dialogue.say(Text("x"))
    dialogue.rewind(0)
    assert dialogue.document == told


def test_words_that_are_no_characters_do_not_outgrow_a_dialogue(random):
    model = random[0]
    dialogue = Dialogue(model, output="text", text=Strategy(1.5), max_tokens=40)
    for n in range(3):
        turn = dialogue.say(Text("x"))
        assert dialogue.document.turns[-1] == turn and all("\ufffd" not in part.text for part in turn.parts)
        assert len(model.grammar.encode(dialogue.document, model.text)) < (n + 1) * 45 + 5


def test_a_dialogue_that_is_not_listened_to_stays_as_it_was(random):
    model = random[0]
    dialogue = Dialogue(model, output="image", size=(3, 3), image=WILD)
    first = dialogue.say(Text("a star"), Image(pixels=np.zeros((8, 8, 3), np.uint8)))
    before = dialogue.document
    for turn, done in dialogue.stream(Text("on"), every=2):
        assert not done
        if turn.parts:
            break
    assert dialogue.document == before
    again = dialogue.say(Text("on"))
    dialogue.rewind(0)
    pixels = Image(pixels=np.zeros((8, 8, 3), np.uint8))
    assert dialogue.say(Text("a star"), pixels) == first and dialogue.say(Text("on")) == again


# ---- streaming, stops, the best -------------------------------------------------------------------


def test_partial_images_show_what_is_there(random, sampler):
    model = random[0]
    request = Request(Document([Turn("user", [Text("x")])]), size=(3, 4), image=WILD, seed=3)
    patch, steps = model.tokenizer.patch, []
    for i, turn, done in model.stream([request], 2, every=4):
        assert i == 0
        steps.append((turn, done))
    assert [done for _, done in steps] == [False] * (len(steps) - 1) + [True]
    final = steps[-1][0].parts[0]
    assert final.codes.shape == (3, 4)
    board = model.sketches([np.full((3, 4), -1)])[0]
    shares = []
    for turn, _ in steps[:-1]:
        for image in turn.parts:
            assert image.pixels.shape == final.pixels.shape
            cells = (image.pixels == board).reshape(3, patch, 4, patch, 3).all((1, 3, 4)).ravel()
            shares.append(12 - cells.sum())
            assert image.codes is None or shares[-1] == 12
            assert not cells[: shares[-1]].any() and cells[shares[-1] :].all()  # in reading order
    assert shares == sorted(shares) and 0 < shares[0] < 12


def test_an_image_keeps_the_codes_that_it_is_to_have(random):
    model = random[0]
    ask = lambda **options: Request(
        Document([Turn("user", [Text("x")])]), size=(3, 4), image=WILD, seed=3, **options
    )
    free = model.generate([ask()])[0].parts[0].codes
    kept = np.full((3, 4), -1, np.int32)
    kept[1, 1:3], kept[2, 0] = (free[1, 1:3] + 1) % model.grammar.codes, free[2, 0]
    with_kept, other = (turn.parts[0].codes for turn in model.generate([ask(kept=kept), ask()]))
    assert (with_kept[kept >= 0] == kept[kept >= 0]).all() and (other == free).all()
    assert (with_kept.ravel()[:5] == free.ravel()[:5]).all()  # of what comes later nothing is known
    assert (with_kept.ravel()[7:] != free.ravel()[7:]).any()  # of what came before all is
    again = (
        model.generate([ask(kept=np.where(kept < 0, with_kept, -1).astype(np.int32))], 1)[0].parts[0].codes
    )
    assert (again[kept < 0] == with_kept[kept < 0]).all()
    with pytest.raises(ValueError, match="kept are codes"):
        ask(kept=kept[:2])
    with pytest.raises(ValueError, match="kept has the shape"):
        model.generate([ask(kept=np.full((3, 4), model.grammar.codes))])


def test_stops_and_limits(random):
    model = random[0]
    ask = lambda **options: Request(
        Document([Turn("user", [Text("x")])]), output="text", text=Strategy(1.0), **options
    )
    (whole,) = model.generate([ask(seed=1)], 2)
    words = whole.parts[0].text
    assert len(words) > 60
    stop = next(words[i : i + 3] for i in range(20, 60) if words.count(words[i : i + 3]) == 1)
    (cut,) = model.generate([ask(seed=1, stop=("never there", stop))], 2)
    assert cut.parts == (Text(words[: words.index(stop)]),)
    (short,) = model.generate([ask(seed=1, max_tokens=5)], 2)
    assert (
        len(model.text.encode(short.parts[0].text)) <= 4 or "\N{REPLACEMENT CHARACTER}" in short.parts[0].text
    )
    with pytest.raises(ValueError, match="max_tokens must be at least"):
        model.generate([ask(max_tokens=0)])
    for wrong in (
        dict(stop="x"),
        dict(stop=("",)),
        dict(guidance_interval=(0.5, 0.2)),
        dict(guidance=np.nan),
    ):
        with pytest.raises(ValueError):
            ask(**wrong)


def test_the_likeliest_of_several(random):
    model = random[0]
    asked = [Request(d, size=(2, 3), image=WILD, seed=i) for i, d in enumerate(documents(model, 2, seed=8))]
    turns, scores = best_of(model, asked, 3, batch_size=2)
    assert scores.shape == (2, 3)
    for request, turn, row in zip(asked, turns, scores):
        whole = Document((*request.document.turns, turn))
        nats = model.nats([whole])[0][len(model.prompts(request)[0]) : -1]
        assert -nats.mean() == pytest.approx(row.max(), rel=1e-4)
    single, one = best_of(model, asked, 1, batch_size=2)
    np.testing.assert_allclose(one[:, 0], scores[:, 0], rtol=1e-5)
    with pytest.raises(ValueError, match="rows of"):
        model.nats([Document([Turn("user", [Text("x " * 400)])])])


def test_of_descriptions_that_from_which_the_picture_is_likeliest_drawn(random, monkeypatch):
    """By the documents that say the words and then draw the picture, and a little by the words' own likelihood."""
    model, rng = random[0], np.random.default_rng(3)
    shown = [picture(rng, model) for _ in range(2)]
    ask = lambda image, **more: Request(
        Document([Turn("user", [image, Text("what is it?")])]),
        "text",
        text=Strategy(0.0),
        max_tokens=5,
        **more,
    )
    asked = [ask(image) for image in shown]
    turns, scores = best_of(model, asked, 4, "drawing", batch_size=2)
    monkeypatch.setattr(best, "_WORDS", 0.0)
    kept, drawn = best_of(model, asked, 4, "drawing", batch_size=2)
    for image, turn, row, greedy in zip(shown, kept, drawn, model.generate(asked, 2)):
        expected = []
        for said in (turn, greedy):
            words = Text(said.parts[0].text.strip())
            document = Document((Turn("user", (words,)), Turn("assistant", (image,))))
            expected.append(-model.nats([document])[0][-image.codes.size - 3 :].sum())
        # The first is the greedy answer; the others are not, or would all be the same.
        assert expected == pytest.approx([row.max(), row[0]], rel=1e-4)
        assert len(set(row.round(3))) > 1
    _, means = best_of(model, asked, 4, batch_size=2)
    tokens = (scores - drawn) / 0.3 / means
    np.testing.assert_allclose(tokens, tokens.round(), atol=0.01)
    assert 1 <= tokens.min() <= tokens.max() <= 6
    pictureless = Request(Document([Turn("user", [Text("what is it?")])]), "text")
    for wrong in (pictureless, dataclasses.replace(ask(shown[0]), output="image")):
        with pytest.raises(ValueError, match="words about a picture"):
            best_of(model, [wrong], 2, "drawing")


def test_images_in_the_context_are_encoded(random):
    model, rng = random[0], np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    codes = model.tokenizer.encode(pixels[None])[0]
    ask = lambda image: Request(Document([Turn("user", [image, Text("bluer")])]), size=(2, 2), image=WILD)
    assert model.generate([ask(Image(pixels=pixels))], 2) == model.generate([ask(Image(codes=codes))], 2)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.generate([ask(Image(pixels=pixels[:7]))], 2)


SHARDED = """
import sys
from pathlib import Path
import numpy as np
from mmgen.document import Document, Text, Turn
from mmgen.sampling.sampler import Request, load
from mmgen.sampling.strategies import Strategy

asked = [Request(Document([Turn("user", [Text(w)])]), size=(3, 3), seed=i, guidance=2.0) for i, w in enumerate("abc")]
drawn = {}
for tensor in (1, 2):
    model = load(sys.argv[1], tensor=tensor)
    nats = model.nats([Document([Turn("user", [Text("a red star")])])])[0]
    drawn[tensor] = [turn.parts[0].codes for turn in model.generate(asked, 2)], nats
shared = {x.sharding.spec for layer in model.weights["layers"] for x in layer.values()}
assert len(shared) > 1, shared
np.testing.assert_allclose(drawn[1][1], drawn[2][1], atol=1e-4)
np.testing.assert_array_equal(drawn[1][0], drawn[2][0])
"""


@pytest.mark.soak
@pytest.mark.parametrize("outline", [0, 16])
def test_devices_that_share_a_model_draw_the_same(space, tmp_path, outline):
    from mmgen.stages import loop
    from tests.conftest import config_of

    sizes = ["kv_heads=2", "vocab_multiple=2", f"outline={outline}"]
    flags = [*space.transformer_flags, *(f"--config.model.{size}" for size in sizes)]
    loop.train(config_of(flags), tmp_path / "run", stop_at=1)
    run_python(SHARDED, tmp_path / "run", devices=2)
