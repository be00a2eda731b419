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
    """Losses of the interaction experts, from the full view and the views without one modality.

    Expert m < M has the uniqueness loss of modality m (triplet: close to the views without another modality, far
    from the view without m), expert M the synergy loss (mean cosine), expert M + 1 redundancy (1 - mean cosine).

    Args:
        latents: (M + 2, M + 1, B, width), M >= 2; view 0 is the full view. float32, float64, bfloat16 or float16.
        backend: the result of core.backend.choose.

    Returns:
        (M + 2,), same dtype; NaN for an empty batch. Differentiable.

    Raises:
        TypeError, ValueError: latents has the wrong type, dtype or shape.

    Cost: latents is read once; memory-bound, or latency-bound at the sizes of a layer.
    """
    check.require_floating("latents", latents)
    if latents.dim() != 4 or latents.shape[1] != latents.shape[0] - 1 or latents.shape[1] < 3:
        raise ValueError(f"latents: expected (M + 2, M + 1, B, width), got {tuple(latents.shape)}")
    if backend == REFERENCE:
        views = [expert.unbind(0) for expert in latents.unbind(0)]
        return torch.stack(reference.interaction_losses(views))
    return torch.ops.flmoe.interaction_losses(latents, backend)
