"""Environment of a measurement: device, driver, threads, versions, commit, allocator."""

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
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.core.triton.target import architecture_name

from .shapes import is_cuda

# Environment variable with the commit, for machines that have the files but no git checkout.
COMMIT_VARIABLE = "FLMOE_COMMIT"
_CPUINFO = Path("/proc/cpuinfo")

KEEPS_MEMORY, DEFAULT = "keeps what is freed", "default"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MOST = 2**31 - 1
# Blocks of at least this size are mapped and unmapped by every call; glibc accepts no larger threshold.
_MAPPED_FROM = 32 * 2**20
_allocator = DEFAULT


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the environment as plain values for JSON; for a CUDA device with facts about GPU and driver."""
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
    """Name of the GPU or the processor."""
    return str(torch.cuda.get_device_name(device)) if is_cuda(device) else cpu_model()


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


def commit() -> str:
    """Commit of this package's checkout around this file or the working directory; else FLMOE_COMMIT or "unknown".

    An installed package may be inside a checkout of another project, whose commit is not used.
    """
    for folder in (Path(__file__).resolve().parents[2], Path.cwd()):
        top = _output("git", "-C", str(folder), "rev-parse", "--show-toplevel")
        if top and (Path(top) / "flmoe_kernels" / "_version.py").is_file():
            name = _output("git", "-C", top, "describe", "--always", "--dirty", "--abbrev=12")
            return name or "unknown"
    return os.environ.get(COMMIT_VARIABLE) or "unknown"


def ask_driver(device: str, query: str) -> list[str]:
    """Return the answers of nvidia-smi about a GPU, in the query's order, with units; [] if there are none."""
    properties = torch.cuda.get_device_properties(device)
    # nvidia-smi numbers all GPUs, torch only those in CUDA_VISIBLE_DEVICES, so the number is the last resort.
    uuid = getattr(properties, "uuid", None)
    names = [f"GPU-{uuid}"] if uuid else []
    for name in (*names, str(torch.device(device).index or 0)):
        text = _output(
            "nvidia-smi", f"--id={name}", f"--query-gpu={query}", "--format=csv,noheader"
        )
        if text:
            return text.split(", ")
    return []


def _gpu_facts(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    facts = ask_driver(device, "driver_version,clocks.max.sm,power.limit")
    driver, clock, power = ([*facts, "", "", ""])[:3]
    return {
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "architecture": architecture_name(architecture_of(torch.device(device)) or 0),
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
    """Return the output of a program, or "" if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def keep_freed_memory() -> None:
    """Keep freed blocks below 32 MiB in this process from now on; does nothing without glibc.

    glibc returns the top of its heap to the system once enough of it is free, and the next call requests the same
    pages again. Whether this happens depends on the placement of buffers: the same backward of a reference took 22
    or 33 ms, for seconds at a time or for a whole process.
    """
    global _allocator
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Setting either value switches off glibc's dynamic adjustment of both.
    if mallopt and mallopt(_MMAP_THRESHOLD, _MAPPED_FROM) and mallopt(_TRIM_THRESHOLD, _MOST):
        _allocator = KEEPS_MEMORY
