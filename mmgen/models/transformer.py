"""The sharded transformer that reads and writes text and images.

Pre-norm RMSNorm, QK-norm, SwiGLU, grouped-query attention, (t, y, x) rotary embedding, scanned
layers. Shapes: B batch, T tokens, D model, V vocabulary, K kv-heads, C channels a head.
"""

import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.models import layers
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
        own = (jnp.arange(vocab) < vocab - codes)[:, None]
        self.embedding = nnx.Param(own * layers.normal(rngs, (vocab, D), 1.0), axes=("vocab", "embed"))
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=self.dtype), config.layers, rngs)
        self.head = (
            None
            if config.tied
            else nnx.Param(own * layers.normal(rngs, (vocab, D), D**-0.5), axes=("vocab", "embed"))
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
        self.code_start, self.max_side = vocab - codes, max_side
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
        """[V, D]: each token's own row, and for a code those of its digits added."""
        if digits is None:
            return own[...]
        table = own[...]
        return table.at[self.code_start :].add(self._digits() @ digits[...])

    def embed(self, tokens, positions, around, before):
        """tokens int32 [B, T], positions int32 [B, T, 3], around int32 [B, T, AROUND], before int32 [B, T, N] -> [B, T, D].

        `around` is as `around_next` says, `before` as `tokens_before` does, with N = `config.before`.
        """
        offset = (positions[..., 1:] - positions[..., :1]).astype(jnp.float32)
        angles = offset[..., None] * (np.pi / 2 ** np.arange(1, _OCTAVES + 1, dtype=np.float32))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles) - 1], -1)
        table = self._table(self.embedding, self.digit_embedding).astype(self.dtype)
        x = table[tokens] + self.place(waves.reshape(waves.shape[:-2] + (-1,)))
        if self.before is not None:
            earlier = table[jnp.maximum(before, 0)] * (before >= 0)[..., None]
            x = x + self.before(earlier.reshape(earlier.shape[:-2] + (-1,)))
        if self.around is None:
            return x
        digits = jnp.pad(self._digits(), ((0, 1), (0, 0)))[around]  # the last row, 0, is that of -1
        return x + self.around(digits.reshape(digits.shape[:-2] + (-1,)))

    def logits(self, x):
        """x [..., D] -> float32 logits [..., V]."""
        x = layers.rms_norm(x)
        if self.head is None:
            # Tied embeddings start at unit scale for the input; the output side is scaled to match.
            head = self._table(self.embedding, self.digit_embedding) * self.config.width**-0.5
        else:
            head = self._table(self.head, self.digit_head)
        y = jnp.einsum("nd,vd->nv", x.reshape(-1, x.shape[-1]), head.astype(self.dtype))
        return y.astype(jnp.float32).reshape(x.shape[:-1] + (-1,))

    def near(self, tokens, segments):
        """What `embed` needs of the tokens near each one: int32 [B, T, AROUND] and [B, T, N]."""
        return (
            around_next(tokens, segments, self.code_start, self.max_side),
            tokens_before(tokens, segments, self.config.before),
        )

    def rope(self, positions):
        return layers.rope(positions, self.config.head_dim, self.config.rope_base)

    def __call__(self, tokens, segments, positions):
        """Tokens, segments int32 [B, T], positions int32 [B, T, 3] -> hidden [B, T, D] (see `logits`).

        A token sees itself and the earlier tokens of its own segment.
        """
        T = tokens.shape[1]
        causal = jnp.tril(jnp.ones((T, T), bool))
        bias = layers.bias_of(causal & (segments[:, :, None] == segments[:, None, :]))
        x = self.embed(tokens, positions, *self.near(tokens, segments))
        x = constrain(x, ("batch", "length", None))
        return layers.scan(
            self.blocks, x, self.rope(positions), bias, remat=self.config.remat, unroll=self.config.unroll
        )


