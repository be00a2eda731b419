"""Batch sizes from the memory that is available."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from flmoe_kernels.core import validation as check

from .models import Inputs

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
LARGEST = 256  # larger batches are no faster, and leave less to share among ranks
# Bytes of activations per byte of inputs: about ten rows of their width in each of about five experts.
_EXPANSION = 64
# Bytes of inputs in a batch on the CPU; activations of more do not stay in the caches. At mmimdb, 0.5 MiB a
# sample, batches of 8 to 32 were faster than those of 256 (bench/results/NOTES.md).
_CPU_INPUTS = 2**24
_SHARE = 8  # one eighth of the available memory is used
_ASSUMED_BYTES = 2**31  # where the system does not report it


def available_bytes(device: torch.device) -> int:
    """Available memory of a device; on the host at most what a container or a batch job allows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    lines = _lines(MEMINFO)  # none where this is not Linux
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    host = int(found[0]) * 1024 if found else _ASSUMED_BYTES
    return max(0, min([host, *_group_rooms()]))


def _group_rooms() -> Iterator[int]:
    """What each control group of this process, and each one around it, still allows."""
    for line in _lines(OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents[: len(own.parts) - len(top.parts)]):
            numbers = [_lines(folder / name)[:1] for name in (limit, used)]
            # Nothing to read at the root, nor where a container shows its own group only; "max" is no limit.
            if not all(each and each[0].isdecimal() for each in numbers):
                continue
            most, taken = (int(each[0]) for each in numbers)
            stat = dict(each.split(maxsplit=1) for each in _lines(folder / "memory.stat"))
            yield most - taken + int(stat.get(cache, 0))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def batch_size(sample_bytes: int, device: torch.device) -> int:
    """A power of two from 1 to LARGEST for inputs of so many bytes per coalition.

    A power of two does not change with the few bytes by which the available memory differs between runs; in
    another batch size a model's last bits may differ.
    """
    fitting = available_bytes(device) // (_SHARE * _EXPANSION * max(sample_bytes, 1))
    if device.type == "cpu":
        fitting = min(fitting, _CPU_INPUTS // max(sample_bytes, 1))
    return min(LARGEST, 1 << max(int(fitting).bit_length() - 1, 0))


def choose_batch(max_batch: int | None, inputs: Inputs, copies: int = 1) -> int:
    """max_batch, or where it is None a batch size for samples of these inputs, each held so many times."""
    if max_batch is None:
        given = [x for x in inputs if x is not None]
        return batch_size(copies * sum(x[:1].nbytes for x in given), given[0].device)
    check.require_count("max_batch", max_batch, 1)
    return max_batch
