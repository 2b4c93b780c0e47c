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


class Transformer(nnx.Module):
    """Causal transformer over packed rows; `vocab` is the grammar's joint vocabulary size.

    `levels` are those of an FSQ tokenizer, whose codes are the last of the vocabulary: a code is then
    read and written as its digits together, plus a part of its own that starts at zero. Codes that
    are alike share what is learned of them, so that rare ones need not be learned alone.
    """

    def __init__(self, config, vocab, rngs, levels=()):
        # Frozen, so that the graph definition can be hashed (it is a static argument of jit).
        self.config, self.dtype = ml_collections.FrozenConfigDict(config), jnp.dtype(config.dtype)
        D = config.width
        self.levels = tuple(levels)
        codes = math.prod(levels) if levels else 0
        own = (jnp.arange(vocab) < vocab - codes)[:, None]
        self.embedding = nnx.Param(own * layers.normal(rngs, (vocab, D), 1.0), axes=("vocab", "embed"))
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=self.dtype), config.layers, rngs)
        self.head = (
            None
            if config.tied
            else nnx.Param(own * layers.normal(rngs, (vocab, D), D**-0.5), axes=("vocab", "embed"))
        )
        scale = max(len(levels), 1) ** -0.5
        digits = lambda scale: nnx.Param(layers.normal(rngs, (sum(levels), D), scale), axes=("code", "embed"))
        self.digit_embedding = digits(scale) if levels else None
        self.digit_head = digits(scale * D**-0.5) if levels and not config.tied else None

        # Rotary embedding tells how far apart two tokens are; where in its image a code stands would have
        # to be inferred. These features of (y - t, x - t) say it outright, for any size; 0 for text.
        self.place = layers.Linear((4 * _OCTAVES, D), ("place", "embed"), rngs, dtype=self.dtype)

    def _table(self, own, digits):
        """[V, D]: each token's own row, and for a code those of its digits added."""
        if digits is None:
            return own[...]
        codes = np.arange(math.prod(self.levels))
        basis = np.cumprod([1, *self.levels[:-1]])
        column = codes[:, None] // basis % self.levels + np.cumsum([0, *self.levels[:-1]])
        has = np.zeros((len(codes), sum(self.levels)), np.float32)
        has[codes[:, None], column] = 1
        table = own[...]
        return table.at[table.shape[0] - len(codes) :].add(has @ digits[...])

    def embed(self, tokens, positions):
        """tokens int32 [B, T], positions int32 [B, T, 3] -> [B, T, D]."""
        offset = (positions[..., 1:] - positions[..., :1]).astype(jnp.float32)
        angles = offset[..., None] * (np.pi / 2 ** np.arange(1, _OCTAVES + 1, dtype=np.float32))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles) - 1], -1)
        x = self._table(self.embedding, self.digit_embedding)[tokens].astype(self.dtype)
        return x + self.place(waves.reshape(waves.shape[:-2] + (-1,)))

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

    def rope(self, positions):
        return layers.rope(positions, self.config.head_dim, self.config.rope_base)

    def __call__(self, tokens, segments, positions):
        """Tokens, segments int32 [B, T], positions int32 [B, T, 3] -> hidden [B, T, D] (see `logits`).

        A token sees itself and the earlier tokens of its own segment.
        """
        T = tokens.shape[1]
        causal = jnp.tril(jnp.ones((T, T), bool))
        bias = layers.bias_of(causal & (segments[:, :, None] == segments[:, None, :]))
        x = constrain(self.embed(tokens, positions), ("batch", "length", None))
        return layers.scan(
            self.blocks, x, self.rope(positions), bias, remat=self.config.remat, unroll=self.config.unroll
        )


def init_cache(config, batch, length, dtype=None):
    """Zeroed keys and values, one pair of buffers [B, S, K, C] a layer."""
    shape = (batch, length, config.kv_heads, config.head_dim)
    dtype = dtype or jnp.dtype(config.dtype)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


def step(model, blocks, cache, tokens, positions, lengths):
    """Feeds tokens to the cached model: prefill (T > 1) and decode (T = 1) alike.

    tokens int32 [B, T], positions int32 [B, T, 3]; lengths int32 [B] is how many tokens each row's
    cache holds already. Row b's token t is written to slot lengths[b] + t and sees slots up to its
    own. `blocks` is `layers.unstack(...)` of the model's blocks. Returns hidden [B, T, D], cache.
    """
    B, T = tokens.shape
    S = cache[0][0].shape[1]
    slots = lengths[:, None] + jnp.arange(T)
    bias = layers.bias_of(jnp.arange(S) <= slots[:, :, None])
    cos_sin = model.rope(positions)
    x = model.embed(tokens, positions)
    new = []
    rows = jnp.arange(B)[:, None]
    for block, (keys, values) in zip(blocks, cache):
        q, k, v = block.attention.qkv(layers.rms_norm(x), cos_sin)
        keys = keys.at[rows, slots].set(k.astype(keys.dtype), mode="drop")
        values = values.at[rows, slots].set(v.astype(values.dtype), mode="drop")
        y = layers.attention(q, keys.astype(q.dtype), values.astype(q.dtype), bias)
        x = x + block.attention.project(y)
        x = x + block.mlp(layers.rms_norm(x))
        new.append((keys, values))
    return x, new


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
