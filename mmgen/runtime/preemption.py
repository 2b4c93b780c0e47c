"""Noticing that the machine will be taken away, wherever the loop is at that moment."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT = 75  # EX_TEMPFAIL of sysexits.h: saved, and to be run again; the launchers in launch/ do so
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preempted(SystemExit):
    """The run was stopped from outside after saving; as the exit status of a process, `EXIT`."""

    def __init__(self, step):
        super().__init__(EXIT)
        self.step = step


class _Interrupted(BaseException):  # passes through every `except Exception` on its way
    pass


class Preemption:
    """While entered, SIGTERM, SIGUSR1 and the first Ctrl-C no longer end the process: they are noticed.

    On one process the handler is our own. On several the one that got the signal may not stop alone, since the
    others would wait for it for ever: JAX's preemption service lets all stop after the same step. It hears
    SIGTERM alone, so the others are passed on to it as that.
    """

    def __init__(self):
        self._alone = jax.process_count() == 1
        self._received = self._interruptible = False
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in _SIGNALS if self._alone else _SIGNALS[1:]:
                if signal.getsignal(number) != signal.SIG_IGN:  # as with nohup: whoever started it meant that
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt  # who presses Ctrl-C twice does not want to wait
        self._received = True
        if self._interruptible:
            self._interruptible = False  # once: a second signal must not break what the first began
            raise _Interrupted

    def reached(self, step):
        """Whether to stop before `step`, which every process asks in turn: the same answer on all of them."""
        return self._received if self._alone else multihost_utils.reached_preemption_sync_point(step)

    def attempt(self, work):
        """work(), or None where a signal came before or meanwhile: it is given up at once (on one process). For
        waiting and measuring. One frame, since a signal may come between any two lines."""
        try:
            self._interruptible = True
            if self._received:
                raise _Interrupted
            result = work()
            self._interruptible = False
            return result
        except _Interrupted:
            return None
        finally:
            self._interruptible = False
