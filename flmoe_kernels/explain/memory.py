"""How many coalitions one batch holds: modest, and the same from run to run where memory is plenty."""

from __future__ import annotations

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
LARGEST = 256  # a larger batch is no faster, and leaves less to share among ranks
# A model's activations over the bytes of its inputs: some ten rows of their width in each of about five experts.
_EXPANSION = 64
_SHARE = 8  # of the memory at hand, one part in so many
_ASSUMED_BYTES = 2**31  # where the system does not tell


def available_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return _ASSUMED_BYTES
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else _ASSUMED_BYTES


def batch_size(sample_bytes: int, device: torch.device) -> int:
    """A power of two from 1 to LARGEST for inputs of so many bytes per coalition.

    Powers of two, so that the few bytes by which the memory at hand differs between runs do not change it: in
    another batch a model's last bits may differ.
    """
    fitting = available_bytes(device) // (_SHARE * _EXPANSION * max(sample_bytes, 1))
    return min(LARGEST, 1 << max(int(fitting).bit_length() - 1, 0))
