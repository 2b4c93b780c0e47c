"""The grammar: every document survives, and everything derived from the tokens agrees with the machine."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgen import grammar as grammars
from mmgen.document import REFUSALS, ROLES, Document, Image, Refusal, Text, Turn, caption_to_image
from mmgen.grammar import Grammar, GrammarError, State

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

LETTERS = "abcd"
GRAMMARS = [Grammar(pieces=len(LETTERS), max_side=3, codes=4, depth=depth) for depth in (1, 3)]
UNLIMITED = 10**6


class Letters:
    """The smallest text model: one piece a letter."""

    def encode(self, text):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids)


LETTERS_MODEL = Letters()


@st.composite
def images(draw, grammar):
    side = st.integers(1, grammar.max_side)
    shape = (draw(side), draw(side)) + ((grammar.depth,) if grammar.depth > 1 else ())
    count = int(np.prod(shape))
    codes = draw(st.lists(st.integers(0, grammar.codes - 1), min_size=count, max_size=count))
    return Image(codes=np.reshape(codes, shape))


def refusals():
    """Turns of an assistant that refuses."""
    texts = st.lists(st.builds(Text, st.text(LETTERS, max_size=4)), max_size=2)
    said = st.tuples(st.builds(Refusal, st.integers(0, REFUSALS - 1)), texts)
    return said.map(lambda parts: Turn("assistant", (parts[0], *parts[1])))


@st.composite
def documents(draw, min_turns=0):
    """(grammar, document): any roles, empty and adjacent texts, images of any size."""
    grammar = draw(st.sampled_from(GRAMMARS))
    part = st.builds(Text, st.text(LETTERS, max_size=4)) | images(grammar)
    turn = st.builds(Turn, st.sampled_from(ROLES), st.lists(part, max_size=4)) | refusals()
    return grammar, Document(draw(st.lists(turn, min_size=min_turns, max_size=4)))


@st.composite
def damaged(draw):
    """(grammar, tokens): a document with a few tokens changed, removed or added, or cut short."""
    grammar, document = draw(documents())
    tokens = grammar.encode(document, LETTERS_MODEL).tolist()
    # Mostly tokens that mean something: the reserved controls would drown the rest.
    known = {*tokens, *grammar.roles.values(), 0, grammar.h(2), grammar.w(2), grammar.code_start}
    token = st.sampled_from(sorted(known)) | st.integers(-2, grammar.vocab_size + 1)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(tokens)))
        tokens[at : at + draw(st.integers(0, 1))] = [draw(token)] * draw(st.integers(0, 1))
    return grammar, tokens[: draw(st.integers(0, len(tokens)) | st.just(len(tokens)))]


@st.composite
def constraints(draw, grammar, batch):
    """Keyword arguments of `allowed`, each without effect at times."""
    per_row = lambda strategy: np.array(draw(st.lists(strategy, min_size=batch, max_size=batch)))
    side = st.integers(0, grammar.max_side)
    return {
        "size": per_row(st.tuples(side, side) if draw(st.booleans()) else st.just((0, 0))).astype(np.int32),
        "image_only": per_row(st.booleans() if draw(st.booleans()) else st.just(False)),
        "text_only": per_row(st.booleans() if draw(st.booleans()) else st.just(False)),
        "refuse": per_row(st.booleans() if draw(st.booleans()) else st.just(True)),
    }


def for_need(given):
    return {name: given[name] for name in ("size", "image_only", "refuse")}


def trace(grammar, tokens):
    """The machine's states: before each token, and after the last."""
    states = [grammar.start(1)]
    for token in tokens:
        states.append(grammar.advance(states[-1], np.array([token], np.int32)))
    return states


def repeat(state, n):
    return State(*(np.repeat(field, n, axis=0) for field in state))


def same(a, b):
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def choose(rng, allowed):
    """A random allowed token of each row."""
    tokens = []
    for row in allowed:
        legal = np.flatnonzero(row)
        assert len(legal), "a row without a legal token"
        tokens.append(rng.choice(legal))
    return np.array(tokens, np.int32)


# Documents and tokens.


