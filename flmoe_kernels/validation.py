"""Checks shared by the doors of the operators. Every error names the argument, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def require_same(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    """Same dtype and device as another argument."""
    if value.dtype != reference.dtype:
        raise TypeError(f"{name}: expected dtype {reference.dtype} as {other}, got {value.dtype}")
    if value.device != reference.device:
        raise ValueError(
            f"{name}: expected device {reference.device} as {other}, got {value.device}"
        )


def require_floating(name: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def require_probability(name: str, value: float) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a probability from 0 to 1, got {value}")


def require_seed(name: str, value: Tensor, device: torch.device) -> None:
    require_tensor(name, value)
    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{name}: expected one int64, got shape {tuple(value.shape)} of {value.dtype}"
        )
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
