"""How a document is written as tokens, and everything that follows from it.

    document := <bos> turn* <eos>          turn  := role part* <end> | <assistant> <refuse:N> text* <end>
    part     := text | image               image := <boi> <h:H> <w:W> code{H*W*depth} <eoi>

One joint vocabulary, in this order: text pieces, 64 control tokens, sizes, image codes. From one
definition come encode and decode, position ids, loss weights, the tokens to drop for guidance,
and the state machine that a sampler follows so that whatever it writes is a document.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from mmgen.document import REFUSALS, ROLES, Document, Image, Refusal, Text, Turn

# The control block. Numbers are never moved or reused: saved tokens and models depend on them.
CONTROLS = 64
CONTROL = {"bos": 0, "eos": 1, "end": 2, "boi": 3, "eoi": 4}
CONTROL |= {role: 5 + n for n, role in enumerate(ROLES)}
CONTROL |= {f"refuse:{n}": 16 + n for n in range(REFUSALS)}

# The modes of the machine: what it expects next.
BOS, BETWEEN, TURN, HEIGHT, WIDTH, CODES, EOI, DONE, OPENED, REFUSED = range(10)
EXPECTED = (
    "<bos>",
    "a role or <eos>",
    "a text piece, <boi> or <end>",
    "a height <h:n>",
    "a width <w:n>",
    "an image code",
    "<eoi>",
    "nothing but <eos> after <eos>",
    "a text piece, <boi>, <refuse:n> or <end>",  # an assistant's turn in which nothing is yet
    "a text piece or <end>",
)


class GrammarError(ValueError):
    """A document that cannot be written, or tokens that are no document."""


class State(NamedTuple):
    """Where each row stands in its document: int32 arrays [B], numpy or JAX, and so a pytree."""

    mode: Any  # BOS .. REFUSED
    role: Any  # token of the role of the latest turn; 0 before the first
    images: Any  # images begun in this turn
    height: Any  # of the latest image, in patches
    width: Any
    remaining: Any  # codes still to come in the image
    p: Any  # position of the next text token; within the codes of an image, of its first code


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The joint vocabulary: text pieces [0, pieces), controls, <h:1..max_side>, <w:1..max_side>, codes.

    A quantizer that gives several codes a patch writes them innermost; each depth has its own
    range of ids, so code c at depth d is token `code_start + d * codes + c`.
    """

    pieces: int
    max_side: int
    codes: int
    depth: int = 1

    def __post_init__(self):
        for field, value in self.to_dict().items():
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise GrammarError(f"Grammar.{field} must be a positive whole number, not {value!r}")
            object.__setattr__(self, field, int(value))  # JSON takes no numpy numbers

    # The vocabulary.

    bos = property(lambda self: self.pieces + CONTROL["bos"])
    eos = property(lambda self: self.pieces + CONTROL["eos"])
    end = property(lambda self: self.pieces + CONTROL["end"])
    boi = property(lambda self: self.pieces + CONTROL["boi"])
    eoi = property(lambda self: self.pieces + CONTROL["eoi"])
    refuse = property(lambda self: self.pieces + CONTROL["refuse:0"])  # and the REFUSALS from it on
    size_start = property(lambda self: self.pieces + CONTROLS)  # from here on tokens are parts of images
    code_start = property(lambda self: self.size_start + 2 * self.max_side)
    vocab_size = property(lambda self: self.code_start + self.depth * self.codes)

    @functools.cached_property
    def roles(self) -> dict[str, int]:
        return {role: self.pieces + CONTROL[role] for role in ROLES}

    def h(self, height: int) -> int:
        return self.size_start - 1 + self._side(height)

    def w(self, width: int) -> int:
        return self.size_start - 1 + self.max_side + self._side(width)

    def _side(self, side: int) -> int:
        if not 1 <= side <= self.max_side:
            raise GrammarError(f"image sides must be 1 to {self.max_side} patches, found {side}")
        return int(side)

    def name(self, token: int) -> str:
        """A token as people read it: "piece 7", "<boi>", "<h:8>", "code 5", "code 5 at depth 1"."""
        control = {self.pieces + number: name for name, number in CONTROL.items()}
        if 0 <= token < self.pieces:
            return f"piece {token}"
        if self.pieces <= token < self.size_start:
            return f"<{control.get(token, f'reserved:{token - self.pieces}')}>"
        if self.size_start <= token < self.code_start:
            axis, side = divmod(token - self.size_start, self.max_side)
            return f"<{'hw'[axis]}:{side + 1}>"
        if self.code_start <= token < self.vocab_size:
            depth, code = divmod(token - self.code_start, self.codes)
            return f"code {code}" + (f" at depth {depth}" if self.depth > 1 else "")
        return f"{token}, which is outside the vocabulary of {self.vocab_size}"

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, int]) -> "Grammar":
        return cls(**values)

    @functools.cached_property
    def hash(self) -> str:
        """Twelve hexadecimal digits, equal for equal grammars on any machine."""
        content = json.dumps({"control": CONTROL, "controls": CONTROLS, **self.to_dict()}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    # Documents to tokens and back. `text` is a `text.Text`, or anything with its encode and decode.

    def encode(self, document: Document, text, close: bool = True) -> np.ndarray:
        """A document as tokens: int32 [T].

        With close=False the last turn stays open (no <end> <eos>), for a model to go on with.
        Raises GrammarError for an image that has no codes or does not fit the vocabulary.
        """
        tokens = [self.bos]
        for turn in document.turns:
            tokens.append(self.roles[turn.role])
            for part in turn.parts:
                if isinstance(part, Refusal):
                    tokens.append(self.refuse + part.category)
                else:
                    is_text = isinstance(part, Text)
                    tokens += self._encode_text(part, text) if is_text else self._encode_image(part)
            tokens.append(self.end)
        tokens.append(self.eos)
        if not close:
            if not document.turns:
                raise GrammarError("a document without turns has no last turn to leave open")
            tokens = tokens[:-2]
        return np.array(tokens, np.int32)

    def _encode_text(self, part: Text, text) -> list[int]:
        ids = text.encode(part.text)
        # The guarantee that nothing a user types becomes a control token.
        if ids and not 0 <= min(ids) <= max(ids) < self.pieces:
            raise GrammarError(f"text ids must be in [0, {self.pieces}), found {min(ids)} to {max(ids)}")
        return ids

    def _encode_image(self, image: Image) -> list[int]:
        codes = image.codes
        if codes is None:
            raise GrammarError("an image has pixels but no codes: run the image tokenizer first")
        if codes.shape[2:] != (() if self.depth == 1 else (self.depth,)):
            expected = "[h, w]" if self.depth == 1 else f"[h, w, {self.depth}]"
            raise GrammarError(f"codes must be {expected}, found {list(codes.shape)}")
        low, high = codes.min(), codes.max()
        if low < 0 or high >= self.codes:
            raise GrammarError(f"image codes must be in [0, {self.codes}), found {low} to {high}")
        header = [self.boi, self.h(codes.shape[0]), self.w(codes.shape[1])]
        return header + self.code_tokens(codes).tolist() + [self.eoi]

    def code_tokens(self, codes):
        """The tokens of codes [h, w] ([h, w, depth]), in their order: [h * w * depth]."""
        return (codes.reshape(-1, self.depth) + self._depth_start).reshape(-1)

    @functools.cached_property
    def _depth_start(self) -> np.ndarray:
        """The token of code 0 at each depth: int32 [depth]."""
        return (self.code_start + self.codes * np.arange(self.depth)).astype(np.int32)

    def decode(self, tokens, text) -> Document:
        """The document that the tokens write, normalised. After the first <eos>, more may follow as padding.

        Raises GrammarError, with where, expected and found, for tokens that are not a whole document.
        """
        tokens = _row(tokens)
        turns, state = self._read(tokens)
        if state.mode != DONE:
            expected = self._expected(state)
            raise GrammarError(f"token {len(tokens)}: expected {expected}, found the end of the tokens")
        return self._document(tokens, turns, text)

    def decode_open(self, tokens, text) -> tuple[Document, np.ndarray | None]:
        """What the beginning of a document writes -> its finished parts as a document, and the codes of an image that
        is not finished as int32 [h, w] ([h, w, depth]), -1 where none is yet, or None. Errors as decode."""
        tokens = _row(tokens)
        turns, state = self._read(tokens)
        codes = None
        if state.mode in (CODES, EOI):
            shape = (state.height, state.width, self.depth)
            codes = np.full(shape, -1, np.int32).reshape(-1)
            found = len(codes) - state.remaining
            codes[:found] = tokens[len(tokens) - found :]
            codes[:found] -= np.resize(self._depth_start, found)
            codes = codes.reshape(shape if self.depth > 1 else shape[:2])
        return self._document(tokens, turns, text), codes

    def _document(self, tokens: np.ndarray, turns: list, text) -> Document:
        """The document of the spans that `_read` found."""
        document = []
        for role, spans in turns:
            parts = []
            for start, stop in spans:
                if tokens[start] == self.boi:
                    height, width = tokens[start + 1] - self.h(1) + 1, tokens[start + 2] - self.w(1) + 1
                    codes = tokens[start + 3 : stop - 1].reshape(height, width, self.depth)
                    codes = codes - self._depth_start
                    parts.append(Image(codes=codes if self.depth > 1 else codes[..., 0]))
                elif tokens[start] >= self.pieces:
                    parts.append(Refusal(int(tokens[start]) - self.refuse))
                else:
                    parts.append(Text(text.decode(tokens[start:stop].tolist())))
            document.append(Turn(role, parts))
        return Document(document).normalised()

    def feed(self, tokens) -> State:
        """The state after a document or the beginning of one: numpy, a batch of one. Errors as decode."""
        _, state = self._read(_row(tokens))
        return State(*(np.array([value], np.int32) for value in state))

    def _read(self, tokens: np.ndarray) -> tuple[list, State]:
        """Checks tokens and finds their parts -> [(role, [(start, stop)])], State of ints.

        The same machine as `advance` and `allowed`, a span at a time instead of a token.
        """
        role_of = {token: role for role, token in self.roles.items()}
        not_text = np.flatnonzero((tokens < 0) | (tokens >= self.pieces))
        turns, i = [], 0
        mode, role, images, height, width, remaining, p = BOS, 0, 0, 0, 0, 0, 0

        def fail(i):
            state = State(mode, role, images, height, width, remaining, p)
            found = self.name(int(tokens[i]))
            raise GrammarError(f"token {i}: expected {self._expected(state)}, found {found}")

        while i < len(tokens):
            token = int(tokens[i])
            length = step = 1  # in tokens, in positions
            if mode == BOS and token == self.bos:
                mode = BETWEEN
            elif mode == BETWEEN and token in role_of:
                mode, role, images = OPENED if token == self.roles["assistant"] else TURN, token, 0
                turns.append((role_of[token], []))
            elif mode == BETWEEN and token == self.eos:
                mode, images = DONE, 0
            elif mode in (TURN, OPENED, REFUSED) and 0 <= token < self.pieces:
                mode = TURN if mode == OPENED else mode
                after = np.searchsorted(not_text, i)
                length = step = (not_text[after] if after < len(not_text) else len(tokens)) - i
                turns[-1][1].append((i, i + length))
            elif mode == OPENED and self.refuse <= token < self.refuse + REFUSALS:
                mode = REFUSED
                turns[-1][1].append((i, i + 1))
            elif mode in (TURN, OPENED) and token == self.boi:
                mode, images, begun = HEIGHT, images + 1, i
            elif mode in (TURN, OPENED, REFUSED) and token == self.end:
                mode = BETWEEN
            elif mode == HEIGHT and self.h(1) <= token < self.w(1):
                mode, height = WIDTH, token - self.h(1) + 1
            elif mode == WIDTH and self.w(1) <= token < self.code_start:
                mode, width = CODES, token - self.w(1) + 1
                remaining = height * width * self.depth
            elif mode == CODES:
                length, step = min(remaining, len(tokens) - i), 0
                codes = tokens[i : i + length] - np.resize(self._depth_start, length)
                wrong = np.flatnonzero((codes < 0) | (codes >= self.codes))
                if len(wrong):
                    remaining -= wrong[0]
                    fail(i + wrong[0])
                remaining -= length
                if remaining == 0:
                    mode, step = EOI, max(height, width)
            elif mode == EOI and token == self.eoi:
                mode = TURN
                turns[-1][1].append((begun, i + 1))
            elif mode == DONE and token == self.eos:
                step = 0
            else:
                fail(i)
            i += length
            p += step
        return turns, State(mode, role, images, height, width, remaining, p)

    def _expected(self, state: State) -> str:
        if state.mode == CODES:
            depth = f" at depth {-state.remaining % self.depth}" if self.depth > 1 else ""
            return f"an image code{depth} ({state.remaining} to come of {state.height} x {state.width})"
        return EXPECTED[state.mode]

    # What training needs to know of a document: arrays over its tokens, without a loop over them. All
    # of these also take whole documents one after another, as a loader reads them: each is as if alone.

    def positions(self, tokens) -> np.ndarray:
        """Position ids (t, y, x) of a document or the beginning of one: int32 [T, 3].

        Text and all marks count up, p, p, p. The codes of an image stand at (p, p + i, p + j) for
        row i and column j, with p the position of the first; what follows is at p + max(H, W).
        """
        tokens = _row(tokens)
        steps = (tokens < self.code_start).astype(np.int32)  # from each token to the next
        begun = np.flatnonzero(tokens == self.boi)
        begun = begun[begun + 2 < len(tokens)]
        heights, widths = tokens[begun + 1] - self.h(1) + 1, tokens[begun + 2] - self.w(1) + 1
        after = begun + 3 + heights * widths * self.depth
        whole = after <= len(tokens)  # the last image of a beginning may not be
        steps[after[whole] - 1] = np.maximum(heights, widths)[whole]
        line = np.cumsum(steps, dtype=np.int32) - steps
        starts = np.flatnonzero(tokens == self.bos)  # of several documents in a row each begins anew
        if len(starts) > 1:
            line -= np.repeat(line[starts], np.diff(starts, append=len(tokens)))
        positions = np.repeat(line[:, None], 3, axis=1)
        if len(begun):
            grids = [_grid(h, w, self.depth) for h, w in zip(heights.tolist(), widths.tolist())]
            codes = np.flatnonzero(tokens >= self.code_start)
            positions[codes] += np.concatenate(grids)[: len(codes)]
        return positions

    def loss_weights(
        self, tokens, text: float = 1.0, image: float = 1.0, user: bool = False, user_images: bool = True
    ) -> np.ndarray:
        """How much each token of a document counts as a target: float32 [T].

        Learned are the parts and the <end> of assistant and page turns, and with user=True of user
        turns, but for their images with user_images=False. `text` weighs pieces, <refuse:n> and <end>; `image` weighs codes and the choice of an image
        and its size, <boi> <h> <w>. What nobody chooses weighs nothing: <bos>, roles, <eoi>, <eos>.
        """
        tokens = _row(tokens)
        # The roles are in this order: system, user, assistant, page.
        speaker = self._speaker(tokens)
        learned = speaker >= self.roles["user" if user else "assistant"]
        image = np.float32(image) * (learned & (user_images | (speaker != self.roles["user"])))
        is_text = (tokens < self.pieces) | (tokens == self.end)
        is_text |= (tokens >= self.refuse) & (tokens < self.refuse + REFUSALS)
        is_image = (tokens >= self.size_start) | (tokens == self.boi)
        return learned * is_text * np.float32(text) + is_image * image

    def guidance_drops(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """What system and user turns say -> (their text, their images): bool [T] each.

        Guidance compares a prediction with one that has not seen the request. The text-free
        branch deletes the first, the text-and-image-free branch both; each leaves a document.
        """
        tokens = _row(tokens)
        speaker = self._speaker(tokens)
        asks = (speaker == self.roles["system"]) | (speaker == self.roles["user"])
        is_image = (tokens >= self.size_start) | (tokens == self.boi) | (tokens == self.eoi)
        return asks & (tokens < self.pieces), asks & is_image

    def _speaker(self, tokens: np.ndarray) -> np.ndarray:
        """The role token of the latest turn at each token ([T]); the first token before the first turn."""
        is_role = (tokens >= self.roles[ROLES[0]]) & (tokens <= self.roles[ROLES[-1]])
        return tokens[np.maximum.accumulate(np.where(is_role, np.arange(len(tokens)), 0))]

    # The machine. Pure array code for numpy and JAX alike: rows are independent and no branch
    # depends on a value, so it can be jitted, vmapped and scanned.

    def start(self, batch: int, xp=np) -> State:
        """`batch` rows before their <bos>. `xp` is numpy or jax.numpy."""
        return State(*(xp.zeros(batch, xp.int32) for _ in State._fields))

    def advance(self, state: State, tokens) -> State:
        """The state after each row writes its token, int32 [B], which must be allowed. Done rows stay."""
        xp, mode = _namespace(state), state.mode
        tokens = xp.asarray(tokens, dtype=xp.int32)
        height = xp.where(mode == HEIGHT, tokens - self.h(1) + 1, state.height)
        width = xp.where(mode == WIDTH, tokens - self.w(1) + 1, state.width)
        last = (mode == CODES) & (state.remaining == 1)
        stays = (mode == DONE) | ((mode == CODES) & ~last)
        in_turn = xp.where(tokens == self.boi, HEIGHT, xp.where(tokens == self.end, BETWEEN, TURN))
        opened = xp.where((tokens >= self.refuse) & (tokens < self.refuse + REFUSALS), REFUSED, in_turn)
        refused = xp.where(tokens == self.end, BETWEEN, REFUSED)
        begun = xp.where(tokens == self.roles["assistant"], OPENED, TURN)
        between = xp.where(tokens == self.eos, DONE, begun)
        codes = xp.where(last, EOI, CODES)
        return State(
            mode=_pick(mode, BETWEEN, between, in_turn, WIDTH, CODES, codes, TURN, DONE, opened, refused),
            role=xp.where((mode == BETWEEN) & (tokens != self.eos), tokens, state.role),
            images=xp.where(mode == BETWEEN, 0, state.images + (self._in_turn(mode) & (tokens == self.boi))),
            height=height,
            width=width,
            remaining=xp.where(mode == WIDTH, height * width * self.depth, state.remaining - (mode == CODES)),
            p=state.p + xp.where(stays, 0, xp.where(last, xp.maximum(height, width), 1)),
        )

    def position(self, state: State):
        """The position ids (t, y, x) of the token about to be written: int32 [B, 3]."""
        xp = _namespace(state)
        patch = state.height * state.width - -(-state.remaining // self.depth)
        i, j = patch // xp.maximum(state.width, 1), patch % xp.maximum(state.width, 1)
        offset = xp.stack([xp.zeros_like(i), i, j], axis=-1)
        return state.p[..., None] + xp.where((state.mode == CODES)[..., None], offset, 0)

    def need(self, state: State, size=(0, 0), image_only=False, refuse=True):
        """The fewest tokens that complete each document: int32 [B]. Arguments as in `allowed`."""
        xp, mode = _namespace(state), state.mode
        least_h, least_w = self._least(state, size)
        image = least_h * least_w * self.depth
        # The longest way out: <boi> <h> <w> codes <eoi> <end> <eos>.
        turn = 2 + xp.where(self._owes_image(state, image_only), 4 + image, 0)
        opened = xp.where(refuse, xp.minimum(turn, 3), turn)  # or <refuse:n> <end> <eos>
        width = 4 + state.height * least_w * self.depth
        return _pick(mode, 2, 1, turn, 5 + image, width, 3 + state.remaining, 3, 0, opened, 2)

    def allowed(self, state: State, room, size=(0, 0), image_only=False, text_only=False, refuse=True):
        """The tokens that each row may write next: bool [B, V].

        Args:
          state: of B rows.
          room: int32 [B], how many tokens may still be written, the one now chosen included. What
            can no longer be finished is not begun: while room >= need(state), some token is allowed,
            and after it room - 1 >= need again. A row with less room than it needs is led out by a
            shortest way.
          size: int32 [B, 2], (height, width) of every image, each up to max_side; 0 leaves a side free.
          image_only: bool [B], whether an assistant turn must be exactly one image.
          text_only: bool [B], whether an assistant turn must not begin an image; image_only goes first.
          refuse: bool [B], whether an assistant turn may be a refusal, whatever else it must be.
        """
        xp, mode = _namespace(state), state.mode
        room = xp.maximum(xp.asarray(room), self.need(state, size, image_only, refuse))
        least_h, least_w = self._least(state, size)
        image = least_h * least_w * self.depth
        most = xp.where(xp.asarray(size) > 0, xp.asarray(size), self.max_side)
        most_h = xp.minimum((room - 5) // (least_w * self.depth), most[..., 0])
        most_w = xp.minimum((room - 4) // xp.maximum(state.height * self.depth, 1), most[..., 1])
        assistant = state.role == self.roles["assistant"]
        picture = image_only & assistant
        silent = text_only & assistant & ~picture

        # Each mode allows one range of tokens, `first` and `count`; some also a closing token and <boi>.
        # role ... <end> <eos>, a refusal or not
        turn = 3 + xp.where(image_only, xp.where(refuse, 1, 4 + image), 0)
        code = self.code_start + -state.remaining % self.depth * self.codes
        role, h, w = self.roles[ROLES[0]], self.h(1) - 1 + least_h, self.w(1) - 1 + least_w
        roles = xp.where(room >= turn, len(ROLES), 0)
        pieces = xp.where((room >= 3) & ~picture, self.pieces, 0)
        said = xp.where(room >= 3, self.pieces, 0)
        first = _pick(mode, self.bos, role, 0, h, w, code, self.eoi, self.eos, 0, 0)
        heights, widths = most_h - least_h + 1, most_w - least_w + 1
        count = _pick(mode, 1, roles, pieces, heights, widths, self.codes, 1, 1, pieces, said)
        may_end = (self._in_turn(mode) & ~self._owes_image(state, image_only)) | (mode == REFUSED)
        may_refuse = (mode == OPENED) & refuse & (room >= 3)
        may_draw = self._in_turn(mode) & (room >= 6 + image) & ~silent & ~(picture & (state.images > 0))
        close = xp.where(may_end, self.end, xp.where(mode == BETWEEN, self.eos, -1))
        draw = xp.where(may_draw, self.boi, -1)
        token = xp.arange(self.vocab_size, dtype=xp.int32)
        nth = token - first[..., None]
        in_range = (nth >= 0) & (nth < count[..., None])
        refusal = (token >= self.refuse) & (token < self.refuse + REFUSALS) & may_refuse[..., None]
        return in_range | (token == close[..., None]) | (token == draw[..., None]) | refusal

    @staticmethod
    def _in_turn(mode):
        return (mode == TURN) | (mode == OPENED)

    def _least(self, state: State, size):
        """The smallest height and width that a next image may have, in patches: int32 [B] or [] each."""
        xp = _namespace(state)
        least = xp.maximum(xp.asarray(size), 1)
        return least[..., 0], least[..., 1]

    def _owes_image(self, state: State, image_only):
        """Which rows stand in an assistant turn that must be one image, and have not begun it: bool [B]."""
        answering = self._in_turn(state.mode) & (state.role == self.roles["assistant"])
        return image_only & answering & (state.images == 0)


def _namespace(state: State):
    """numpy or jax.numpy, whichever the state is made of; JAX is not imported for those who do without."""
    return state.mode.__array_namespace__()


def _pick(mode, *values):
    """For each row the value of its mode; `values` are in the order of the modes: int32 [B]."""
    xp, picked = mode.__array_namespace__(), mode
    for each, value in enumerate(values):
        picked = xp.where(mode == each, value, picked)
    return picked.astype(xp.int32)


def _row(tokens) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise GrammarError(f"tokens must be integers [T], found {tokens.dtype} {list(tokens.shape)}")
    return tokens.astype(np.int32, copy=False)


@functools.lru_cache(maxsize=256)
def _grid(height: int, width: int, depth: int) -> np.ndarray:
    """(0, i, j) of every code of an image, row by row: int32 [height * width * depth, 3]."""
    i, j = np.divmod(np.repeat(np.arange(height * width, dtype=np.int32), depth), np.int32(width))
    return np.stack([np.zeros_like(i), i, j], axis=1)