@given(documents())
def test_every_document_survives(case):
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert grammar.decode(tokens, LETTERS_MODEL) == document.normalised()
    assert grammar.decode([*tokens, grammar.eos, grammar.eos], LETTERS_MODEL) == document.normalised()


@given(documents(min_turns=1))
def test_an_open_document_is_the_document_without_its_last_two_tokens(case):
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL, close=False)
    assert [*tokens, grammar.end, grammar.eos] == grammar.encode(document, LETTERS_MODEL).tolist()


@given(damaged())
def test_reading_rejects_exactly_what_the_machine_forbids_and_says_where(case):
    grammar, tokens = case
    legal = 0
    state = grammar.start(1)
    for token in tokens:
        known = 0 <= token < grammar.vocab_size
        if not known or not grammar.allowed(state, np.array([UNLIMITED]))[0, token]:
            break
        state = grammar.advance(state, np.array([token]))
        legal += 1
    if legal < len(tokens):
        for read in (grammar.feed, lambda t: grammar.decode(t, LETTERS_MODEL)):
            with pytest.raises(GrammarError, match=rf"^token {legal}: expected .*, found "):
                read(tokens)
    else:
        assert same(grammar.feed(tokens), state)
        if state.mode[0] == grammars.DONE:
            grammar.decode(tokens, LETTERS_MODEL)
        else:
            with pytest.raises(GrammarError, match=f"^token {legal}: expected .*, found the end of"):
                grammar.decode(tokens, LETTERS_MODEL)


def test_errors_say_expected_and_found():
    g = GRAMMARS[1]
    cases = {
        (): "token 0: expected <bos>, found the end of the tokens",
        (g.bos, 2): "token 1: expected a role or <eos>, found piece 2",
        (g.bos, g.roles["user"], g.eoi): "token 2: expected a text piece, <boi> or <end>, found <eoi>",
        (g.bos, g.roles["user"], g.boi, g.w(1)): "token 3: expected a height <h:n>, found <w:1>",
        (g.bos, g.roles["user"], g.boi, g.h(2), g.w(1), g.code_start, g.code_start + 1): (
            "token 6: expected an image code at depth 1 (5 to come of 2 x 1), found code 1 at depth 0"
        ),
        (g.bos, g.pieces + 40): "token 1: expected a role or <eos>, found <reserved:40>",
        (g.bos, -1): "token 1: expected a role or <eos>, found -1, which is outside the vocabulary of 86",
    }
    for tokens, message in cases.items():
        with pytest.raises(GrammarError) as error:
            g.decode(tokens, LETTERS_MODEL)
        assert str(error.value) == message


def test_tokens_must_be_a_row_of_integers():
    for tokens in (np.zeros((1, 3), np.int32), np.zeros(3), 7):
        with pytest.raises(GrammarError, match="tokens must be integers"):
            GRAMMARS[0].feed(tokens)


@pytest.mark.parametrize(
    "image, message",
    [
        (Image(pixels=np.zeros((8, 8, 3), np.uint8)), "no codes"),
        (Image(codes=np.zeros((4, 1), int)), "sides must be 1 to 3 patches, found 4"),
        (Image(codes=np.zeros((1, 4), int)), "sides must be 1 to 3 patches, found 4"),
        (Image(codes=np.full((1, 1), 4)), r"must be in \[0, 4\), found 4 to 4"),
        (Image(codes=np.zeros((1, 1, 3), int)), r"codes must be \[h, w\], found \[1, 1, 3\]"),
        (Image(codes=np.zeros((1, 1, 1), int)), r"codes must be \[h, w\], found \[1, 1, 1\]"),
    ],
)
def test_images_that_cannot_be_written(image, message):
    with pytest.raises(GrammarError, match=message):
        GRAMMARS[0].encode(caption_to_image("a", image), LETTERS_MODEL)


def test_a_text_model_cannot_reach_past_its_pieces():
    class Rogue(Letters):
        def encode(self, text):
            return [len(LETTERS)]

    with pytest.raises(GrammarError, match=r"text ids must be in \[0, 4\), found 4 to 4"):
        GRAMMARS[0].encode(caption_to_image("a"), Rogue())


