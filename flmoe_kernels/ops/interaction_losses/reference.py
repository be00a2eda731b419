"""Reference of the interaction losses in plain PyTorch.

Source: FL-I2MoE (arXiv 2603.13326) and its ancestor I2MoE (arXiv 2505.19190).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRIPLET_MARGIN = 1.0
TRIPLET_EPS = 1e-7


def uniqueness_loss(views: Sequence[Tensor], modality: int) -> Tensor:
    """Triplet loss of a uniqueness expert: close to views without another modality, far from its own."""
    anchor, negative = views[0], views[1 + modality]
    positives = [view for m, view in enumerate(views[1:]) if m != modality]
    losses = [
        F.triplet_margin_loss(
            anchor, positive, negative, margin=TRIPLET_MARGIN, p=2, eps=TRIPLET_EPS
        )
        for positive in positives
    ]
    return torch.stack(losses).mean()


def mean_cosine(views: Sequence[Tensor]) -> Tensor:
    """Mean over modalities and batch of cos(full view, view without the modality)."""
    anchor = F.normalize(views[0], p=2, dim=1)
    cosines = [(anchor * F.normalize(view, p=2, dim=1)).sum(dim=1).mean() for view in views[1:]]
    return torch.stack(cosines).mean()


def interaction_losses(views: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The M + 2 losses from views[e][v] (B, *): uniqueness per modality, synergy, redundancy."""
    *unique, synergy, redundancy = views
    losses = [uniqueness_loss(expert, m) for m, expert in enumerate(unique)]
    return [*losses, mean_cosine(synergy), 1.0 - mean_cosine(redundancy)]
