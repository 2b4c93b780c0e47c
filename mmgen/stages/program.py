"""What is compiled of a run: the state's shapes and shardings, its initial values, and one training step.

Nothing here holds data or touches a disk, so that `mmgen tools plan`, the benchmarks and the tests compile
the very step that `loop.train` runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmgen.runtime import hardware, optimizer
from mmgen.runtime import mesh as meshes


class Program(NamedTuple):
    graphdef: Any  # of the model; nnx.merge(graphdef, params) is one
    shapes: dict  # the state as ShapeDtypeStructs that carry their shardings
    init: Callable  # key -> state, laid out, never all of it on one device
    gradients: Callable  # (params, batch, step) -> ({name: (sum, weight)}, gradients of the mean loss)
    step: Callable  # (state, batch) -> (state, metrics); jitted, the state is donated


def build(config, make, loss, mesh):
    """The `Program` of `loss` on models of `make(nnx.Rngs)`, to be called within `meshes.use(mesh, ...)`.

    `loss(model, batch, key)`, whose batch also has the "step" int32 [], returns {name: (sum, weight)} with a "loss"
    among them: what is learned is the
    sum of the losses over the sum of the weights of the whole batch, however many parts (`config.accumulate`)
    it is computed in. A mean of the parts' means would give each token of a part with few a larger say.

    Where a config has `updates` above 1, a step is so many updates, each by a part of the batch, one after the other;
    metrics are means over them.

    A step that has no weights at all, whose loss or gradient is not finite, or whose gradient norm is over `config.spike` times its
    running mean (that of parameters of no optimizer group: a discriminator's may leap with its lazy terms), leaves parameters and optimizer as they were and is counted in the metrics `skipped` (so far)
    and `skipped_in_row`.
    """
    create = lambda key: make(nnx.Rngs(key))
    new_key = jax.ShapeDtypeStruct(
        (), jax.eval_shape(lambda: jax.random.key(0)).dtype
    )  # its shape: no device is asked
    graphdef, abstract = nnx.split(nnx.eval_shape(create, new_key))
    updates = config.get("updates", 1)
    tx = optimizer.make(config.optimizer, config.steps * updates, abstract)
    norms = optimizer.norms(abstract)

    def init(key):
        params = nnx.to_pure_dict(nnx.split(create(key))[1])
        watch = {
            "norm": jnp.zeros(()),
            "skipped": jnp.zeros((), jnp.int32),
            "in_row": jnp.zeros((), jnp.int32),
        }
        state = {
            "params": params,
            "optimizer": {"step": jnp.zeros((), jnp.int32), "moments": tx.init(params), "watch": watch},
        }
        if config.ema:
            state["ema"] = jax.tree.map(jnp.copy, params)
        return state

    shapes = jax.eval_shape(init, new_key)
    shardings = _shardings(shapes, meshes.param_shardings(abstract, mesh, config.sharding), mesh)
    shapes = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )

    def part(params, batch, key, at):
        """-> ({name: (sum, weight)}, gradients of the sum of losses)."""

        def value(params):
            sums = loss(nnx.merge(graphdef, params), batch | {"step": at}, key)
            return sums["loss"][0], sums

        (_, sums), grads = jax.value_and_grad(value, has_aux=True)(params)
        return sums, jax.lax.with_sharding_constraint(grads, shardings["params"])

    def gradients(params, batch, at):
        step_key = jax.random.fold_in(jax.random.key(config.seed + 1), at)
        if config.accumulate == 1:
            sums, grads = part(params, batch, step_key, at)
        else:
            body = lambda total, x: (jax.tree.map(jnp.add, total, part(params, *x, at)), None)
            xs = (parts(batch, config.accumulate), jax.random.split(step_key, config.accumulate))
            one = jax.eval_shape(part, params, *jax.tree.map(lambda x: x[0], xs), at)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), one)
            (sums, grads), _ = jax.lax.scan(body, zeros, xs)
        weight = jnp.maximum(sums["loss"][1], 1e-9)
        return sums, jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)

    def update(state, batch):
        params, watch = state["params"], state["optimizer"]["watch"]
        at = state["optimizer"]["step"]
        sums, grads = gradients(params, batch, at)
        measured = {name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in sums.items()}
        measured_norms = norms(grads)
        norm = measured_norms["grad_norm"]

        updates, moments = tx.update(grads, state["optimizer"]["moments"], params)
        good = (
            jnp.isfinite(measured["loss"])
            & jnp.isfinite(sum(measured_norms.values()))
            & (sums["loss"][1] > 0)
        )
        if config.spike:
            known = at - watch["skipped"] >= _KNOWN
            good &= ~known | (norm <= config.spike * watch["norm"])
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        # Of few norms the mean, of many an average that forgets over some hundred steps.
        share = jnp.maximum(1 / (1 + at - watch["skipped"]), 0.01).astype(watch["norm"].dtype)
        watch = {
            "norm": keep((1 - share) * watch["norm"] + share * norm, watch["norm"]),
            "skipped": watch["skipped"] + ~good,
            "in_row": jnp.where(good, 0, watch["in_row"] + 1),
        }
        new = {
            "params": keep(optax.apply_updates(params, updates), params),
            "optimizer": {
                "step": at + 1,
                "moments": keep(moments, state["optimizer"]["moments"]),
                "watch": watch,
            },
        }
        if config.ema:
            # Early averages forget the initial values quickly: the horizon grows with the step.
            decay = jnp.minimum(config.ema, (1 + at) / (10 + at))
            new["ema"] = keep(optax.incremental_update(new["params"], state["ema"], 1 - decay), state["ema"])
        counts = {"skipped": watch["skipped"], "skipped_in_row": watch["in_row"]}
        return new, measured | measured_norms | counts

    def step(state, batch):
        if updates == 1:
            return update(state, batch)
        state, measured = jax.lax.scan(update, state, parts(batch, updates))
        latest = {name: measured[name][-1] for name in ("skipped", "skipped_in_row")}
        return state, jax.tree.map(lambda x: x.mean(0), measured) | latest

    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    return Program(
        graphdef,
        shapes,
        jax.jit(init, out_shardings=shardings, compiler_options=hardware.hasty(on_cpu)),
        gradients,
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
    )


_KNOWN = 20  # good steps before the running mean of the gradient norm says what a spike is


def parts(batch, n):
    """A batch in n. Arrays [B, ...] -> [n, B / n, ...]. Part i has rows i, n + i, 2n + i, ...: each device keeps its own."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, n, *x.shape[1:]), 0, 1), batch)


def _shardings(shapes, params, mesh):
    """The state's shardings: averages and optimizer moments lie as their parameters do.

    A leaf whose path ends in a parameter's path (as moments' paths do) is laid out as it.
    """
    named = {tuple(k.key for k in path): s for path, s in jax.tree_util.tree_leaves_with_path(params)}

    def one(path, leaf):
        keys = [getattr(k, "key", None) for k in path]
        for start in range(len(keys)):
            if tuple(keys[start:]) in named and leaf.ndim:
                return named[tuple(keys[start:])]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, shapes)
