"""Slots: a fixed number of requests that are answered at once, by two compiled programs.

`_fill` reads the prompts of those that just got a slot, chunk by chunk; a dispatch writes tokens in one `while_loop`
that follows the grammar's machine, row by row. Requests come and go between dispatches. What differs between them
(prompt, size, guidance, temperature, seed, state) is data, not program.

A request has up to three rows, its branches: all of its document, the document without its text, and without text
and images; row r is branch r // N of slot r % N. One draw decides for all branches. Shapes: N slots, R rows,
S tokens that a row's cache holds, D model, V vocabulary.
"""

import dataclasses
import functools
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmgen.document import REFUSALS
from mmgen.grammar import BETWEEN, CODES, OPENED
from mmgen.sampling import cache as caches
from mmgen.sampling.strategies import choose


class _State(NamedTuple):
    """What stays on the device between dispatches."""

    cache: dict
    hidden: jax.Array  # [R, D] at each row's latest token
    prompt: jax.Array  # [R, D] at the last token of the prompt that the row's cache begins with
    lengths: jax.Array  # [R] tokens in each row's cache
    machine: Any  # the grammar's State of each row
    written: jax.Array  # [N] tokens of each answer so far


@dataclasses.dataclass
class Progress:
    """How far a request has come: `tokens` int32 [T] are those of its answer, <end> included when `done`. reused: so many tokens of its
    prompt were not read anew, as the slots held them."""

    ticket: int
    request: Any
    tokens: np.ndarray
    done: bool
    reused: int = 0


@dataclasses.dataclass
class _Job:
    ticket: int
    request: Any
    prompts: list  # tokens of each branch
    room: int
    reused: int = 0