def around_next(tokens, segments, code_start, max_side):
    """The codes above left, above, above right, two above and two left of the place that comes after each code.

    tokens, segments int32 [B, T] -> int32 [B, T, AROUND]; -1 where the image has no such code, or not yet, and
    beside text. The width of an image is said by the token before its first code; <w:1..max_side> precede the
    codes in the vocabulary. At an image's sides "left" and "right" are the ends of the rows beside.
    """
    at = jnp.arange(tokens.shape[1])
    width = tokens - code_start + max_side + 1
    stated = (width > 0) & (width <= max_side)
    latest = jax.lax.cummax(jnp.where(stated, at * (max_side + 1) + width, 0), axis=1)
    begin, width = jnp.divmod(latest, max_side + 1)
    above = at - width + 1
    places = jnp.stack(
        [above - 1, above, above + 1, above - width, jnp.broadcast_to(at - 1, above.shape)], -1
    )
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


def init_cache(config, batch, length, dtype=None):
    """Nothing read yet: zeroed keys and values [B, S, K, C], a pair of buffers a layer, and tokens [B, S]."""
    shape = (batch, length, config.kv_heads, config.head_dim)
    dtype = dtype or jnp.dtype(config.dtype)
    pairs = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]
    return {"layers": pairs, "tokens": jnp.zeros((batch, length), jnp.int32)}


def step(model, blocks, cache, tokens, positions, lengths):
    """Feeds tokens to the cached model: prefill (T > 1) and decode (T = 1) alike.

    tokens int32 [B, T], positions int32 [B, T, 3]; lengths int32 [B] is how many tokens each row's
    cache holds already. Row b's token t is written to slot lengths[b] + t and sees slots up to its
    own. `blocks` is `layers.unstack(...)` of the model's blocks. Returns hidden [B, T, D], cache.
    """
    B, T = tokens.shape
    S = cache["tokens"].shape[1]
    slots = lengths[:, None] + jnp.arange(T)
    bias = layers.bias_of(jnp.arange(S) <= slots[:, :, None])
    cos_sin = model.rope(positions)
    rows = jnp.arange(B)[:, None]
    read = cache["tokens"].at[rows, slots].set(tokens, mode="drop")
    near = (y[rows, jnp.minimum(slots, S - 1)] for y in model.near(read, jnp.ones_like(read)))
    x = model.embed(tokens, positions, *near)
    pairs = []
    for block, (keys, values) in zip(blocks, cache["layers"]):
        q, k, v = block.attention.qkv(layers.rms_norm(x), cos_sin)
        keys = keys.at[rows, slots].set(k.astype(keys.dtype), mode="drop")
        values = values.at[rows, slots].set(v.astype(values.dtype), mode="drop")
        y = layers.attention(q, keys.astype(q.dtype), values.astype(q.dtype), bias)
        x = x + block.attention.project(y)
        x = x + block.mlp(layers.rms_norm(x))
        pairs.append((keys, values))
    return x, {"layers": pairs, "tokens": read}


def loss(model, batch, *, code_start, z_loss):
    """Weighted next-token cross-entropy of a packed batch, and its parts.

    batch: tokens, segments int32 [B, T], positions int32 [B, T, 3], weights float32 [B, T] (of
    each token as a target). Tokens from `code_start` on are image codes. `z_loss` times log Z
    squared keeps the logits from drifting (arXiv:2204.02311). Returns the mean over weights, and
    the cross-entropy of text and of image codes apart.
    """
    x = model(batch["tokens"][:, :-1], batch["segments"][:, :-1], batch["positions"][:, :-1])
    logits = constrain(model.logits(x), ("batch", "length", "vocab"))
    targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    entropy = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    mean = lambda value, weight: (value * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
    images = targets >= code_start
    metrics = {
        "image_loss": mean(entropy, weights * images),
        "text_loss": mean(entropy, weights * ~images),
    }
    return mean(entropy + z_loss * jnp.square(log_z), weights), metrics
