"""Keep freed memory in the process.

Every tuning step frees what it made. glibc hands large blocks back to the system at once, and the next step pays
for each page again: measured, an eighth of a step. The peak is the same. This changes the whole process, so
the command does it and the library does not.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD = 4 * 2**20  # tensors of a step are smaller, chains of states larger


def keep_freed_memory() -> None:
    """Has no effect where the C library is not glibc."""
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
