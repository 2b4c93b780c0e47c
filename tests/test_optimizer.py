"""Which parameters Muon trains, that stacked layers are trained as single ones, and the schedule."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

from mmgen.models import layers, transformer
from mmgen.models.autoencoders import Autoencoder
from mmgen.runtime import config as configs
from mmgen.runtime import optimizer
from tests.conftest import run_python

BASE = dict(
    name="muon", learning_rate=0.1, adam_learning_rate=0.01, warmup=0, final=0.0, weight_decay=0.0, beta1=0.9,
    beta2=0.95, clip=0.0,
)  # fmt: skip


def settings(**changes):
    return ml_collections.ConfigDict({**BASE, **changes})


def abstract_of(make):
    return nnx.split(nnx.eval_shape(make))[1]


def labels(state):
    """{parameter path: "muon" or "adam"}, as the moments of the optimizer's state show."""
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), nnx.to_pure_dict(state))
    moments = jax.eval_shape(optimizer.make(settings(), 10, state).init, params)
    found = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(moments):
        keys = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        kind = "muon" if "muon" in keys else "adam"
        if "mu" in keys:
            found["/".join(keys[keys.index("mu") + 1 :])] = kind
    return found


def test_muon_trains_the_matrices_of_blocks_and_adam_the_rest():
    config = configs.load("transformer:tiny").model
    found = labels(abstract_of(lambda: transformer.Transformer(config, 60, nnx.Rngs(0), (5, 3, 2))))
    for name, kind in found.items():
        inside = name.startswith("blocks/") and name.endswith("/w") or name == "before/w"
        assert kind == ("muon" if inside else "adam"), name
    assert {
        "embedding",
        "head",
        "digit_embedding",
        "before/w",
        "blocks/attention/q/w",
        "blocks/mlp/wi/w",
    } <= set(found)


def test_muon_in_the_tokenizer():
    found = labels(abstract_of(lambda: Autoencoder(configs.load("tokenizer:tiny").model, nnx.Rngs(0))))
    for name, kind in found.items():
        inside = ("/blocks/" in name and not name.endswith("/b")) or name in (
            "prior/mix/w",
            "decoder/cells/up/w",
        )
        assert kind == ("muon" if inside else "adam"), name
    assert (
        "encoder/stem/w" in found and "decoder/head/b" in found and any("/blocks/" in name for name in found)
    )


class Stacked(nnx.Module):
    def __init__(self):
        self.blocks = layers.stack(lambda r: layers.MLP(6, 10, r, dtype=jnp.float32), 3, nnx.Rngs(0))


class Single(nnx.Module):
    def __init__(self):
        self.blocks = layers.MLP(6, 10, nnx.Rngs(0), dtype=jnp.float32)


def updates(state, params, gradients, **changes):
    """What two optimizer steps add to the parameters."""
    tx = optimizer.make(settings(**changes), 100, state)

    @jax.jit
    def run(params, gradients):
        first, moments = tx.update(gradients, tx.init(params), params)
        return jax.tree.map(jnp.add, first, tx.update(gradients, moments, params)[0])

    return run(params, gradients)


def random_like(state, seed):
    tree = nnx.to_pure_dict(state)
    leaves, definition = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(definition, [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves)])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_frozen_parameters_stay_and_have_no_moments(name):
    class Both(nnx.Module):
        def __init__(self):
            self.kept, self.learned = (layers.MLP(6, 10, nnx.Rngs(0), dtype=jnp.float32) for _ in range(2))
            for _, variable in nnx.to_flat_state(nnx.state(self.kept)):
                variable.set_metadata(frozen=True)

    state = abstract_of(Both)
    params, gradients = random_like(state, 0), random_like(state, 1)
    changed = updates(state, params, gradients, name=name, weight_decay=0.1)
    assert not any(np.any(x) for x in jax.tree.leaves(changed["kept"]))
    assert all(np.all(np.asarray(x) != 0) for x in jax.tree.leaves(changed["learned"]))
    moments = optimizer.make(settings(name=name), 10, state).init(params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(moments)]
    assert any("learned" in path for path in paths) and not any("kept" in path for path in paths)


