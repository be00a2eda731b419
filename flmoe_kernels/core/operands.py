"""Checks and copies of tensors that a kernel reads through raw pointers.

A registered operator can be called without the package's public functions, so every backend checks again whatever
could cause a read past the end of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import HALVES_AND_FLOAT32

HOST = torch.device("cpu")


def expect(
    name: str,
    x: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device = HOST,
) -> None:
    """Raise ValueError unless x is None or has this shape, dtype and device."""
    if x is None:
        return
    if x.shape != tuple(shape) or x.dtype is not dtype or x.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on {device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def expect_bounds(name: str, x: Tensor, device: torch.device = HOST) -> None:
    """Check row bounds such as cu_seqlens: int32, at least one value."""
    expect(name, x, (max(x.numel(), 1),), torch.int32, device)


def expect_seed(seed: Tensor | None, device: torch.device = HOST) -> None:
    if seed is not None:
        expect("seed", seed.reshape(-1), (1,), torch.int64, device)


def expert_out_of_range(index: Tensor, experts: int) -> ValueError:
    """The error for an expert index with values outside -1 to experts - 1."""
    return ValueError(
        f"index: expected -1 or experts from 0 to {experts - 1}, "
        f"got values from {int(index.min())} to {int(index.max())}"
    )


def expect_float32_or_half(name: str, x: Tensor) -> None:
    """Raise ValueError unless the dtype is supported by the Triton kernels."""
    if x.dtype not in HALVES_AND_FLOAT32:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def experts_contiguous(x: Tensor) -> Tensor:
    """x (E, ...), or a copy of it, with contiguous parts of the experts: half of a fused weight is not copied."""
    return x if len(x) and x[0].is_contiguous() else x.contiguous()


def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy of it, with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
