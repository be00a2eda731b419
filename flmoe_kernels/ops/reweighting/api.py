"""Entry points of the reweighting: docstrings and choice of the backend.

The calling layers validate the inputs; the Triton kernels check shapes again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import without_autocast

from . import op as _op  # noqa: F401  registers flmoe::reweighting_features and flmoe::mix_experts
from . import reference
from .reference import Masks

__all__ = ["mix_experts", "reweighting_features"]


def reweighting_features(
    inputs: Sequence[Tensor],
    masks: Masks,
    normalized: Sequence[bool],
    tokens: Tensor,
    valid: Tensor | None,
    backend: str,
) -> Tensor:
    """Mean of each modality's valid tokens; 0 without any.

    Args:
        inputs, masks: M times (B, L_m, D), and (B, L_m) bool or None.
        normalized: whether a modality's mean is divided by its L2 norm.
        tokens, valid: inputs and masks concatenated over L, (B, L, D) and (B, L) bool or None; used by Triton.
        backend: the result of core.backend.choose.

    Returns:
        (B, M * D), same dtype. Differentiable with respect to inputs; with Triton, with respect to tokens.
    """
    match backend:
        case "triton":
            lengths = [x.shape[1] for x in inputs]
            bits = sum(1 << m for m, scale in enumerate(normalized) if scale)
            op = torch.ops.flmoe.reweighting_features
            return op(tokens, valid, lengths, bits, backend)[0]
        case _:
            return reference.reweighting_features(inputs, masks, normalized)


def mix_experts(
    scores: Tensor, logits: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the weights softmax(scores / temperature) (B, E) and the mixture (B, C) of the logits.

    Args:
        scores: (B, E).
        logits: (E, B, C); scores are cast to their dtype, and autocast has no effect.
        temperature: positive.
        backend: the result of core.backend.choose.
    """
    scores = scores.to(logits.dtype)
    match backend:
        case "triton":
            return torch.ops.flmoe.mix_experts(scores, logits, float(temperature), backend)
        case _:
            with without_autocast(scores.device):
                return reference.mix_experts(scores, logits, temperature)
