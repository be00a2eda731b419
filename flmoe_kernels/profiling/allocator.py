"""glibc's allocator told to keep what is freed, for comparisons of what kernels compute."""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1
_LARGEST_MAPPED = 32 * 2**20  # what glibc takes at most


@functools.cache
def keep_freed_memory() -> bool:
    """From now on freed memory stays with this process. Returns whether the allocator is one that can be told.

    glibc gives the top of its heap back to the system once enough of it is free, and the next call asks for the
    same pages again. Whether that happens depends on where buffers came to lie: a reference that makes large
    tensors in its backward took 22 or 33 ms for the same call, for seconds at a time or for a whole process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Setting one ends glibc's own adjustment of both.
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MAPPED) and mallopt(_TRIM_THRESHOLD, _MOST))
