"""The memory of this machine: how much there is, and how the C library hands it back."""

import ctypes
import os
import sys
from pathlib import Path

# malloc.h: parameters of mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def total_bytes() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def keep_freed_memory() -> None:
    """Keep what a step frees for the next one, where the CPU trains; to be called first of all.

    XLA takes its scratch memory anew in every step. glibc serves blocks as large as that by mapping
    fresh pages, which the kernel clears one by one: a fifth of the time of a step of the demo
    (38,000 page faults). On a machine with a GPU the scratch lies there, and the many threads that
    decode images do better with glibc's defaults; elsewhere than on Linux this does nothing.

    The number of arenas stays glibc's. With one for all threads, matrix products would look for
    their scratch among the gaps that compiling left in it: half as long again for a RegNet's step.
    """
    if sys.platform != 'linux' or Path('/dev/nvidiactl').exists():
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:  # another C library than glibc
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    mallopt(_TOP_PAD, 64 * 2**20)


def give_back_freed_memory() -> None:
    """Return to the system what is free now; with glibc, elsewhere it does nothing.

    To be called after a compilation, which frees as much as a RegNet's step needs.
    """
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