def test_an_open_document_needs_a_turn():
    with pytest.raises(GrammarError, match="no last turn"):
        GRAMMARS[0].encode(Document(), LETTERS_MODEL, close=False)


# The vocabulary.


def test_the_numbers_of_control_tokens_never_move():
    g = Grammar(pieces=100, max_side=16, codes=1000)
    assert [g.bos, g.eos, g.end, g.boi, g.eoi] == [100, 101, 102, 103, 104]
    assert g.roles == {"system": 105, "user": 106, "assistant": 107, "page": 108}
    assert [g.name(116), g.name(131), g.name(132)] == ["<refuse:0>", "<refuse:15>", "<reserved:32>"]
    assert [g.h(1), g.h(16), g.w(1), g.w(16), g.code_start, g.vocab_size] == [164, 179, 180, 195, 196, 1196]
    assert Grammar(pieces=100, max_side=16, codes=1000, depth=4).vocab_size == 196 + 4000


def test_a_grammar_is_saved_as_its_fields():
    g = Grammar(pieces=100, max_side=16, codes=1000, depth=2)
    again = Grammar.from_dict(json.loads(json.dumps(g.to_dict())))
    assert again == g and again.hash == g.hash
    # Saved shards and checkpoints carry this.
    assert g.hash == "fe57890338a9"
    assert len({Grammar(**{**g.to_dict(), field: 7}).hash for field in g.to_dict()} | {g.hash}) == 5


@pytest.mark.parametrize("fields", [(0, 3, 4), (4, 0, 4), (4, 3, -1), (4, 3, 4, 0), (4, 3, 4.0)])
def test_a_grammar_needs_positive_sizes(fields):
    with pytest.raises(GrammarError, match="positive whole number"):
        Grammar(*fields)


@pytest.mark.parametrize("side", [0, -1, 4])
def test_sides_are_checked(side):
    for token in (GRAMMARS[0].h, GRAMMARS[0].w):
        with pytest.raises(GrammarError, match="1 to 3"):
            token(side)


# Positions, weights and drops, each against the machine or the documents.


@given(documents())
def test_the_machine_accepts_every_document_and_gives_its_positions(case):
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL)
    positions = grammar.positions(tokens)
    assert positions.dtype == np.int32 and positions.shape == (len(tokens), 3)
    state = grammar.start(1)
    for n, token in enumerate(tokens):
        room = np.array([len(tokens) - n])  # exactly enough
        assert grammar.need(state)[0] <= room[0]
        assert grammar.allowed(state, room)[0, token]
        assert np.array_equal(grammar.position(state)[0], positions[n])
        assert np.array_equal(grammar.positions(tokens[:n]), positions[:n])
        assert same(grammar.feed(tokens[:n]), state)
        state = grammar.advance(state, tokens[n : n + 1])
    assert state.mode[0] == grammars.DONE and grammar.need(state)[0] == 0
    assert same(grammar.feed(tokens), state)
    assert same(grammar.advance(state, np.array([grammar.eos])), state)


@given(st.lists(documents(), min_size=1, max_size=4), st.data())
def test_documents_one_after_another_are_each_as_if_alone(cases, data):
    grammar = cases[0][0]
    rows = [grammar.encode(document, LETTERS_MODEL) for each, document in cases if each == grammar]
    joined = np.concatenate(rows)
    user = data.draw(st.booleans())
    for of in (grammar.positions, lambda t: grammar.loss_weights(t, 0.5, 2.0, user)):
        assert np.array_equal(of(joined), np.concatenate([of(row) for row in rows]))
    for k in range(2):
        alone = np.concatenate([grammar.guidance_drops(row)[k] for row in rows])
        assert np.array_equal(grammar.guidance_drops(joined)[k], alone)


