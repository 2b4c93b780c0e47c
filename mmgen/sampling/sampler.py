"""Sampling: requests in, turns out, in any mix; and what the model says of given documents.

The work is done by `Slots` (slots.py), over weights and a cache that cache.py lays out.
"""

import contextlib
import dataclasses
import functools
import json
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.data import images
from mmgen.document import Document, Image, Text, Turn
from mmgen.grammar import Grammar
from mmgen.models import transformer
from mmgen.models.autoencoders import load_tokenizer
from mmgen.models.refiner import Refiner, load_refiner
from mmgen.runtime import checkpoint, hardware
from mmgen.runtime import mesh as meshes
from mmgen.sampling import cache as caches
from mmgen.sampling.slots import Slots
from mmgen.sampling.strategies import Strategy
from mmgen.text import Text as TextModel

_STOP_EVERY = 32  # tokens after which the texts of answers are searched for what stops them


@dataclasses.dataclass(frozen=True)
class Request:
    """What to answer, and how.

    document: ends with the turn to answer; images in it that have no codes are encoded. output: "image" (exactly
    one), "text", or "any". size: (height, width) of the image in patches; None lets the model choose.

    guidance: 1 is none; above 1 pushes away from what the model would do without the text. image_guidance: above 1
    pushes away from what it would do without the images of the document too (for edits; it needs `image_drop` in
    training); without such images it says nothing. guidance_interval: the shares of an image's codes between
    which there is guidance, (0, 1) for all. guidance_rescale: from 0 to 1, how far the spread of the guided logits is
    brought back to that of the logits without guidance.

    refusals: None where the model must not refuse; a number where it may, if it was trained to: the bias of a refusal's logits, below 0 for
    fewer refusals. Then the answer may be a `Refusal` and its words, whatever `output` says.

    kept: codes int32 [h, w] (or [h, w, depth]) of a picture of `size` that the image is to have, -1 where it is to be drawn: an edit under
    a mask. What is drawn follows on what is kept before it, row by row, and knows what lies behind it only where the document shows it.

    max_tokens: the most that the answer may take, its <end> included; the grammar leads out before. stop: texts
    before which a text answer ends, wherever they first occur.
    """

    document: Document
    output: str = "image"
    size: tuple[int, int] | None = None
    seed: int = 0
    guidance: float = 1.0
    image_guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    image: Strategy = Strategy()
    text: Strategy = Strategy()
    refusals: float | None = None
    kept: np.ndarray | None = dataclasses.field(default=None, compare=False)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.output not in ("image", "text", "any"):
            raise ValueError(f"output must be 'image', 'text' or 'any', found {self.output!r}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be a tuple of texts that are not empty, found {self.stop!r}")
        sides = (1, 1) if self.size is None else tuple(self.size)
        if len(sides) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in sides):
            raise ValueError(f"size must be a (height, width) of at least 1 patch each, found {self.size}")
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1 or not 0 <= self.guidance_rescale <= 1:
            raise ValueError(
                "expected 0 <= low <= high <= 1 of guidance_interval and guidance_rescale from 0 to 1, found "
                f"{self.guidance_interval} and {self.guidance_rescale}"
            )
        if self.refusals is not None and not abs(self.refusals) <= 1e6:
            raise ValueError(f"refusals must be None or a number up to 1e6, found {self.refusals}")
        if self.kept is not None and (self.output != "image" or self.kept.shape[:2] != self.size):
            raise ValueError(
                f"kept are codes of the image that is drawn: expected output 'image' and its size, {self.kept.shape[:2]}, found "
                f"{self.output!r} and {self.size}"
            )
        if not (abs(self.guidance) <= 1e6 and abs(self.image_guidance) <= 1e6):
            raise ValueError(
                f"guidance must be a number up to 1e6, found {self.guidance} and {self.image_guidance}"
            )


@dataclasses.dataclass(frozen=True)
class Refining:
    """How answers' images get their pixels from a `models.refiner.Refiner`; see its `refine`."""

    refiner: Refiner
    steps: int = 4
    guidance: float = 1.0
    tile: int | None = None
    temperature: float = 1.0

    @property
    def about(self):
        """What a note says of it."""
        return {
            "refiner": self.refiner.hash, "scale": self.refiner.scale, "steps": self.steps, "guidance": self.guidance,
            "tile": self.tile, "temperature": self.temperature,
        }  # fmt: skip


