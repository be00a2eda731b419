"""Reference of the interaction losses in plain PyTorch.

Source: FL-I2MoE (arXiv 2603.13326) and its ancestor I2MoE (arXiv 2505.19190).

exists (B, M) bool: whether the view that replaces modality m exists for a sample; None: all exist. A loss is the
mean over the (sample, view) pairs that exist, 0 if there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TRIPLET_MARGIN = 1.0
TRIPLET_EPS = 1e-7

Views = Sequence[Tensor]
# The loss of each sample, (B,).
PairLoss = Callable[[Tensor, Tensor], Tensor]
TripletLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def triplet(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return F.triplet_margin_loss(
        anchor, positive, negative, margin=TRIPLET_MARGIN, p=2, eps=TRIPLET_EPS, reduction="none"
    )


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return (F.normalize(x, p=2, dim=1) * F.normalize(y, p=2, dim=1)).sum(dim=1)


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().mean(dim=1)


def interaction_losses(views: Sequence[Views], exists: Tensor | None = None) -> list[Tensor]:
    """Losses from views[e][v] (B, *): uniqueness of each modality, synergy, redundancy.

    Two experts have only the last two losses.
    """
    return _losses(views, exists, triplet, cosine, lambda x, y: 1.0 - cosine(x, y))


def regression_losses(views: Sequence[Views], exists: Tensor | None = None) -> list[Tensor]:
    """The same for regression: mean squared errors of the outputs."""

    def uniqueness(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return squared_error(anchor, positive) - squared_error(anchor, negative)

    return _losses(views, exists, uniqueness, squared_error, squared_error)


def _losses(
    views: Sequence[Views],
    exists: Tensor | None,
    uniqueness: TripletLoss,
    synergy: PairLoss,
    redundancy: PairLoss,
) -> list[Tensor]:
    if exists is not None:
        # The derivative of a loss may be NaN where a view does not exist, and 0 * NaN is NaN.
        views = [
            [
                full,
                *(torch.where(exists[:, m : m + 1], x, full.detach()) for m, x in enumerate(rest)),
            ]
            for full, *rest in views
        ]
    *unique, _, _ = views
    modalities = range(len(views[0]) - 1)
    losses = []
    for m, (full, *replaced) in enumerate(unique):
        others = [other for other in modalities if other != m]
        terms = [uniqueness(full, replaced[other], replaced[m]) for other in others]
        losses.append(_mean(terms, [(m, other) for other in others], exists))
    for (full, *replaced), loss in zip(views[-2:], (synergy, redundancy), strict=True):
        terms = [loss(full, view) for view in replaced]
        losses.append(_mean(terms, [(m,) for m in modalities], exists))
    return losses


def _mean(
    terms: Sequence[Tensor], needed: Sequence[tuple[int, ...]], exists: Tensor | None
) -> Tensor:
    """Mean over all pairs of sample and term for which every view in `needed` exists; 0 if there are none."""
    values = torch.stack(list(terms))
    if exists is None or not len(exists):
        return values.mean()
    there = torch.stack([exists[:, list(modalities)].all(dim=1) for modalities in needed])
    return (torch.where(there, values, 0.0) / there.sum().clamp_min(1)).sum()