def test_positions_of_a_small_document():
    g = GRAMMARS[0]
    document = caption_to_image("ab", Image(codes=np.zeros((2, 3), int)))
    t, y, x = g.positions(g.encode(document, LETTERS_MODEL)).T.tolist()
    #           bos user a  b  end ass boi h  w  codes ................  eoi end eos
    assert t == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 12, 13, 14]
    assert y == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 10, 10, 10, 12, 13, 14]
    assert x == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 9, 10, 11, 12, 13, 14]


@given(documents(), st.booleans(), st.booleans())
def test_learned_are_the_free_choices_of_those_who_answer(case, user, shows):
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL)
    learned = [grammar.roles[role] for role in ("assistant", "page", *["user"] * user)]
    expected = []
    for state, token in zip(trace(grammar, tokens), tokens):
        inside = state.mode[0] not in (grammars.BOS, grammars.BETWEEN)
        forced = grammar.allowed(state, np.array([UNLIMITED])).sum() == 1
        is_text = token < grammar.pieces or token == grammar.end or 0 <= token - grammar.refuse < REFUSALS
        counts = inside and not forced and state.role[0] in learned
        counts = counts and (is_text or shows or state.role[0] != grammar.roles["user"])
        expected.append((0.5 if is_text else 2.0) if counts else 0.0)
    weights = grammar.loss_weights(tokens, text=0.5, image=2.0, user=user, user_images=shows)
    assert weights.dtype == np.float32 and weights.tolist() == expected


@given(documents())
def test_dropping_what_was_asked_leaves_a_document(case):
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL)
    text, image = grammar.guidance_drops(tokens)
    assert text.dtype == image.dtype == bool and not (text & image).any()

    def without(*kinds):
        asks = lambda turn: turn.role in ("system", "user")
        kept = lambda turn: [part for part in turn.parts if not (asks(turn) and isinstance(part, kinds))]
        return Document([Turn(turn.role, kept(turn)) for turn in document.turns]).normalised()

    assert grammar.decode(tokens[~text], LETTERS_MODEL) == without(Text)
    assert grammar.decode(tokens[~(text | image)], LETTERS_MODEL) == without(Text, Image)


# The machine.


@given(st.data())
def test_whatever_the_machine_allows_is_a_document_that_ends_in_time(data):
    grammar = data.draw(st.sampled_from(GRAMMARS))
    batch = data.draw(st.integers(1, 4))
    given = data.draw(constraints(grammar, batch))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    state = grammar.start(batch)
    room = np.array(data.draw(st.lists(st.integers(2, 60), min_size=batch, max_size=batch)))
    rows = [[] for _ in range(batch)]
    for step in range(room.max()):
        tokens = choose(rng, grammar.allowed(state, room - step, **given))
        for row, token, mode in zip(rows, tokens, state.mode):
            if mode == grammars.DONE:
                assert token == grammar.eos
            else:
                row.append(token)
        state = grammar.advance(state, tokens)
    for n, row in enumerate(rows):
        assert len(row) <= room[n]
        document = grammar.decode(row, LETTERS_MODEL)
        check(document, given, n)


def check(document, given, n):
    """That a document obeys the constraints of row n."""
    size, image_only, text_only = given["size"][n], given["image_only"][n], given["text_only"][n]
    for turn in document.turns:
        for image in (part for part in turn.parts if isinstance(part, Image)):
            assert all(side in (0, found) for side, found in zip(size, image.codes.shape))
        if turn.parts and isinstance(turn.parts[0], Refusal):
            assert given["refuse"][n]
        elif turn.role == "assistant" and image_only:
            assert [type(part) for part in turn.parts] == [Image]
        elif turn.role == "assistant" and text_only:
            assert all(isinstance(part, Text) for part in turn.parts)


