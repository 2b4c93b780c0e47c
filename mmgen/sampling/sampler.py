"""Sampling: prefill, then one jitted loop that follows the grammar's machine, row by row.

Rows of a batch differ in prompt, image size, guidance, temperature and seed; all of that is data,
not program. With guidance the batch holds each request twice, [requests, text-free requests], and
one random draw decides for both. Shapes: B requests, R rows of the model (B or 2B), P prompt
tokens (padded), N new tokens.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.document import Document, Image, Turn
from mmgen.grammar import BETWEEN, CODES, Grammar
from mmgen.models import layers, transformer
from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import checkpoint
from mmgen.sampling.strategies import Strategy, choose
from mmgen.text import Text

_PAD = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Request:
    """What to answer, and how.

    document: ends with the turn to answer; images in it need codes. output: "image" (exactly one),
    "text", or "any". size: (height, width) of the image in patches; None lets the model choose.
    guidance: 1 is none; above 1 pushes away from what the model would do without the text.
    """

    document: Document
    output: str = "image"
    size: tuple[int, int] | None = None
    seed: int = 0
    guidance: float = 1.0
    image: Strategy = Strategy()
    text: Strategy = Strategy()

    def __post_init__(self):
        if self.output not in ("image", "text", "any"):
            raise ValueError(f"output must be 'image', 'text' or 'any', found {self.output!r}")


def best_of(sampler, requests, n, score, batch_size=16):
    """Answers each request n times and keeps the picture that `score` likes best -> (turns, scores float [B, n]).

    score(images uint8 [H, W, 3] each, texts) -> [N] numbers, such as `contrastive.Towers.score`; a request's text
    is that of its document. Draw 0 has the request's own seed, so more draws only add to choose from.
    """
    if n < 1:
        raise ValueError(f"expected at least one draw of a request, found {n}")
    if any(request.output != "image" for request in requests):
        raise ValueError("only pictures are scored: expected output='image' of every request")
    seed = lambda request, k: int(np.random.SeedSequence([request.seed, k]).generate_state(1)[0])
    draws = [
        dataclasses.replace(request, seed=seed(request, k)) if k else request
        for request in requests
        for k in range(n)
    ]
    turns = sampler.generate(draws, batch_size)
    texts = [request.document.text() for request in draws]
    scores = np.reshape(score([turn.parts[0].pixels for turn in turns], texts), (-1, n))
    return [turns[i * n + k] for i, k in enumerate(scores.argmax(1))], scores


class Sampler:
    """A trained transformer with all that its samples need: grammar, text model, image tokenizer."""

    def __init__(self, graphdef, params, config, grammar, text, tokenizer):
        self.graphdef, self.params, self.config = graphdef, params, config
        self.grammar, self.text, self.tokenizer = grammar, text, tokenizer
        self.longest = config.data.row_length

    def generate(self, requests, batch_size=16):
        """Answers each request -> list of assistant `Turn`s; images carry codes and pixels.

        Raises ValueError where a prompt and its answer do not fit the row length of the training.
        """
        if not requests:
            raise ValueError("there is nothing to sample: expected at least one request")
        turns = [None] * len(requests)
        prompts = [self._prompt(request) for request in requests]
        # Requests of like lengths share a batch.
        order = sorted(range(len(requests)), key=lambda i: (_padded(prompts[i]), i))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            chosen += [chosen[-1]] * (batch_size - len(chosen))
            tokens = self._batch([requests[i] for i in chosen], [prompts[i] for i in chosen])
            for i, row in zip(chosen, tokens):
                turns[i] = self._turn(row)
        return self._with_pixels(turns)

    def _prompt(self, request):
        """The tokens of the document and the opened answer, with text and without: two int32 arrays."""
        turns = request.document.turns + (Turn("assistant", ()),)
        tokens = self.grammar.encode(Document(turns), self.text, close=False)
        dropped, _ = self.grammar.guidance_drops(tokens)
        return tokens, tokens[~dropped]

    def _batch(self, requests, prompts):
        """One compiled batch -> the new tokens of each request, cut at the <end> of its turn."""
        grammar, guided = self.grammar, any(request.guidance != 1 for request in requests)
        rows = [full for full, _ in prompts] + ([free for _, free in prompts] if guided else [])
        width = max(map(_padded, prompts))
        room = [self._room(request, tokens) for request, (tokens, _) in zip(requests, prompts)]
        lengths = np.array([len(tokens) for tokens in rows], np.int32)
        tokens = np.zeros((len(rows), width), np.int32)
        positions = np.zeros((len(rows), width, 3), np.int32)
        for row, written in enumerate(rows):
            tokens[row, : len(written)] = written
            positions[row, : len(written)] = grammar.positions(written)
        states = [grammar.feed(written) for written in rows]
        machine = type(states[0])(*(np.concatenate(field) for field in zip(*states)))
        strategies = [(request.text, request.image) for request in requests]
        knobs = {
            "seed": np.array([request.seed & 0xFFFFFFFF for request in requests], np.uint32),
            "room": np.array(room, np.int32),
            "size": np.array([request.size or (0, 0) for request in requests], np.int32),
            "image_only": np.array([request.output == "image" for request in requests]),
            "text_only": np.array([request.output == "text" for request in requests]),
            "guidance": np.array([request.guidance for request in requests], np.float32),
            "temperature": np.array([[s.temperature for s in pair] for pair in strategies], np.float32),
            "top_k": np.array([[s.top_k for s in pair] for pair in strategies], np.int32),
            "top_p": np.array([[s.top_p for s in pair] for pair in strategies], np.float32),
            "min_p": np.array([[s.min_p for s in pair] for pair in strategies], np.float32),
            "keep_mode": np.array([[s.keep_mode for s in pair] for pair in strategies]),
        }
        out = _generate(
            self.params, tokens, positions, lengths, machine, knobs,
            graphdef=self.graphdef, grammar=grammar, new=_round_up(max(room)), guided=guided,
        )  # fmt: skip
        out = np.asarray(out)
        return [row[: np.argmax(row == grammar.end) + 1] for row in out]

    def _room(self, request, tokens):
        """How many tokens the answer may take, <end> and <eos> included."""
        height, width = request.size or (1, 1)
        if max(height, width) > self.grammar.max_side:
            raise ValueError(f"an image of {height} x {width} codes: sides go up to {self.grammar.max_side}")
        least = 3 if request.output == "text" else height * width * self.grammar.depth + 6
        room = self.longest - len(tokens)
        if room < least:
            raise ValueError(
                f"the prompt is too long: {len(tokens)} tokens, and its answer needs {least} more, but this "
                f"model was trained on rows of {self.longest}; shorten the prompt"
            )
        return min(room, least) if request.output == "image" and request.size else room

    def _turn(self, tokens):
        """The assistant's turn that the new tokens write."""
        role = [self.grammar.bos, self.grammar.roles["assistant"]]
        return self.grammar.decode(np.array([*role, *tokens, self.grammar.eos]), self.text).turns[0]

    def _with_pixels(self, turns):
        """Decodes the codes of all images of the turns, those of equal size together."""
        places = {}
        for t, turn in enumerate(turns):
            for p, part in enumerate(turn.parts):
                if isinstance(part, Image):
                    places.setdefault(part.codes.shape, []).append((t, p))
        parts = [list(turn.parts) for turn in turns]
        for found in places.values():
            pixels = self.tokenizer.decode(np.stack([parts[t][p].codes for t, p in found]))
            for (t, p), image in zip(found, pixels):
                parts[t][p] = Image(pixels=image, codes=parts[t][p].codes)
        return [Turn(turn.role, tuple(each)) for turn, each in zip(turns, parts)]


