"""Checkpoints: Orbax v0 behind one file, with a manifest that says what every file of a step holds.

checkpoints/12/{params,optimizer,ema}   named items, so that a sampler restores the weights alone
checkpoints/12.json                     the manifest: written last, and only with it does the step count
checkpoints/12.damaged, 12.damaged.json set aside by a training run, never deleted (12.unfinished,
                                        12.replaced likewise)
checkpoints/12.saving*, 12.removing     of a run that is saving now, or that was killed: a training run
                                        that opens the folder deletes them

Orbax neither checks contents nor falls back from a damaged step: the manifests add both. Arrays are stored
as they are: zstd, Orbax's default, takes a twelfth off trained weights and costs more than half of the speed.
"""

import functools
import itertools
import json
import logging
import math
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from blake3 import blake3
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from mmgen.runtime import packed

_FOLDER = "checkpoints"
_FORMAT = 1
_SEAL = b',\n "digest": "'
_FILE_BYTES = 32 << 20  # Orbax's 2 GB take half as long again to save: one thread writes, and one digests
_TIMEOUT = 20 * 60  # seconds that processes wait for one another, as in Orbax
_opened = itertools.count()  # alike in all processes of a run, which open the same in the same order


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another kind than was asked for."""


class _Agreed(CheckpointError):
    """A failure of some process that every process has heard of."""


class Checkpoints:
    """The checkpoints of a training run, opened once; a context manager. All processes make the same calls.

    Kept are the newest `keep` steps, every step that `keep_every` divides (0: none), and the one whose
    metric `best` is the best by `mode`, "min" or "max".

    failed: how many saves have failed; error: the last one's, in words.
    """

    def __init__(self, workdir, *, keep=2, keep_every=0, best=None, mode="min"):
        if keep < 1 or keep_every < 0 or mode not in ("min", "max"):
            raise ValueError(
                f"expected keep >= 1, keep_every >= 0 and mode 'min' or 'max'; found {keep}, {keep_every}, {mode!r}"
            )
        self.workdir, self._folder = Path(workdir), _folder(workdir)
        self._keep, self._keep_every, self._best, self._mode = keep, keep_every, best, mode
        self._first = jax.process_index() == 0  # the process that tidies the folder that all share
        self._name, self._topics = next(_opened), itertools.count()
        self._orbax = self._thread = self._said = None
        self.failed, self.error, self._counts = 0, None, True
        if self._first:
            _tidy(self._folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Waits until the last save counts, or has failed."""
        self.wait()
        if self._orbax:
            self._orbax.close()
            self._orbax = None

    def latest(self):
        """The newest undamaged step, or None, the same in all processes; damaged ones are set aside."""
        self.wait()
        self._open_topic()
        rank, count = jax.process_index(), jax.process_count()
        for step in reversed(self._agree(steps(self.workdir))[0]):
            damage = [words for words in self._agree(_damage(self._folder, step, rank, count)) if words]
            if not damage:
                return step
            if self._first:
                aside = _set_aside(self._folder, step, "damaged")
                logging.warning(
                    "checkpoint %s is damaged: %s. It is kept as %s; the step before it is tried",
                    self._folder / str(step), damage[0], aside,
                )  # fmt: skip
        return None

    def save(self, step, items, record=None, metrics=None):
        """Starts to save `items` {name: pytree} as a step; returns when the arrays may be overwritten.

        First waits for the save before. `record` (JSON: config, versions, hashes) and `metrics`
        {name: number} go into the manifest. A save that fails is logged and counted, and never raises:
        the training goes on, and the steps that count stay.
        """
        content = {
            "format": _FORMAT, "step": int(step), "record": record or {},
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        }  # fmt: skip
        content = json.loads(
            json.dumps(content)
        )  # as it is now; what is not JSON is a mistake, and raises here
        self.wait()
        self._open_topic()
        error, self._counts = None, False
        try:
            if self._first:
                _make_room(self._folder, step)
            self._agree()
            if not self._orbax:
                handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in items}
                options = ocp.AsyncOptions(
                    barrier_sync_fn=lambda key, timeout_ms: self._agree(),
                    # Alone, a folder that cannot be made shows at once; Orbax's threads would wait for it
                    # for minutes. With others, who wait on devices for this process, it must show later.
                    create_directories_asynchronously=jax.process_count() > 1,
                )
                self._orbax = ocp.AsyncCheckpointer(
                    ocp.CompositeCheckpointHandler(**handlers), _TIMEOUT, async_options=options
                )
            save = functools.partial(ocp.args.PyTreeSave, ocdbt_target_data_file_size=_FILE_BYTES)
            args = {name: save(tree) for name, tree in items.items()}
            self._orbax.save(self._saving(step), args=ocp.args.Composite(**args))
        except Exception as trouble:  # of any kind: to lose a save is better than to lose the run
            error = trouble.with_traceback(None)  # which would hold on to the arrays
        self._thread = threading.Thread(target=self._finish, args=(content, error), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self):
        """Waits for the save that is going on; returns whether the last one counts."""
        if self._thread:
            self._thread.join()
            self._thread = None
        return self._counts

    def _saving(self, step):
        return self._folder / f"{step}.saving"

    def _finish(self, content, error):
        """In a thread of its own: waits for the files, writes the manifest, deletes what is not kept.

        Processes meet through the coordination service only: no device waits, and none is used.
        """
        step, failed = content["step"], False
        try:
            try:
                if error:
                    raise error
                self._orbax.wait_until_finished()  # its threads meet twice, through `_agree`
                self._count(content)
            except _Agreed:
                raise
            except Exception as trouble:  # the others wait for this process at the next meeting
                self._agree(error=trouble)
        except Exception as trouble:
            failed, self.failed, self.error = True, self.failed + 1, str(trouble)
        self._counts = not failed
        if self._first:
            try:
                if failed:
                    left = [other for other in steps(self.workdir) if other != step]
                    logging.warning(
                        "the checkpoint of step %d was NOT saved: %s. The run goes on, and the steps before stay "
                        "valid: %s. %s has %d MiB free; the next save tries again",
                        step, self.error, left, self._folder, _free(self._folder) >> 20,
                    )  # fmt: skip
                    _delete(self._folder, step)
                else:
                    self._retain()
            except OSError as trouble:
                logging.warning("what is no longer needed stays in %s: %s", self._folder, trouble)

    def _count(self, content):
        """Makes a step count that is wholly written: every process digests its share of the files."""
        step = content["step"]
        saved = self._saving(step)
        names = self._agree(sorted(_files(saved)) if self._first else None)[0]
        share = names[jax.process_index() :: jax.process_count()]
        found = self._agree(_digests(saved, share))
        if self._first:
            content |= {"files": {name: entry for part in found for name, entry in part.items()}}
            saved.rename(self._folder / str(step))
            _write_manifest(self._folder, step, content)
        self._agree()

    def _retain(self):
        """Deletes the steps that are not to be kept; only called when a newer one counts."""
        found = steps(self.workdir)
        kept = {*found[-self._keep :], *(s for s in found if self._keep_every and s % self._keep_every == 0)}
        if self._best:
            kept.add(best_step(self.workdir, self._best, self._mode))
        for step in found:
            if step not in kept:
                _delete(self._folder, step)

    def _open_topic(self):
        """Begins a round of meetings: one that fell apart (a timeout) does not put the next out of step."""
        self._topic, self._meetings = f"mmgen/{self._name}/{next(self._topics)}", itertools.count()

    def _agree(self, value=None, error=None):
        """The `value` (JSON) of every process, by rank; raises `_Agreed` in all of them where one has an error."""
        said = [value, None if error is None else f"{type(error).__name__}: {error}"]
        everyone = [said]
        if jax.process_count() > 1:
            client = ocp.multihost.get_jax_distributed_client()
            rank, place = jax.process_index(), f"{self._topic}/{next(self._meetings)}"
            client.key_value_set(f"{place}/{rank:08}", json.dumps(said))
            client.wait_at_barrier(place, _TIMEOUT * 1000)
            everyone = [json.loads(text) for _, text in sorted(client.key_value_dir_get(f"{place}/"))]
            if self._first and self._said:  # everyone is past the meeting before
                client.key_value_delete(f"{self._said}/")
            self._said = place
        for rank, (_, trouble) in enumerate(everyone):
            if trouble:
                raise _Agreed(f"process {rank}: {trouble}" if len(everyone) > 1 else trouble) from error
        return [value for value, _ in everyone]