@given(documents(), st.data())
def test_room_forbids_exactly_what_could_not_be_finished(case, data):
    """need() is the length of the shortest way out (Bellman), and allowed() is legality and need together."""
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL)
    state = grammar.feed(tokens[: data.draw(st.integers(0, len(tokens) - 1))])
    given = data.draw(constraints(grammar, 1))
    vocabulary = np.arange(grammar.vocab_size)
    legal = grammar.allowed(state, np.array([UNLIMITED]), **given)[0]
    after = grammar.advance(repeat(state, len(vocabulary)), vocabulary)
    after = grammar.need(after, **for_need(given))
    need = grammar.need(state, **for_need(given))[0]
    assert need == 1 + after[legal].min()

    room = data.draw(st.integers(need, need + 12))
    allowed = grammar.allowed(state, np.array([room]), **given)[0]
    finishable = legal & (after <= room - 1)
    if state.mode[0] == grammars.BETWEEN and given["image_only"][0]:
        # No turn is begun unless an answer could be: a little stricter than need be.
        assert allowed[grammar.eos] and not (allowed & ~finishable).any()
    else:
        assert np.array_equal(allowed, finishable)
    short = grammar.allowed(state, np.array([need - 1]), **given)[0]
    assert np.array_equal(short, grammar.allowed(state, np.array([need]), **given)[0])


@given(documents(), st.integers(1, 20))
def test_constraints_left_out_change_nothing(case, room):
    grammar, document = case
    tokens = grammar.encode(document, LETTERS_MODEL)
    states = State(*(np.concatenate(fields) for fields in zip(*trace(grammar, tokens))))
    rows, room = len(states.mode), np.array([room])
    no = np.zeros(rows, bool)
    free = {"size": np.zeros((rows, 2), np.int32), "image_only": no, "text_only": no, "refuse": ~no}
    assert np.array_equal(grammar.allowed(states, room), grammar.allowed(states, room, **free))
    assert np.array_equal(grammar.need(states), grammar.need(states, **for_need(free)))


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["depth1", "depth3"])
def test_what_an_assistant_turn_may_hold(grammar):
    """Of one piece, <boi> and <end>: which may come first, and which after an image."""
    marks = [0, grammar.boi, grammar.end]
    image = [grammar.boi, grammar.h(1), grammar.w(1), *grammar._depth_start, grammar.eoi]

    def may(role, after, **given):
        state = grammar.feed([grammar.bos, grammar.roles[role], *after])
        return grammar.allowed(state, np.array([UNLIMITED]), **given)[0, marks].tolist()

    image_only, text_only = {"image_only": np.array([True])}, {"text_only": np.array([True])}
    for role in ROLES:
        answers = role == "assistant"
        assert may(role, []) == may(role, image) == [True, True, True]
        assert may(role, [], **text_only) == may(role, image, **text_only) == [True, not answers, True]
        assert may(role, [], **image_only) == [not answers, True, not answers]
        assert may(role, image, **image_only) == [not answers, not answers, True]
        assert may(role, [], **image_only, **text_only) == [not answers, True, not answers]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["depth1", "depth3"])
def test_a_refusal_comes_first_and_then_words_alone(grammar):
    """Whatever an answer must be, it may be refused, where that is allowed; and by nobody but the assistant."""
    marks = [0, grammar.boi, grammar.refuse, grammar.refuse + REFUSALS - 1, grammar.end]

    def may(role, after, **given):
        state = grammar.feed([grammar.bos, grammar.roles[role], *after])
        given = {name: np.array([value]) for name, value in given.items()}
        return grammar.allowed(state, np.array([UNLIMITED]), **given)[0, marks].tolist()

    assert may("assistant", []) == [True] * 5
    assert (
        may("assistant", [], refuse=False)
        == may("user", [])
        == may("page", [])
        == [True, True, False, False, True]
    )
    assert may("assistant", [], image_only=True) == [False, True, True, True, False]
    assert may("assistant", [], text_only=True) == [True, False, True, True, True]
    assert may("assistant", [0]) == [True, True, False, False, True]
    for after in ([grammar.refuse + 3], [grammar.refuse + 3, 0]):
        assert (
            may("assistant", after)
            == may("assistant", after, image_only=True)
            == [True, False, False, False, True]
        )
    tokens = grammar.encode(Document([Turn("assistant", [Refusal(3), Text("ab")])]), LETTERS_MODEL)
    assert grammar.name(tokens[2]) == "<refuse:3>"
    with pytest.raises(GrammarError, match="<refuse:n>"):
        grammar.decode([grammar.bos, grammar.roles["assistant"], grammar.roles["user"]], LETTERS_MODEL)
    with pytest.raises(GrammarError, match="expected a text piece or <end>, found <boi>"):
        grammar.decode([grammar.bos, grammar.roles["assistant"], grammar.refuse, grammar.boi], LETTERS_MODEL)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["depth1", "depth3"])
