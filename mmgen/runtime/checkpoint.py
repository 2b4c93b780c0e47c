"""Checkpoints: Orbax v0 behind one small file, with a content digest for every step.

A step is a folder of named items (`params`, `ema`, `optimizer`), so that a sampler
restores the weights alone. Orbax neither checks contents nor falls back from a damaged step;
the digests written beside the steps add both.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_FOLDER = "checkpoints"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another kind than was asked for."""


def _digest(folder):
    """sha256 over the names and contents of every file of a step."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def save(workdir, step, items, keep=2):
    """Writes `items` (name -> pytree) as one step, then its digest; keeps the last `keep` steps."""
    folder = Path(workdir).resolve() / _FOLDER
    first = jax.process_index() == 0  # of the processes that share the folder, the one that tidies it
    # A run that went on from an earlier step leaves later ones, damaged or half-written. Orbax would
    # silently save nothing beside them, and the digest would then vouch for what is damaged.
    if first:
        _remove(folder, lambda found: found >= step)
    wait_for_all("checkpoint: the folder is tidy")
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(step, args=ocp.args.Composite(**args))
    if first:
        (folder / f"{step}.sha256").write_text(_digest(folder / str(step)))
        # Only now that the new step counts may the old ones go.
        kept = steps(workdir)[-keep:]
        _remove(folder, lambda found: found not in kept)
    wait_for_all("checkpoint: the step counts")


def wait_for_all(what):
    """Waits until every process of the run is here; alone it does nothing."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _remove(folder, unwanted):
    """Deletes unwanted steps and unfinished pieces of them, digests first: without one none counts."""
    named = [(path, path.name.partition(".")[0]) for path in folder.glob("*")]
    paths = [path for path, name in named if name.isdigit() and unwanted(int(name))]
    for path in sorted(paths, key=lambda path: path.suffix != ".sha256"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps(workdir):
    """The steps on disk that were completely written, oldest first."""
    folder = Path(workdir).resolve() / _FOLDER
    return sorted(int(p.stem) for p in folder.glob("*.sha256") if (folder / p.stem).is_dir())


def latest(workdir):
    """The newest undamaged step, or None; damaged steps are reported and passed over."""
    folder = Path(workdir).resolve() / _FOLDER
    for step in reversed(steps(workdir)):
        if _digest(folder / str(step)) == (folder / f"{step}.sha256").read_text():
            return step
        logging.warning(
            "checkpoint %s is damaged (its contents do not match its digest); "
            "falling back to the step before it",
            folder / str(step),
        )
    return None


def restore(workdir, step, abstract):
    """Reads the named items of a step; `abstract` maps names to trees of ShapeDtypeStructs.

    Every abstract leaf carries its sharding, so a step may be restored to any mesh.
    """
    folder = Path(workdir).resolve() / _FOLDER
    with ocp.CheckpointManager(folder, item_names=tuple(abstract)) as manager:
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        try:
            return dict(manager.restore(step, args=ocp.args.Composite(**args)).items())
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(
                f"{folder / str(step)} does not fit the model of this config: {error}"
            ) from error


def weights_item(workdir, step):
    """The item a sampler wants: the moving average where the run kept one, else the parameters."""
    folder = Path(workdir).resolve() / _FOLDER / str(step)
    return "ema" if (folder / "ema").is_dir() else "params"


def load_weights(workdir, abstract):
    """Restores the inference weights of the newest good step; returns (params, step)."""
    if not Path(workdir).is_dir():
        raise CheckpointError(f"no checkpoint: the folder {workdir} does not exist")
    step = latest(workdir)
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {workdir}: expected a workdir of a finished or running "
            f"`mmgen train` with {_FOLDER}/STEP inside"
        )
    item = weights_item(workdir, step)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None) or sharding),
        abstract,
    )
    return restore(workdir, step, {item: abstract})[item], step


def read_config(workdir, stage=None):
    """The config.json of a workdir as a dict; an error when it is of another stage."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{workdir} is not a workdir: expected {path}, written by `mmgen train`")
    config = json.loads(path.read_text())
    if stage and config["stage"] != stage:
        raise CheckpointError(f"{workdir} holds a {config['stage']} run; expected a {stage} run")
    return config


def export(workdir, out):
    """Copies what inference needs (config and the newest weights) to the new workdir `out`."""
    step = latest(workdir)
    if step is None:
        raise CheckpointError(f"nothing to export: {workdir} has no checkpoint")
    source, target = Path(workdir) / _FOLDER, Path(out) / _FOLDER
    item = weights_item(workdir, step)
    if target.exists():
        shutil.rmtree(target)
    (target / str(step)).mkdir(parents=True)
    for path in (source / str(step)).iterdir():
        if path.is_file():
            shutil.copy2(path, target / str(step) / path.name)
    shutil.copytree(source / str(step) / item, target / str(step) / item)
    shutil.copy2(Path(workdir) / "config.json", Path(out) / "config.json")
    (target / f"{step}.sha256").write_text(_digest(target / str(step)))
    return step


def weights_hash(params):
    """A short hash of a tree's values, the identity of a trained tokenizer."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(jax.device_get(leaf).tobytes())
    return digest.hexdigest()[:16]
