"""The memory that a program on the CPU computes in."""

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt, <malloc.h>
_MADV_HUGEPAGE, _HUGE = 14, 2 << 20
_RESERVE = 2 << 30  # addresses only; nothing is used before it is touched


@functools.cache
def keep_pages():
    """Makes glibc's malloc keep what is freed, in huge pages -> whether it could.

    XLA's CPU client allocates a program's working memory anew at each call. By default glibc gets blocks of
    that size from the kernel and gives them back at once, so that a training step pays for a page fault at
    every 4 KiB it touches: with 113,000 of them a third of the quickstart transformer's time. Elsewhere
    (macOS, musl) it does nothing. Costs: the process never shrinks, and threads share one heap. Call it
    before JAX starts its threads: those that have a heap of their own keep it.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        malloc, free, madvise, mallopt = libc.malloc, libc.free, libc.madvise, libc.mallopt
    except (OSError, AttributeError):
        return False
    malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # One arena, because the others can only map blocks as large as these; none is mapped, none is trimmed.
    kept = mallopt(_ARENA_MAX, 1) and mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1)
    block = malloc(_RESERVE)  # the heap grows by it, and stays grown
    if not kept or not block:
        return False
    start = -(-block // _HUGE) * _HUGE
    madvise(start, (block + _RESERVE - start) // _HUGE * _HUGE, _MADV_HUGEPAGE)
    free(block)
    return True