def save(workdir, step, items, keep=2, **more):
    """Saves one step and waits until it counts, as `Checkpoints.save`; raises CheckpointError where it fails."""
    with Checkpoints(workdir, keep=keep) as checkpoints:
        checkpoints.save(step, items, **more)
        if not checkpoints.wait():
            raise CheckpointError(f"step {step} was not saved in {workdir}: {checkpoints.error}")


# -- what lies in the folder


def _folder(workdir):
    return Path(workdir).resolve() / _FOLDER


def _free(folder):
    return shutil.disk_usage(folder if folder.exists() else folder.anchor).free


def steps(workdir):
    """The steps that were completely written, oldest first; whether they still are, `latest` finds out."""
    paths = [path for kind in ("json", "sha256") for path in _folder(workdir).glob(f"*.{kind}")]
    return sorted({int(path.stem) for path in paths if path.stem.isdigit()})


def latest(workdir, weights=False):
    """The newest undamaged step, or None; damaged ones are reported and passed over, and stay as they are.

    weights: whether it is enough that what `weights_item` names is undamaged.
    """
    folder = _folder(workdir)
    for step in reversed(steps(workdir)):
        damage = _damage(folder, step, item=weights_item(workdir, step) if weights else None)
        if not damage:
            return step
        logging.warning(
            "checkpoint %s is damaged: %s. Falling back to the step before it", folder / str(step), damage
        )
    return None


