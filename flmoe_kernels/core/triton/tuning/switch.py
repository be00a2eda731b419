"""Whether calls look for the fastest configuration, and with which clock. Off unless someone asks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .trial import Trial

# Seconds that one run of a trial takes.
Timer = Callable[[Trial[Any]], float]

VARIABLE = "FLMOE_AUTOTUNE"


def from_environment() -> bool:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
    return value == "1"


@dataclass(frozen=True, eq=False)
class _Asked:
    enabled: bool
    timer: Timer | None


_environment = _Asked(from_environment(), None)
# The last one counts. A tuple that is replaced, so that a thread that reads it needs no lock.
_asked: tuple[_Asked, ...] = (_environment,)
_lock = threading.Lock()


def enabled() -> bool:
    return _asked[-1].enabled


def given_timer() -> Timer | None:
    """The one that `autotune` was given, instead of the device's own."""
    return _asked[-1].timer


@contextmanager
def autotune(enabled: bool = True, *, timer: Timer | None = None) -> Iterator[None]:
    """Every call inside the `with` block, in any thread, runs the fastest configuration of each Triton kernel.

    The first call of a kernel with a new class, dtype, size and device times the candidates on its own inputs,
    which waits for the device, and remembers the fastest in this process and in a file for later ones; see
    `flmoe_kernels.core.triton.tuning.cache`. A call under CUDA graph capture times nothing: it gets what was found before, or
    the launch table. Without this, and without FLMOE_AUTOTUNE=1, every call gets the launch table, and no file is
    read or written. What is found may change the order of sums, and so the last bits of results.

    Args:
        enabled: False switches a surrounding autotune, or the environment's, off.
        timer: the clock, which must run a trial at least once; default: events of the trial's device.

    Raises:
        TypeError: `enabled` is not a truth value.
    """
    global _asked
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {enabled!r}")
    own = _Asked(enabled, timer)
    with _lock:
        _asked = (*_asked, own)
    try:
        yield
    finally:
        # Its own and not the last one: blocks of two threads need not be nested.
        with _lock:
            _asked = tuple(one for one in _asked if one is not own)
