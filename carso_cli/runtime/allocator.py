"""Memory that a process frees stays with it, on Linux with glibc.

By default glibc asks the system for every block above some size and gives it back when it is freed. The
activations of a forward pass are such blocks: each pass then has every page of them cleared and mapped again,
which took 0.3 to 0.4 of the time of an attack step on a CPU. Peak memory stays the same.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Names and numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
# The largest C int, which is what mallopt takes.
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc reuse freed blocks of any size, unless the environment sets its thresholds already.

    Returns:
        Whether this process now does.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    # Symbols of the process itself, whatever C library it runs on.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        # Another C library.
        return False
    # No mapped blocks at all: mallopt refuses a threshold above 32 MiB, and activations may be larger.
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_MMAP_MAX, 0))