def best_step(workdir, metric, mode="min"):
    """The step whose `metric`, as saved with it, is the least (mode "max": the greatest); None without any."""
    found = []
    for step in steps(workdir):
        try:
            value = manifest(workdir, step)["metrics"].get(metric, math.nan)
        except CheckpointError:
            continue  # `latest` says what is wrong with it
        if math.isfinite(value):
            found.append((value if mode == "min" else -value, -step))  # of equals the newest
    return -min(found)[1] if found else None


def manifest(workdir, step):
    """What was written with a step: {"format", "step", "record", "metrics", "files": {path: [bytes, digest]}}.

    Raises CheckpointError where it is missing or damaged. Of the format before this one, which had digests
    alone, "format" is 0 and the rest is empty.
    """
    path = _folder(workdir) / f"{step}.json"
    if not path.exists() and path.with_suffix(".sha256").exists():
        return {"format": 0, "step": step, "record": {}, "metrics": {}, "files": {}}
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    body, _, seal = data.rpartition(_SEAL)
    if seal != _seal(body):
        raise CheckpointError(
            f"{path.name}: expected it to end with the digest of what it says, found {seal!r:.99}"
        )
    content = json.loads(data)
    if content["format"] != _FORMAT:
        raise CheckpointError(
            f"{path}: expected format {_FORMAT}, found {content['format']}; use the mmgen that wrote it, or a newer one"
        )
    return content


def _seal(body):
    return blake3(body).hexdigest().encode() + b'"\n}'


def _write_manifest(folder, step, content):
    """Writes it all at once, and on the disk: a step counts with it or not at all."""
    body = json.dumps(content, indent=1).encode().removesuffix(b"\n}")
    temporary = folder / f"{step}.saving.json"
    with temporary.open("wb") as file:
        file.write(body + _SEAL + _seal(body))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / f"{step}.json")
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def diff(old, new):
    """Lines `key: old -> new` of what differs between two nested dicts, as of two manifests' records."""
    old, new = named_leaves(old), named_leaves(new)
    told = lambda tree, key: json.dumps(tree[key]) if key in tree else "(none)"
    return [
        f"{key}: {told(old, key)} -> {told(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if told(old, key) != told(new, key)
    ]


def named_leaves(tree, join="."):
    """{"a.b": leaf} of nested dicts."""
    flat = {}
    for key, value in tree.items():
        inner = named_leaves(value, join) if isinstance(value, dict) else None
        flat |= {f"{key}{join}{name}": leaf for name, leaf in inner.items()} if inner else {str(key): value}
    return flat


def _files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _digests(folder, names):
    """{name: [bytes, digest]} of some files. BLAKE3 reads 4.6 GB/s a core; SHA-256 1.6, BLAKE2b 0.9."""

    def one(name):
        digest, size, buffer = blake3(), 0, memoryview(bytearray(1 << 20))
        with open(folder / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
        return [size, digest.hexdigest()]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(one, names)))


