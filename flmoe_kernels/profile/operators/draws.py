"""Seeded inputs, the same for every contestant."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.profile.cases import Case


def generator_of(device: str) -> torch.Generator:
    """Make a seeded generator on the device, so that a GPU does not wait for the host."""
    return torch.Generator(device).manual_seed(1)


def draw(*size: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Draw normal values in float32 on the generator's device."""
    return torch.randn(*size, generator=generator, device=generator.device) * scale


def place(case: Case, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x to the case's dtype, then move it to the case's device and to `dtype`."""
    return x.to(case.dtype).to(device=case.device, dtype=dtype)
