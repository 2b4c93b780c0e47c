"""Every attention against a slow one in NumPy: values and gradients, on rows of several documents."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_python
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from mmgen.models import attention as module
from mmgen.models import flash
from mmgen.models.attention import attention

ALL = ("xla", "chunked", "gpu", "splash")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels of other machines run in Pallas's interpreter, and chunks are small enough to be several."""
    monkeypatch.setattr(module, "CHUNK", 32)
    for name in ("gpu", "splash"):
        kernel = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setitem(module.IMPLEMENTATIONS, name, kernel)


def rows(T):
    """Two rows of documents and padding: the borders are at no multiple of anything."""
    first = np.repeat([1, 2, 3, 0], [T // 3, T // 4, 5, T - T // 3 - T // 4 - 5])
    second = np.repeat([1, 2, 3], [1, T // 2 + 1, T - T // 2 - 2])
    return np.stack([first, second]).astype(np.int32)


def draw(shape, kv_heads, dtype=np.float32, seed=0):
    """q, k, v and the slope of the output."""
    B, T, N, C = shape
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, n, C)).astype(dtype) for n in (N, kv_heads, kv_heads, N)]


def slow(q, k, v, slope, mask):
    """(y, dq, dk, dv) in float64, one head of one row at a time; mask bool [B, T, S]."""
    q, k, v, slope = (x.astype(np.float64) for x in (q, k, v, slope))
    y, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    B, T, N, C = q.shape
    for b in range(B):
        for n in range(N):
            m = n // (N // k.shape[2])
            Q, K, V, D = q[b, :, n], k[b, :, m], v[b, :, m], slope[b, :, n]
            weights = np.where(mask[b], np.exp(Q @ K.T / C**0.5), 0)
            weights /= weights.sum(1, keepdims=True)
            slopes = D @ V.T
            d = weights * (slopes - (weights * slopes).sum(1, keepdims=True)) / C**0.5
            y[b, :, n], dq[b, :, n] = weights @ V, d @ K
            dk[b, :, m] += d.T @ Q
            dv[b, :, m] += weights.T @ D
    return y, dq, dk, dv


def packed(segments):
    T = segments.shape[1]
    return np.tril(np.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None, :])


def outcome(q, k, v, slope, see=None, **options):
    """(y, dq, dk, dv)."""

    def both(q, k, v, slope):
        y, back = jax.vjp(lambda *x: attention(*x, see, **options), q, k, v)
        return y, *back(slope)

    return jax.jit(both)(q, k, v, slope)


def assert_close(found, expected, tolerance):
    for name, a, b in zip(("y", "dq", "dk", "dv"), found, expected, strict=True):
        a = np.asarray(a, np.float64)
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max()), (name, np.abs(a - b).max())