class Sampler:
    """A trained transformer with all that its samples need: grammar, text model, image tokenizer.

    graphdef, params: of the whole `Transformer`; they are laid out anew (see cache.py) and not kept. int8: weights
    of the layers and the head in int8. int8_cache: keys and values too. mesh: shares them out over its axis
    "tensor" (see `load`). step: of the checkpoint, for those who note where a sample comes from.
    """

    def __init__(
        self,
        graphdef,
        params,
        config,
        grammar,
        text,
        tokenizer,
        *,
        int8=False,
        int8_cache=False,
        mesh=None,
        step=None,
    ):
        self.config, self.grammar, self.text, self.tokenizer = config, grammar, text, tokenizer
        self.refuses = False  # whether it was trained to refuse
        self.longest, self.step, self.refining = config.data.row_length, step, None
        self.int8_cache, self.mesh = int8_cache, mesh
        self._decoding = set()  # (size, batch size) of pictures whose decoder is compiled, or about to be
        self.dtype = jnp.dtype(config.model.dtype)
        # Tokens of a prompt that are read at a time: as many as it takes to be bound by arithmetic.
        self.chunk = 32 if jax.default_backend() == "cpu" else 128
        prepare = lambda params: caches.prepare(nnx.merge(graphdef, params), self.dtype, int8)
        with self.on_mesh():
            self.weights = jax.jit(prepare, compiler_options=hardware.hasty(jax.default_backend() == "cpu"))(
                params
            )
        model = nnx.merge(graphdef, params)
        for name in caches.LAID_OUT:
            setattr(model, name, None)
        self.model_config = model.config
        self.graphdef, rest = nnx.split(model)
        self.params = nnx.to_pure_dict(rest)

    def on_mesh(self):
        """The context in which this sampler's programs are traced and run."""
        return meshes.use(self.mesh, caches.RULES) if self.mesh else contextlib.nullcontext()

    def generate(self, requests, batch_size=16):
        """Answers each request -> list of assistant `Turn`s; images carry codes and pixels.

        Raises ValueError where a prompt and its answer do not fit the row length of the training.
        """
        turns = [None] * len(requests)
        for i, turn, _ in self.stream(requests, batch_size):
            turns[i] = turn
        return turns

    def stream(self, requests, batch_size=16, every=None):
        """Answers requests, `batch_size` at a time -> iterator of (index of the request, turn, done), as they finish.

        With `every`, unfinished answers come too, after each so many tokens: text so far, and an image so far as
        pixels alone, what is not there yet a checkerboard. Requests that need the same number of branches and
        about the same length share a program; within it bits depend on nothing else (see `Slots`).
        """
        yield from (found[:3] for found in self.stream_tokens(requests, batch_size, every))

    def stream_tokens(self, requests, batch_size, every=None):
        """As `stream`, with the answer's tokens as a fourth."""
        if not requests:
            raise ValueError("there is nothing to sample: expected at least one request")
        if every is not None and every < 1:
            raise ValueError(f"expected reports every 1 token or more, found {every}")
        requests = [dataclasses.replace(r, document=self.encoded(r.document)) for r in requests]
        groups = {}
        for i, request in enumerate(requests):
            prompts = self.prompts(request)
            length = self.bucket(len(prompts[0]) + self.room(request, prompts[0]))
            groups.setdefault((len(prompts), length), []).append(i)
        for (branches, length), members in sorted(groups.items()):
            slots = Slots(self, batch_size, branches, length)
            yield from self.answers(slots, requests, members, every)

    def answers(self, slots, requests, members, every=None):
        """(i, turn, done, tokens) of requests[i] for i in members, as in `stream`, through these slots, which nobody else
        uses meanwhile."""
        index = {slots.add(requests[i]): i for i in members}
        self._decoder_ahead([requests[i] for i in members], slots.count)
        stops = any(requests[i].stop for i in members)
        try:
            while slots.busy:
                found = []
                for progress in slots.run(every or (_STOP_EVERY if stops else None)):
                    turn, codes, stopped = self.turn(progress.request, progress.tokens, progress.done)
                    if stopped and not progress.done:
                        slots.cancel(progress.ticket)
                    done = stopped or progress.done
                    if done or every:
                        found.append((index[progress.ticket], turn, codes, done, progress.tokens))
                # What is not done yet changes again: its pixels are the decoder's.
                seeds = [requests[i].seed if done else None for i, *_, done, _ in found]
                turns = self.with_pixels([turn for _, turn, *_ in found], slots.count, seeds)
                begun = [n for n, (_, _, codes, *_) in enumerate(found) if codes is not None]
                for n, pixels in zip(begun, self.sketches([found[n][2] for n in begun], slots.count)):
                    turns[n] = Turn(turns[n].role, (*turns[n].parts, Image(pixels=pixels)))
                yield from ((i, turn, done, tokens) for (i, _, _, done, tokens), turn in zip(found, turns))
        finally:  # whoever stops listening leaves the slots free
            for ticket in index:
                slots.cancel(ticket)

    def _decoder_ahead(self, requests, batch_size):
        """Compiles, once, what makes pixels of codes of the sizes that are asked for, while the codes are written."""
        sizes = {(request.size, batch_size) for request in requests if request.size} - self._decoding
        self._decoding |= sizes
        if sizes and not (self.mesh or self.refining):
            blanks = [np.zeros((1, *size), np.int32) for size, _ in sizes]
            work = lambda: [self.tokenizer.decode(codes, batch_size) for codes in blanks]
            threading.Thread(target=work).start()

    def encoded(self, document):
        """The document with codes for all its images. ValueError for sizes that the tokenizer's patch does not divide."""
        return self.encode([document], 1)[0]

    def encode(self, documents, batch_size=16):
        """`encoded` of several documents, `batch_size` images of equal size at a time."""
        documents, lacking = list(documents), {}  # images by their size
        images = [image for document in documents for image in document.images() if image.codes is None]
        if not images:
            return documents
        patch = self.tokenizer.patch
        most = self.grammar.max_side * patch
        for image in images:
            height, width = image.pixels.shape[:2]
            if height % patch or width % patch or max(height, width) > most:
                raise ValueError(
                    f"an image of {width}x{height} pixels: sides must be multiples of {patch}, up to {most}; "
                    "resize it first"
                )
            lacking.setdefault(image.pixels.shape, {})[id(image)] = image.pixels
        codes = {}
        for found in lacking.values():
            codes |= zip(found, self.tokenizer.encode(np.stack(list(found.values())), batch=batch_size))
        whole = lambda part: Image(part.pixels, codes[id(part)]) if id(part) in codes else part
        return [
            Document([Turn(turn.role, [whole(part) for part in turn.parts]) for turn in document.turns])
            for document in documents
        ]

    def prompts(self, request):
        """The tokens of the document and the opened answer, int32 [T], for each branch of the guidance: with all,
        without text, without text and images."""
        turns = self.encoded(request.document).turns + (Turn("assistant", ()),)
        tokens = self.grammar.encode(Document(turns), self.text, close=False)
        words, images = self.grammar.guidance_drops(tokens)
        if request.image_guidance != 1 and images.any():
            return [tokens, tokens[~words], tokens[~(words | images)]]
        return [tokens] if request.guidance == 1 else [tokens, tokens[~words]]

    def room(self, request, tokens):
        """How many tokens the answer may take, <end> and <eos> included."""
        height, width = request.size or (1, 1)
        depth = () if self.grammar.depth == 1 else (self.grammar.depth,)
        if request.kept is not None and (
            request.kept.shape[2:] != depth
            or not (-1 <= request.kept.min() <= request.kept.max() < self.grammar.codes)
        ):
            raise ValueError(
                f"kept has the shape {request.kept.shape} and codes up to {request.kept.max()}: expected {(height, width, *depth)}, and "
                f"codes from -1 to {self.grammar.codes - 1}"
            )
        if max(height, width) > self.grammar.max_side:
            raise ValueError(f"an image of {height} x {width} codes: sides go up to {self.grammar.max_side}")
        least = height * width * self.grammar.depth + 6 if request.output == "image" else 3
        room = self.longest - len(tokens)
        if room < least:
            raise ValueError(
                f"the prompt is too long: {len(tokens)} tokens, and its answer needs {least} more, but this "
                f"model was trained on rows of {self.longest}; shorten the prompt"
            )
        if request.max_tokens is not None:
            if request.max_tokens + 1 < least:
                raise ValueError(f"max_tokens must be at least {least - 1} here, found {request.max_tokens}")
            room = min(room, request.max_tokens + 1)
        return min(room, least) if request.output == "image" and request.size else room

    def bucket(self, length):
        """The length of the cache for `length` tokens: whole chunks, of which few numbers are compiled."""
        needed, most = (-(-tokens // self.chunk) for tokens in (length, max(length, self.longest)))
        octave = 1 << max(needed.bit_length() - 3, 0)  # 1, 2, ... 7, 8, 10, 12, 14, 16, 20, ...
        return min(-(-needed // octave) * octave, most) * self.chunk

    def turn(self, request, tokens, done=True):
        """What an answer's tokens write so far -> the assistant's turn of its finished parts, without pixels; the
        codes of an image that is not finished, -1 where none is yet, or None; whether a text of `request.stop`
        ended the turn. Until it is `done`, the end of a text that may be the begin of such a one is held back."""
        role = [self.grammar.bos, self.grammar.roles["assistant"]]
        document, codes = self.grammar.decode_open(np.array([*role, *tokens]), self.text)
        parts = document.turns[0].parts
        for n, part in enumerate(parts):
            found = [part.text.find(stop) for stop in request.stop] if isinstance(part, Text) else []
            found = [at for at in found if at >= 0]
            if found:
                cut = Turn("assistant", (*parts[:n], Text(part.text[: min(found)])))
                return cut.normalised(), None, True
        if request.stop and not done and parts and isinstance(parts[-1], Text):
            text = parts[-1].text
            held = max(n for stop in request.stop for n in range(len(stop)) if text.endswith(stop[:n]))
            return Turn("assistant", (*parts[:-1], Text(text[: len(text) - held]))).normalised(), codes, False
        return document.turns[0], codes, False

    def with_pixels(self, turns, batch_size, seeds):
        """The turns with pixels for the codes of all their images, `batch_size` of equal size decoded together: those
        of the tokenizer's decoder, or of the refiner where there is one and the turn has one of the `seeds`. The noise
        of a turn's images is a function of its seed alone."""
        grids, noises = [], []
        for turn, seed in zip(turns, seeds):
            images = [part for part in turn.parts if isinstance(part, Image)]
            grids += [image.codes for image in images]
            noises += [None if seed is None else draw_seed(seed, n) for n in range(len(images))]
        pixels = iter(self._decoded(grids, batch_size, noises))
        whole = lambda part: Image(pixels=next(pixels), codes=part.codes) if isinstance(part, Image) else part
        return [Turn(turn.role, tuple(whole(part) for part in turn.parts)) for turn in turns]

    def sketches(self, grids, batch_size=16):
        """Pixels of images of which codes are still to come (-1 in the codes [h, w]): there is a checkerboard where
        they are, as nothing is known of it. Near its border the picture may still change."""
        missing = [codes.reshape(codes.shape[:2] + (-1,)).min(-1) < 0 for codes in grids]
        latest = [
            codes[~none][-1:] if (~none).any() else np.zeros(1, np.int32)
            for codes, none in zip(grids, missing)
        ]
        filled = [np.where(codes < 0, last[0], codes) for codes, last in zip(grids, latest)]
        patch, sketches = self.tokenizer.patch, []
        for pixels, none in zip(self._decoded(filled, batch_size), missing):
            none = none.repeat(patch, 0).repeat(patch, 1)
            squares = sum(np.indices(none.shape) // max(patch // 2, 1)) % 2
            board = np.full((*none.shape, pixels.shape[2]), 255, np.uint8)
            board[..., :3] = np.where(squares, 160, 96)[..., None]
            sketches.append(np.where(none[..., None], board, pixels))
        return sketches

    def _decoded(self, grids, batch_size, seeds=None):
        """Pixels of each of these codes, refined where there is a refiner and a seed. A batch is always full, so that
        bits do not depend on how many there are."""
        kinds, pixels = {}, [None] * len(grids)
        for n, (codes, seed) in enumerate(zip(grids, seeds or [None] * len(grids))):
            kinds.setdefault((codes.shape, self.refining is not None and seed is not None), []).append(n)
        for (_, refined), found in kinds.items():
            codes = np.stack([grids[n] for n in found])
            if refined:
                how = self.refining
                decoded = how.refiner.refine(
                    codes,
                    [seeds[n] for n in found],
                    how.steps,
                    how.guidance,
                    how.tile,
                    batch_size,
                    how.temperature,
                )
            else:
                decoded = self.tokenizer.decode(codes, batch=batch_size)
            for n, each in zip(found, decoded):
                pixels[n] = each
        return pixels

    def reconstruct(self, images, seed=0, batch_size=16):
        """What codes give back of images uint8 [N, H, W, c] of one size: the pixels that answers would have."""
        codes = self.tokenizer.encode(images)
        return np.stack(
            self._decoded(list(codes), batch_size, [draw_seed(seed, n) for n in range(len(codes))])
        )

    def shown(self, pixels, data, size=None, signer=None, scale=1):
        """A picture, uint8 [H, W, 3 or 4], that a user shows, as an `Image` of `size` (height, width) in patches; where that is None, of about
        its own size divided by `scale`, its sides no longer than the grammar's.

        signer: a `safety.provenance.Signer`, or None. Where it has signed the file (data: its bytes) the image has the codes that
        were drawn, and without a `size` their size. Its mark is taken off the pixels: a model sees it, and few have learned to look past it.
        """
        patch, most = self.tokenizer.patch, self.grammar.max_side
        codes = signer.codes_in(data, self.tokenizer.hash) if signer else None
        if codes is not None and (max(codes.shape[:2]) > most or size not in (None, codes.shape[:2])):
            codes = None
        if codes is not None:
            size = codes.shape[:2]
        elif size is None:
            shrink = min(1 / scale, most * patch / max(pixels.shape[:2]))
            size = [max(round(side * shrink / patch), 1) for side in pixels.shape[:2]]
        pixels = images.fit(pixels, size[1] * patch, size[0] * patch)
        return Image(signer.unmarked(pixels) if signer else pixels, codes)

    def nats(self, documents, batch_size=16):
        """How surprising each token of each document is -> list of float32 [T], -log p of the token after those
        before it; 0 for the first. No guidance, temperature or grammar: the model's own distribution. Instead of
        documents they may be rows of tokens, int32 [T].

        Raises GrammarError for what cannot be written, ValueError for documents longer than the training's rows.
        """
        rows = list(documents)
        if not all(isinstance(row, np.ndarray) for row in rows):
            rows = [self.grammar.encode(document, self.text) for document in self.encode(rows, batch_size)]
        longest = max(map(len, rows), default=0)
        if longest > self.longest:
            raise ValueError(
                f"a document of {longest} tokens: this model was trained on rows of {self.longest}; shorten it"
            )
        out, order = [None] * len(rows), sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(rows), batch_size):
            chosen = order[start : start + batch_size]
            S = self.bucket(len(rows[chosen[-1]]))
            tokens, positions = np.zeros((batch_size, S), np.int32), np.zeros((batch_size, S, 3), np.int32)
            for row, i in enumerate(chosen):
                tokens[row, : len(rows[i])] = rows[i]
                positions[row, : len(rows[i])] = self.grammar.positions(rows[i])
            with self.on_mesh():
                nats = _nats(
                    self.params, self.weights, tokens, positions, graphdef=self.graphdef, chunk=self.chunk,
                    int8=self.int8_cache,
                )  # fmt: skip
            for i, each in zip(chosen, np.asarray(nats)):
                out[i] = each[: len(rows[i])]
        return out


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk", "int8"))
def _nats(params, weights, tokens, positions, *, graphdef, chunk, int8):
    """-log p of each token int32 [B, S] -> float32 [B, S]; a chunk of all rows at a time, as whole rows would need
    S x S numbers for each head, and S x V."""
    model = nnx.merge(graphdef, params)
    B, S = tokens.shape
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))

    def surprise(logits, targets):
        return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]

    def read(cache, at):
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, at, chunk, 1)
        x, cache = caches.step(model, weights, cache, part(tokens), part(positions), jnp.full(B, at))

        def row(x_and_targets):
            x, targets = x_and_targets
            logits = caches.logits(model, weights, x)
            if not model.colors:
                return surprise(logits, targets)
            code = targets >= model.code_start
            outlines, colors = jnp.divmod(jnp.where(code, targets - model.code_start, 0), model.colors)
            first = surprise(logits, jnp.where(code, model.code_start + colors, targets))
            return first + jnp.where(code, surprise(caches.outline_logits(model, x, colors), outlines), 0)

        return cache, jax.lax.map(row, (x, part(targets)))

    cache = caches.empty(model.config, B, S, model.dtype, int8)
    _, nats = jax.lax.scan(read, cache, jnp.arange(0, S, chunk))
    nats = nats.transpose(1, 0, 2).reshape(B, S)
    return jnp.pad(nats[:, :-1], ((0, 0), (1, 0)))


