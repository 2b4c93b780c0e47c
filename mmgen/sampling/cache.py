"""The transformer as sampling wants it: weights laid out once, and a cache of keys and values.

Training keeps stacked float32 parameters; a decoding step is bound by the bytes it reads. `prepare` therefore
unstacks the layers (slicing them within a loop was four times slower), joins the projections that read the same
input, builds the tables of the vocabulary once, and casts all to the type of the computation or to int8.

Shapes: B rows, T tokens, S slots of a row's cache, D model, K kv-heads, G heads a kv-head, C channels a head,
F hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp

from mmgen.models import layers
from mmgen.models.attention import bias_of
from mmgen.models.transformer import crossings, images_of, sees_codes, sees_features
from mmgen.runtime import mesh as meshes
from mmgen.runtime.mesh import constrain

# What `prepare` lays out anew; the rest of the model's parameters stay as they are.
LAID_OUT = ("embedding", "digit_embedding", "head", "digit_head", "blocks", "cross")
# Where sampling runs on a mesh: rows are everywhere, and the axis "tensor" shares heads, hidden units and vocabulary.
RULES = {"batch": None, "length": None, "stream": None, "vocab": "tensor", "mlp": "tensor"}
RULES |= {"heads": "tensor", "kv_heads": "tensor"}


def prepare(model, dtype, int8=False):
    """The weights of a `Transformer` for `step` and `logits`: {"layers", "cross", "embedding", "head"}.

    dtype is that of the weights. With int8 the matrices of the layers and the head are int8 and a float32 scale
    an output channel, (values, scale): the largest weight of a channel is 127. Activations are not quantized, so
    nothing has to be calibrated; the embedding, of which a step reads a few rows, stays as it is.
    """
    c = model.config
    K, G, C = c.kv_heads, c.heads // c.kv_heads, c.head_dim

    def matrix(w, axes):
        if not int8:
            return constrain(w.astype(dtype), axes)
        values, scale = quantize(w, 0)
        return constrain(values, axes), constrain(scale, axes[1:])

    def layer(block):
        a, m = block.attention, block.mlp
        # A kv-head's queries, its key and its value lie together: one product, which "tensor" splits by kv-heads.
        qkv = [a.q.w[...].reshape(-1, K, G, C), a.k.w[...][:, :, None], a.v.w[...][:, :, None]]
        return {
            "qkv": matrix(jnp.concatenate(qkv, 2), (None, "kv_heads", None, None)),
            "out": matrix(a.out.w[...], ("kv_heads", None)),
            "wi": matrix(m.wi.w[...], (None, None, "mlp")),
            "wo": matrix(m.wo.w[...], ("mlp", None)),
        }

    def crossing(block):
        a, gate = block.attention, jnp.tanh(block.gate[...])
        return {
            "q": matrix(a.q.w[...].reshape(-1, K, G, C), (None, "kv_heads", None, None)),
            "kv": matrix(jnp.stack([a.k.w[...], a.v.w[...]], 2), (None, "kv_heads", None, None)),
            "out": matrix(gate * a.out.w[...], ("kv_heads", None)),
        }

    count = crossings(c)
    return {
        "layers": [layer(block) for block in layers.unstack(model.blocks, c.layers)],
        "cross": [crossing(block) for block in layers.unstack(model.cross, count)] if count else [],
        "embedding": constrain(model.embedding_table().astype(dtype), ("vocab", None)),
        "head": matrix(model.head_table().T, (None, "vocab")),
    }


def quantize(x, axis):
    """x as int8 and the float32 scale, x.shape without `axis`, that the values are multiplied with."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis) / 127, 1e-30)
    return jnp.round(x / jnp.expand_dims(scale, axis)).astype(jnp.int8), scale


def empty(config, rows, slots, dtype, int8=False):
    """A cache that holds nothing yet: tokens int32 [B, S], and for each layer keys and values [B, K, S, C].

    Zeros and not uninitialised memory: what no query sees is still multiplied with a weight of 0. With int8 keys
    and values are pairs, int8 and a float32 scale for each of them [B, K, S]. With cross-attention there are keys and
    values of image features too, "cross", at the slots of their codes, and the positions int32 [B, 3, S].
    """
    shape = (rows, config.kv_heads, slots, config.head_dim)

    def buffer():
        whole = lambda shape, dtype: constrain(
            jnp.zeros(shape, dtype), (None, "kv_heads", None, None)[: len(shape)]
        )
        return (whole(shape, jnp.int8), whole(shape[:3], jnp.float32)) if int8 else whole(shape, dtype)

    pairs = lambda count: [(buffer(), buffer()) for _ in range(count)]
    ints = lambda *shape: jnp.zeros(shape, jnp.int32)
    cache = {"layers": pairs(config.layers), "tokens": ints(rows, slots)}
    count = crossings(config)
    return cache | {"cross": pairs(count), "positions": ints(rows, 3, slots)} if count else cache


