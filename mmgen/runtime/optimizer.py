"""AdamW and Muon from the config, with warmup, cosine decay and clipping."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mmgen.runtime import mesh as meshes

# Matrices that read or write something other than the residual stream train with AdamW.
_ADAM_AXES = {"vocab", "pixels", "code", "place", "query", "label"}
_BATCH_AXES = {"gate"}


def schedule(config, steps):
    """Linear warmup to 1, then cosine down to `config.final`: a factor of the peak rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0, 1.0, min(config.warmup, steps - 1), max(steps, 2), config.final
    )


def _dimensions(state, mine=lambda variable: True):
    """Pure dict: how Muon sees each parameter as a matrix, or a MaskedNode where AdamW trains it, or another
    transform does: where it is not `mine`."""

    def one(variable):
        axes = variable.get_metadata()["axes"]
        stacked = variable.ndim - len(axes)
        if len(axes) < 2 or _ADAM_AXES & set(axes) or not mine(variable):
            return optax.MaskedNode()
        # The first axis is summed over, except where several axes lead to one output ("out").
        outputs = tuple(i + stacked for i, a in enumerate(axes) if i > 0 and a not in _BATCH_AXES)
        return MuonDimensionNumbers((stacked,), outputs)

    return _each(state, one)


def _each(state, one):
    """Pure dict of one(variable) for the variables of a state."""
    tree = {}
    for path, variable in nnx.to_flat_state(state):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = one(variable)
    return tree


