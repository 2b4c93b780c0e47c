"""The one attention: a reference, fused kernels, and a ring over devices that share a row.

Shapes: B batch, T queries, S keys, N heads, K kv-heads, G = N / K, C channels a head.
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mmgen.runtime import mesh as meshes

LOW = -1e30  # the logit of a key that may not be seen: finite, so that a row without any gives no NaN
CHUNK = 512  # keys at a time in `ring`
NAME = "attention"  # for checkpoint policies: what, kept, spares the backward pass this forward pass


def attention(q, k, v, see=None, *, impl="xla"):
    """Softmax attention with grouped queries, scaled by C**-0.5.

    q [B, T, N, C]; k, v [B, S, K, C] with N a multiple of K -> [B, T, N, C]. Each query sees, by `see`:
      None          every key;
      int [B, T]    the segments of packed rows (S = T): itself and what is before it in its own segment.
                    Padding is a segment as any other, 0. Segments are runs: "gpu" takes none whose number
                    comes back later in its row;
      float         what this bias leaves it, broadcastable to [B, T, S]: see `bias_of`.
    The softmax is in float32 at least, and in float64 where the inputs are. The result bears the checkpoint
    name NAME.

    `impl` is "xla" (the reference, any case), "chunked" (packed rows on any backend, its logits never whole),
    "gpu" or "splash" (fused kernels of GPU and TPU, see there), or "auto": the kernel of the backend at hand,
    and "xla" where there is none or it does not suit the shapes, the precision or a bias.

    Within `meshes.use` each device works on its own rows and heads, by the rules of "batch" and "heads"; keys
    and values are repeated just as far as their heads must be for that. Where "length" is split as well,
    packed rows go through `ring` whatever `impl` says, and otherwise all keys are gathered. An axis that does
    not divide (a single row, the one query of a decoding step) is not split: its devices then do the same
    work.

    Raises ValueError for an unknown `impl`, one that cannot do what is asked, and shapes that do not fit.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {impl!r}; known: auto, {', '.join(IMPLEMENTATIONS)}")
    (B, T, N, C), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, C) or v.shape != k.shape or N % K:
        raise ValueError(
            f"attention expects q [B, T, N, C] and k, v [B, S, K, C] with N a multiple of K; "
            f"found {q.shape}, {k.shape}, {v.shape}"
        )
    if see is not None and not _is_bias(see) and (see.shape != (B, T) or S != T or see.dtype == bool):
        raise ValueError(
            f"`see` is None, a float bias (bias_of makes one of a mask) or int segments {(B, T)} of as many "
            f"keys as queries; found {see.dtype} {see.shape} and {S} keys"
        )
    if meshes.current() is None:
        return _local(q, k, v, see, impl)

    mesh, rules = meshes.current()
    packed = see is not None and not _is_bias(see)

    def over(axis, size):
        """The mesh axes that a logical axis of this size is split over."""
        axes = meshes.spec((axis,), rules)[0] or ()
        axes = axes if isinstance(axes, tuple) else (axes,)
        if size % ways(axes) == 0:
            return axes
        if axis == "length" and packed:
            raise ValueError(
                f"packed rows of {size} tokens do not divide over {ways(axes)} devices of mesh axes {axes}: "
                f"make config.data.row_length a multiple of {ways(axes)}, or change config.mesh"
            )
        return ()

    ways = lambda axes: math.prod(mesh.shape[a] for a in axes)
    spec = lambda *axes: PartitionSpec(*(a or None for a in axes))
    batch, length, heads = over("batch", B), over("length", T), over("heads", N)
    # A device's heads are neighbours, and their kv-heads its own where these divide over the same devices.
    k, v = (jnp.repeat(x, math.lcm(K, ways(heads)) // K, axis=2) for x in (k, v))
    along = length if packed or ways(length) == 1 else ()
    queries, keys = spec(batch, length, heads, ()), spec(batch, along, heads, ())
    if packed:
        sight = spec(batch, length)
    elif see is not None:  # axes of size 1 are there for all
        see = see.reshape((1,) * (3 - see.ndim) + see.shape)
        sight = spec(*(a if n > 1 else () for a, n in zip((batch, length, ()), see.shape)))
    else:
        sight = None
    if ways(along) > 1:
        work = functools.partial(ring, axes=along)
    else:
        work = functools.partial(_local, impl=impl)
    # Unchecked: kernels do not say over which axes their results vary.
    split = jax.shard_map(
        work, mesh=mesh, in_specs=(queries, keys, keys, sight), out_specs=queries, check_vma=False
    )
    return split(q, k, v, see)


def bias_of(mask):
    """The additive bias of a bool mask (True: may look)."""
    return jnp.where(mask, 0.0, LOW).astype(jnp.float32)


def _named(x):
    return checkpoint_name(x, NAME)


def _is_bias(see):
    return see is not None and jnp.issubdtype(see.dtype, jnp.floating)


def _local(q, k, v, see, impl):
    """`attention` of what one device holds."""
    auto = impl == "auto"
    if auto:
        impl = {"tpu": "splash", "gpu": "gpu"}.get(jax.default_backend(), "xla")
    why = _unfit(q, k, see, impl)
    if why and not auto:
        raise ValueError(f"attention {impl!r} {why}; found q {q.dtype} {q.shape}, k {k.shape}: choose 'xla'")
    if why and q.shape[1] > 1 and not _is_bias(see):
        logging.warning(
            "attention 'xla' in place of %r, which %s; found q %s %s", impl, why, q.dtype, q.shape
        )
    return IMPLEMENTATIONS["xla" if why else impl](q, k, v, see)


def _unfit(q, k, see, impl):
    """What `impl` asks for and does not find here, or None."""
    T, C = q.shape[1], q.shape[-1]
    if impl == "xla":
        return None
    if _is_bias(see):
        return "takes segments, not a bias"
    if impl == "chunked":
        return "takes packed rows alone" if see is None else None
    if k.shape[1] != T or T % 128:
        return "needs as many keys as queries, a multiple of 128"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return "needs bfloat16 or float32"
    if impl == "gpu" and not 16 <= C <= 128:
        return "needs 16 to 128 channels a head"
    return None


def _fold(q, k, v):
    """[B, T, N, C], [B, S, K, C] -> [B*K, G*T, C], [B*K, S, C]: on CPU two plain batched matrix products over
    B*K are 1.5 times as fast as five-axis einsums. The queries come scaled."""
    (B, T, N, C), (S, K) = q.shape, k.shape[1:3]
    q = (q * C**-0.5).reshape(B, T, K, N // K, C).transpose(0, 2, 3, 1, 4).reshape(B * K, -1, C)
    return q, *(x.transpose(0, 2, 1, 3).reshape(B * K, S, C) for x in (k, v))


def _unfold(y, kv_heads, shape):
    """Undoes `_fold` for what belongs to queries [B, T, N, C]."""
    B, T, N, C = shape
    return y.reshape(B, kv_heads, N // kv_heads, T, C).transpose(0, 3, 1, 2, 4).reshape(shape)


def xla(q, k, v, see=None):
    """The reference: all logits at once, [B, N, T, S]."""
    shape, (S, K) = q.shape, k.shape[1:3]
    B, T, N, C = shape
    high = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = _fold(q, k, v)
    logits = jnp.einsum("btc,bsc->bts", q, k, preferred_element_type=high).reshape(B, K, N // K, T, S)
    if _is_bias(see):
        logits = logits + see.reshape((1,) * (3 - see.ndim) + see.shape)[:, None, None]
    elif see is not None:
        mask = jnp.tril(jnp.ones((T, T), bool)) & (see[:, :, None] == see[:, None, :])
        logits = logits + bias_of(mask)[:, None, None]
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    y = jnp.einsum("bts,bsc->btc", weights.astype(v.dtype).reshape(B * K, -1, S), v)
    return _named(_unfold(y.reshape(logits.shape[:-1] + (C,)) / total.astype(v.dtype), K, shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring(q, k, v, segments, axes=()):
    """Attention in packed rows that lie split over the mesh axes `axes` (within shard_map), in their order.

    q [B, T, N, C]; k, v [B, T, K, C]; segments int [B, T]: this device's parts. Keys, values, their segments
    and their places travel around the ring while the softmax accumulates in float32 at least
    (arXiv:2310.01889), and once more in the backward pass, where the gradients of k and v travel with them
    until they are home. A device holds O(T) of the row and logits for `CHUNK` keys at a time.

    Keys that no query here may see, as they come later or belong to other documents, cost no arithmetic. But
    the last device of a causal row sees all and the first only itself, and the ring waits for the slowest:
    with one long document a row this takes nearly twice the time that an even division (striped,
    arXiv:2311.09431) would.

    With no axes, one device goes through its own keys chunk by chunk.
    """
    return _ring_forward(q, k, v, segments, axes)[0]


def _turn(block, axes):
    """Hands `block` to the next device of the ring."""
    if not axes:
        return block
    ways = lax.axis_size(axes)
    return jax.tree.map(lambda x: lax.ppermute(x, axes, [(i, (i + 1) % ways) for i in range(ways)]), block)


def _around(visit, carry, block, axes):
    """visit(carry, block) -> (carry, block) with this device's own block, then with each other's in turn."""
    carry, block = visit(carry, block)
    if not axes:
        return carry, block
    return lax.fori_loop(1, lax.axis_size(axes), lambda _, x: visit(x[0], _turn(x[1], axes)), (carry, block))


def _places(T, axes):
    """int [1, T]: where in the whole row this device's tokens stand."""
    return (lax.axis_index(axes) if axes else 0) * T + jnp.arange(T)[None]


def _chunks(x):
    """[B, S, ...] -> [S / CHUNK, B, CHUNK, ...], or one chunk where these do not divide."""
    size = CHUNK if x.shape[1] % CHUNK == 0 else x.shape[1]
    return jnp.moveaxis(x.reshape(x.shape[:1] + (-1, size) + x.shape[2:]), 1, 0)


def _mask(segments, places, theirs, at):
    """bool [B, T, S]: which queries, of these segments and places, see which keys."""
    return (segments[:, :, None] == theirs[:, None]) & (places[:, :, None] >= at[:, None])


def _logits(q, k, mask):
    """q [B*K, G*T, C], k [B*K, S, C], mask [B, T, S] -> [B, K, G, T, S]."""
    B, T, S = mask.shape
    high = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("btc,bsc->bts", q, k, preferred_element_type=high)
    return jnp.where(mask[:, None, None], logits.reshape(B, -1, q.shape[1] // T, T, S), LOW)


def _ring_forward(q, k, v, segments, axes):
    inputs, K = (q, k, v, segments), k.shape[2]
    B, T, N, C = q.shape
    high = jnp.promote_types(q.dtype, jnp.float32)
    places = _places(T, axes)
    q, k, v = _fold(q, k, v)

    def piece(state, x):
        k, v, theirs, at = x
        mask = _mask(segments, places, theirs, at)

        def attend(state):
            top, total, y = state
            logits = _logits(q, k, mask)
            peak = jnp.maximum(top, logits.max(-1, keepdims=True))
            weights, shrink = jnp.exp(logits - peak), jnp.exp(top - peak)
            seen = jnp.einsum(
                "bts,bsc->btc", weights.astype(v.dtype).reshape(k.shape[0], -1, k.shape[1]), v,
                preferred_element_type=high,
            )  # fmt: skip
            return peak, total * shrink + weights.sum(-1, keepdims=True), y * shrink + seen.reshape(y.shape)

        return lax.cond(mask.any(), attend, lambda state: state, state), None

    def visit(state, block):
        return lax.scan(piece, state, jax.tree.map(_chunks, block))[0], block

    rows = (B, K, N // K, T)
    state = (jnp.full(rows + (1,), LOW, high), jnp.zeros(rows + (1,), high), jnp.zeros(rows + (C,), high))
    (top, total, y), _ = _around(visit, state, (k, v, segments, places), axes)
    y = _unfold(y / total, K, inputs[0].shape).astype(q.dtype)
    y, norm = _named(y), _named(top + jnp.log(total))
    return y, (inputs, y, norm)


def _ring_backward(axes, kept, slope):
    (q, k, v, segments), y, norm = kept
    shape, K = q.shape, k.shape[2]
    B, T, N, C = shape
    high = jnp.promote_types(q.dtype, jnp.float32)
    places = _places(T, axes)
    fold = lambda x: x.reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)
    shift = fold((slope.astype(high) * y.astype(high)).sum(-1))
    slope = fold(slope).reshape(B * K, -1, C)
    q, k, v = _fold(q, k, v)

    def piece(dq, x):
        (k, v, theirs, at), (dk, dv) = x
        mask = _mask(segments, places, theirs, at)

        def attend(sums):
            dq, dk, dv = sums
            product = functools.partial(jnp.einsum, preferred_element_type=high)
            flat = lambda x: x.astype(q.dtype).reshape(k.shape[0], -1, k.shape[1])
            weights = jnp.exp(_logits(q, k, mask) - norm)
            d = flat(weights * (product("btc,bsc->bts", slope, v).reshape(weights.shape) - shift))
            return (
                dq + product("bts,bsc->btc", d, k),
                dk + product("bts,btc->bsc", d, q),
                dv + product("bts,btc->bsc", flat(weights), slope),
            )

        dq, dk, dv = lax.cond(mask.any(), attend, lambda sums: sums, (dq, dk, dv))
        return dq, (dk, dv)

    def visit(dq, block):
        dq, sums = lax.scan(piece, dq, jax.tree.map(_chunks, block))
        return dq, (block[0], tuple(jnp.moveaxis(x, 0, 1).reshape(k.shape) for x in sums))

    sums = (jnp.zeros(k.shape, high), jnp.zeros(k.shape, high))
    dq, (_, sums) = _around(visit, jnp.zeros(q.shape, high), ((k, v, segments, places), sums), axes)
    sums = _turn(sums, axes)  # the last step home
    dk, dv = (x.reshape(B, K, T, C).transpose(0, 2, 1, 3).astype(q.dtype) for x in sums)
    return (_unfold(dq, K, shape) * C**-0.5).astype(q.dtype), dk, dv, None


ring.defvjp(_ring_forward, _ring_backward)


def gpu(q, k, v, see=None, *, interpret=False):
    """Our Pallas kernel for GPUs (Triton), see `flash`: in packed rows it skips other documents in both
    passes, where jax.nn.dot_product_attention's cuDNN knows a row's length but not where its documents end.
    Newer JAX says that Triton kernels will go; "chunked" then remains."""
    from mmgen.models import flash  # only GPUs need it

    return flash.flash(q, k, v, see, flash.fit(flash.TILES, q.dtype, q.shape[-1]), interpret)


def splash(q, k, v, see=None, *, interpret=False):
    """JAX's Pallas kernel for TPUs: skips blocks that come later, and reads segments in both passes."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # only TPUs need it

    T, N, C = q.shape[1:]
    side = next(side for side in (512, 256, 128) if T % side == 0)
    mask = kernels.FullMask((T, T)) if see is None else kernels.CausalMask((T, T))
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * N), block_sizes=kernels.BlockSizes(*[side] * 8), interpret=interpret,
        residual_checkpoint_name=NAME,
    )  # fmt: skip
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    segments = None if see is None else kernels.SegmentIds(see, see)
    y = jax.vmap(kernel)(heads_first(q * C**-0.5), heads_first(k), heads_first(v), segments)
    return heads_first(y)


IMPLEMENTATIONS = {"xla": xla, "chunked": ring, "gpu": gpu, "splash": splash}
