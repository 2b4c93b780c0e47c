"""The blocks around the one attention (attention.py), the one MLP and their small parts, used by every model.

Shapes: B batch, T tokens, D model, N heads, K kv-heads, C channels a head, F hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmgen.models.attention import attention, bias_of
from mmgen.runtime import mesh as meshes
from mmgen.runtime.mesh import constrain


def normal(rngs, shape, scale):
    """Truncated normal of standard deviation `scale`, float32. Without rngs zeros, for those who want a model's
    shapes alone: to trace random numbers takes half of the time in which a model is restored."""
    if rngs is None:
        return jnp.zeros(shape)
    return scale * jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) / 0.87962566


class Linear(nnx.Module):
    """y = x @ w (+ b). On one device the input is flattened to two axes: on CPU that is twice as fast. On several
    it keeps its axes, since what merges two that are split cannot stay split."""

    def __init__(self, shape, axes, rngs, *, bias=False, scale=None, dtype=jnp.float32):
        self.dtype = dtype
        self.w = nnx.Param(normal(rngs, shape, shape[0] ** -0.5 if scale is None else scale), axes=axes)
        self.b = nnx.Param(jnp.zeros(shape[1:]), axes=axes[1:]) if bias else None

    def __call__(self, x):
        x, w = x.astype(self.dtype), self.w[...].astype(self.dtype)
        if meshes.current() is None:
            y = (x.reshape(-1, w.shape[0]) @ w.reshape(w.shape[0], -1)).reshape(x.shape[:-1] + w.shape[1:])
        else:
            y = jnp.tensordot(x, w, 1)
        return y if self.b is None else y + self.b[...].astype(self.dtype)


def high(x):
    """x in float32, or as it is where it is more precise."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_norm(x, epsilon=1e-6):
    """Root mean square norm over the last axis (arXiv:1910.07467), in float32, without a scale.

    A learned scale would only rescale the rows of the matrix that follows (as in nanochat we leave it
    out); on CPU, leaving all norms away saved a fifth of a step.
    """
    y = high(x)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + epsilon)).astype(x.dtype)


