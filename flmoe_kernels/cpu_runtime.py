"""What every call into the native CPU module needs: addresses, dtype codes, output buffers, threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import native

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_HUGE_BYTES = 4 << 20


def dtype_code(x: Tensor) -> int:
    return _CODES[x.dtype]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def threads() -> int:
    return torch.get_num_threads()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor; large ones ask for huge pages, whose faults are ten times cheaper."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    size = out.numel() * out.element_size()
    if size >= _HUGE_BYTES:
        native().advise_huge(out.data_ptr(), size)
    return out
