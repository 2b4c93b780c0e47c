"""A signal, wherever the loop is when it comes, leaves a checkpoint and status 75; run again, nothing is lost.

And a process that is stuck ends by itself.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from mmgen.runtime import checkpoint, goodput
from mmgen.runtime.preemption import EXIT
from mmgen.stages import loop
from tests.conftest import STEPS, arrays, assert_same_arrays, config_of, mmgen, records, run_python
from tests.test_processes import run

# Trains, and gets the signal sys.argv[1] at the place sys.argv[2]; where the place may be waited at, it would be for ever.
SIGNALLED = """
import os, signal, sys, threading, time
from mmgen.__main__ import main
from mmgen.data.loader import Images, Rows
from mmgen.runtime import checkpoint, mesh
from mmgen.stages import loop

number, place = signal.Signals[sys.argv[1]], sys.argv[2]
hit = lambda: os.kill(os.getpid(), number)

def at(owner, name, when, forever=False):
    there = getattr(owner, name)
    def here(*args, **kwargs):
        if when(*args):
            if forever:
                threading.Timer(0.5, hit).start()
                time.sleep(3600)
            hit()
        return there(*args, **kwargs)
    setattr(owner, name, here)

calls = []
count = lambda *_: calls.append(0) or len(calls)
if place == "warmup":  # before the first step is compiled
    at(mesh, "global_batch", lambda *_: count() == 1)
if place in ("step", "last"):  # after the last step comes a measurement
    at(mesh, "global_batch", lambda *_: count() == {"step": 4, "last": 8}[place])
if place == "save":
    at(checkpoint.Checkpoints, "save", lambda self, step, *_: step == 3)
if place == "data":  # the thread that makes batches is stuck
    for loader in (Images, Rows):
        at(loader, "rows_of", lambda self, step, *_: step == 5, forever=True)
if place == "evaluate":
    setup = loop.setup
    def patched(config, workdir):
        stage = setup(config, workdir)
        class Owner:
            evaluate = staticmethod(stage.evaluate)
        at(Owner, "evaluate", lambda *_: True, forever=True)
        return stage._replace(evaluate=Owner.evaluate)
    loop.setup = patched
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    "number, place, saved",
    [
        ("SIGUSR1", "step", (4,)),
        pytest.param("SIGTERM", "warmup", (1,), marks=pytest.mark.soak),
        pytest.param("SIGTERM", "save", (3,), marks=pytest.mark.soak),
        # Half a second after the data stops the loop waits for it, at step 5; on a busy machine it is not there yet.
        pytest.param("SIGTERM", "data", range(1, 6), marks=pytest.mark.soak),
        pytest.param("SIGUSR1", "evaluate", (STEPS,), marks=pytest.mark.soak),
        pytest.param("SIGTERM", "last", (STEPS,), marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_a_signal_saves_and_the_next_start_goes_on(space, tmp_path, number, place, saved):
    command = ["train", *space.tokenizer_flags, "--workdir", tmp_path]
    done = run_python(SIGNALLED, number, place, *command, check=False)
    assert done.returncode == EXIT, done.stderr[-2000:]
    assert checkpoint.latest(tmp_path) in saved
    for _ in range(2):  # the second finds nothing left to do
        assert mmgen(*command) == 0
        assert records(tmp_path) == records(space.tokenizer)
    assert_same_arrays(arrays(tmp_path, STEPS), arrays(space.tokenizer, STEPS))
    shares = goodput.summary(tmp_path)
    assert len(json.loads((tmp_path / "goodput.json").read_text())) == 3
    assert (
        0 < shares["down"] and 0 <= shares["step"] < 1 and sum(shares.values()) == pytest.approx(1, abs=0.05)
    )


# Rank sys.argv[1] gets the signal sys.argv[2] while it prepares a batch.
ONE_OF_SEVERAL = """
import os, signal, sys
from mmgen.__main__ import main
from mmgen.data.loader import Rows

def rows_of(self, step, rows, rows_of=Rows.rows_of):
    if step == 4 and os.environ["MMGEN_DISTRIBUTED"].startswith(sys.argv[1]):
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
    return rows_of(self, step, rows)

Rows.rows_of = rows_of
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.soak
@pytest.mark.parametrize("rank, number", [(1, "SIGTERM"), (0, "SIGUSR1")])
def test_processes_agree_on_the_step_that_they_stop_at(space, tmp_path, rank, number):
    flags = ["--config", "transformer:tiny", f"--config.data.shards={space.shards}", "--config.mesh.data=4"]
    flags += ["--config.steps=2000", "--config.save_every=5000", "--config.log_every=1"]
    command = ["train", *flags, "--workdir", tmp_path]
    run(2, ONE_OF_SEVERAL, [(rank, number, *command)] * 2, status=EXIT)
    step = checkpoint.latest(tmp_path)
    assert 0 < step < 2000 and records(tmp_path)[-1]["step"] == step
    loop.train(config_of([*flags, "--config.mesh.data=1"]), tmp_path, stop_at=step + 1)  # and one goes on
    assert records(tmp_path)[-1]["step"] == step + 1 and np.isfinite(records(tmp_path)[-1]["loss"])


STUCK = """
import sys, time
from mmgen.__main__ import main
from mmgen.data.loader import Images

def rows_of(self, step, rows, rows_of=Images.rows_of):
    if step == 4:
        time.sleep(3600)
    return rows_of(self, step, rows)

Images.rows_of = rows_of
sys.exit(main(sys.argv[1:]))
"""


def test_a_stuck_process_says_where_and_ends(space, tmp_path):
    command = ["train", *space.tokenizer_flags, "--config.step_limit=3", "--workdir", tmp_path]
    done = run_python(STUCK, *command, check=False)
    assert done.returncode == 1 and "Timeout" in done.stderr
    assert "in rows_of" in done.stderr and "in train" in done.stderr  # the culprit and who waits for it
    assert checkpoint.latest(tmp_path) == 3
    assert mmgen(*command) == 0
    assert_same_arrays(arrays(tmp_path, STEPS), arrays(space.tokenizer, STEPS))


def test_signals_find_their_old_handlers_again(space, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    workdir = shutil.copytree(space.tokenizer, tmp_path / "run")
    assert mmgen("train", *space.tokenizer_flags, "--workdir", workdir) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.soak
def test_killed_twenty_times_and_not_a_bit_is_lost(space, tmp_path):
    """kill -9 at random moments: at start-up, while compiling, in steps and saves."""
    flags = [flag for flag in space.transformer_flags if "every" not in flag and "steps" not in flag]
    flags += ["--config.steps=1500", "--config.save_every=7", "--config.log_every=5"]
    whole, killed, reached = tmp_path / "whole", tmp_path / "killed", []
    assert mmgen("train", *flags, "--workdir", whole) == 0
    command = [sys.executable, "-m", "mmgen", "train", *flags, "--workdir", str(killed)]
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"})  # fmt: skip
        if random.random() < 0.8:  # else it may not even have begun
            next(line for line in process.stdout if line.startswith("step "))
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(random.uniform(0, 4))
        process.kill()
        process.wait()
        reached.append(checkpoint.latest(killed) or 0)
    assert reached == sorted(reached) and len(set(reached)) > 5 and reached[-1] < 1500
    assert mmgen("train", *flags, "--workdir", killed) == 0
    print(f"steps reached at each kill: {reached}, {goodput.summary(killed)}")
    assert records(killed) == records(whole)
    assert_same_arrays(arrays(killed, 1500), arrays(whole, 1500))
