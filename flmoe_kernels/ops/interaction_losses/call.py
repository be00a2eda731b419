"""Shapes of a call of the interaction losses."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.operands import expect


def check_shapes(latents: Tensor, exists: Tensor | None) -> None:
    """Check latents (M + 2, M + 1, B, width), or (2, M + 1, B, width), M >= 2, and exists (B, M) bool."""
    shape = tuple(latents.shape)
    if len(shape) != 4 or shape[1] < 3 or shape[0] not in (2, shape[1] + 1):
        raise ValueError(f"latents: expected (M + 2 or 2, M + 1, B, width), got {shape}")
    if exists is not None:
        expect("exists", exists, (shape[2], shape[1] - 1), torch.bool, latents.device)
