"""The sharded transformer that reads and writes text and images.

Pre-norm RMSNorm, QK-norm, SwiGLU, grouped-query attention, (t, y, x) rotary embedding, scanned
layers. Shapes: B batch, T tokens, D model, V vocabulary, K kv-heads, C channels a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.models import layers
from mmgen.models.cross_entropy import cross_entropy
from mmgen.runtime import mesh as meshes
from mmgen.runtime.mesh import constrain

_OCTAVES = 6  # of the place features: periods of 4, 8, ... 128 patches
AROUND = 5  # codes around the next one


class Transformer(nnx.Module):
    """Causal transformer over packed rows; `vocab` is the grammar's joint vocabulary size.

    `levels` are those of an FSQ tokenizer, whose codes are the last of the vocabulary: a code is then
    read and written as its digits together, plus a part of its own that starts at zero. Codes that
    are alike share what is learned of them, so that rare ones need not be learned alone. Where the first
    `color_digits` of them carry colours (see stages/tokenizer.py), these together are also read and written
    as one, and so are the rest: an outline is the same in any colour. `max_side` is the grammar's.
    """

    def __init__(self, config, vocab, rngs, levels=(), color_digits=0, max_side=0):
        # Frozen, so that the graph definition can be hashed (it is a static argument of jit).
        self.config, self.dtype = ml_collections.FrozenConfigDict(config), jnp.dtype(config.dtype)
        D = config.width
        codes = math.prod(levels) if levels else 0
        parts = [range(i, i + 1) for i in range(len(levels))]
        if color_digits:
            parts += [range(color_digits), range(color_digits, len(levels))]
        self.levels, self.parts = tuple(levels), tuple(parts)
        # Tables may have more rows than tokens, so that a tensor axis can share them evenly.
        self.vocab, self.code_start = vocab, vocab - codes
        self.rows = -(-vocab // config.vocab_multiple) * config.vocab_multiple
        own = (jnp.arange(self.rows) < vocab - codes)[:, None]
        self.embedding = nnx.Param(own * layers.normal(rngs, (self.rows, D), 1.0), axes=("vocab", "embed"))
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=self.dtype), config.layers, rngs)
        self.head = (
            None
            if config.tied
            else nnx.Param(own * layers.normal(rngs, (self.rows, D), D**-0.5), axes=("vocab", "embed"))
        )
        scale = max(len(parts), 1) ** -0.5
        rows = sum(math.prod(levels[i] for i in part) for part in parts)
        digits = lambda scale: nnx.Param(layers.normal(rngs, (rows, D), scale), axes=("code", "embed"))
        self.digit_embedding = digits(scale) if levels else None
        self.digit_head = digits(scale * D**-0.5) if levels and not config.tied else None

        # Rotary embedding tells how far apart two tokens are; where in its image a code stands would have
        # to be inferred. These features of (y - t, x - t) say it outright, for any size; 0 for text.
        self.place = layers.Linear((4 * _OCTAVES, D), ("place", "embed"), rngs, dtype=self.dtype)

        # What is drawn already around the next code decides most of it: given at once, no head has to find it.
        self.max_side = max_side
        self.around = (
            layers.Linear((AROUND * rows, D), ("place", "embed"), rngs, scale=D**-0.5, dtype=self.dtype)
            if config.around and levels
            else None
        )

        # Whose colour "red" is, the next word says: words that stand together are bound before any head looks for them.
        self.before = (
            layers.Linear((config.before * D, D), ("mlp", "embed"), rngs, dtype=self.dtype)
            if config.before
            else None
        )

    def _digits(self):
        """float32 [codes, rows]: the rows of the digits' tables that make up each code."""
        codes = np.arange(math.prod(self.levels))
        digit = codes[:, None] // np.cumprod([1, *self.levels[:-1]]) % self.levels
        values = [
            np.ravel_multi_index([digit[:, i] for i in p], [self.levels[i] for i in p]) for p in self.parts
        ]
        return np.concatenate([np.eye(v.max() + 1, dtype=np.float32)[v] for v in values], 1)

    def _table(self, own, digits):
        """[rows, D]: each token's own row, and for a code those of its digits added."""
        if digits is None:
            return own[...]
        # Padded and added rather than written into a slice: a table that is split over its rows stays so.
        return own[...] + jnp.pad(
            self._digits() @ digits[...], ((self.code_start, self.rows - self.vocab), (0, 0))
        )

    def embedding_table(self):
        """[rows, D]: what a token becomes at the input, before its place and its neighbours are added."""
        return self._table(self.embedding, self.digit_embedding)

    def embed(self, tokens, positions, around, before, table=None):
        """tokens int32 [B, T], positions int32 [B, T, 3], around int32 [B, T, AROUND], before int32 [B, T, N] -> [B, T, D].

        `around` is as `around_next` says, `before` as `tokens_before` does, with N = `config.before`. `table` is
        the `embedding_table` where it is at hand already.
        """
        offset = (positions[..., 1:] - positions[..., :1]).astype(jnp.float32)
        angles = offset[..., None] * (np.pi / 2 ** np.arange(1, _OCTAVES + 1, dtype=np.float32))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles) - 1], -1)
        table = (self.embedding_table() if table is None else table).astype(self.dtype)
        x = lookup(table, tokens) + self.place(waves.reshape(waves.shape[:-2] + (-1,)))
        if self.before is not None:
            earlier = lookup(table, before)
            x = x + self.before(earlier.reshape(earlier.shape[:-2] + (-1,)))
        if self.around is None:
            return x
        digits = jnp.pad(self._digits(), ((0, 1), (0, 0)))[around]  # the last row, 0, is that of -1
        return x + self.around(digits.reshape(digits.shape[:-2] + (-1,)))

    def head_table(self):
        """[rows, D]: what a normed hidden state is multiplied with to give logits."""
        if self.head is None:
            # Tied embeddings start at unit scale for the input; the output side is scaled to match.
            return self.embedding_table() * self.config.width**-0.5
        return self._table(self.head, self.digit_head)

    def logits(self, x):
        """x [..., D] -> float32 logits [..., V]."""
        x = layers.rms_norm(x)
        y = jnp.einsum("nd,vd->nv", x.reshape(-1, x.shape[-1]), self.head_table().astype(self.dtype))
        return layers.high(y).reshape(x.shape[:-1] + (-1,))[..., : self.vocab]

    def near(self, tokens, segments):
        """What `embed` needs of the tokens near each one: int32 [B, T, AROUND] and [B, T, N]."""
        return (
            around_next(tokens, segments, self.code_start, self.max_side),
            tokens_before(tokens, segments, self.config.before),
        )

    def near_at(self, tokens, places):
        """As `near`, of one document a row, for the tokens at `places` int32 [B, T] of tokens [B, S] alone."""
        at = jnp.arange(tokens.shape[1])
        stated = stated_width(tokens, self.code_start, self.max_side)
        seen = jnp.where((stated > 0)[:, None] & (at <= places[..., None]), at, -1).max(-1)
        width = jnp.take_along_axis(stated, jnp.maximum(seen, 0), 1)
        around = around_places(places, width)
        of = lambda y: jnp.take_along_axis(tokens[:, None], jnp.clip(y, 0, tokens.shape[1] - 1), 2)
        now = jnp.take_along_axis(tokens, jnp.minimum(places, tokens.shape[1] - 1), 1)
        inside = ((now >= self.code_start) & (seen >= 0))[..., None]
        inside &= (seen[..., None] < around) & (around <= places[..., None])
        before = places[..., None] - np.arange(1, self.config.before + 1)
        return jnp.where(inside, of(around) - self.code_start, -1), jnp.where(before >= 0, of(before), -1)

    def rope(self, positions):
        return layers.rope(positions, self.config.head_dim, self.config.rope_base)

    def __call__(self, tokens, segments, positions):
        """Tokens, segments int32 [B, T], positions int32 [B, T, 3] -> hidden [B, T, D] (see `logits`).

        A token sees itself and the earlier tokens of its own segment.
        """
        x = self.embed(tokens, positions, *self.near(tokens, segments))
        x = constrain(x, ("batch", "stream", None))
        c = self.config
        return layers.scan(
            self.blocks, x, self.rope(positions), segments, c.attention, remat=c.remat, unroll=c.unroll
        )


