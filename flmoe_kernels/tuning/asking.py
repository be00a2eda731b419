"""Questions about calls: which of them share an answer."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .._version import __version__
from .finding import Question


def bucket(size: int) -> int:
    """Sizes up to the same power of two are one."""
    return 1 << max(size - 1, 0).bit_length()


def question(
    kernel: str, kind: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> Question:
    """Of one kernel of a call; sizes as buckets or as they are."""
    named = str(dtype).removeprefix("torch.")
    place = _device_name(device.type, device.index)
    return Question(kernel, kind, named, tuple(sizes.items()), place, _triton(), __version__)


@functools.cache
def _device_name(kind: str, index: int | None) -> str:
    if kind != "cuda":
        return f"{kind} {platform.machine()}"
    return str(torch.cuda.get_device_name(index))


@functools.cache
def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"
