"""Peak memory of a call beyond its inputs, by GPU allocator or resident set.

On a CPU a fresh process is measured. The first use of an operator loads code, starts threads and fills tables.
These tens of MiB do not depend on the call's size, so a small call of the same kind runs first. Memory that was
freed during preparation is returned to the system; otherwise the call would reuse it and seem to need less.
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
from .shapes import is_cuda, small

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")

Call = Callable[[], Any]


def peak_bytes(case: Case, contestant: Contestant | str) -> int | None:
    """Peak bytes of a contestant's calls beyond inputs and parameters; None if they cannot be measured.

    Memory that the call keeps between calls (gradients) counts, except for compiled contestants on a CPU, where it
    cannot be distinguished from the compiler's memory.

    Raises:
        RuntimeError: out of memory; the measuring process may then end early.
    """
    who = find(case, contestant) if isinstance(contestant, str) else contestant
    if memory_unavailable_reason(case.device):
        return None
    if is_cuda(case.device):
        return device_growth(warmed_call(case, who), case.device)
    return peak_growth(warmed_call, case, who)


def memory_unavailable_reason(device: str) -> str:
    """Return the reason why peaks cannot be measured here, or ""."""
    if is_cuda(device) or _CLEAR_REFS.exists():
        return ""
    return f"{sys.platform} cannot reset and report the peak memory of a process"


def peak_growth(make: Callable[..., Call], *args: Any) -> int:
    """Largest growth in bytes of the resident set of a fresh process during two calls.

    `make(*args)` builds the call in that process; its parameters and inputs do not count. Linux only.

    Raises:
        RuntimeError: the process ended without a result.
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
            f"the process that measures memory ended early, with exit code {process.exitcode}"
        ) from error
    finally:
        process.join()


def warmed_call(case: Case, contestant: Contestant) -> Call:
    """Return a contestant's call after a small call of the same kind; compiled contestants compile this shape."""
    compiled = contestant.name.startswith("compiled")
    first = dataclasses.replace(case, shape=small(case.shape))
    warm = prepare(first, REFERENCE if compiled else contestant).call
    warm()
    warm()
    call = prepare(case, contestant).call
    if compiled and not is_cuda(case.device):
        call()  # not needed on a GPU, where the compiler keeps no device memory
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
    """Return freed memory to the system, if the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def device_growth(call: Call, device: str) -> int:
    """Peak bytes of GPU memory beyond what is allocated before a call, reported by the allocator.

    The second call is measured, because the first call may compile and choose tiles.
    """
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