def check_packed(impl, kv_heads, T=128):
    given, segments = draw((2, T, 4, 32), kv_heads), rows(T)
    assert_close(outcome(*given, segments, impl=impl), slow(*given, packed(segments)), 3e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("impl", ALL)
def test_packed_rows(impl):
    check_packed(impl, 2)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("impl", ALL)
def test_kv_heads(impl, kv_heads):
    check_packed(impl, kv_heads)


@pytest.mark.parametrize("impl", ["gpu", "splash"])
def test_several_blocks(impl):
    check_packed(impl, 2, T=384)


@pytest.mark.parametrize("q, k", [(32, 64), (64, 32), (128, 16)])
def test_tiles_skip_other_documents(monkeypatch, q, k):
    """Documents that end with a tile, just before and after one, and within one; 48 channels, heads in
    threes. What is skipped is not even read: NaN in a document that has its tiles to itself stays there."""
    monkeypatch.setattr(flash, "fit", lambda *_: flash.Tiles(*[flash.Tile(q, k, 4, 2)] * 3))
    first = np.repeat([1, 2, 3, 4, 0], [128, 63, 2, 3, 60])
    segments = np.stack([first, np.repeat([1, 2, 3], [128, 1, 127])]).astype(np.int32)
    given = draw((2, 256, 6, 48), 2)
    assert_close(outcome(*given, segments, impl="gpu"), slow(*given, packed(segments)), 3e-6)
    for other, kept in (segments == 1, slice(128, None)), (segments != 1, slice(128)):
        results = [
            outcome(*(np.where(other[..., None, None], poison, x) for x in given), segments, impl="gpu")
            for poison in (0, np.nan)
        ]
        for a, b in zip(*results, strict=True):
            assert np.array_equal(np.asarray(a)[:, kept], np.asarray(b)[:, kept])


@pytest.mark.parametrize("dtype, C, expected", [("bfloat16", 64, 128), ("float32", 64, 64), ("float32", 96, 32)])
def test_tiles_fit_shared_memory(dtype, C, expected):
    tile = flash.Tile(128, 64, 4, 2)
    assert flash.fit(flash.Tiles(*[tile] * 3), dtype, C).dq == (expected, min(64, max(32, expected // 2)), 4, 2)


@pytest.mark.parametrize("impl", ["xla", "gpu", "splash"])
def test_every_query_sees_all(impl):
    given = draw((2, 128, 4, 32), 2)
    assert_close(outcome(*given, impl=impl), slow(*given, np.ones((2, 128, 128), bool)), 3e-6)


@pytest.mark.parametrize("impl", ALL)
def test_bfloat16(impl):
    given, segments = draw((2, 128, 4, 32), 2), rows(128)
    found = outcome(*(jnp.asarray(x, jnp.bfloat16) for x in given), segments, impl=impl)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, slow(*given, packed(segments)), 0.03)


@pytest.mark.parametrize("impl", ALL)
def test_a_document_knows_nothing_of_its_neighbours(impl):
    given, segments = draw((2, 128, 4, 32), 2), rows(128)
    other = [np.where((segments == 2)[..., None, None], x + 1, x) for x in given]
    for a, b in zip(outcome(*given, segments, impl=impl), outcome(*other, segments, impl=impl)):
        a, b = np.asarray(a), np.asarray(b)
        assert np.array_equal(a[segments != 2], b[segments != 2])
        assert not np.array_equal(a[segments == 2], b[segments == 2])


@pytest.mark.parametrize("impl", ["chunked", "gpu"])
def test_what_is_kept_spares_the_backward_pass_a_forward_pass(impl):
    """Kept under its name, the output is not computed again: as many products (of an interpreted kernel, loops
    in what is compiled: unused kernels are still in the jaxpr) as where everything is kept."""
    given, segments = draw((2, 128, 4, 32), 2), rows(128)

    def count(**options):
        layer = jax.checkpoint(lambda *x: attention(*x, segments, impl=impl), **options)
        both = jax.value_and_grad(lambda *x: (layer(*x) ** 2).sum(), (0, 1, 2))
        if impl == "gpu":
            return jax.jit(both).lower(*given[:3]).compile().as_text().count(" while(")
        return str(jax.make_jaxpr(both)(*given[:3])).count("dot_general")

    policies = jax.checkpoint_policies
    kept = count(policy=policies.save_only_these_names(module.NAME))
    assert kept == count(policy=policies.everything_saveable) < count()


def test_bias():
    """As decoding has it: more keys than queries, each row with its own number; and none seen at all."""
    q, k, v, slope = draw((2, 3, 4, 8), 2)
    k, v = (np.concatenate([x, x[:, ::-1] + 1], 1) for x in (k, v))
    mask = np.arange(6) <= np.array([[0, 1, 2], [3, 4, 5]])[..., None]
    found = outcome(q, k, v, slope, module.bias_of(mask), impl="auto")
    assert_close(found, slow(q, k, v, slope, mask), 3e-6)
    same = np.broadcast_to(mask[:1], mask.shape)
    found = outcome(q, k, v, slope, module.bias_of(mask[0]))
    assert_close(found, slow(q, k, v, slope, same), 3e-6)
    assert np.isfinite(attention(q, k, v, module.bias_of(np.zeros((3, 6), bool)))).all()


def test_auto_is_the_reference_where_there_is_no_kernel():
    given, segments = draw((2, 40, 2, 8), 1), rows(40)
    for a, b in zip(outcome(*given, segments, impl="auto"), outcome(*given, segments), strict=True):
        assert np.array_equal(a, b)


def test_auto_takes_the_kernel_that_suits(monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(module.IMPLEMENTATIONS, "gpu", lambda q, *_: seen.append(q.shape[1]) or q)
    q, k, v, _ = draw((2, 128, 2, 16), 1)
    attention(q, k, v, rows(128), impl="auto")
    attention(q[:, :1], k, v, impl="auto")
    attention(q[:, :40], k[:, :40], v[:, :40], rows(40), impl="auto")
    attention(q, k, v, module.bias_of(packed(rows(128))), impl="auto")
    assert seen == [128]


@pytest.mark.parametrize(
    "options, see, T, expected",
    [
        ({"impl": "flash"}, None, 128, "unknown attention 'flash'; known: auto, xla, chunked, gpu, splash"),
        ({"impl": "gpu"}, np.zeros((2, 128, 128), np.float32), 128, "segments, not a bias"),
        ({"impl": "splash"}, rows(120), 120, "a multiple of 128"),
        ({"impl": "gpu"}, None, 128, "16 to 128 channels"),
        ({"impl": "chunked"}, None, 128, "packed rows alone"),
        ({}, np.zeros((2, 128), bool), 128, "found bool"),
        ({}, rows(64), 128, r"int segments \(2, 128\)"),
    ],
)
def test_errors(options, see, T, expected):
    q, k, v, _ = draw((2, T, 2, 8), 1)
    with pytest.raises(ValueError, match=expected):
        attention(q, k, v, see, **options)


def test_heads_must_be_a_multiple():
    q, k, v, _ = draw((2, 16, 3, 8), 2)
    with pytest.raises(ValueError, match="N a multiple of K"):
        attention(q, k, v)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype, C", [("bfloat16", 64), ("float32", 128)])
@pytest.mark.parametrize(
    "impl, platform, call", [("gpu", "cuda", "__gpu$xla.gpu.triton"), ("splash", "tpu", "tpu_custom_call")]
)
def test_lowers_for_machines_that_are_not_here(monkeypatch, impl, platform, call, dtype, C):
    monkeypatch.setitem(module.IMPLEMENTATIONS, impl, getattr(module, impl))
    machine = contextlib.nullcontext()
    if platform == "cuda":  # newer JAX asks which GPU it will be
        device = AbstractDevice("NVIDIA H100", None, "gpu")
        machine = use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
    shapes = [jax.ShapeDtypeStruct((2, 1024, n, C), dtype) for n in (4, 2, 2, 4)]
    segments = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def both(q, k, v, slope, segments):
        y, back = jax.vjp(lambda *x: attention(*x, segments, impl=impl), q, k, v)
        return y, *back(slope)

    unchecked = [jax.export.DisabledSafetyCheck.custom_call(call)]
    exported = jax.export.export(jax.jit(both), platforms=[platform], disabled_checks=unchecked)
    with machine:
        text = exported(*shapes, segments).mlir_module()
    assert text.count(f"custom_call @{call}") >= 3  # forward, and twice backward


MESHES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import NamedSharding
import test_attention as t
from mmgen.models import attention as module
from mmgen.runtime import mesh as meshes
from mmgen.runtime.presets import SHARDING

module.CHUNK = 4
B, T, N, C = 8, 64, 4, 8
segments = np.tile(t.rows(T), (B // 2, 1))
draw = lambda kv_heads, dtype=np.float64: t.draw((B, T, N, C), kv_heads, dtype)
expected = {kv_heads: t.slow(*draw(kv_heads), t.packed(segments)) for kv_heads in (1, 2)}
everything = {"context": 2, "tensor": 2, "data": 2}
several = {"data": 8}, {"tensor": 4, "data": 2}, {"context": 4, "data": 2}, {"context": 4, "fsdp": 2}
for sizes in (*several, everything):
    with meshes.use(meshes.make_mesh(sizes), SHARDING):
        for kv_heads, dtype, tolerance in (1, np.float64, 1e-13), (2, np.float64, 1e-13), (2, np.float32, 2e-6):
            found = t.outcome(*draw(kv_heads, dtype), segments)
            assert {x.dtype for x in found} == {np.dtype(dtype)}
            t.assert_close(found, expected[kv_heads], tolerance)

# Full attention, a bias, and what does not divide: one row, one query.
full, mask = draw(2), t.packed(segments)
one, bias = [x[:1] for x in full], module.bias_of(mask)
with meshes.use(meshes.make_mesh(everything), SHARDING):
    for given, see, mask_of in (
        (full, None, np.ones_like(mask)), (full, bias, mask),
        (full, bias[:1], np.broadcast_to(mask[:1], mask.shape)),
        (one, bias[0], mask[:1]), (one, segments[:1], mask[:1]),
    ):
        t.assert_close(t.outcome(*given, see), t.slow(*given, mask_of), 1e-13)
    q, k, v, slope = one[0][:, :1], *one[1:3], one[3][:, :1]
    t.assert_close(t.outcome(q, k, v, slope, bias[:1, :1]), t.slow(q, k, v, slope, mask[:1, :1]), 1e-13)
    try:
        module.attention(*(x[:, :63] for x in full[:3]), segments[:, :63])
        raise SystemExit("a row that does not divide passed")
    except ValueError as error:
        assert "63" in str(error) and "context" in str(error), error

    # Computed again in the backward pass of a loop over layers, as the transformer has it.
    def deep(q, k, v, slope):
        layer = jax.checkpoint(lambda x, _: (module.attention(x, k, v, segments), None))
        return (jax.lax.scan(layer, q, None, 2)[0] * slope).sum()
    found = jax.jit(jax.grad(deep, (0, 1, 2)))(*full)
alone = jax.jit(jax.grad(deep, (0, 1, 2)))(*full)
for a, b in zip(found, alone):
    np.testing.assert_allclose(a, b, atol=1e-12)

def lay(sizes, dtype, shape, kv_heads):
    mesh = meshes.make_mesh(sizes)
    one = lambda shape, dtype, axes: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, meshes.spec(axes, SHARDING)))
    B, T, N, C = shape
    given = [one((B, T, n, C), dtype, ("batch", "length", "heads", None)) for n in (N, kv_heads, kv_heads, N)]
    return mesh, *given, one((B, T), jnp.int32, ("batch", "length"))

def both(q, k, v, slope, see, impl="xla"):
    y, back = jax.vjp(lambda *x: module.attention(*x, see, impl=impl), q, k, v)
    return y, *back(slope)

# Laid out as the rules say, nothing travels without a ring, and within one nothing is gathered.
for sizes, expected in ({"tensor": 4, "data": 2}, []), ({"context": 4, "tensor": 2}, ["collective-permute"]):
    mesh, *given = lay(sizes, jnp.float32, (B, T, N, C), N)
    with meshes.use(mesh, SHARDING):
        text = jax.jit(both).lower(*given).compile().as_text()
    travels = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert [way for way in travels if way in text] == expected

# Memory grows with a row, not with its square.
module.CHUNK, memory = 32, []
for sizes, T in ({"data": 8}, 1024), ({"context": 4, "data": 2}, 1024), ({"context": 4, "data": 2}, 2048):
    mesh, *given = lay(sizes, jnp.float32, (8, T, 2, 8), 2)
    with meshes.use(mesh, SHARDING):
        memory.append(jax.jit(both).lower(*given).compile().memory_analysis().temp_size_in_bytes)
assert memory[1] < memory[0] / 4 and memory[2] < 2.2 * memory[1], memory

# A kernel that cannot be partitioned lowers within a mesh, for machines that are not here.
jax.config.update("jax_enable_x64", False)
mesh, *given = lay({"data": 4, "tensor": 2}, jnp.bfloat16, (4, 256, 8, 64), 2)
with meshes.use(mesh, SHARDING):
    work = jax.jit(lambda *x: both(*x, impl="splash"))
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    text = jax.export.export(work, platforms=["tpu"], disabled_checks=unchecked)(*given).mlir_module()
assert "tpu_custom_call" in text
"""


def test_meshes_agree_with_one_device():
    run_python(MESHES, devices=8)