def lookup(table, ids):
    """Rows of table [V, D] for int ids [B, T, ...] -> [B, T, ..., D]; zeros where an id is negative.

    Under a mesh each device looks up what lies in its own part of the vocabulary, and the parts are summed: the
    compiler by itself would gather the whole table, or what was looked up, on every device.
    """

    def local(table, ids, over=()):
        ids = ids - (jax.lax.axis_index(over) * table.shape[0] if over else 0)
        here = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.where(here[..., None], table[jnp.where(here, ids, 0)], 0)
        return jax.lax.psum(rows, over) if over else rows

    if meshes.current() is None:
        return local(table, ids)
    mesh, rules = meshes.current()
    rows, tokens = meshes.spec(("vocab", None), rules), meshes.spec(("batch", "length"), rules)
    return jax.shard_map(
        functools.partial(local, over=meshes.mesh_axes(rows[0])),
        mesh=mesh, in_specs=(rows, tokens), out_specs=tokens, check_vma=False,
    )(table, ids)  # fmt: skip


def stated_width(tokens, code_start, max_side):
    """The width that each token states, 0 where it states none: <w:1..max_side> precede the codes in the vocabulary."""
    width = tokens - code_start + max_side + 1
    return jnp.where((width > 0) & (width <= max_side), width, 0)


