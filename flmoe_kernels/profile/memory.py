"""Peak memory of one call over its inputs: of a GPU's allocator, or of the resident set of a fresh process.

The first use of an operator loads code, starts threads and fills tables: tens of MiB that do not depend on the
call's size and are no part of it. So a small call of the same kind comes first. What was freed while the call was
made ready is given back to the system: otherwise the call would find it there and seem to need less than it does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flmoe_kernels.core.backend import REFERENCE

from .cases import Case
from .registry import Contestant, find, prepare
from .shapes import at_length, is_cuda

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SMALL = 8

Call = Callable[[], Any]


def peak_bytes(case: Case, contestant: Contestant | str) -> int | None:
    """Bytes that calls of a contestant take at most beyond inputs and parameters; None where none can be told.

    What the call keeps from one time to the next (gradients) counts; of a compiled one on a CPU it does not, since
    there the compiler's own memory cannot be told from it.

    Raises:
        RuntimeError: the call lacks memory, or the process that measures ended early, as one does then.
    """
    who = find(case, contestant) if isinstance(contestant, str) else contestant
    return peak_of(warmed_call, case, who, device=case.device)


def peak_of(make: Callable[..., Call], *args: Any, device: str) -> int | None:
    """The same of the call that `make(*args)` makes ready after a small one of its kind.

    Raises:
        RuntimeError: see peak_bytes.
    """
    if memory_unavailable_reason(device):
        return None
    return device_growth(make(*args), device) if is_cuda(device) else peak_growth(make, *args)


def memory_unavailable_reason(device: str) -> str:
    """Why peaks cannot be measured here, or ""."""
    if is_cuda(device) or _CLEAR_REFS.exists():
        return ""
    return f"{sys.platform} does not tell a process's peak since a moment"


def peak_growth(make: Callable[..., Call], *args: Any) -> int:
    """Bytes by which the resident set of a fresh process grows at most while it makes two calls.

    `make(*args)` builds the call in that process; its parameters and inputs do not count. Linux only.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(target=_grow, args=(make, args, threads, send))
    process.start()
    send.close()
    try:
        return int(receive.recv())
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"the process that was to measure its memory ended early, with {process.exitcode}"
        ) from error
    finally:
        process.join()


def warmed_call(case: Case, contestant: Contestant) -> Call:
    """A contestant's call after a small one of the same kind; a compiled one has compiled this very shape."""
    compiled = contestant.name.startswith("compiled")
    small = dataclasses.replace(case, shape=at_length(case.shape, _SMALL))
    warm = prepare(small, REFERENCE if compiled else contestant).call
    warm()
    warm()
    call = prepare(case, contestant).call
    if compiled and not is_cuda(case.device):
        call()  # on a GPU a compiler takes nothing of the device's memory that it would keep
    return call


def _grow(make: Callable[..., Call], args: tuple[Any, ...], threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    call = make(*args)
    _give_back()
    before = _status_kib("VmRSS")
    _CLEAR_REFS.write_text("5")  # resets the high-water mark
    call()
    call()
    pipe.send((_status_kib("VmHWM") - before) * 1024)


def _status_kib(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {field}")


def _give_back() -> None:
    """Freed memory to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def device_growth(call: Call, device: str) -> int:
    """Bytes of a GPU's memory that a call takes at most beyond what is allocated before it; the allocator tells.

    The first call may compile and choose tiles: the second one is measured.
    """
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