def load(workdir):
    """Restores a `Sampler` from the workdir of a transformer run, which holds everything it needs.

    Raises CheckpointError for a folder that is missing, empty or of another stage, and for a
    tokenizer or a text model other than those the transformer was trained with.
    """
    workdir = Path(workdir)
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "transformer"))
    manifest = json.loads((workdir / "vocabulary.json").read_text())
    grammar, text = Grammar.from_dict(manifest["grammar"]), Text(workdir / "text.model")
    tokenizer = load_tokenizer(workdir / "tokenizer")
    for name, found in (("text", text.hash), ("tokenizer", tokenizer.hash)):
        if found != manifest[f"{name}_hash"]:
            raise checkpoint.CheckpointError(
                f"{workdir}: the {name} in it is not the one that this transformer was trained with "
                f"(expected hash {manifest[f'{name}_hash']}, found {found}); codes of one mean nothing to another"
            )
    make = lambda: transformer.of_codes(config.model, manifest, grammar.vocab_size, nnx.Rngs(0))
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    params, _ = checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract))
    return Sampler(graphdef, params, config, grammar, text, tokenizer)


def _padded(prompt):
    return _round_up(len(prompt[0]))


def _round_up(n):
    return -(-n // _PAD) * _PAD


class _Loop(NamedTuple):
    """What the decoding loop carries."""

    i: jax.Array  # tokens written so far
    hidden: jax.Array  # [R, D] at each row's latest token
    cache: list  # per layer (keys, values) [R, P + N, K, C]
    lengths: jax.Array  # [R] tokens in each row's cache
    machine: NamedTuple  # the grammar's State of each row
    out: jax.Array  # [B, N] what has been written; <eos> beyond
    done: jax.Array  # [B] the answer is complete


@functools.partial(jax.jit, static_argnames=("graphdef", "grammar", "new", "guided"))
def _generate(params, tokens, positions, lengths, machine, knobs, *, graphdef, grammar, new, guided):
    """Prefills R prompts and writes up to `new` tokens for B requests -> int32 [B, new]."""
    model = nnx.merge(graphdef, params)
    blocks = layers.unstack(model.blocks, model.config.layers)
    R, P = tokens.shape
    B = R // 2 if guided else R
    both = (lambda x: jnp.concatenate([x, x])) if guided else (lambda x: x)
    machine = jax.tree.map(jnp.asarray, machine)

    # Slots beyond a row's length hold the keys of padding until new tokens overwrite them; no
    # query sees a slot beyond its own.
    cache = transformer.init_cache(model.config, R, P + new)
    x, cache = transformer.step(model, blocks, cache, tokens, positions, jnp.zeros(R, jnp.int32))
    start = _Loop(
        i=jnp.int32(0),
        hidden=x[jnp.arange(R), lengths - 1],
        cache=cache,
        lengths=jnp.asarray(lengths),
        machine=machine,
        out=jnp.full((B, new), grammar.eos, jnp.int32),
        done=jnp.zeros(B, bool),
    )
    draw = jax.vmap(
        lambda seed, i: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), i)), (0, None)
    )

    def body(s):
        logits = model.logits(s.hidden)
        if guided:
            full, free = jnp.split(logits, 2)
            logits = free + knobs["guidance"][:, None] * (full - free)
            # At guidance 1 the formula above is `full` up to rounding; make it exact, so that a
            # request without guidance is the same in any company.
            logits = jnp.where(knobs["guidance"][:, None] == 1, full, logits)
        state = jax.tree.map(lambda field: field[:B], s.machine)
        legal = grammar.allowed(
            state, knobs["room"] - s.i, knobs["size"], knobs["image_only"], knobs["text_only"]
        )
        modality = (state.mode == CODES).astype(jnp.int32)
        knob = lambda name: jnp.take_along_axis(knobs[name], modality[:, None], 1)[:, 0]
        how = map(knob, ("temperature", "top_k", "top_p", "min_p", "keep_mode"))
        previous = jnp.where(s.i > 0, s.out[:, s.i - 1], -1)
        token = choose(logits, legal, draw(knobs["seed"], s.i), previous, *how)
        token = jnp.where(s.done, grammar.eos, token)
        here = grammar.position(s.machine)
        machine = grammar.advance(s.machine, both(token))
        x, cache = transformer.step(model, blocks, s.cache, both(token)[:, None], here[:, None], s.lengths)
        return _Loop(
            i=s.i + 1,
            hidden=x[:, 0],
            cache=cache,
            lengths=s.lengths + 1,
            machine=machine,
            out=s.out.at[:, s.i].set(token),
            done=s.done | (machine.mode[:B] == BETWEEN),
        )

    return jax.lax.while_loop(lambda s: (s.i < new) & ~s.done.all(), body, start).out
