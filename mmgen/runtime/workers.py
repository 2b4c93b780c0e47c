"""`map` by several processes. They know nothing of JAX: what imports this module in them stays small and quick."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading


_FOR_THE_RUN = (signal.SIGINT, signal.SIGUSR1)  # to answer, after its step; SIGTERM stays: it is how a pool ends


@contextlib.contextmanager
def _held():
    """Processes that begin here inherit what is blocked: until they can ignore a signal it must not end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers:
    """`count` processes, begun at the first `map`. Spawned, not forked: a run has threads, and perhaps an accelerator."""

    def __init__(self, count):
        self.count = count
        with _held():
            self._pool = concurrent.futures.ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), initializer=_begin
            )

    def map(self, function, *lists):
        """Of a function of a module, as `map`. BrokenProcessPool where a process died, and whatever `function` raised."""
        with _held():
            return self._pool.map(function, *lists, chunksize=-(-len(lists[0]) // (4 * self.count)))

    def close(self):
        """Ends them, after what they are at: a run may end by os._exit, which tells nobody."""
        self._pool.shutdown(cancel_futures=True)


def _begin():
    os.environ["JAX_PLATFORMS"] = "cpu"  # should `function` want JAX: the accelerator is the run's
    for number in _FOR_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_RUN)
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """However that one ends: a process of a pool waits for more for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
