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


def require_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        upper = "" if most is None else f" to {most}"
        raise ValueError(f"{name}: expected an int from {least}{upper}, got {value}")


def require_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value}")


def require_index(
    name: str, value: Tensor, shape: tuple[int, ...], count: int, device: torch.device
) -> None:
    """int64 values within 0..count - 1."""
    require_tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    # Reading values waits for a GPU and cannot be traced; there torch's own indexing stays in bounds.
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= count:
            raise ValueError(f"{name}: expected values from 0 to {count - 1}, got {low} to {high}")