def test_a_request_for_one_image_of_a_size(grammar):
    prompt = grammar.encode(caption_to_image("abc"), LETTERS_MODEL, close=False)
    state = repeat(grammar.feed(prompt), 2)
    given = {
        "size": np.array([[2, 3], [3, 1]], np.int32),
        "image_only": np.array([True, True]),
        "refuse": np.zeros(2, bool),
    }
    room = grammar.need(state, **given)
    assert room.tolist() == [6 + 6 * grammar.depth, 6 + 3 * grammar.depth]
    rng = np.random.default_rng(0)
    rows = []
    for step in range(room.max()):
        allowed = grammar.allowed(state, room - step, **given)
        rows.append(choose(rng, allowed))
        state = grammar.advance(state, rows[-1])
    rows = np.stack(rows, axis=1)
    assert rows[:, 0].tolist() == [grammar.boi] * 2
    for row, (height, width), length in zip(rows, given["size"], room):
        answer = grammar.decode([*prompt, *row], LETTERS_MODEL).turns[-1]
        assert answer.role == "assistant" and answer.parts[0].codes.shape[:2] == (height, width)
        assert row[length - 2 :].tolist() == [grammar.end] + [grammar.eos] * (len(row) - length + 1)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["depth1", "depth3"])
def test_numpy_and_jax_agree_inside_jit_scan_and_vmap(grammar):
    batch, room = 16, 50
    rng = np.random.default_rng(1)
    given = {
        "size": rng.integers(0, grammar.max_side + 1, (batch, 2)).astype(np.int32),
        "image_only": rng.random(batch) < 0.3,
        "text_only": rng.random(batch) < 0.3,
        "refuse": np.arange(batch) % 3 > 0,
    }

    def step(state, key, room):
        allowed = grammar.allowed(state, jnp.full(batch, room), **given)
        tokens = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf))
        outputs = allowed, tokens, grammar.position(state), grammar.need(state)
        return grammar.advance(state, tokens), outputs

    @jax.jit
    def write(key):
        rooms = room - jnp.arange(room)
        keys = jax.random.split(key, room)
        return jax.lax.scan(lambda s, x: step(s, *x), grammar.start(batch, jnp), (keys, rooms))

    last, (allowed, tokens, positions, need) = jax.tree.map(np.asarray, write(jax.random.key(0)))
    state = grammar.start(batch)
    for n in range(room):
        assert np.array_equal(allowed[n], grammar.allowed(state, np.full(batch, room - n), **given))
        assert np.array_equal(positions[n], grammar.position(state))
        assert np.array_equal(need[n], grammar.need(state))
        one_by_one = jax.vmap(lambda s, r, g: grammar.allowed(s, r, **g))(
            jax.tree.map(jnp.asarray, state), jnp.full(batch, room - n), given
        )
        assert np.array_equal(allowed[n], one_by_one)
        state = grammar.advance(state, tokens[n])
    assert same(state, last) and (state.mode == grammars.DONE).all()
    for n, row in enumerate(tokens.T):
        check(grammar.decode(row, LETTERS_MODEL), given, n)


@given(st.data())
@settings(max_examples=20)
def test_rows_are_independent(data):
    grammar, first = data.draw(documents())
    second = Document([Turn("page", [Text("abcd")])])
    rows = [grammar.encode(d, LETTERS_MODEL) for d in (first, second)]
    alone = [grammar.feed(row[: data.draw(st.integers(0, len(row)))]) for row in rows]
    room = np.array([data.draw(st.integers(1, 30)) for _ in rows])
    together = State(*(np.concatenate(fields) for fields in zip(*alone)))
    allowed = grammar.allowed(together, room)
    for n, state in enumerate(alone):
        assert np.array_equal(allowed[n], grammar.allowed(state, room[n : n + 1])[0])
