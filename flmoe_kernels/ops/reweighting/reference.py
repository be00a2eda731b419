"""Reference of the reweighting in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Masks = Sequence[Tensor | None] | None


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of x (B, L, D) over its valid tokens, with a count of at least 1; plain mean without a mask."""
    if mask is None:
        return x.mean(dim=1)
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


def reweighting_features(
    inputs: Sequence[Tensor], masks: Masks = None, normalized: Sequence[bool] | None = None
) -> Tensor:
    """Pooled inputs (B, M * D): mean of the valid tokens, 0 without any.

    normalized: whether a modality's mean is divided by its L2 norm; None: if the modality has a mask.
    """
    features = []
    for m, x in enumerate(inputs):
        mask = masks[m] if masks is not None else None
        if mask is not None:
            x = torch.where(mask.to(torch.bool).unsqueeze(-1), x, 0.0)  # 0 * NaN of padding is NaN
        # The floor of the norm, 1e-12, is 0 in float16: a modality with only padding would give 0 / 0.
        pooled = masked_mean(x.float() if x.dtype == torch.float16 else x, mask)
        scale = mask is not None if normalized is None else normalized[m]
        features.append(F.normalize(pooled, p=2, dim=1) if scale else pooled)
    return torch.cat(features, dim=1).to(inputs[0].dtype)


def mix_experts(scores: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return weights (B, E) = softmax(scores / temperature), and the mixture (B, C) of logits (E, B, C)."""
    weights = torch.softmax(scores / temperature, dim=1)
    return weights, torch.einsum("be,ebc->bc", weights, logits)
