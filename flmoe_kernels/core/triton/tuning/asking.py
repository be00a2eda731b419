"""Questions about calls: which of them share an answer."""

from __future__ import annotations

import functools
import platform

import torch

from flmoe_kernels._version import __version__

from .finding import Question


def bucket(size: int) -> int:
    """Sizes up to the same power of two are one; 0 is its own."""
    return 1 << (size - 1).bit_length() if size else 0


def question(
    kernel: str, kind: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> Question:
    """Of one kernel of a call; sizes as buckets or as they are."""
    named = str(dtype).removeprefix("torch.")
    place = _device_name(device)
    return Question(kernel, kind, named, tuple(sizes.items()), place, _triton(), __version__)


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


@functools.cache
def _triton() -> str:
    try:
        # Of the module: distributions of it have several names.
        import triton
    except ModuleNotFoundError:
        return "none"
    return str(triton.__version__)