def _damage(folder, step, share=0, shares=1, item=None):
    """What is wrong with a step, in words, or None.

    Names and sizes are compared of all files; digests of each `shares`-th file from `share` on (processes
    divide the work), and, where `item` is given, only of what restoring that item reads.
    """
    saved = folder / str(step)
    try:
        content = manifest(folder.parent, step)
        found, files = _files(saved), content["files"]
        if not content["format"]:
            digest = (folder / f"{step}.sha256").read_text()
            return None if _digest_before(saved) == digest else f"its contents do not match {step}.sha256"
        for name in sorted(files.keys() | found):
            if name not in found:
                return f"{name} is missing, expected {files[name][0]} bytes"
            if name not in files:
                return f"{name} is not of it, expected {len(files)} files, found {len(found)}"
            if (size := (saved / name).stat().st_size) != files[name][0]:
                return f"{name}: expected {files[name][0]} bytes, found {size}"
        read = [name for name in sorted(files) if item is None or name.partition("/")[0] in (name, item)]
        for name, (_, digest) in _digests(saved, read[share::shares]).items():
            if digest != files[name][1]:
                return f"{name}: expected digest {files[name][1]}, found {digest}"
    except (CheckpointError, OSError) as error:  # cannot be read
        return str(error)


def _digest_before(folder):
    """The digest of a step of the format before this one: sha256 over the names and contents of its files."""
    digest = sha256()
    for name in sorted(_files(folder), key=Path):
        digest.update(name.encode() + b"\0" + sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


# -- what a training run changes in it


def _tidy(folder):
    """Deletes what was never promised, and sets aside what looks like a step but has no manifest."""
    for path in folder.glob("*"):
        if ".saving" in path.name or ".removing" in path.name or ".orbax-checkpoint-tmp" in path.name:
            _remove(path)
        elif path.name.isdigit() and int(path.name) not in steps(folder.parent):
            aside = _set_aside(folder, int(path.name), "unfinished")
            logging.warning("checkpoint %s has no manifest: not used, and kept as %s", path, aside)


def _make_room(folder, step):
    """Empties the place of a step that is to be saved, and of those that an earlier run saved after it."""
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder)
    for later in steps(folder.parent):
        if later >= step:
            aside = _set_aside(folder, later, "replaced")
            logging.warning(
                "step %d is saved after step %d was: the latter is kept as %s", step, later, aside
            )


def _set_aside(folder, step, why):
    """Renames a step and its manifest to STEP.WHY (STEP.WHY.1, ... where taken); returns the name."""
    names = (f"{step}.{why}{number and f'.{number}' or ''}" for number in itertools.count())
    aside = next(name for name in names if not list(folder.glob(name)) + list(folder.glob(f"{name}.json")))
    for suffix in (".json", ".sha256", ""):
        if (folder / f"{step}{suffix}").exists():
            (folder / f"{step}{suffix}").rename(folder / f"{aside}{suffix}")
    return aside


def _delete(folder, step):
    """Deletes a step: first it stops to count, and a kill in between leaves nothing that looks like one."""
    for suffix in (".json", ".sha256"):
        (folder / f"{step}{suffix}").unlink(missing_ok=True)
    if (folder / str(step)).exists():
        (folder / str(step)).rename(folder / f"{step}.removing")
    for path in (*folder.glob(f"{step}.removing"), *folder.glob(f"{step}.saving*")):
        _remove(path)


def _remove(path):
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# -- reading


def restore(workdir, step, abstract):
    """Reads the named items of a step; `abstract` maps names to trees of ShapeDtypeStructs.

    Every abstract leaf carries its sharding, so a step may be restored to any mesh and number of processes.
    """
    folder = _folder(workdir) / str(step)
    args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*abstract)) as reader:
        try:
            return dict(reader.restore(folder, args=ocp.args.Composite(**args)).items())
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise CheckpointError(f"{folder} does not fit the model of this config: {error}") from error


def weights_item(workdir, step):
    """The item a sampler wants: the moving average where the run kept one, else the parameters."""
    return "ema" if (_folder(workdir) / str(step) / "ema").is_dir() else "params"


def _newest_weights(workdir):
    """The newest step with good weights, and where these lie: an Orbax item's folder or a packed file. Raises
    CheckpointError where there are none."""
    if not Path(workdir).is_dir():
        raise CheckpointError(f"no checkpoint: the folder {workdir} does not exist")
    if path := packed.path_of(workdir):
        return packed.names(path)[1], path
    step = latest(workdir, weights=True)
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {workdir}: expected a workdir of a finished or running "
            f"`mmgen train` with {_FOLDER}/STEP inside, or {packed.NAME}"
        )
    return step, _folder(workdir) / str(step) / weights_item(workdir, step)


