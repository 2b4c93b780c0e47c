"""Where the wall time of a run went: the share of it that moved the run on, and what took the rest."""

import contextlib
import json
import logging
import os
import time
from pathlib import Path

_FILE = "goodput.json"


class Goodput:
    """Accounts every second of training to one cause: "start" until `running`, then "step" but for
    what `on` names. Kept in `workdir`/goodput.json, one entry each time that the run was started."""

    def __init__(self, workdir, step, began, write=True):
        """`began` is time.monotonic() when the start of `step` began."""
        self._path, self._write = Path(workdir) / _FILE, write
        wall = time.time() - (time.monotonic() - began)
        self._entry = {"began": wall, "until": wall, "first": step, "last": step, "seconds": {}}
        self._before = _read(self._path)
        self._cause, self._since = "start", began

    def _switch(self, cause):
        now, seconds = time.monotonic(), self._entry["seconds"]
        seconds[self._cause] = seconds.get(self._cause, 0.0) + now - self._since
        before, self._cause, self._since = self._cause, cause, now
        return before

    def running(self):
        """The first step is done: from here on time is useful where nothing else is said."""
        self._switch("step")

    @contextlib.contextmanager
    def on(self, cause):
        before = self._switch(cause)
        try:
            yield
        finally:
            self._switch(before)

    def share(self, step):
        """Writes down that `step` is reached -> the share of this process's time that was steps."""
        self._switch(self._cause)
        self._entry |= {"until": time.time(), "last": step}
        if self._write:
            try:
                temporary = self._path.with_suffix(".tmp")
                temporary.write_text(json.dumps([*self._before, self._entry]))
                os.replace(temporary, self._path)
            except OSError as error:  # a full disk: the run is worth more than its accounts
                logging.warning("%s was not written: %s", self._path, error)
        return self._entry["seconds"].get("step", 0.0) / sum(self._entry["seconds"].values())


def summary(workdir):
    """{cause: share of the wall time} of a whole run, from its first start to its last word: "step" is what
    moved it on, "lost" what was done again after a stop, "down" what passed between two starts."""
    entries = _read(Path(workdir) / _FILE)
    if not entries:
        raise FileNotFoundError(f"{workdir} has no {_FILE}: no training was started there")
    total = max(entries[-1]["until"] - entries[0]["began"], 1e-9)
    seconds = {"step": 0.0, "lost": 0.0, "down": 0.0}
    for i, entry in enumerate(entries):
        for cause, spent in entry["seconds"].items():
            seconds[cause] = seconds.get(cause, 0.0) + spent
        if i + 1 < len(entries):
            after, done = entries[i + 1], entry["last"] - entry["first"]
            back = min(
                later["first"] for later in entries[i + 1 :]
            )  # a damaged checkpoint may lead further back
            again = max(0, entry["last"] - max(back, entry["first"])) / max(done, 1)
            lost = entry["seconds"].get("step", 0.0) * again
            seconds["step"], seconds["lost"] = seconds["step"] - lost, seconds["lost"] + lost
            seconds["down"] += max(0.0, after["began"] - entry["until"])
    return {cause: spent / total for cause, spent in seconds.items()}


def _read(path):
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []
