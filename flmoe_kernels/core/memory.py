"""Available memory of a device or of the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
_ASSUMED_BYTES = 2**31  # if the system does not report it


def available_bytes(device: torch.device) -> int:
    """Available memory of a device; on the host at most the limit of the container or batch job."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    lines = _lines(MEMINFO)  # empty if this is not Linux
    numbers = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    host = int(numbers[0]) * 1024 if numbers else _physical_bytes()
    return max(0, min([host, *_group_rooms()]))


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return _ASSUMED_BYTES


def _group_rooms() -> Iterator[int]:
    """Yield the memory that is left in each control group of this process and its parents."""
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
            # The files are missing at the root, or if a container shows only its own group. "max": no limit.
            if not all(lines and lines[0].isdecimal() for lines in numbers):
                continue
            most, taken = (int(lines[0]) for lines in numbers)
            stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
            yield most - taken + int(stat.get(cache, 0))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
