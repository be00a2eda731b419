"""Facts that a measurement depends on: device, driver, instruction set, threads, versions, commit, allocator."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from flmoe_kernels import __version__
from flmoe_kernels.core.backend import instruction_set

from .shapes import is_cuda

# Names the commit on a machine that has the files but no git checkout.
COMMIT_VARIABLE = "FLMOE_COMMIT"
_CPUINFO = Path("/proc/cpuinfo")

KEEPS_MEMORY, DEFAULT = "keeps what is freed", "default"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1
# Blocks from here on are mapped and unmapped by every call; glibc accepts no larger threshold.
_MAPPED_FROM = 32 * 2**20
_allocator = DEFAULT


def environment(device: str = "cpu") -> dict[str, Any]:
    """Plain values for JSON; with the driver's and the GPU's facts for a CUDA device."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "allocator": _allocator,
        "flmoe_kernels": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "commit": commit(),
    }
    if is_cuda(device):
        facts |= _gpu_facts(device)
    return facts


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    return str(torch.cuda.get_device_name(device)) if is_cuda(device) else cpu_model()


def cpu_model() -> str:
    """The processor's name as the system tells it; on Linux platform.processor() is often empty.

    A name without a number, as virtual machines have them, stands for many processors: family and model follow.
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


def commit() -> str:
    """The checkout of this package that it or the working directory lies in, else FLMOE_COMMIT, else "unknown".

    An installed package may lie in a checkout of somebody else's: that one's commit says nothing.
    """
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        top = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")
        if top and (Path(top) / "flmoe_kernels" / "_version.py").is_file():
            found = _output("git", "-C", top, "describe", "--always", "--dirty", "--abbrev=12")
            return found or "unknown"
    return os.environ.get(COMMIT_VARIABLE) or "unknown"


def ask_driver(device: str, query: str) -> list[str]:
    """What nvidia-smi tells of a GPU, in the query's order, with units; [] where it tells nothing."""
    properties = torch.cuda.get_device_properties(device)
    # nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves: the number is the last resort.
    uuid = getattr(properties, "uuid", None)
    names = [f"GPU-{uuid}"] if uuid else []
    for name in (*names, str(torch.device(device).index or 0)):
        told = _output(
            "nvidia-smi", f"--id={name}", f"--query-gpu={query}", "--format=csv,noheader"
        )
        if told:
            return told.split(", ")
    return []


def _gpu_facts(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    told = ask_driver(device, "driver_version,clocks.max.sm,power.limit")
    driver, clock, power = ([*told, "", "", ""])[:3]
    return {
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "clock": clock or "unknown",
        "power_limit": power or "unknown",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a program prints, or "" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def keep_freed_memory() -> None:
    """Keep freed blocks below 32 MiB in this process from now on; without glibc nothing happens.

    glibc returns the top of its heap to the system once enough of it is free, and the next call requests the same
    pages again. Whether that happens depends on the placement of buffers: the same backward of a reference took 22
    or 33 ms, for seconds at a time or for a whole process.
    """
    global _allocator
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Setting one ends glibc's own adjustment of both.
    if mallopt and mallopt(_MMAP_THRESHOLD, _MAPPED_FROM) and mallopt(_TRIM_THRESHOLD, _MOST):
        _allocator = KEEPS_MEMORY
