"""Noticing that the machine will be taken away, wherever the loop is at that moment."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT = 75  # EX_TEMPFAIL of sysexits.h: saved, and to be run again; the launchers in launch/ do so
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run was stopped from outside after saving; as the exit status of a process, `EXIT`."""

    def __init__(self, step):
        super().__init__(EXIT)
        self.step = step


class _Interrupted(BaseException):  # passes through every `except Exception` on its way
    pass


class Preemption:
    """While entered, SIGTERM and SIGUSR1 no longer end the process: they are noticed.

    On one process the handler is our own. On several the one that got the signal may not stop alone, since the
    others would wait for it for ever: JAX's preemption service lets all stop after the same step. It hears
    SIGTERM alone, so SIGUSR1 is passed on to it as that.
    """

    def __init__(self):
        self._alone = jax.process_count() == 1
        self._received = self._interruptible = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in _SIGNALS if self._alone else (signal.SIGUSR1,):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._received = True
        if self._interruptible:
            self._interruptible = False  # once: a second signal must not break what the first began
            raise _Interrupted

    def reached(self, step):
        """Whether to stop before `step`, which every process asks in turn: the same answer on all of them."""
        return self._received if self._alone else multihost_utils.reached_preemption_sync_point(step)

    @contextlib.contextmanager
    def interruptible(self):
        """What runs within is given up as soon as a signal comes (on one process): for waiting and measuring."""
        try:
            self._interruptible = True
            if self._received:
                raise _Interrupted
            yield
        except _Interrupted:
            pass
        finally:
            self._interruptible = False
