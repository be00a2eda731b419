"""Entry point of the interaction losses: docstring, validation, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.backend import REFERENCE

from . import op as _op  # noqa: F401  registers flmoe::interaction_losses
from . import reference

__all__ = ["interaction_losses"]


def interaction_losses(latents: Tensor, backend: str) -> Tensor:
    """Losses of the interaction experts on the full view and the views that lack one modality.

    Experts 0..M-1 are the uniqueness experts (a triplet loss: close to views that lack another modality, far from
    the view that lacks their own), expert M is synergy (mean cosine), expert M + 1 redundancy (1 - mean cosine).

    Args:
        latents: (M + 2, M + 1, B, width), M from 2; view 0 is the full one. float32, float64, bfloat16 or float16.
        backend: the result of core.backend.choose.

    Returns:
        (M + 2,), same dtype; NaN for an empty batch. Differentiable.

    Raises:
        TypeError, ValueError: latents of another kind or shape.

    Cost: reads latents once; bound by memory, or by latency at the sizes of a layer.
    """
    check.require_floating("latents", latents)
    if latents.dim() != 4 or latents.shape[1] != latents.shape[0] - 1 or latents.shape[1] < 3:
        raise ValueError(f"latents: expected (M + 2, M + 1, B, width), got {tuple(latents.shape)}")
    if backend == REFERENCE:
        views = [expert.unbind(0) for expert in latents.unbind(0)]
        return torch.stack(reference.interaction_losses(views))
    return torch.ops.flmoe.interaction_losses(latents, backend)
