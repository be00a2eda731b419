"""Dtypes: accumulation dtype, codes in the native module, names, autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .native import constant_in_traces

HALVES_AND_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (*HALVES_AND_FLOAT32, torch.float64)
# The values of DType in csrc/common/types.h.
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def dtype_code(x: Tensor) -> int:
    return _CODES[x.dtype]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@constant_in_traces
def _has_autocast(kind: str) -> bool:
    """torch.amp.is_autocast_available, which torch.compile cannot trace before torch 2.11."""
    return torch.amp.is_autocast_available(kind)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of torch.autocast on this device, None if it is off or the device, such as meta, has none."""
    kind = device.type
    if not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off; on a device without autocast it does nothing."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