class Slots:
    """`count` requests of a `sampler` at a time, each of at most `branches` branches and `length` tokens in all.

    Bits: a request's tokens do not depend on its slot, on its neighbours, or on when it came; they do, in rounding,
    on (count, branches, length), which name the compiled programs.

    Keys and values are reused: a row remembers the prompt that its cache begins with, and a new prompt takes over
    whole chunks of any row's that it shares, copied or in place. A dialogue's next turn, a turn after a rewind, and
    more samples of one prompt thus read only what is new. All that is reused was computed in the same chunks as
    it would be anew, so that it is the same to the last bit; hence a dialogue's next turn reads the last answer
    again, a few chunks, where decoding computed it token by token.
    """

    def __init__(self, sampler, count, branches=1, length=None):
        if count < 1 or branches not in (1, 2, 3):
            raise ValueError(f"expected at least 1 slot and 1 to 3 branches, found {count} and {branches}")
        self.sampler, self.count, self.branches = sampler, count, branches
        self.length = sampler.bucket(length or sampler.longest)
        self._used = [0] * count  # when each slot was last given away
        self._queue, self._tickets, self._time = {}, 0, 0  # jobs that wait, by their tickets, the first first
        strategy = lambda dtype: np.zeros((count, 2), dtype)
        self._knobs = {
            "seed": np.zeros(count, np.uint32), "room": np.zeros(count, np.int32),
            "size": np.zeros((count, 2), np.int32),
            "image_only": np.zeros(count, bool), "text_only": np.zeros(count, bool),
            "refuse": np.zeros(count, bool), "refusal_bias": np.zeros(count, np.float32),
            "branches": np.ones(count, np.int32),
            "guidance": np.ones(count, np.float32), "image_guidance": np.ones(count, np.float32),
            "interval": np.zeros((count, 2), np.float32), "rescale": np.zeros(count, np.float32),
            "temperature": strategy(np.float32), "top_k": strategy(np.int32), "top_p": strategy(np.float32),
            "min_p": strategy(np.float32), "keep_mode": strategy(bool),
            "kept": np.full((count, self.length), -1, np.int32),  # tokens of an image's codes
        }  # fmt: skip
        self._compiled = False
        self._reset()

    def _reset(self):
        """Nobody in the slots, and nothing in the rows."""
        sampler = self.sampler
        self._jobs = [None] * self.count
        self._held = [np.zeros(0, np.int32)] * (self.count * self.branches)  # prompts
        with sampler.on_mesh():
            state = _empty(
                sampler.model_config,
                sampler.grammar,
                self.count,
                self.branches,
                self.length,
                sampler.dtype,
                sampler.int8_cache,
            )
        # Committed to its device as what comes out of a dispatch is: else the second would be compiled anew.
        self._state = state if sampler.mesh else jax.device_put(state, jax.local_devices()[0])

    @property
    def busy(self):
        """Whether any request is being answered or waits."""
        return bool(self._queue) or any(self._jobs)

    def add(self, request):
        """Takes a request -> its ticket, an int. It waits where no slot is free.

        Raises ValueError where it does not fit: prompt and answer the length, or its branches.
        """
        prompts = self.sampler.prompts(request)
        room = self.sampler.room(request, prompts[0])
        if len(prompts) > self.branches:
            raise ValueError(
                f"the request's guidance needs {len(prompts)} branches, these slots have {self.branches}"
            )
        if len(prompts[0]) + room > self.length:
            raise ValueError(
                f"a prompt of {len(prompts[0])} tokens and {room} for its answer do not fit slots of {self.length}"
            )
        self._tickets += 1
        self._queue[self._tickets] = _Job(self._tickets, request, prompts, room)
        return self._tickets

    def cancel(self, ticket):
        """Forgets a request that waits or is being answered -> whether it did: it may be done."""
        for place, job in enumerate(self._jobs):
            if job and job.ticket == ticket:
                self._jobs[place] = None
                return True
        return self._queue.pop(ticket, None) is not None

    def run(self, tokens=None, first=False):
        """One dispatch -> the `Progress` of every request in a slot, at most `tokens` further; those that are done
        have left it. Without a limit it ends when all are done or, where others wait (here, or elsewhere, by `first`), the first.

        Raises FloatingPointError where the model's logits are not finite. After this or any other exception
        the slots are empty; those that waited still wait.
        """
        if tokens is not None and tokens < 0:
            raise ValueError(f"expected at least 0 tokens, found {tokens}")
        try:
            return self._run(self.length if tokens is None else tokens, first)
        except BaseException:  # Ctrl-C too: what the device holds is not what is noted here
            self._reset()
            raise

    def _run(self, steps, first):
        fill = self._admit()
        active = np.array([job is not None for job in self._jobs])
        if not active.any():
            return []
        target = active.sum() - 1 if self._queue or first else 0
        model, graphdef = self.sampler, self.sampler.graphdef
        with model.on_mesh():
            ahead = self._compile(active)
            if fill is not None:
                self._state = _fill(
                    model.params, model.weights, self._state, fill, graphdef=graphdef, chunk=model.chunk
                )
            if ahead:
                ahead.join()
            self._state, seen = _dispatch(
                model.params, model.weights, self._state, self._knobs, active, np.int32(steps), np.int32(target),
                graphdef=graphdef, grammar=model.grammar, branches=self.branches,
            )  # fmt: skip
        still, broken, lengths, written, rows = map(np.asarray, seen)
        if broken.any():
            raise FloatingPointError(
                "the model's logits are not finite: its weights, or the guidance, are beyond use"
            )
        found = []
        for place, job in enumerate(self._jobs):
            if job:
                answer = rows[place, lengths[place] - written[place] : lengths[place]]
                found.append(Progress(job.ticket, job.request, answer, not still[place], job.reused))
                if not still[place]:
                    self._jobs[place] = None
        return found

    def _compile(self, active):
        """At first: a thread that compiles what writes, while what reads is compiled and run: that takes most of the
        time to a first picture. Both are called as always, and find their programs then."""
        if self._compiled or self.sampler.mesh:
            return None
        model, self._compiled = self.sampler, True
        lowered = _dispatch.lower(
            model.params, model.weights, self._state, self._knobs, active, np.int32(0), np.int32(0),
            graphdef=model.graphdef, grammar=model.grammar, branches=self.branches,
        )  # fmt: skip
        thread = threading.Thread(
            target=lowered.compile
        )  # no daemon: an interpreter that ends waits for the compiler
        thread.start()
        return thread

    # What the host does between dispatches.

    def _no_prompts(self):
        R, S = self.count * self.branches, self.length
        ints = lambda *shape: np.zeros(shape, np.int32)
        return {
            "count": np.int32(0), "row": ints(R), "source": ints(R), "kept": ints(R), "copied": ints(R),
            "chunks": ints(R), "tokens": ints(R, S), "positions": ints(R, S, 3),
            "fresh": np.zeros(R, bool), "lengths": ints(R), "machine": self.sampler.grammar.start(R),
        }  # fmt: skip

    def _admit(self):
        """Gives free slots to those that wait -> what the device has to read for it, or None.

        The device fills rows in this order, and `_held` is what rows hold at each point of it."""
        if not self._queue or all(self._jobs):
            return None
        fill = self._no_prompts()
        while self._queue and not all(self._jobs):
            job = self._queue.pop(next(iter(self._queue)))
            free = [place for place, other in enumerate(self._jobs) if other is None]
            place = max(free, key=lambda p: (_shared(self._held[p], job.prompts[0]), -self._used[p], -p))
            self._time += 1
            self._jobs[place], self._used[place] = job, self._time
            self._set_knobs(place, job)
            reused = [
                self._plan(fill, b * self.count + place, prompt) for b, prompt in enumerate(job.prompts)
            ]
            job.reused = reused[0]
        return fill

    def _plan(self, fill, row, prompt):
        """Adds to `fill` how `row` comes to hold `prompt` -> how many tokens of it need not be read."""
        chunk, at = self.sampler.chunk, int(fill["count"])
        shared = [_shared(held, prompt) for held in self._held]
        equal = [n == len(prompt) == len(held) for n, held in zip(shared, self._held)]
        source = max(range(len(shared)), key=lambda r: (equal[r], shared[r], r == row))
        whole = equal[source]  # then its last hidden state is known too
        chunks = -(-len(prompt) // chunk)
        copied = chunks if whole else min(shared[source], len(prompt) - 1) // chunk
        fill["count"] += np.int32(1)
        fill["row"][at], fill["source"][at], fill["chunks"][at] = row, source, chunks
        fill["copied"][at], fill["kept"][at] = copied, copied if source == row else 0
        fill["tokens"][at, : len(prompt)] = prompt
        fill["positions"][at, : len(prompt)] = self.sampler.grammar.positions(prompt)
        fill["fresh"][row], fill["lengths"][row] = True, len(prompt)
        for field, value in zip(fill["machine"], self.sampler.grammar.feed(prompt)):
            field[row] = value[0]
        self._held[row] = prompt
        return min(copied * chunk, len(prompt))

    def _set_knobs(self, place, job):
        request = job.request
        strategies = (request.text, request.image)
        values = {
            "seed": request.seed & 0xFFFFFFFF, "room": job.room, "size": request.size or (0, 0),
            "image_only": request.output == "image", "text_only": request.output == "text",
            "refuse": request.refusals is not None, "refusal_bias": request.refusals or 0.0,
            "branches": len(job.prompts), "guidance": request.guidance,
            "image_guidance": request.image_guidance, "interval": request.guidance_interval,
            "rescale": request.guidance_rescale,
        }  # fmt: skip
        for name in ("temperature", "top_k", "top_p", "min_p", "keep_mode"):
            values[name] = [getattr(strategy, name) for strategy in strategies]
        for name, value in values.items():
            self._knobs[name][place] = value
        self._knobs["kept"][place] = -1
        if request.kept is not None:
            kept = self.sampler.grammar.code_tokens(request.kept)
            self._knobs["kept"][place, : len(kept)] = np.where(request.kept.reshape(-1) < 0, -1, kept)


def _shared(a, b):
    """How many tokens a and b begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _empty(config, grammar, count, branches, S, dtype, int8):
    R, D = count * branches, config.width
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    hidden = jnp.zeros((R, D), dtype)
    cache = caches.empty(config, R, S, dtype, int8)
    return _State(cache, hidden, hidden, zeros(R), grammar.start(R, jnp), zeros(count))


@functools.partial(jax.jit, static_argnames=("graphdef", "grammar", "branches"), donate_argnames=("state",))
def _dispatch(params, weights, state, knobs, active, steps, target, *, graphdef, grammar, branches):
    """Writes at most `steps` tokens in each slot that is `active` [N], until no more than `target` of these are ->
    state, (active, broken [N]: logits not finite, lengths [N], written [N], tokens [N, S])."""
    model = nnx.merge(graphdef, params)
    N = state.written.shape[0]
    every = lambda x: jnp.concatenate([x] * branches)
    keys = jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))
    place, start = jnp.arange(N), model.code_start

    def body(carry):
        i, state, active, broken = carry
        machine = jax.tree.map(lambda field: field[:N], state.machine)
        legal = grammar.allowed(
            machine, knobs["room"] - state.written, knobs["size"], knobs["image_only"], knobs["text_only"],
            knobs["refuse"],
        )  # fmt: skip
        modality = (machine.mode == CODES).astype(jnp.int32)
        knob = lambda name: jnp.take_along_axis(knobs[name], modality[:, None], 1)[:, 0]
        how = [knob(name) for name in ("temperature", "top_k", "top_p", "min_p", "keep_mode")]
        latest = state.cache["tokens"][place, jnp.maximum(state.lengths[:N] - 1, 0)]
        previous = jnp.where(state.written > 0, latest, -1)

        def draw(logits, legal, previous, key):
            """A token of each row, of those that `logits` [R, ...] are of; whether these are finite."""
            logits = _guided(logits.reshape(branches, N, -1), legal, machine, grammar, knobs)
            finite = jnp.isfinite(jnp.where(legal, logits, 0.0)).all(-1)
            return choose(logits, legal, jax.vmap(jax.random.uniform)(key), previous, *how), finite

        key = keys(knobs["seed"], state.written)
        logits = caches.logits(model, weights, state.hidden)
        legal = _refused(logits[:N], legal, machine, grammar, knobs)
        if not model.colors:
            token, finite = draw(logits, legal, previous, key)
        else:  # A code is its colour at first, and all codes are legal or none.
            before = jnp.maximum(previous - start, 0)
            same = jnp.where(previous < start, previous, start + before % model.colors)
            token, finite = draw(logits, legal[:, : model.first], same, key)
            code, repeats = token >= start, (token >= start) & (token == same)
            logits = caches.outline_logits(model, state.hidden, every(jnp.maximum(token - start, 0)))
            free, same = jnp.ones(logits.shape[-1:], bool), jnp.where(repeats, before // model.colors, -1)
            outline, sure = draw(logits, free[None], same, jax.vmap(jax.random.fold_in, (0, None))(key, 1))
            token, finite = jnp.where(code, token + model.colors * outline, token), finite & (sure | ~code)
        coming = machine.height * machine.width * grammar.depth - machine.remaining
        kept = knobs["kept"][place, jnp.clip(coming, 0, knobs["kept"].shape[1] - 1)]
        token = jnp.where((machine.mode == CODES) & (kept >= 0), kept, token)
        broken = broken | (active & ~finite)
        token = every(jnp.where(active, token, grammar.eos))
        at = grammar.position(state.machine)
        reach = jnp.max(jnp.where(every(active), state.lengths, 0)) + 1
        x, cache = caches.step(
            model, weights, state.cache, token[:, None], at[:, None], state.lengths, reach=reach
        )
        machine = grammar.advance(state.machine, token)
        state = state._replace(
            cache=cache,
            hidden=x[:, 0],
            lengths=state.lengths + every(active),
            machine=machine,
            written=state.written + active,
        )
        return i + 1, state, active & (machine.mode[:N] != BETWEEN), broken

    more = lambda carry: (carry[0] < steps) & (carry[2].sum() > target) & ~carry[3].any()
    _, state, active, broken = jax.lax.while_loop(
        more, body, (jnp.int32(0), state, active, jnp.zeros(N, bool))
    )
    return state, (active, broken, state.lengths[:N], state.written, state.cache["tokens"][:N])


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk"), donate_argnames=("state",))
def _fill(params, weights, state, fill, *, graphdef, chunk):
    """Rows take over the chunks that others hold, read the rest of their prompts, and stand at the begin of an answer
    -> state."""
    model, N = nnx.merge(graphdef, params), state.written.shape[0]

    def row(j, carry):
        cache, prompt = carry
        to, source = fill["row"][j], fill["source"][j]

        def copy(i, cache):
            def moved(buffer):
                size = [1, *buffer.shape[1:]]
                size[min(buffer.ndim - 1, 2)] = chunk  # the slots come after the heads, where there are any
                held = jax.lax.dynamic_slice(buffer, caches.corner(buffer, source, i * chunk), size)
                return jax.lax.dynamic_update_slice(buffer, held, caches.corner(buffer, to, i * chunk))

            return jax.tree.map(moved, cache)

        def read(i, carry):
            cache, _ = carry
            part = lambda x: jax.lax.dynamic_slice(
                x, (j, i * chunk) + (0,) * (x.ndim - 2), (1, chunk) + x.shape[2:]
            )
            x, cache = caches.step(
                model, weights, cache, part(fill["tokens"]), part(fill["positions"]), i[None] * chunk, to
            )
            return cache, x[0, jnp.clip(fill["lengths"][to] - 1 - i * chunk, 0, chunk - 1)]

        copied = fill["copied"][j]
        cache = jax.lax.fori_loop(fill["kept"][j], copied, copy, cache)
        cache, hidden = jax.lax.fori_loop(copied, fill["chunks"][j], read, (cache, prompt[source]))
        return cache, prompt.at[to].set(hidden)

    cache, prompt = jax.lax.fori_loop(0, fill["count"], row, (state.cache, state.prompt))
    fresh = fill["fresh"]
    old_or = lambda old, new: jnp.where(fresh.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
    return _State(
        cache=cache,
        hidden=old_or(state.hidden, prompt),
        prompt=prompt,
        lengths=old_or(state.lengths, fill["lengths"]),
        machine=jax.tree.map(old_or, state.machine, fill["machine"]),
        written=jnp.where(fresh[:N], 0, state.written),
    )


def _refused(logits, legal, machine, grammar, knobs):
    """legal [N, V] without refusals or with nothing else, at the begin of answers that may be refusals: whichever is likelier of the
    two by the model's own logits [N, V or fewer, codes left out], with a bias. What may be refused is thus no matter of chance, nor
    of guidance (refusal tokens, arXiv:2412.06748)."""
    opened = (machine.mode == OPENED) & knobs["refuse"]

    def decided():
        token = jnp.arange(legal.shape[1])
        refusal = (token >= grammar.refuse) & (token < grammar.refuse + REFUSALS)
        n = logits.shape[1]
        x = jnp.where(
            legal[:, :n], logits + jnp.where(refusal[:n], knobs["refusal_bias"][:, None], 0.0), -jnp.inf
        )
        likely = jnp.where(refusal[:n], jax.nn.softmax(x, -1), 0.0).sum(-1) > 0.5
        return jnp.where(opened[:, None], legal & (refusal == likely[:, None]), legal)

    return jax.lax.cond(opened.any(), decided, lambda: legal)


def _guided(logits, legal, machine, grammar, knobs):
    """Logits of the branches [branches, N, V] -> those to draw from [N, V]; V of tokens, or of outlines.

    With the branches full, free (no text) and bare (no text, no image): bare + image_guidance * (free - bare) +
    guidance * (full - free), after InstructPix2Pix (arXiv:2211.09800); two branches are the case image_guidance 1.
    A request with fewer branches than there are uses its own alone, and one without guidance `full` to the last
    bit. Guidance holds for the codes of an image within `interval`, shares of the image (after arXiv:2404.07724),
    and for all that is no code. `rescale` brings the spread of the guided logits back towards that of `full`
    (after arXiv:2305.08891): over the legal tokens, for it is between these that is chosen.
    """
    full = logits[0]
    if len(logits) == 1:
        return full
    column = lambda name: knobs[name][:, None]
    guided = logits[1] + column("guidance") * (full - logits[1])
    if len(logits) == 3:
        bare = logits[2] + column("image_guidance") * (logits[1] - logits[2])
        bare = bare + column("guidance") * (full - logits[1])
        guided = jnp.where(column("branches") == 3, bare, guided)

    def spread(x):
        mean = jnp.where(legal, x, 0.0).sum(-1, keepdims=True) / legal.sum(-1, keepdims=True)
        return jnp.sqrt(jnp.where(legal, jnp.square(x - mean), 0.0).sum(-1, keepdims=True))

    def rescaled(guided):
        ratio = spread(full) / jnp.maximum(spread(guided), 1e-30)
        return guided * (1 + column("rescale") * (ratio - 1))

    guided = jax.lax.cond(jnp.any(knobs["rescale"] > 0), rescaled, lambda guided: guided, guided)
    codes = machine.height * machine.width * grammar.depth
    share = (codes - machine.remaining) / jnp.maximum(codes, 1)
    low, high = knobs["interval"].T
    outside = (machine.mode == CODES) & ((share < low) | (share >= high))
    plain = outside | (knobs["branches"] == 1)
    return jnp.where(plain[:, None], full, guided)