def corner(buffer, row, slot):
    """The index at which a slot of a row begins in one of the cache's buffers: [B, S] or [B, K, S, ...]."""
    return (row, slot) if buffer.ndim == 2 else (row, 0, slot) + (0,) * (buffer.ndim - 3)


def _span(slots):
    """How many slots of a cache are looked at together. On CPU a step takes what it takes to read the cache, so those that nobody has
    reached yet are left out, and bits don't depend on how many there are; elsewhere the loop would cost more."""
    return 32 if jax.default_backend() == "cpu" and slots % 32 == 0 else slots


def step(model, weights, cache, tokens, positions, start, row=None, reach=None):
    """Feeds tokens to the cached model, one a row (decoding) or many (prefill) -> hidden [B, T, D], cache.

    model: a Transformer without what is `LAID_OUT`. tokens int32 [B, T], positions int32 [B, T, 3], start int32
    [B]: token t of row b is written to slot start[b] + t, and sees the slots up to its own. Slots beyond S are
    dropped. With `row`, an index, B is 1 and these are tokens of that row of the cache alone; start + T must then
    be within S. reach: how many slots the longest row has after it, int32, where some rows don't matter and are not to be looked at
    further; what slots beyond a row's own hold adds nothing to it, to the last bit, however far others reach.

    Where an image ends among these tokens, its features are computed, all at once, and their keys and values of
    cross-attention take the slots of its codes: before that nothing sees them.
    """
    (B, T), S = tokens.shape, cache["tokens"].shape[1]
    c = model.config
    K, G, C = c.kv_heads, c.heads // c.kv_heads, c.head_dim
    slots = start[:, None] + jnp.arange(T)
    span = _span(S)
    spans = jnp.minimum(-(-(start.max() + T if reach is None else reach) // span), S // span)

    def put(buffer, new):
        """Writes new [B, T, ...] into buffer [rows, S], or [rows, K, S, ...] with the heads first."""
        new = new.astype(buffer.dtype)
        if row is None:
            rows = jnp.arange(B)[:, None]
            where = (rows, slots) if buffer.ndim == 2 else (rows, slice(None), slots)
            return buffer.at[where].set(new, mode="drop")
        new = new if buffer.ndim == 2 else new.swapaxes(1, 2)
        return jax.lax.dynamic_update_slice(buffer, new, corner(buffer, row, start[0]))

    def of_rows(buffer):
        return buffer if row is None else jax.lax.dynamic_slice_in_dim(buffer, row, 1)

    def remember(buffer, new):
        return tuple(map(put, buffer, quantize(new, -1))) if isinstance(buffer, tuple) else put(buffer, new)

    def recall(buffer, n):
        """Of span n: values [B, K, span, C] and their scale [B, K, 1, 1, span], 1 where there is none."""
        values, scale = buffer if isinstance(buffer, tuple) else (buffer, None)

        def part(buffer):
            rows, at = (buffer.shape[0], 0) if row is None else (1, row)
            size = (rows, buffer.shape[1], span, *buffer.shape[3:])
            return jax.lax.dynamic_slice(buffer, corner(buffer, at, n * span), size)

        return part(values).astype(x.dtype), 1.0 if scale is None else part(scale)[:, :, None, None]

    def attend(q, keys, values, bias):
        """q [B, T, N, C], normed and rotated, the cache's keys and values, bias [B, 1, 1, T, S] -> [B, T, N * C]."""
        # As in models/layers.py: queries of twice the length, over the square root of C.
        q = (q * (2 * C**-0.5)).reshape(B, T, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, C)

        def look(n, seen):
            """The largest logit so far, and the sums of weights and of weighted values beneath it."""
            most, total, y = seen
            k, k_scale = recall(keys, n)
            v, v_scale = recall(values, n)
            logits = jnp.einsum("bkqc,bksc->bkqs", q, k, preferred_element_type=jnp.float32)
            part = jax.lax.dynamic_slice_in_dim(bias, n * span, span, -1)
            logits = logits.reshape(B, K, G, T, span) * k_scale + part
            new = jnp.maximum(most, logits.max(-1, keepdims=True))
            p, old = jnp.exp(logits - new), jnp.exp(most - new)
            total = old * total + p.sum(-1, keepdims=True)
            p = (p * v_scale).astype(v.dtype).reshape(B, K, G * T, span)
            more = jnp.einsum("bkqs,bksc->bkqc", p, v, preferred_element_type=jnp.float32)
            return new, total, old * y + more.reshape(y.shape)

        shape = (B, K, G, T)
        nothing = jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1)), jnp.zeros((*shape, C))
        _, total, y = look(0, nothing) if span == S else jax.lax.fori_loop(0, spans, look, nothing)
        return (y / total).astype(x.dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, -1)

    def encode(cross, images, held, begin, new):
        """`cross` with the keys and values of images that are `new` bool [B, W] in the slots from `begin` [B] on."""
        places = begin[:, None] + jnp.arange(new.shape[1])
        at = lambda y: jnp.take_along_axis(y, places, 1)
        where = jnp.stack([at(y) for y in held.swapaxes(0, 1)], -1)
        near = model.near_at(of_rows(written), places)
        x = model.embed(at(of_rows(written)), where, *near, table=weights["embedding"])
        features = model.features(x, at(images), where)
        cos_sin = model.cross_rope(where)
        rows = jnp.arange(B)[:, None] if row is None else jnp.full((1, 1), row)
        index = rows, slice(None), jnp.where(new, places, S)

        def put(buffer, new):
            if not isinstance(buffer, tuple):
                return buffer.at[index].set(new.astype(buffer.dtype), mode="drop")
            return tuple(b.at[index].set(y, mode="drop") for b, y in zip(buffer, quantize(new, -1)))

        found = []
        for w, (keys, values) in zip(weights["cross"], cross):
            kv = _product(features, w["kv"])
            k = layers.rotate(layers.rms_norm(kv[:, :, :, 0]), cos_sin)
            found.append((put(keys, k), put(values, kv[:, :, :, 1])))
        return found

    written = put(cache["tokens"], tokens)
    near = model.near_at(of_rows(written), slots)
    x = model.embed(tokens, positions, *near, table=weights["embedding"])
    cos_sin = model.rope(positions)
    see = jnp.arange(S) <= slots[..., None]
    new_cache = {"tokens": written}
    if weights["cross"]:
        new_cache["positions"] = put(cache["positions"], positions)
        history = of_rows(written)
        images, finished = images_of(history, jnp.zeros_like(history), model.code_start)
        at = lambda y, slots: jnp.take_along_axis(y, jnp.clip(slots, 0, S - 1), 1)
        known, now = jnp.where(start > 0, at(finished, start[:, None] - 1)[:, 0], 0), at(finished, slots)
        # An image that ends here has begun among so many slots.
        W = min(S, T + model.most_codes)
        begin = jnp.clip(start - model.most_codes, 0, S - W)
        inside = at(images, begin[:, None] + jnp.arange(W))
        new = (inside > known[:, None]) & (inside <= now[:, -1:])
        cross = new_cache["cross"] = jax.lax.cond(
            new.any(), encode, lambda cross, *_: cross,
            cache["cross"], images, of_rows(new_cache["positions"]), begin, new,
        )  # fmt: skip
        seen = sees_features(now, images)
        cross_bias, cross_cos_sin = bias_of(seen)[:, None, None], model.cross_rope(positions)
        if model.hidden_codes:
            see &= sees_codes(at(images, slots), images)
    bias = bias_of(see)[:, None, None]
    pairs = new_cache["layers"] = []
    for n, (w, (keys, values)) in enumerate(zip(weights["layers"], cache["layers"])):
        if weights["cross"] and n % c.cross_every == 0:
            look = weights["cross"][n // c.cross_every]
            q = _product(layers.rms_norm(x), look["q"]).reshape(B, T, K * G, C)
            q = layers.rotate(layers.rms_norm(q), cross_cos_sin)
            y = attend(q, *cross[n // c.cross_every], cross_bias)
            x = x + _product(jnp.where(seen.any(-1, keepdims=True), y, 0), look["out"])
        qkv = _product(layers.rms_norm(x), w["qkv"])
        q, k, v = qkv[..., :G, :].reshape(B, T, K * G, C), qkv[..., G, :], qkv[..., G + 1, :]
        q, k = (layers.rotate(layers.rms_norm(y), cos_sin) for y in (q, k))
        keys, values = remember(keys, k), remember(values, v)
        x = x + _product(attend(q, keys, values, bias), w["out"])
        y = _product(layers.rms_norm(x), w["wi"])
        x = x + _product(jax.nn.silu(y[..., 0, :]) * y[..., 1, :], w["wo"])
        pairs.append((keys, values))
    return x, new_cache


def logits(model, weights, x):
    """Hidden states [..., D] -> float32 logits of tokens [..., V].

    Where codes are told in two steps (`model.colors`) a code is there as its colour; its outline has the logits
    that `outline_logits` gives.
    """
    return _product(layers.rms_norm(x), weights["head"], jnp.float32)[..., : model.first]


def outline_logits(model, x, colors):
    """Hidden states [..., D] and colours int32 [...] -> float32 logits of the outlines with these colours [..., outlines]."""
    return model.outline.given(layers.rms_norm(x), colors)


def _product(x, w, out=None):
    """x [..., D] @ w [D, ...]; w may be (int8, scale). On one device all is flattened, as in `layers.Linear`."""
    w, scale = w if isinstance(w, tuple) else (w, None)
    out, w = out or x.dtype, w.astype(x.dtype)
    how = dict(preferred_element_type=out if scale is None else jnp.float32)
    if meshes.current() is None:
        y = jnp.matmul(x.reshape(-1, w.shape[0]), w.reshape(w.shape[0], -1), **how)
        y = y.reshape(x.shape[:-1] + w.shape[1:])
    else:
        y = jnp.tensordot(x, w, 1, **how)
    return y if scale is None else (y * scale).astype(out)
