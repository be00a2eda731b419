"""Facts of this machine that select a table of floors, and its allocator. torch is used only if it is loaded."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .floors import Here

_CPUINFO = Path("/proc/cpuinfo")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1
# Blocks of at least this size are mapped and unmapped by every call; glibc accepts no larger threshold.
_MAPPED_FROM = 32 * 2**20
KEEPS_MEMORY = "keeps freed memory"
allocator = "default"


def here(device: str) -> Here:
    """Return the facts; those about torch and about the kernels of flmoe_kernels only if they are loaded."""
    torch, kernels = sys.modules.get("torch"), sys.modules.get("flmoe_kernels.core.backend")
    gpu = torch.cuda.get_device_name(device) if torch and device.startswith("cuda") else ""
    isa = kernels.instruction_set() if kernels else ""
    return Here(cpu_model(), isa, gpu, torch.__version__ if torch else "")


def cpu_model() -> str:
    """Name of the processor as the system reports it; on Linux platform.processor() is often empty.

    Names without a number, as in virtual machines, are ambiguous, so family and model are appended.
    """
    facts: dict[str, str] = {}
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and not any(letter.isdigit() for letter in name):
        return f"{name} (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name


def threads() -> int:
    """Threads of torch if it is loaded; else those of OMP_NUM_THREADS, by default 1."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or 1)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch's threads for a while; does nothing if torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Keep freed blocks below 32 MiB in this process from now on; does nothing without glibc.

    glibc returns the top of its heap to the system once enough of it is free, and the next call requests the same
    pages again. Whether this happens depends on the placement of buffers: the same backward of a reference took 22
    or 33 ms, for seconds at a time or for a whole process.
    """
    global allocator
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Setting either value switches off glibc's dynamic adjustment of both.
    if mallopt and mallopt(_MMAP_THRESHOLD, _MAPPED_FROM) and mallopt(_TRIM_THRESHOLD, _MOST):
        allocator = KEEPS_MEMORY