def _orthogonalize(updates, dimensions, over):
    """The tree `updates` with orthogonal matrices, scaled by their shapes as in github.com/KellerJordan/Muon.

    Matrices of one shape, of all layers and parameters, make one stack, which the devices along the mesh axes
    `over` share: each has some of them whole. Had all devices some rows of each, as of parameters, then the
    partitioner would gather every matrix on every device in every step of the iteration.
    """
    leaves, tree = jax.tree.flatten(updates)
    orders, stacks = [], {}
    for i, (x, (inputs, outputs)) in enumerate(zip(leaves, tree.flatten_up_to(dimensions))):
        size = lambda axes: math.prod(x.shape[axis] for axis in axes)
        short, long = sorted((inputs, outputs), key=size)
        orders.append((*(axis for axis in range(x.ndim) if axis not in inputs + outputs), *short, *long))
        scale = max(1, size(outputs) / size(inputs)) ** 0.5
        stacks.setdefault((size(short), size(long)), []).append((i, scale))

    for shape, members in stacks.items():
        turned = [leaves[i].transpose(orders[i]) for i, _ in members]
        stack = _share(_newton_schulz, jnp.concatenate([x.reshape(-1, *shape) for x in turned]), over)
        ends = np.cumsum([x.size // math.prod(shape) for x in turned])
        for (i, scale), x, part in zip(members, turned, jnp.split(stack, ends[:-1])):
            leaves[i] = scale * part.reshape(x.shape).transpose(np.argsort(orders[i]))
    return tree.unflatten(leaves)


def _newton_schulz(x):
    """Matrices [S, n, m], n <= m, with singular values near 1 in place of their own. Four steps after AOL
    preconditioning are as orthogonal as five without it (arXiv:2512.04632), and a quarter sooner."""
    for step in range(4):
        a = x @ x.mT
        if step == 0:
            scale = jax.lax.rsqrt(jnp.maximum(jnp.abs(a).sum(-1, keepdims=True), 1e-8))
            x, a = x * scale, a * scale * scale.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def _share(function, stack, over):
    """function(stack) where the devices along the mesh axes `over` each do a part of the stack's first axis."""
    if not over:
        return function(stack)
    # One mesh axis after the other moves to the first axis: the partitioner exchanges parts for each, where it
    # would gather everything for several at once.
    free = PartitionSpec.UNCONSTRAINED
    layouts = [PartitionSpec(over[:end], free, free) for end in range(1, len(over))] + [PartitionSpec(over)]
    ways = lambda axes: math.prod(meshes.current()[0].shape[axis] for axis in axes)
    # Padded and split as most parameters are before anything moves: XLA for CPUs else exchanges pieces of which
    # only some are padded, in layouts that differ, and then refuses its own exchange ("all-to-all has operands
    # with different shapes").
    x = jnp.pad(stack, ((0, -len(stack) % ways(over)), (0, 0), (0, 0)))
    split = [
        axes if size % ways(axes) == 0 else free for size, axes in zip(x.shape[1:], (over[:1], over[1:]))
    ]
    x = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(x, PartitionSpec(None, *split)))
    for layout in layouts:
        x = jax.lax.with_sharding_constraint(x, layout)
    x = function(x)
    for layout in layouts[::-1]:
        x = jax.lax.with_sharding_constraint(x, layout)
    return x[: len(stack)]


def _splitting(state):
    """The mesh axes, of several devices, that the rules split parameters over."""
    if not meshes.current():
        return ()
    mesh, rules = meshes.current()
    logical = {axis for _, variable in nnx.to_flat_state(state) for axis in variable.get_metadata()["axes"]}
    found = {axis for name in logical for axis in meshes.mesh_axes(rules.get(name))}
    return tuple(axis for axis in meshes.AXES if axis in found and mesh.shape[axis] > 1)


def make(config, steps, state):
    """The optax transform of `config.optimizer` for an (abstract) `nnx.State`.

    config: name ("muon" or "adamw"), learning_rate (peak), adam_learning_rate (peak of what Muon
    does not train), warmup, final, weight_decay, beta1, beta2, clip (global norm; 0: none).

    A parameter's metadata may say more: with `frozen` it is never changed and has no moments, and with
    `bounds` (least, greatest) it is brought back within them after every step. With `average` (a decay d) it is a
    moving average: its gradient is its distance from the new value, of which it goes 1 - d, at any rate and outside of
    clipping. The parameters of a `group` have an optimizer of their own, with a norm of their own to clip:
    `config.groups[group]` says what of it differs from `config`.
    """

    kinds = _each(state, _kind)
    transforms, groups = {}, dict(config.get("groups", {}))
    for name in sorted(set(jax.tree.leaves(kinds))):
        if name == "frozen":
            transforms[name] = optax.set_to_zero()
        elif name == "average":
            decays = _each(state, lambda variable: variable.get_metadata().get("average"))
            transforms[name] = _averages(decays)
        else:
            own = ml_collections.ConfigDict(config)
            own.update(groups.get(name, {}))
            mine = functools.partial(lambda name, variable: _kind(variable) == name, name)
            transforms[name] = _learner(own, steps, state, mine)
    transform = optax.partition(transforms, kinds) if len(transforms) > 1 else next(iter(transforms.values()))
    bounds = _each(state, lambda variable: variable.get_metadata().get("bounds"))
    if jax.tree.leaves(bounds):
        transform = optax.chain(transform, _within(bounds))
    return transform


def _kind(variable):
    """Who changes a parameter: "frozen", "average", its group, or "learned"."""
    about = variable.get_metadata()
    average = "average" if "average" in about else None
    return "frozen" if about.get("frozen") else average or about.get("group", "learned")


def norms(state):
    """The function that takes the gradients of a state's parameters to {"grad_norm": of those of no group,
    "grad_norm_GROUP": of a group's}. Frozen parameters are in none, nor are averages, whose gradients are distances.
    """
    kinds = jax.tree.leaves(_each(state, _kind))
    named = {
        kind: "grad_norm" + f"_{kind}" * (kind != "learned") for kind in dict.fromkeys(["learned", *kinds])
    }

    def of(grads):
        leaves = list(zip(jax.tree.leaves(grads), kinds))
        norm = lambda kind: optax.tree.norm([grad for grad, its in leaves if its == kind])
        return {name: norm(kind) for kind, name in named.items() if kind not in ("frozen", "average")}

    return of


def _learner(config, steps, state, mine):
    """The transform of `make` for parameters that are `mine`, without anything special."""
    factor = schedule(config, steps)
    rate = lambda peak: lambda step: peak * factor(step)
    if config.name == "adamw":
        transform = optax.adamw(
            rate(config.learning_rate),
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            # Of matrices alone; that layers are stacked is no axis of a parameter's own.
            mask=_each(state, lambda variable: len(variable.get_metadata()["axes"]) > 1),
        )
    elif config.name == "muon":
        dimensions = _dimensions(state, mine)
        labels = jax.tree.map(
            lambda d: "muon" if isinstance(d, MuonDimensionNumbers) else "adam",
            dimensions,
            is_leaf=lambda d: isinstance(d, MuonDimensionNumbers | optax.MaskedNode),
        )
        # As optax.contrib.muon, but for where its matrices are while they are orthogonalized: of its own steps
        # there are none, which leaves the momentum.
        momentum = scale_by_muon(ns_steps=0, preconditioning="aol", weight_dimension_numbers=dimensions)
        orthogonal = optax.chain(
            momentum,
            optax.stateless(lambda updates, _: _orthogonalize(updates, dimensions, _splitting(state))),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate(config.learning_rate)),
        )
        rest = optax.adamw(
            rate(config.adam_learning_rate), config.beta1, config.beta2, weight_decay=0.0, nesterov=True
        )
        transform = optax.partition({"muon": orthogonal, "adam": rest}, labels)
    else:
        raise ValueError(f"unknown optimizer {config.name!r}; known: 'adamw', 'muon'")
    return optax.chain(optax.clip_by_global_norm(config.clip), transform) if config.clip else transform


def _averages(decays):
    """Goes the share 1 - decay of the way; `decays` is a tree of them, None for other parameters."""

    def update(updates, params):
        step = lambda decay, x: x if isinstance(x, optax.MaskedNode) else (decay - 1) * x
        return jax.tree.map(step, decays, updates, is_leaf=lambda x: x is None)

    return optax.stateless(update)


def _within(bounds):
    """Shortens updates such that parameters stay in their bounds; `bounds` is a tree of (least, greatest) or None."""

    def one(update, param, limits):
        return update if limits is None else jnp.clip(param + update, *limits) - param

    return optax.stateless(lambda updates, params: jax.tree.map(one, updates, params, bounds))
