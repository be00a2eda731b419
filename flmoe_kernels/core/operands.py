"""Checks and copies of the tensors that a kernel reads through plain addresses.

A registered operator can be called without the package's public functions, so each backend checks again what
would otherwise become a read past a tensor's end.
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
    """ValueError unless x, if given, has this shape and dtype and is on this device."""
    if x is None:
        return
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name}: expected {dtype} {tuple(shape)} on {device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def expect_bounds(name: str, x: Tensor, device: torch.device = HOST) -> None:
    """Bounds of runs of rows: int32, at least one."""
    expect(name, x, (max(x.numel(), 1),), torch.int32, device)


def expect_seed(seed: Tensor | None, device: torch.device = HOST) -> None:
    if seed is not None:
        expect("seed", seed.reshape(-1), (1,), torch.int64, device)


def expert_out_of_range(index: Tensor, experts: int) -> ValueError:
    """The error for an index of experts that has other values than -1 to experts - 1."""
    return ValueError(
        f"index: expected -1 or experts from 0 to {experts - 1}, "
        f"got values from {int(index.min())} to {int(index.max())}"
    )


def expect_float32_or_half(name: str, x: Tensor) -> None:
    """The dtypes of every Triton kernel."""
    if x.dtype not in HALVES_AND_FLOAT32:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def rows_contiguous(x: Tensor) -> Tensor:
    """x, or a copy of it, with the elements of the last dimension next to each other."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
