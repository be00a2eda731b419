"""Environment of a measurement: device, driver, threads, versions, commit, allocator."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from flmoe_gate import machine
from flmoe_gate.machine import cpu_model
from flmoe_kernels import __version__
from flmoe_kernels.core.backend import instruction_set
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.core.triton.target import architecture_name

from .shapes import is_cuda

# Environment variable with the commit, for machines that have the files but no git checkout.
COMMIT_VARIABLE = "FLMOE_COMMIT"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return the environment as plain values for JSON; for a CUDA device with facts about GPU and driver."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "allocator": machine.allocator,
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
