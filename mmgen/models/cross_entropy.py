"""Cross-entropy over a large vocabulary that never holds the logits of a whole batch."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmgen.runtime import mesh as meshes


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(x, head, targets, weights, vocab, z_loss=0.0, chunk=0, dtype=jnp.float32):
    """Sum over tokens of weight * (cross-entropy + z_loss * log Z squared), and each token's own numbers.

    x [B, T, D] and head [V, D] make the logits, in `dtype` with float32 sums; targets int32 and weights float32
    [B, T]. Rows of the head from `vocab` on are padding. Returns (scalar, cross-entropy [B, T], log Z [B, T]);
    only the scalar has a gradient, with respect to x and head.

    `chunk` tokens of a device at a time are turned into logits (0: all at once), and since the sum is a scalar
    the gradient is known as soon as the logits are: it is taken in the same pass, so that nothing is computed
    twice and what stays is of the size of x and head (the same idea as in Liger Kernel, arXiv:2410.10989).
    Under a mesh every device works on its own tokens and its own part of the vocabulary.
    """
    return _run(x, head, targets, weights, vocab, z_loss, chunk, dtype, gradient=False)[:3]


def _forward(x, head, targets, weights, vocab, z_loss, chunk, dtype):
    *value, dx, dhead = _run(x, head, targets, weights, vocab, z_loss, chunk, dtype, gradient=True)
    return tuple(value), (dx, dhead)


def _backward(vocab, z_loss, chunk, dtype, gradients, cotangents):
    dx, dhead = gradients
    scale = cotangents[0]
    return (dx * scale.astype(dx.dtype), dhead * scale.astype(dhead.dtype), None, None)


cross_entropy.defvjp(_forward, _backward)


def _run(x, head, targets, weights, vocab, z_loss, chunk, dtype, gradient):
    local = functools.partial(_local, vocab=vocab, z_loss=z_loss, chunk=chunk, dtype=dtype, gradient=gradient)
    current = meshes.current()
    if current is None:
        return local(x, head, targets, weights, tokens_over=(), vocab_over=())
    mesh, rules = current
    tokens, table = meshes.spec(("batch", "length"), rules), meshes.spec(("vocab", None), rules)
    hidden = PartitionSpec(*tokens, None)
    axes = lambda spec: tuple(a for entry in spec for a in meshes.mesh_axes(entry))
    local = functools.partial(local, tokens_over=axes(tokens), vocab_over=axes(table))
    gradients = (hidden, table) if gradient else (None, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(hidden, table, tokens, tokens),
        out_specs=(PartitionSpec(), tokens, tokens, *gradients),
        check_vma=False,
    )(x, head, targets, weights)


def _local(x, head, targets, weights, *, vocab, z_loss, chunk, dtype, gradient, tokens_over, vocab_over):
    """What one device does with its tokens [b, t] and its rows of the head [v, D]."""
    B, T, D = x.shape
    n, v = B * T, head.shape[0]
    high = jnp.promote_types(dtype, jnp.float32)
    table = head.astype(dtype)
    first = v * jax.lax.axis_index(vocab_over) if vocab_over else 0
    real = first + jnp.arange(v) < vocab

    def piece(x, targets, weights):
        """Of c tokens: sum, cross-entropy [c], log Z [c] and the gradients of x [c, D] and of the head [v, D]."""
        logits = jnp.einsum("nd,vd->nv", x.astype(dtype), table, preferred_element_type=high)
        logits = jnp.where(real, logits, -1e30)
        top = logits.max(-1)
        top = jax.lax.pmax(top, vocab_over) if vocab_over else top
        scaled = jnp.exp(logits - top[:, None])
        total = _sum(scaled.sum(-1), vocab_over)
        log_z = top + jnp.log(total)
        hit = (targets - first)[:, None] == jnp.arange(v)
        entropy = log_z - _sum(jnp.where(hit, logits, 0).sum(-1), vocab_over)
        value = (weights * (entropy + z_loss * jnp.square(log_z))).sum()
        if not gradient:
            return value, entropy, log_z, None, None
        slope = (weights * (1 + 2 * z_loss * log_z) / total)[:, None] * scaled
        slope = (slope - jnp.where(hit, weights[:, None], 0)).astype(dtype)
        dx = _sum(jnp.einsum("nv,vd->nd", slope, table, preferred_element_type=high), vocab_over).astype(
            x.dtype
        )
        dhead = jnp.einsum("nv,nd->vd", slope, x.astype(dtype), preferred_element_type=high)
        return value, entropy, log_z, dx, dhead

    flat = x.reshape(n, D), targets.reshape(n), weights.astype(high).reshape(n)
    if not chunk or chunk >= n:
        value, entropy, log_z, dx, dhead = piece(*flat)
    else:
        parts = -(-n // chunk)
        padded = [jnp.pad(y, ((0, parts * chunk - n),) + ((0, 0),) * (y.ndim - 1)) for y in flat]
        xs = tuple(y.reshape(parts, chunk, *y.shape[1:]) for y in padded)

        def body(total, x):
            value, entropy, log_z, dx, dhead = piece(*x)
            return jax.tree.map(jnp.add, total, (value, dhead)), (entropy, log_z, dx)

        zeros = jnp.zeros((), high), jnp.zeros((v, D), high) if gradient else None
        (value, dhead), ys = jax.lax.scan(body, zeros, xs)
        entropy, log_z, dx = jax.tree.map(lambda y: y.reshape(parts * chunk, *y.shape[2:])[:n], ys)
    value, dhead = _sum(value, tokens_over), _sum(dhead, tokens_over)
    if gradient:
        dx, dhead = dx.reshape(B, T, D), dhead.astype(head.dtype)
    return value, entropy.reshape(B, T), log_z.reshape(B, T), dx, dhead


def _sum(x, axes):
    return jax.lax.psum(x, axes) if axes and x is not None else x
