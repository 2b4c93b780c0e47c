"""The one training loop: every stage is run by `train(config, workdir)`.

A stage (one file beside this one) is a function `setup(config, workdir) -> Stage` that says what
is learned and from what; everything about meshes, optimizers, checkpoints, resuming and logging
is here, once, in the order in which it happens.
"""

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mmgen.runtime import checkpoint, memory, optimizer
from mmgen.runtime import mesh as meshes
from mmgen.runtime import metrics as metric_files
from mmgen.runtime.config import ConfigError, nearest

STAGES = ("tokenizer", "transformer")

# Settings that may differ between the runs that continue one another: they steer what is
# written down and where it is computed, never what is learned.
_FREE = {
    "log_every",
    "save_every",
    "evaluate_every",
    "keep",
    "name",
    "prefetch",
    "mesh",
    "sharding",
    "keep_pages",
    "data.threads",
    "data.workers",
    "data.max_bad",
    "data.shards",  # where they lie; the stage compares what they hold
}


class Stage(NamedTuple):
    """What a stage adds to the loop."""

    make: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[nnx.Module, dict, jax.Array], tuple[jax.Array, dict]]  # (model, batch, key)
    data: Any  # .batch_size; .prefetch(start, rows) -> iterator of (step, those rows of the batch, how many are bad)
    unit: str  # what throughput counts, e.g. "tokens"
    units_a_step: int
    evaluate: Callable[[nnx.GraphDef, dict, int], dict]  # held-out metrics; may write previews
    adopt: Callable[[], None] = lambda: None  # puts into the workdir what samples of the run need


def setup(config, workdir):
    """The `Stage` of config.stage."""
    if config.stage not in STAGES:
        raise ConfigError(f"no stage {config.stage!r}; {nearest(config.stage, STAGES)}")
    return importlib.import_module(f"mmgen.stages.{config.stage}").setup(config, Path(workdir))


