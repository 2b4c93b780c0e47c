"""Fused attention for GPUs (Pallas, by Triton; arXiv:2205.14135, arXiv:2307.08691) that skips other documents.

Shapes as in `attention`. In packed rows a block of queries begins at the keys where the document of its first
query begins, and ends at the diagonal; a block of keys takes queries up to where the document of its last key
ends. Time grows with the squares of the documents, not with that of the row.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmgen.models.attention import LOW, NAME


class Tile(NamedTuple):
    """How one kernel is cut: queries and keys at a time (powers of two of 16 at least that divide T), warps a
    block, and stages of the pipeline that loads what its loop needs next."""

    q: int
    k: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The three kernels: the forward pass, the gradient of q, and those of k and v."""

    forward: Tile
    dq: Tile
    dkv: Tile


TILES = Tiles(Tile(128, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2))  # of several on an H100: docs/lab-notes.md


def fit(tiles, dtype, channels):
    """`tiles` with sides as many times smaller as a head's row is longer than 128 bytes, 32 at least: so that
    shared memory holds them."""
    times = max(1, jnp.dtype(dtype).itemsize * pl.next_power_of_2(channels) // 128)
    side = lambda size: min(size, max(32, size // times))
    return Tiles(*(t._replace(q=side(t.q), k=side(t.k)) for t in tiles))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def flash(q, k, v, segments=None, tiles=TILES, interpret=False):
    """Softmax attention, scaled by C**-0.5: q [B, T, N, C]; k, v [B, T, K, C]; bfloat16 or float32 -> as q.

    `segments` int [B, T]: each query sees itself and what is before it in its own segment. Segments are runs,
    as packing makes them: a number, 0 of padding too, may not come back later in its row. None: every query
    sees every key.

    Products are in the inputs' type, summed in float32; the softmax is in float32. Those of float32 have
    JAX's default precision, on GPUs TF32, as "xla" has: jax.default_matmul_precision("highest") makes it full.
    N / K heads share a kv-head without repeating it. Where C is no power of two, zeros are added. The output
    and the logarithm of the softmax's total, all that is kept but the inputs, bear the checkpoint name NAME.

    Raises ValueError for T that is no multiple of the tiles.
    """
    return _forward(q, k, v, segments, tiles, interpret)[0]


def _padded(*arrays):
    """[..., C] -> [..., the next power of two], with zeros."""
    more = pl.next_power_of_2(arrays[0].shape[-1]) - arrays[0].shape[-1]
    return [jnp.pad(x, ((0, 0),) * 3 + ((0, more),)) if more else x for x in arrays]


def _same(segments, side, at):
    """bool [B, T / side, T]: which tokens share the segment of the token at place `at` of each block."""
    return segments[:, at::side, None] == segments[:, None, :]


def _from(segments, tile):
    """int32 [B, T / tile.q]: the first block of keys that a block of queries sees, or None."""
    if segments is None:
        return None
    T = segments.shape[1]
    return jnp.where(_same(segments, tile.q, 0), jnp.arange(T, dtype=jnp.int32), T).min(-1) // tile.k


def _to(segments, tile):
    """int32 [B, T / tile.k]: one past the last block of queries that sees a block of keys, or None."""
    if segments is None:
        return None
    T = segments.shape[1]
    same = _same(segments, tile.k, tile.k - 1)
    return jnp.where(same, jnp.arange(T, dtype=jnp.int32), 0).max(-1) // tile.q + 1


def _call(kernel, tile, name, interpret, **options):
    """pallas_call, with this tile."""
    params = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
    kernel = functools.partial(kernel, tile=tile)
    return pl.pallas_call(kernel, compiler_params=params, interpret=interpret, name=name, **options)


def _scale(channels):
    """Of the logits, to base 2: 2**x is what the hardware has."""
    return channels**-0.5 * math.log2(math.e)


def _keys(i, from_ref, T, tile):
    """The blocks of keys that query block i sees: (from, to)."""
    if from_ref is None:
        return 0, T // tile.k
    return from_ref[i], lax.div(i * tile.q + tile.q + tile.k - 1, tile.k)


def _line(segments_ref, i, side):
    """(the segments, the places) of block i of this side; None where all see all."""
    if segments_ref is None:
        return None
    return segments_ref[pl.ds(i * side, side)], i * side + jnp.arange(side)


def _hide(logits, down, across, keys_down=False):
    """LOW in place of the logits of keys that a query may not see; `down` and `across` are from `_line`."""
    if down is None:
        return logits
    down, across = [x[:, None] for x in down], [x[None] for x in across]
    (own, place), (theirs, at) = (across, down) if keys_down else (down, across)
    return jnp.where((own == theirs) & (place >= at), logits, LOW)


def _forward_kernel(q_ref, k_ref, v_ref, segments_ref, from_ref, y_ref, norm_ref, *, tile, scale):
    i, T = pl.program_id(0), k_ref.shape[0]
    q = q_ref[...]
    queries = _line(segments_ref, i, tile.q)

    def visit(j, state):
        y, top, total = state
        at = pl.ds(j * tile.k, tile.k)
        logits = plgpu.dot(q, k_ref[at, :], trans_b=True) * scale
        logits = _hide(logits, queries, _line(segments_ref, j, tile.k))
        # Before its document a query has but LOW, whose weights of 1 its first true logit shrinks to 0.
        peak = jnp.maximum(top, logits.max(1))
        weights, shrink = jnp.exp2(logits - peak[:, None]), jnp.exp2(top - peak)
        seen = plgpu.dot(weights.astype(q.dtype), v_ref[at, :])
        return y * shrink[:, None] + seen, peak, total * shrink + weights.sum(1)

    floats = functools.partial(jnp.full, dtype=jnp.float32)
    state = floats(q.shape, 0), floats(tile.q, LOW), floats(tile.q, 0)
    y, top, total = lax.fori_loop(*_keys(i, from_ref, T, tile), visit, state)
    y_ref[...] = (y / total[:, None]).astype(y_ref.dtype)
    norm_ref[...] = top + jnp.log2(total)


def _forward(q, k, v, segments, tiles, interpret):
    (B, T, N, C), K, tile = q.shape, k.shape[2], tiles.forward
    if any(T % side for t in tiles for side in (t.q, t.k)):
        raise ValueError(f"{T} tokens are no multiple of the tiles {tiles}")
    inputs, scale, group = (q, k, v, segments), _scale(C), N // K
    q, k, v = _padded(q, k, v)
    wide = q.shape[-1]
    block = pl.BlockSpec((None, tile.q, None, wide), lambda i, b, n: (b, i, n, 0))
    row = pl.BlockSpec((None, T, None, wide), lambda i, b, n: (b, 0, n // group, 0))
    numbers = lambda size: None if segments is None else pl.BlockSpec((None, size), lambda i, b, n: (b, 0))
    y, norm = _call(
        functools.partial(_forward_kernel, scale=scale), tile, "flash_forward", interpret,
        grid=(T // tile.q, B, N),
        in_specs=[block, row, row, numbers(T), numbers(T // tile.q)],
        out_specs=[block, pl.BlockSpec((None, None, tile.q), lambda i, b, n: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
    )(q, k, v, segments, _from(segments, tile))  # fmt: skip
    y, norm = (checkpoint_name(x, NAME) for x in (y[..., :C], norm))
    return y, (inputs, y, norm)


def _dq_kernel(
    q_ref, k_ref, v_ref, slope_ref, norm_ref, shift_ref, segments_ref, from_ref, dq_ref, *, tile, scale
):
    i, T = pl.program_id(0), k_ref.shape[0]
    q, slope, norm, shift = q_ref[...], slope_ref[...], norm_ref[...], shift_ref[...]
    queries = _line(segments_ref, i, tile.q)

    def visit(j, dq):
        at = pl.ds(j * tile.k, tile.k)
        k = k_ref[at, :]
        logits = plgpu.dot(q, k, trans_b=True) * scale
        logits = _hide(logits, queries, _line(segments_ref, j, tile.k))
        weights = jnp.exp2(logits - norm[:, None])
        d = weights * (plgpu.dot(slope, v_ref[at, :], trans_b=True) - shift[:, None])
        return dq + plgpu.dot(d.astype(q.dtype), k)

    dq = lax.fori_loop(*_keys(i, from_ref, T, tile), visit, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = (dq * (scale * math.log(2))).astype(dq_ref.dtype)


def _dkv_kernel(
    q_ref, k_ref, v_ref, slope_ref, norm_ref, shift_ref, segments_ref, to_ref, dk_ref, dv_ref, *, tile, scale
):
    """Keys run down and queries across, so that the weights enter their products as they are."""
    j, (T, group) = pl.program_id(0), q_ref.shape[:2]
    k, v = k_ref[...], v_ref[...]
    keys = _line(segments_ref, j, tile.k)
    span = (0, T // tile.q) if to_ref is None else (lax.div(j * tile.k, tile.q), to_ref[j])

    def head(n, sums):
        def visit(i, sums):
            dk, dv = sums
            at = pl.ds(i * tile.q, tile.q)
            q, slope = q_ref[at, n, :], slope_ref[at, n, :]
            logits = plgpu.dot(k, q, trans_b=True) * scale
            logits = _hide(logits, keys, _line(segments_ref, i, tile.q), keys_down=True)
            weights = jnp.exp2(logits - norm_ref[n, at][None])
            dv = dv + plgpu.dot(weights.astype(q.dtype), slope)
            d = weights * (plgpu.dot(v, slope, trans_b=True) - shift_ref[n, at][None])
            return dk + plgpu.dot(d.astype(q.dtype), q), dv

        return lax.fori_loop(*span, visit, sums)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, group, head, (zeros, zeros))
    dk_ref[...] = (dk * (scale * math.log(2))).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def _backward(tiles, interpret, kept, slope):
    (q, k, v, segments), y, norm = kept
    (B, T, N, C), K, scale = q.shape, k.shape[2], _scale(q.shape[-1])
    group = N // K
    shift = (slope.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
    q, k, v, slope = _padded(q, k, v, slope)
    wide = q.shape[-1]
    given = q, k, v, slope, norm, shift, segments
    numbers = lambda size: None if segments is None else pl.BlockSpec((None, size), lambda i, b, n: (b, 0))

    tile = tiles.dq
    block = pl.BlockSpec((None, tile.q, None, wide), lambda i, b, n: (b, i, n, 0))
    row = pl.BlockSpec((None, T, None, wide), lambda i, b, n: (b, 0, n // group, 0))
    line = pl.BlockSpec((None, None, tile.q), lambda i, b, n: (b, n, i))
    dq = _call(
        functools.partial(_dq_kernel, scale=scale), tile, "flash_dq", interpret,
        grid=(T // tile.q, B, N),
        in_specs=[block, row, row, block, line, line, numbers(T), numbers(T // tile.q)],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*given, _from(segments, tile))  # fmt: skip

    tile = tiles.dkv
    block = pl.BlockSpec((None, tile.k, None, wide), lambda j, b, n: (b, j, n, 0))
    row = pl.BlockSpec((None, T, group, wide), lambda j, b, n: (b, 0, n, 0))
    line = pl.BlockSpec((None, group, T), lambda j, b, n: (b, n, 0))
    dk, dv = _call(
        functools.partial(_dkv_kernel, scale=scale), tile, "flash_dkv", interpret,
        grid=(T // tile.k, B, K),
        in_specs=[row, block, block, row, line, line, numbers(T), numbers(T // tile.k)],
        out_specs=[block, block],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
    )(*given, _to(segments, tile))  # fmt: skip
    return dq[..., :C], dk[..., :C], dv[..., :C], None


flash.defvjp(_forward, _backward)
