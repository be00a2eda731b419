"""glibc's allocator told to keep what is freed, for comparisons of what kernels compute."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1
# Blocks from here on are mapped and unmapped by every call; glibc takes no more.
_MAPPED_FROM = 32 * 2**20

KEEPS, DEFAULT = "keeps what is freed", "default"
_state = DEFAULT


def keep_freed_memory() -> None:
    """From now on freed blocks of less than 32 MiB stay with this process; nothing happens without glibc.

    glibc gives the top of its heap back to the system once enough of it is free, and the next call asks for the
    same pages again. Whether that happens depends on where buffers came to lie: a reference that makes large
    tensors in its backward took 22 or 33 ms for the same call, for seconds at a time or for a whole process.
    """
    global _state
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Setting one ends glibc's own adjustment of both.
    if mallopt and mallopt(_MMAP_THRESHOLD, _MAPPED_FROM) and mallopt(_TRIM_THRESHOLD, _MOST):
        _state = KEEPS


def allocator() -> str:
    """KEEPS or DEFAULT."""
    return _state