def test_muon_on_stacked_layers_is_muon_on_each():
    stacked, single = abstract_of(Stacked), abstract_of(Single)
    params, gradients = random_like(stacked, 0), random_like(stacked, 1)
    together = updates(stacked, params, gradients, weight_decay=0.1)
    for layer in range(3):
        pick = lambda tree: jax.tree.map(lambda p: p[layer], tree)
        alone = updates(single, pick(params), pick(gradients), weight_decay=0.1)
        for a, b in zip(jax.tree.leaves(pick(together)), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_muon_makes_steps_of_even_singular_values():
    """Orthogonalised: a gradient of rank one hundred times longer in one direction is not."""
    single = abstract_of(Single)
    params = jax.tree.map(jnp.zeros_like, random_like(single, 0))
    gradients = random_like(single, 1)
    wo = gradients["blocks"]["wo"]["w"]
    gradients["blocks"]["wo"]["w"] = wo + 10 * jnp.outer(wo[:, 0], wo[0])
    step = updates(single, params, gradients)["blocks"]["wo"]["w"]
    values = np.linalg.svd(step, compute_uv=False)
    before = np.linalg.svd(gradients["blocks"]["wo"]["w"], compute_uv=False)
    assert before[0] / before[-1] > 20 and values[0] / values[-1] < 3
    # Gate and value are two matrices that share one product.
    for part in np.moveaxis(np.asarray(updates(single, params, gradients)["blocks"]["wi"]["w"]), 1, 0):
        values = np.linalg.svd(part, compute_uv=False)
        assert values[0] / values[-1] < 3


def test_muon_is_that_of_optax():
    """Its updates and its state, but for where the matrices are while they are orthogonalized."""
    config = configs.load("transformer:tiny").model
    state = abstract_of(lambda: transformer.Transformer(config, 60, nnx.Rngs(0), (5, 3, 2)))
    chosen = settings(weight_decay=0.1)
    factor = optimizer.schedule(chosen, 100)
    theirs = optax.contrib.muon(
        lambda step: 0.1 * factor(step), ns_steps=4, preconditioning="aol", weight_decay=0.1,
        adam_learning_rate=lambda step: 0.01 * factor(step), adam_b1=0.9, adam_b2=0.95,
        muon_weight_dimension_numbers=jax.tree.map(
            lambda found: None if isinstance(found, optax.MaskedNode) else found, optimizer._dimensions(state),
            is_leaf=lambda x: isinstance(x, optax.MaskedNode | optax.contrib.MuonDimensionNumbers),
        ),
    )  # fmt: skip

    def run(transform):
        params, moments = random_like(state, 0), transform.init(random_like(state, 0))
        for step in range(3):
            changes, moments = jax.jit(transform.update)(random_like(state, step + 1), moments, params)
            params = optax.apply_updates(params, changes)
        return params, moments

    ours, expected = run(optimizer.make(chosen, 100, state)), run(theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


SHARED = """
import jax, numpy as np
from flax import nnx
from jax.sharding import Mesh
from mmgen.commands.tools.plan import collectives
from mmgen.models import layers
from mmgen.runtime import config as configs, mesh as meshes, presets
from mmgen.stages import program
from tests.test_optimizer import abstract_of, optimizer, random_like, settings

class Blocks(nnx.Module):
    def __init__(self):
        config = configs.load("transformer:tiny").model
        config.update(heads=4, kv_heads=2)
        make = lambda rngs: layers.Block(config, rngs, dtype="float32")
        self.blocks = layers.stack(make, 3, nnx.Rngs(0))

state = abstract_of(Blocks)
tx = optimizer.make(settings(weight_decay=0.1), 100, state)
values = random_like(state, 1), tx.init(random_like(state, 0)), random_like(state, 0)
expected = jax.jit(tx.update)(*values)
for shape in ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}):
    sizes = [shape.get(axis, 1) for axis in meshes.AXES]
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), meshes.AXES)
    params = meshes.param_shardings(state, mesh, presets.SHARDING)
    moments = program._shardings(jax.eval_shape(lambda: values[1]), params, mesh)
    laid = jax.device_put(values, (params, moments, params))
    with meshes.use(mesh, presets.SHARDING):
        update = jax.jit(tx.update, out_shardings=(params, moments)).lower(*laid).compile()
    for a, b in zip(jax.tree.leaves(update(*laid)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    print(shape, collectives(update.as_text()))
"""


@pytest.mark.soak
def test_devices_share_the_matrices_and_gather_none():
    """Fifteen of one shape and six of another on eight devices: what is shared out is exchanged, there and back."""
    lines = run_python(SHARED, devices=8).stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "all-to-all" in line and "all-gather" not in line and "all-reduce" not in line, line


def test_schedule():
    factor = optimizer.schedule(settings(warmup=10, final=0.1), 100)
    assert [float(factor(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.5, 1])
    assert float(factor(100)) == pytest.approx(0.1)
    assert float(factor(55)) == pytest.approx(0.55, abs=1e-3)  # half of the cosine
    values = [float(factor(step)) for step in range(10, 101)]
    assert all(a >= b for a, b in zip(values, values[1:]))


@pytest.mark.parametrize("steps, warmup", [(1, 50), (2, 50), (3, 2), (5, 0)])
def test_short_runs_have_a_schedule_too(steps, warmup):
    factor = optimizer.schedule(settings(warmup=warmup), steps)
    values = [float(factor(step)) for step in range(steps)]
    assert np.isfinite(values).all() and max(values) <= 1
    assert steps == 1 or max(values) > 0.4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_spares_vectors(name):
    class Tower(nnx.Module):
        def __init__(self):
            make = lambda r: layers.Linear((6, 6), ("embed", "mlp"), r, bias=True)
            self.blocks = layers.stack(make, 2, nnx.Rngs(0))
            self.out = make(nnx.Rngs(1))

    state = abstract_of(Tower)
    params = jax.tree.map(jnp.ones_like, random_like(state, 0))
    zero = jax.tree.map(jnp.zeros_like, params)
    step = updates(state, params, zero, name=name, weight_decay=0.5)
    for part in (step["blocks"], step["out"]):
        assert (np.asarray(part["w"]) < 0).all() and not np.any(part["b"])


def test_clipping_bounds_the_gradient():
    state = abstract_of(Single)
    params, gradients = random_like(state, 0), random_like(state, 1)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradients)))
    small = jax.tree.map(lambda g: g * 1e-3 / norm, gradients)
    clipped = updates(state, params, gradients, name="adamw", clip=1e-3)
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(updates(state, params, small, name="adamw"))):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_unknown_optimizer():
    with pytest.raises(ValueError, match="'adamw'"):
        optimizer.make(settings(name="adam"), 10, abstract_of(Single))
