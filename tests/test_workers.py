"""Processes that work beside a run."""

import subprocess
import sys

import pytest

from mmgen.runtime.workers import Workers

# Its group is told to stop, and it goes on, as a run does that saves first.
SIGNALLED = """
import os, signal
from mmgen.runtime.workers import Workers
for number in (signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
workers = Workers(2)
print(list(workers.map(abs, range(-3, 0))))
for number in (signal.SIGINT, signal.SIGUSR1):
    os.killpg(0, number)
    print(list(workers.map(divmod, [7, 8, 9, 10, 11], [2] * 5)))
print("jax" in os.environ.get("JAX_PLATFORMS", ""), list(workers.map(os.getenv, ["JAX_PLATFORMS"])))
workers.close()
os._exit(75)
"""


def test_what_is_told_to_the_group_is_for_the_run():
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], start_new_session=True, capture_output=True, text=True, timeout=120
    )
    halves = [(3, 1), (4, 0), (4, 1), (5, 0), (5, 1)]
    assert done.stdout.splitlines() == ["[3, 2, 1]", str(halves), str(halves), "False ['cpu']"], done.stderr
    assert done.returncode == 75 and "leaked" not in done.stderr and "Broken" not in done.stderr, done.stderr


# ... and is told so while its processes begin.
SIGNALLED_EARLY = """
import os, signal, time
from mmgen.runtime.workers import Workers
for number in (signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: None)
workers = Workers(4)
found = workers.map(abs, range(-8, 0))
for _ in range(20):
    time.sleep(0.01)
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.killpg(0, number)
print(list(found))
workers.close()
os._exit(75)
"""


def test_processes_that_only_begin_are_spared_too():
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_EARLY], start_new_session=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[8, 7, 6, 5, 4, 3, 2, 1]\n" and done.returncode == 75, done.stderr
    assert "died" not in done.stderr and "Broken" not in done.stderr, done.stderr


def test_an_error_comes_back_and_the_next_is_answered():
    workers = Workers(1)
    try:
        with pytest.raises(ValueError, match="invalid literal"):
            list(workers.map(int, ["1", "x"]))
        assert list(workers.map(int, ["1", "2"])) == [1, 2]
    finally:
        workers.close()
