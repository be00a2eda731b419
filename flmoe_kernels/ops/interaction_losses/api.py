"""Entry point of the interaction losses: docstring, validation, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.core.backend import REFERENCE

from . import op as _op  # noqa: F401  registers flmoe::interaction_losses
from . import reference
from .call import check_shapes

__all__ = ["interaction_losses"]


def interaction_losses(latents: Tensor, backend: str, exists: Tensor | None = None) -> Tensor:
    """Losses of the interaction experts, from the full view and the views that replace one modality.

    Expert m < M has the uniqueness loss of modality m (triplet: close to the views that replace another modality,
    far from the view that replaces m), expert M the synergy loss (mean cosine), expert M + 1 redundancy (1 - mean
    cosine).

    Each is a mean over the (sample, view) pairs that exist; 0 if there are none.

    Args:
        latents: (M + 2, M + 1, B, width), M >= 2; view 0 is the full view. float32, float64, bfloat16 or float16.
            (2, M + 1, B, width) without uniqueness experts.
        backend: the result of core.backend.choose.
        exists: (B, M) bool, whether the view that replaces modality m exists for a sample; None: all exist.

    Returns:
        (M + 2,) or (2,), same dtype; NaN for an empty batch. Differentiable.

    Raises:
        TypeError, ValueError: latents has the wrong type, dtype or shape.

    Cost: latents is read once; memory-bound, or latency-bound at the sizes of a layer.
    """
    check.require_floating("latents", latents)
    check_shapes(latents, exists)
    if backend == REFERENCE:
        views = [expert.unbind(0) for expert in latents.unbind(0)]
        return torch.stack(reference.interaction_losses(views, exists))
    return torch.ops.flmoe.interaction_losses(latents, exists, backend)