def rope(positions, channels, base):
    """Cosines and sines [..., C/2] of rotary embedding (arXiv:2104.09864) over one or more axes.

    `positions` is int [..., A]. Frequencies fall as in one dimension and are dealt to the A axes
    in turn, so that each axis sees the whole range; equal coordinates give plain one-dimensional
    rotary embedding (the multi-axis form follows Qwen2-VL, arXiv:2409.12191).
    """
    pairs = channels // 2
    frequency = base ** (-np.arange(pairs) / pairs)
    axis = np.arange(pairs) % positions.shape[-1]
    angles = positions[..., axis].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, cos_sin):
    """Rotates the channel halves of x [B, T, N, C] by the angles of cosines and sines [B, T, C/2]."""
    cos, sin = (y[:, :, None] for y in cos_sin)
    a, b = jnp.split(high(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with QK-norm (arXiv:2302.05442) and rotary embedding.

    Keys and values are made of x itself or, with `source`, of something else that is so wide.
    """

    def __init__(self, config, rngs, *, dtype, out_scale=None, source=None):
        D, N, K, C = config.width, config.heads, config.kv_heads, config.head_dim
        if N % K:
            raise ValueError(f"heads ({N}) must be a multiple of kv_heads ({K})")
        self.q = Linear((D, N, C), ("embed", "heads", "head_dim"), rngs, dtype=dtype)
        self.k = Linear((source or D, K, C), ("embed", "kv_heads", "head_dim"), rngs, dtype=dtype)
        self.v = Linear((source or D, K, C), ("embed", "kv_heads", "head_dim"), rngs, dtype=dtype)
        self.out = Linear((N * C, D), ("heads", "embed"), rngs, scale=out_scale, dtype=dtype)

    def qkv(self, x, cos_sin, source=None):
        """Projected, normed and rotated q of x [B, T, D], and k, v of x or of `source` [B, T, E]."""
        source = x if source is None else source
        q, k = (rotate(rms_norm(project(y)), cos_sin) for project, y in ((self.q, x), (self.k, source)))
        # Normed q and k bound the logits by sqrt(C); twice that lets a head look at one place alone.
        return 2.0 * q, k, self.v(source)

    def __call__(self, x, cos_sin, see=None, impl="xla"):
        q, k, v = self.qkv(x, cos_sin)
        return self.project(attention(q, k, v, see, impl=impl))

    def project(self, y):
        return self.out(y.reshape(y.shape[:2] + (-1,)))


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202); gate and value share one matrix product."""

    def __init__(self, width, hidden, rngs, *, dtype, out_scale=None):
        self.wi = Linear((width, 2, hidden), ("embed", "gate", "mlp"), rngs, dtype=dtype)
        self.wo = Linear((hidden, width), ("mlp", "embed"), rngs, scale=out_scale, dtype=dtype)

    def __call__(self, x):
        y = self.wi(x)
        y = jax.nn.silu(y[..., 0, :]) * y[..., 1, :]
        return self.wo(constrain(y, ("batch", "length", "mlp")) if y.ndim == 3 else y)


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention, x + MLP. `see` makes it causal or not (attention.py)."""

    def __init__(self, config, rngs, *, dtype):
        # Residual outputs start small so that depth does not grow the stream (GPT-2's scaling).
        shrink = (2 * config.layers) ** -0.5
        N, C, F = config.heads, config.head_dim, config.mlp
        self.attention = Attention(config, rngs, dtype=dtype, out_scale=shrink * (N * C) ** -0.5)
        self.mlp = MLP(config.width, F, rngs, dtype=dtype, out_scale=shrink * F**-0.5)

    def __call__(self, x, cos_sin, see=None, impl="xla"):
        # Between the halves the stream may be split over its tokens further than within them ("stream" beside
        # "length" in the rules): norms and sums are then not computed by every tensor device again.
        x = x + self.attention(rms_norm(x), cos_sin, see, impl)
        x = checkpoint_name(constrain(x, ("batch", "stream", None)), "stream")
        x = x + self.mlp(rms_norm(x))
        return checkpoint_name(constrain(x, ("batch", "stream", None)), "stream")


class CrossBlock(nnx.Module):
    """x + tanh(gate) * attention to features (Flamingo, arXiv:2204.14198): it starts with a gate of 0, at no effect."""

    def __init__(self, config, source, rngs, *, dtype):
        scale = (2 * config.layers * config.heads * config.head_dim) ** -0.5
        self.attention = Attention(config, rngs, dtype=dtype, out_scale=scale, source=source)
        self.gate = nnx.Param(jnp.zeros(()), axes=())

    def __call__(self, x, cos_sin, features, see):
        """x [B, T, D], features [B, T, E], see bool [B, T, T]: which features each token sees; it may be none."""
        y = attention(*self.attention.qkv(rms_norm(x), cos_sin, features), bias_of(see))
        y = jnp.where(see.any(-1)[..., None, None], y, 0)
        x = x + jnp.tanh(self.gate[...]).astype(x.dtype) * self.attention.project(y)
        return checkpoint_name(constrain(x, ("batch", "stream", None)), "stream")


def stack(make, layers, rngs):
    """One module whose parameters carry a leading axis of `layers`; `make(rngs)` builds a layer."""
    if rngs is None:
        return nnx.vmap(lambda _: make(None))(jnp.zeros(layers))
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), layers))


_policies = jax.checkpoint_policies
# What the backward pass finds kept of each layer; the rest it computes again. Named are the outputs of the
# attention ("attention") and of both halves of a block, which are the stream after them ("stream").
REMAT = {
    "none": None,  # everything is kept
    "dots": _policies.dots_with_no_batch_dims_saveable,  # outputs of linear layers; attention is done again
    "attention": _policies.save_only_these_names("attention", "stream"),
    "full": _policies.nothing_saveable,  # the layer's input alone
    "offload": _policies.save_and_offload_only_these_names(  # as "attention", in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["attention", "stream"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def scan(blocks, x, *args, remat="none", unroll=False):
    """Runs stacked blocks over x with `lax.scan`; each layer's slice is merged in the body.

    `remat` is a name of `REMAT`. `unroll` writes the layers out one after the other: longer to compile, and on
    CPU a quarter to a third faster to run, since no stacked residuals are sliced.
    """
    graphdef, params = nnx.split(blocks)
    return jax.lax.scan(_body(graphdef, args, remat, unroll), x, params, unroll=unroll)[0]


def scan_crossed(cross, sight, blocks, x, *args, remat="none", unroll=False):
    """As `scan` of the stacked blocks, with `cross`, fewer stacked blocks, evenly between: one before every so many.
    `sight` is the tuple of what these are called with."""
    (cross_graphdef, cross_params), (graphdef, params) = nnx.split(cross), nnx.split(blocks)
    groups = len(jax.tree.leaves(cross_params)[0])
    look = _body(cross_graphdef, sight, remat, unroll)
    body = _body(graphdef, args, remat, unroll)

    def group(x, layers):
        x, _ = look(x, layers[0])
        return jax.lax.scan(body, x, layers[1], unroll=unroll)

    grouped = jax.tree.map(lambda p: p.reshape(groups, -1, *p.shape[1:]), params)
    return jax.lax.scan(group, x, (cross_params, grouped), unroll=unroll)[0]


def _body(graphdef, args, remat, unroll):
    """(x, a layer's parameters) -> (x, None), for `lax.scan`."""
    if remat not in REMAT:
        raise ValueError(f"no remat policy {remat!r}; known: {', '.join(REMAT)}")

    def body(x, layer):
        return nnx.merge(graphdef, layer)(x, *args), None

    if (
        remat != "none"
    ):  # within a loop nothing can be merged with what is computed again; outside it must not be
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=unroll)
    return body


def unstack(blocks, layers):
    """The list of single layers of stacked blocks (decoding slices them once, outside its loop)."""
    graphdef, params = nnx.split(blocks)
    return [nnx.merge(graphdef, jax.tree.map(lambda p: p[i], params)) for i in range(layers)]
