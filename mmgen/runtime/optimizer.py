"""AdamW and Muon from the config, with warmup, cosine decay and clipping."""

import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

# Matrices that read or write something other than the residual stream train with AdamW.
_ADAM_AXES = {"vocab", "pixels", "code", "place"}
_BATCH_AXES = {"gate"}


def schedule(config, steps):
    """Linear warmup to 1, then cosine down to `config.final`: a factor of the peak rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0, 1.0, min(config.warmup, steps - 1), max(steps, 2), config.final
    )


def _dimensions(state):
    """Pure dict: how Muon sees each parameter as a matrix, or None where AdamW trains it."""

    def one(variable):
        axes = variable.get_metadata()["axes"]
        stacked = variable.ndim - len(axes)
        if len(axes) < 2 or _ADAM_AXES & set(axes):
            return None
        # The first axis is summed over, except where several axes lead to one output ("out").
        outputs = tuple(i + stacked for i, a in enumerate(axes) if i > 0 and a not in _BATCH_AXES)
        return MuonDimensionNumbers((stacked,), outputs)

    flat = [(path, one(variable)) for path, variable in nnx.to_flat_state(state)]
    tree = {}
    for path, dims in flat:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = dims
    return tree


def make(config, steps, state):
    """The optax transform of `config.optimizer` for an (abstract) `nnx.State`.

    config: name ("muon" or "adamw"), learning_rate (peak), adam_learning_rate (peak of what Muon
    does not train), warmup, final, weight_decay, beta1, beta2, clip (global norm; 0: none).
    """
    factor = schedule(config, steps)
    rate = lambda peak: lambda step: peak * factor(step)
    matrices = nnx.to_pure_dict(
        nnx.from_flat_state(
            [
                (path, v.ndim - (1 if v.ndim > len(v.get_metadata()["axes"]) else 0) > 1)
                for path, v in nnx.to_flat_state(state)
            ]
        )
    )
    if config.name == "adamw":
        transform = optax.adamw(
            rate(config.learning_rate),
            config.beta1,
            config.beta2,
            weight_decay=config.weight_decay,
            mask=matrices,
        )
    elif config.name == "muon":
        transform = muon(
            rate(config.learning_rate),
            # As orthogonal as after five steps without this preconditioning (arXiv:2512.04632), a quarter sooner.
            ns_steps=4,
            preconditioning="aol",
            weight_decay=config.weight_decay,
            adam_learning_rate=rate(config.adam_learning_rate),
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_dimensions(state),
        )
    else:
        raise ValueError(f"unknown optimizer {config.name!r}; known: 'adamw', 'muon'")
    if config.clip:
        transform = optax.chain(optax.clip_by_global_norm(config.clip), transform)
    return transform
