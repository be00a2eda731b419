"""Peak memory of one call over its inputs: of a GPU's allocator, or of the resident set of a fresh process."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .contestants import Contestant, prepare
from .shapes import is_cuda

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def peak_bytes(case: Case, contestant: Contestant | str) -> int:
    """Bytes that calls of a contestant take at most beyond inputs and parameters.

    What the call keeps from one time to the next (gradients, a kept graph) counts.

    Raises:
        RuntimeError: on a system that does not tell (a CPU without Linux's /proc).
    """
    name = contestant if isinstance(contestant, str) else contestant.name
    if is_cuda(case.device):
        return _gpu_growth(case, name)
    return peak_growth(_warmed_call, case, name)


def memory_lack(device: str) -> str:
    """Why peaks cannot be measured here, or ""."""
    if is_cuda(device) or _CLEAR_REFS.exists():
        return ""
    return f"{sys.platform} does not tell a process's peak since a moment"


def peak_growth(make: Callable[..., Callable[[], Any]], *args: Any) -> int:
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
        raise RuntimeError("the process that was to measure its memory ended early") from error
    finally:
        process.join()


def _warmed_call(case: Case, name: str) -> Callable[[], object]:
    """The call of a process in which what compiles has compiled, since a compiler's memory is not the call's."""
    call = prepare(case, name).call
    if name.startswith("compiled"):
        call()
    return call


def _grow(
    make: Callable[..., Callable[[], Any]], args: tuple[Any, ...], threads: int, pipe: Any
) -> None:
    torch.set_num_threads(threads)
    call = make(*args)
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


def _gpu_growth(case: Case, name: str) -> int:
    """In this process: the allocator tells its peak exactly. The first call, which may compile, does not count."""
    call = prepare(case, name).call
    call()
    torch.cuda.synchronize(case.device)
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    call()
    torch.cuda.synchronize(case.device)
    return torch.cuda.max_memory_allocated(case.device) - before
