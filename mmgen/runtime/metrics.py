"""Metrics on disk: one JSON line and one TensorBoard event a log step; where a run took place."""

import json
import logging
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Metrics:
    """Appends scalars to `metrics.jsonl` and TensorBoard's event files under `workdir`, and to a project of
    Weights & Biases where one is named."""

    def __init__(self, workdir, start=0, project=""):
        """Cuts metrics.jsonl back to steps <= start, so a resumed run leaves no line twice."""
        self._wandb = _wandb(workdir, project) if project else None
        self._path = Path(workdir) / "metrics.jsonl"
        kept = [line for line in read(workdir) if line["step"] <= start] if self._path.exists() else []
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self._path)
        self._file = self._path.open("a", buffering=1)
        self._events = EventFileWriter(str(Path(workdir) / "tensorboard"))

    def write(self, step, scalars):
        scalars = {name: float(value) for name, value in scalars.items()}
        try:
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        except OSError as error:  # a full disk: the run is worth more than its record
            logging.warning("%s: step %s was not written: %s", self._path, step, error)
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        if self._wandb:
            self._wandb.log(scalars, step=step)

    def close(self):
        self._file.close()
        self._events.close()
        if self._wandb:
            self._wandb.finish()


def _wandb(workdir, project):
    """The run of Weights & Biases that belongs to the workdir: started again, it goes on."""
    try:
        import wandb
    except ImportError:
        raise ValueError(f"config.wandb={project!r} needs the package: pip install wandb") from None
    name = Path(workdir).resolve().name
    path = Path(workdir) / "wandb.id"  # a name may not be the only one of its kind, and a workdir may move
    if not path.exists():
        path.write_text(f"{name}-{os.urandom(4).hex()}")
    config = json.loads((Path(workdir) / "config.json").read_text())
    return wandb.init(
        project=project, id=path.read_text(), name=name, resume="allow", dir=str(workdir), config=config
    )


class Profile:
    """A trace of steps `first` to `last` - 1 in `workdir`/profile, for TensorBoard or xprof; none if both are equal."""

    def __init__(self, workdir, first, last, on=True):
        self._folder, self._first, self._last = str(Path(workdir) / "profile"), first, last
        self._wanted, self._tracing = on and first < last, False

    def at(self, step):
        """Begins or ends the trace where `step` is about to be computed."""
        if self._wanted and not self._tracing and self._first <= step < self._last:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif self._tracing and step >= self._last:
            self.__exit__()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = self._wanted = False


def read(workdir):
    """The records of a workdir's metrics.jsonl; a half-written last line is left out."""
    records = []
    for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def environment():
    """Versions, git commit and devices: what a run must record to be repeated."""
    names = (
        "mmgen",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "grain",
        "numpy",
        "pillow",
        "sentencepiece",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:  # a machine without git
        git = ""
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git": git or None,
        "devices": [str(device) for device in jax.devices()],
        "platform": platform.platform(),
    }