def draw_seed(seed, n):
    """The seed of draw n of what has a seed of its own."""
    return int(np.random.SeedSequence([seed % 2**64, n]).generate_state(1)[0])


def refining(workdir, tokenizer, *, refiner="", upscale=None, **how):
    """The `Refining` of the refiner run in `refiner`, or of the one that lies in a transformer's workdir, in
    WORKDIR/refiners/NAME, and enlarges `upscale` times.

    Raises ValueError where there is none, or where it reads the codes of another tokenizer.
    """
    beside = Path(workdir) / "refiners"
    folders = [Path(refiner)] if refiner else sorted(beside.glob("*/"))
    scales = {folder: checkpoint.read_config(folder, "refiner")["model"]["scale"] for folder in folders}
    right = [folder for folder in folders if upscale in (None, scales[folder])]
    if not folders:
        raise ValueError(
            f"expected the workdir of a refiner run in {beside}, found none: name one with --refiner"
        )
    if len(right) != 1:
        have = ", ".join(f"{folder} (x{scale})" for folder, scale in scales.items())
        wanted = "one refiner" if upscale is None else f"one refiner that enlarges {upscale} times"
        raise ValueError(f"expected {wanted}, found {have}: choose by --refiner or --upscale")
    own = (right[0] / "tokenizer").exists()  # packed ones have that of the model they lie beside
    found = load_refiner(right[0], None if own else tokenizer)
    if found.tokenizer.hash != tokenizer.hash:
        raise ValueError(
            f"{right[0]} reads the codes of tokenizer {found.tokenizer.hash}, this model writes those of "
            f"{tokenizer.hash}: train one with --config.data.tokenizer={workdir}/tokenizer"
        )
    return Refining(found, **how)