def train(config, workdir, *, stop_at=None):
    """Trains from scratch or from the newest good checkpoint of `workdir`; returns the last metrics.

    The same command run again continues, and (on CPU) ends with the same bits as a run that was
    never stopped. `stop_at` ends early, after saving, as an interruption would.
    """
    workdir = Path(workdir)
    _check(config, workdir)
    if config.keep_pages:
        memory.keep_pages()
    stage = setup(config, workdir)
    mesh = meshes.make_mesh(dict(config.mesh))
    rows = NamedSharding(mesh, meshes.spec(("batch",), config.sharding))
    meshes.check_batch(rows, stage.data.batch_size)
    first = jax.process_index() == 0  # of the processes that share a workdir, the one that writes
    if first:  # after all that may refuse the config: a mistake does not claim the workdir
        stage.adopt()
        _record(config, workdir)
    with meshes.use(mesh, config.sharding), contextlib.ExitStack() as within:
        # -- state: shapes first, then shardings, then values, never all on one device
        make = lambda key: stage.make(nnx.Rngs(key))
        graphdef, abstract = nnx.split(nnx.eval_shape(make, jax.random.key(config.seed)))
        tx = optimizer.make(config.optimizer, config.steps, abstract)

        def init(key):
            params = nnx.to_pure_dict(nnx.split(make(key))[1])
            state = {
                "params": params,
                "optimizer": {"step": jnp.zeros((), jnp.int32), "moments": tx.init(params)},
            }
            if config.ema:
                state["ema"] = jax.tree.map(jnp.copy, params)
            return state

        shapes = jax.eval_shape(init, jax.random.key(config.seed))
        shardings = _shardings(shapes, meshes.param_shardings(abstract, mesh, config.sharding), mesh)
        start = checkpoint.latest(workdir)
        if start is None:
            start, state = 0, jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
        else:
            target = jax.tree.map(
                lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings
            )
            state = checkpoint.restore(workdir, start, target)
        count = sum(p.size for p in jax.tree.leaves(shapes["params"]))
        print(
            f"{config.name}: {count / 1e6:.2f}M parameters, {mesh.size} device(s), "
            f"steps {start} -> {config.steps}, workdir {workdir}",
            flush=True,
        )

        # -- one step
        key = jax.random.key(config.seed + 1)

        def train_step(state, batch):
            step = state["optimizer"]["step"]
            step_key = jax.random.fold_in(key, step)
            value = lambda params: stage.loss(nnx.merge(graphdef, params), batch, step_key)
            (loss, parts), grads = jax.value_and_grad(value, has_aux=True)(state["params"])
            updates, moments = tx.update(grads, state["optimizer"]["moments"], state["params"])
            new = {
                "params": optax.apply_updates(state["params"], updates),
                "optimizer": {"step": step + 1, "moments": moments},
            }
            if config.ema:
                # Early averages forget the initial values quickly: the horizon grows with the step.
                decay = jnp.minimum(config.ema, (1 + step) / (10 + step))
                new["ema"] = optax.incremental_update(new["params"], state["ema"], 1 - decay)
            return new, {"loss": loss, **parts, "grad_norm": optax.tree.norm(grads)}

        train_step = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))

        # -- the loop
        stop = min(config.steps, stop_at or config.steps)
        writer = metric_files.Metrics(workdir, start) if first else None
        last = {}
        if start >= stop:  # nothing left to do: report what was measured when it was done
            for record in metric_files.read(workdir):
                last |= {name: value for name, value in record.items() if name != "step"}
        began, since, waited, bad = time.monotonic(), start, 0.0, 0
        mine = meshes.local_rows(rows, stage.data.batch_size)
        batches = within.enter_context(contextlib.closing(stage.data.prefetch(start, mine)))
        bar = tqdm(total=config.steps, initial=start, desc=config.name, disable=None, leave=False)
        for step in range(start, stop):
            wait = time.monotonic()
            index, batch, skipped = next(batches)
            assert index == step, (index, step)
            waited, bad = waited + time.monotonic() - wait, bad + skipped
            batch = meshes.global_batch(batch, mine, stage.data.batch_size, rows)
            state, measured = train_step(state, batch)
            bar.update()
            done = step + 1
            log, save = done % config.log_every == 0, done % config.save_every == 0 or done == stop
            measure = done % config.evaluate_every == 0 or done == config.steps
            if log or save or measure:
                # Reading the metrics of this step waits for it; between such steps nothing waits.
                scalars = {name: float(value) for name, value in measured.items()}
                if not math.isfinite(scalars["loss"] + scalars["grad_norm"]):
                    raise FloatingPointError(
                        f"loss {scalars['loss']}, gradient norm {scalars['grad_norm']} at step {done}; "
                        f"see {workdir}/metrics.jsonl. The last checkpoint is from before; try a lower learning rate"
                    )
            if log or measure:
                last = scalars
                now = time.monotonic()
                rate = (done - since) / (now - began)
                last |= {
                    f"{stage.unit}_per_second": rate * stage.units_a_step,
                    "data_wait": waited / (done - since),
                }
                if bad:  # documents that could not be read, since the run began or went on
                    last["bad_documents"] = bad
                eta = (config.steps - done) / rate
                shown = "  ".join(f"{name} {value:.4g}" for name, value in last.items())
                tqdm.write(f"step {done}/{config.steps}  {shown}  eta {eta:.0f} s")
                if measure:
                    last |= stage.evaluate(graphdef, state.get("ema", state["params"]), done)
                if first:
                    writer.write(done, last)
                began, since, waited = time.monotonic(), done, 0.0
            if save:  # last: what is on disk of a saved step is whole, and resuming cuts back the rest
                checkpoint.save(workdir, done, state, config.keep)
        bar.close()
        if first:
            writer.close()
    return last


def _check(config, workdir):
    """Makes `workdir`, or checks that the run in it has this config's settings."""
    if not 0 <= config.seed < 1 << 32:
        raise ConfigError(f"config.seed is a whole number from 0 to 2**32 - 1, not {config.seed}")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    ours = json.loads(config.to_json())
    if path.exists():
        theirs = json.loads(path.read_text())
        changed = sorted(
            key
            for key, value in _flat(ours).items()
            if _flat(theirs).get(key, value) != value and not {key, key.split(".")[0]} & _FREE
        )
        if theirs.get("stage") != ours["stage"]:
            raise ConfigError(
                f"{workdir} holds a {theirs.get('stage')} run, this config is a "
                f"{ours['stage']} run; use another --workdir"
            )
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with other settings ({', '.join(changed)} differ); "
                "use another --workdir, or the settings in its config.json"
            )


def _record(config, workdir):
    """Writes the resolved config, and where the run takes place, to `workdir`."""
    path = workdir / "config.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config.to_json(indent=2))
    os.replace(temporary, path)
    (workdir / "environment.json").write_text(json.dumps(metric_files.environment(), indent=2))


def _flat(tree, prefix=""):
    """{'a.b': value} of nested dicts."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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