def around_places(at, width):
    """Where the codes around the place after `at` stand, in an image of this width: int32 [..., AROUND]."""
    above = at - width + 1
    return jnp.stack([above - 1, above, above + 1, above - width, jnp.broadcast_to(at - 1, above.shape)], -1)


def around_next(tokens, segments, code_start, max_side):
    """The codes above left, above, above right, two above and two left of the place that comes after each code.

    tokens, segments int32 [B, T] -> int32 [B, T, AROUND]; -1 where the image has no such code, or not yet, and
    beside text. The width of an image is said by the token before its first code; <w:1..max_side> precede the
    codes in the vocabulary. At an image's sides "left" and "right" are the ends of the rows beside.
    """
    at = jnp.arange(tokens.shape[1])
    stated = stated_width(tokens, code_start, max_side)
    latest = jax.lax.cummax(jnp.where(stated > 0, at * (max_side + 1) + stated, 0), axis=1)
    begin, width = jnp.divmod(latest, max_side + 1)
    places = around_places(at, width)
    of = lambda x: jnp.take_along_axis(x[..., None], jnp.clip(places, 0, x.shape[1] - 1), 1)
    inside = ((tokens >= code_start) & (width > 0))[..., None] & (begin[..., None] < places)
    inside &= places <= at[:, None]
    inside &= of(segments) == segments[..., None]
    inside &= (jnp.take_along_axis(segments, begin, 1) == segments)[
        ..., None
    ]  # the width is of this document
    return jnp.where(inside, of(tokens) - code_start, -1)


def tokens_before(tokens, segments, n):
    """The n tokens before each one, the nearest first: int32 [B, T] twice -> [B, T, n]; -1 beyond the segment's start."""
    places = np.arange(tokens.shape[1])[:, None] - np.arange(1, n + 1)
    of = lambda x: x[:, np.maximum(places, 0)]
    return jnp.where((places >= 0) & (of(segments) == segments[..., None]), of(tokens), -1)


def of_codes(config, vocabulary, vocab, rngs):
    """The Transformer for the codes and the grammar that a dict (such as a shard's manifest) describes."""
    levels = vocabulary["levels"] if config.factored else ()
    return Transformer(
        config, vocab, rngs, levels, vocabulary["color_digits"], vocabulary["grammar"]["max_side"]
    )


def loss(model, batch, *, code_start, z, chunk):
    """Weighted next-token cross-entropy of a packed batch, and what is watched: {name: (sum, weight)}.

    batch: tokens, segments int32 [B, T], positions int32 [B, T, 3], weights float32 [B, T] (of each token as a
    target). Tokens from `code_start` on are image codes. `z` times log Z squared keeps the logits from drifting (arXiv:2204.02311). Beside "loss", the
    cross-entropy of image codes and of text apart, the mean log Z and the root mean square of the last hidden
    states, whose growth announces trouble long before the loss does.
    """
    x = model(batch["tokens"], batch["segments"], batch["positions"])
    # The row is not cut by one for the shift: kernels and meshes want its full, even length. The last place has
    # no target and no weight.
    after = lambda y: jnp.pad(y[:, 1:], ((0, 0), (0, 1)))
    targets, weights = after(batch["tokens"]), after(batch["weights"])
    normed = constrain(layers.rms_norm(x), ("batch", "length", None))
    total, entropy, log_z = cross_entropy(
        normed, model.head_table(), targets, weights, model.vocab, z, chunk, model.dtype
    )
    of = lambda value, weight: ((value * weight).sum(), weight.sum())
    images = targets >= code_start
    square = jnp.mean(jnp.square(jax.lax.stop_gradient(layers.high(x))), -1)
    return {
        "loss": (total, weights.sum()),
        "image_loss": of(entropy, weights * images),
        "text_loss": of(entropy, weights * ~images),
        "log_z": of(log_z, weights),
        "output_norm": of(jnp.sqrt(square), batch["segments"] > 0),
    }
