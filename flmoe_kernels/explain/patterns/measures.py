"""Measures of importance maps, one per sample; batched, in float64."""

from __future__ import annotations

from fractions import Fraction
from numbers import Integral, Real

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.tokens import percent_counts, places
from flmoe_kernels.explain.masking.measure import tied_tokens

ENTROPY, NORMALIZED_ENTROPY, GINI, TOP_SHARE = CONCENTRATION = (
    "entropy",
    "normalized_entropy",
    "gini",
    "top_share",
)
JACCARD, COSINE = OVERLAP = ("jaccard", "cosine")


def require_top(top: object) -> int | float:
    """Return a count of tokens as an int, a share as a float. Raises TypeError or ValueError for others."""
    if isinstance(top, bool) or not isinstance(top, Real):
        raise TypeError(f"top: expected an int or a float, got {type(top).__name__}")
    if isinstance(top, Integral):
        check.require_count("top", int(top), 1)
        return int(top)
    if not 0.0 < float(top) <= 1.0:
        raise ValueError(f"top: expected a share above 0 up to 1, or a count (int), got {top}")
    return float(top)


def top_tokens(importance: Tensor, valid: Tensor, top: int | float) -> tuple[Tensor, Tensor]:
    """Return the most important tokens (B, R, L) bool, and whether they were chosen among near-ties (B, R).

    importance (B, R, L) >= 0, valid (B, L) bool. Equal tokens keep their order.
    """
    if isinstance(top, int):
        counts = valid.sum(dim=1).clamp(max=top)
    else:
        counts = percent_counts(valid, 100 * Fraction(str(top)))
    allowed = valid.unsqueeze(1).expand_as(importance)
    chosen = places(importance, allowed) <= counts.view(-1, 1, 1)
    flat = [x.flatten(0, 1) for x in (importance, allowed, chosen)]
    tied = tied_tokens(flat[0], flat[1], flat[2].unsqueeze(0)).view(chosen.shape[:2])
    return chosen, tied & (importance > 0).any(dim=2)


def concentration_measures(importance: Tensor, valid: Tensor, chosen: Tensor) -> Tensor:
    """CONCENTRATION (4, R, B) of importance (B, R, L) >= 0, which is 0 for padding; NaN if it is 0 everywhere."""
    count = valid.sum(dim=1, keepdim=True).double()
    shares = importance / importance.sum(dim=2, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(dim=2)
    # The rank among valid tokens, from 1; padding comes first, and has share 0.
    length = importance.shape[2]
    rank = torch.arange(1, length + 1, device=importance.device) - (length - count)
    weight = (2 * rank - count - 1).unsqueeze(1)
    gini = (shares.sort(dim=2)[0] * weight).sum(dim=2) / count
    top = torch.where(chosen, shares, 0.0).sum(dim=2)
    found = torch.stack([entropy, entropy / count.log(), gini, top])
    return found.masked_fill((importance == 0).all(dim=2), torch.nan).transpose(1, 2)


def overlap_measures(importance: Tensor, chosen: Tensor) -> Tensor:
    """OVERLAP (2, P, B) of the pairs of maps in importance (B, R, L) >= 0; NaN if one of them is 0 everywhere."""
    there = (importance != 0).any(dim=2)
    sets = chosen.double()
    common = sets @ sets.transpose(1, 2)
    size = sets.sum(dim=2)
    jaccard = common / (size.unsqueeze(2) + size.unsqueeze(1) - common)
    units = importance / torch.linalg.vector_norm(importance, dim=2, keepdim=True)
    cosine = units @ units.transpose(1, 2)
    both = there.unsqueeze(2) & there.unsqueeze(1)
    found = torch.stack([jaccard, cosine]).masked_fill(~both, torch.nan)
    first, second = pairs(importance.shape[1])
    return found[:, :, first, second].transpose(1, 2)


def pairs(count: int) -> tuple[list[int], list[int]]:
    """Positions e and f of the pairs e < f."""
    first, second = torch.triu_indices(count, count, 1).tolist()
    return first, second