def load(workdir, *, int8=False, int8_cache=False, tensor=1):
    """Restores a `Sampler` from the workdir of a transformer run, which holds everything it needs.

    int8, int8_cache: of the weights and of keys and values (see cache.py). tensor: how many devices share the
    heads, the hidden units and the vocabulary. On CPU computation is in float32 whatever the training was in:
    bfloat16 products are seven times as slow there.

    Raises CheckpointError for a folder that is missing, empty or of another stage, and for a
    tokenizer or a text model other than those the transformer was trained with.
    """
    workdir = Path(workdir)
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "transformer", "reinforce"))
    if jax.default_backend() == "cpu":
        config.model.dtype = "float32"
    manifest = json.loads((workdir / "vocabulary.json").read_text())
    grammar, text = Grammar.from_dict(manifest["grammar"]), TextModel(workdir / "text.model")
    tokenizer = load_tokenizer(workdir / "tokenizer")
    for name, found in (("text", text.hash), ("tokenizer", tokenizer.hash)):
        if found != manifest[f"{name}_hash"]:
            raise checkpoint.CheckpointError(
                f"{workdir}: the {name} in it is not the one that this transformer was trained with "
                f"(expected hash {manifest[f'{name}_hash']}, found {found}); codes of one mean nothing to another"
            )
    make = lambda: transformer.of_codes(config.model, manifest, grammar.vocab_size, None)
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    shapes, mesh = nnx.to_pure_dict(abstract), None
    if tensor < 1:
        raise ValueError(f"expected at least 1 device to share the model, found {tensor}")
    if tensor > 1:
        mesh = meshes.make_mesh({"data": -1, "tensor": tensor})
        shardings = meshes.param_shardings(abstract, mesh, dict(config.sharding) | {"embed": None})
        place = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
        shapes = jax.tree.map(place, shapes, shardings)
    params, step = checkpoint.load_weights(workdir, shapes)
    found = Sampler(
        graphdef,
        params,
        config,
        grammar,
        text,
        tokenizer,
        int8=int8,
        int8_cache=int8_cache,
        mesh=mesh,
        step=step,
    )
    found.refuses = manifest.get("refusals", False)
    return found