def weights(workdir):
    """The newest weights of a workdir, {"a/b": array} on the host, and their step."""
    step, source = _newest_weights(workdir)
    place = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = jax.tree.map(
        lambda stored: jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=place), _stored(source)
    )
    found = named_leaves(_read(source, abstract), "/")
    return {name: np.asarray(array, order="C") for name, array in found.items()}, step


def load_weights(workdir, abstract, beside=()):
    """Restores the inference weights of the newest good step; returns (params, step). `beside` are names at the top
    of the tree, of what training needed and nobody else does: they are left where they are."""
    step, source = _newest_weights(workdir)
    place = lambda a: getattr(a, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(a)), abstract)
    stored = _stored(source) if beside or source.is_file() else {}
    if not stored.keys() & set(beside) and not source.is_file():
        return restore(workdir, step, {source.name: abstract})[source.name], step
    kept = named_leaves({name: tree for name, tree in stored.items() if name not in beside}, "/")
    different = sorted(kept.keys() ^ named_leaves(abstract, "/").keys())
    if different:
        raise CheckpointError(
            f"{source} does not fit the model of this config: only one has {', '.join(different)}"
        )
    return _read(source, abstract), step


def restore_weights(workdir, params, *, only=None, grow=None, leave=None):
    """Starts a model from the weights of another run; returns (params, report).

    params: nested dict of the new model's arrays, as initialised; what is not taken stays as it is. Taken is
        each parameter that both have with one shape. Names are as "blocks/attention/q"; patterns are regular
        expressions, searched for in them.
    only: takes the parameters of this pattern alone.
    grow: {pattern: spans}, of tables whose rows move: [(first old row, first new row, how many), ...]; None
        is the rows from 0 on that both have. A joint vocabulary may grow in its middle. Other rows keep
        their initial values.
    leave: parameters of this pattern may have another shape, and are then not taken.
    report: {"taken", "grown", "left": names in the new model, "unused": names only in the old one}.

    Raises CheckpointError at any other parameter of another shape.
    """
    _, source = _newest_weights(workdir)
    stored, ours = named_leaves(_stored(source), "/"), named_leaves(params, "/")
    report = {"taken": [], "grown": [], "left": [], "unused": sorted(stored.keys() - ours.keys())}
    spans, wanted = {}, {}
    for name, leaf in ours.items():
        matching = [rows for pattern, rows in (grow or {}).items() if re.search(pattern, name)]
        place = leaf.sharding
        if name not in stored or (only and not re.search(only, name)):
            report["left"].append(name)
            continue
        shape = tuple(stored[name].shape)
        if matching:
            spans[name] = matching[0] or [(0, 0, min(shape[0], leaf.shape[0]))]
            bad = [
                s for s in spans[name] if min(s) < 0 or s[0] + s[2] > shape[0] or s[1] + s[2] > leaf.shape[0]
            ]
            if bad or shape[1:] != leaf.shape[1:]:
                raise CheckpointError(
                    f"{name}: expected rows of {leaf.shape} from rows of {shape} by the spans {spans[name]}, "
                    f"which do not lie in both; give (first old row, first new row, how many)"
                )
            report["grown"].append(name)
            if isinstance(place, NamedSharding):  # the old number of rows may not divide as the new one does
                place = NamedSharding(place.mesh, PartitionSpec())
        elif shape == leaf.shape:
            report["taken"].append(name)
        elif leave and re.search(leave, name):
            report["left"].append(name)
            continue
        else:
            raise CheckpointError(
                f"{name}: expected the new model's shape {leaf.shape}, found {shape} in {source}; make config.model as "
                "that run's config.json has it (in code: name it in `grow`, or in `leave`)"
            )
        wanted[name] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
    found = named_leaves(_read(source, _nested(wanted)), "/") if wanted else {}
    for name, rows in spans.items():
        found[name] = _place_rows(ours[name], found[name], rows)
    name_of = lambda path: "/".join(str(entry.key) for entry in path)
    return jax.tree_util.tree_map_with_path(lambda path, x: found.get(name_of(path), x), params), report


def _place_rows(new, old, spans):
    """`new` with the rows of `old` where the spans say."""

    @functools.partial(jax.jit, out_shardings=new.sharding)
    def place(new, old):
        for start, to, count in spans:
            new = new.at[to : to + count].set(old[start : start + count])
        return new

    return place(new, old)


def _stored(source):
    """The tree of an item as stored: nested dict of what has .shape and .dtype."""
    if source.is_file():
        return _nested(packed.names(source)[0])
    with ocp.PyTreeCheckpointer() as reader:
        return reader.metadata(source).item_metadata.tree


def _read(source, abstract):
    """Those arrays of an item that `abstract` (nested dict, with shardings) names."""
    if source.is_file():
        wanted = named_leaves(abstract, "/")
        found = packed.read(source, wanted)
        wrong = [name for name, a in wanted.items() if tuple(a.shape) != found[name].shape]
        if wrong:
            raise CheckpointError(
                f"{source} does not fit the model of this config: expected {wrong[0]} of shape {wanted[wrong[0]].shape}, "
                f"found {found[wrong[0]].shape}"
            )
        return _nested(
            {name: jax.device_put(found[name].astype(a.dtype), a.sharding) for name, a in wanted.items()}
        )
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(
            source, args=ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True)
        )


def _nested(flat):
    """Nested dicts of {"a/b": leaf}."""
    tree = {}
    for name, leaf in flat.items():
        *above, last = name.split("/")
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), above, tree)[last] = leaf
    return tree


def read_config(workdir, *stages):
    """The config.json of a workdir as a dict; an error when it is of none of these stages, if any are named."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{workdir} is not a workdir: expected {path}, written by `mmgen train`")
    config = json.loads(path.read_text())
    if stages and config["stage"] not in stages:
        raise CheckpointError(
            f"{workdir} holds a {config['stage']} run; expected a {' or a '.join(stages)} run"
        )
    return config


# -- taking weights elsewhere


def export(workdir, out):
    """Copies what inference needs (config and the newest weights) to the new workdir `out`."""
    if path := packed.path_of(workdir):
        if Path(out).resolve() == Path(workdir).resolve():
            raise CheckpointError(f"expected another folder to export to, found {out}, which is exported")
        Path(out).mkdir(parents=True, exist_ok=True)
        for each in (path, Path(workdir) / "config.json"):
            shutil.copy2(each, Path(out) / each.name)
        return packed.names(path)[1]
    step = latest(workdir, weights=True)
    if step is None:
        raise CheckpointError(f"nothing to export: {workdir} has no checkpoint")
    source, target = _folder(workdir), _folder(out)
    item, content = weights_item(workdir, step), manifest(workdir, step)
    if source == target:
        raise CheckpointError(f"expected another folder to export to, found {out}, which is exported")
    _remove(target)
    (target / str(step)).mkdir(parents=True)
    for path in (source / str(step)).iterdir():
        if path.is_file():
            shutil.copy2(path, target / str(step) / path.name)
    shutil.copytree(source / str(step) / item, target / str(step) / item)
    shutil.copy2(Path(workdir) / "config.json", Path(out) / "config.json")
    copied = target / str(step)
    files = _digests(copied, sorted(_files(copied)))  # of what was written, held against what was there
    wrong = [name for name in files if content["format"] and files[name] != content["files"][name]]
    if wrong:
        raise CheckpointError(f"{copied / wrong[0]} is not what was copied; export again, to another disk")
    _write_manifest(target, step, content | {"format": _FORMAT, "files": files})
    return step


def export_safetensors(workdir, path):
    """Writes the newest weights as one safetensors file, names as "blocks.attention.q"; returns their step.

    Its metadata: step, item ("ema" or "params"), config and record (JSON). Takes memory for the weights once.
    """
    from safetensors.numpy import save_file

    arrays, step = weights(workdir)
    arrays = {name.replace("/", "."): array for name, array in arrays.items()}
    metadata = {
        "format": "mmgen", "step": str(step), "item": "packed" if packed.path_of(workdir) else weights_item(workdir, step), "config": json.dumps(read_config(workdir)),
        "record": json.dumps({} if packed.path_of(workdir) else manifest(workdir, step)["record"]),
    }  # fmt: skip
    path = Path(path)
    temporary = path.with_name(path.name + ".saving")
    save_file(arrays, temporary, metadata)
    temporary.replace(path)
    return step


def weights_hash(params):
    """A short hash of a tree's values, the identity of a trained tokenizer."""
    digest = sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(jax.device_get(leaf).tobytes())
    return digest.hexdigest()[:16]
