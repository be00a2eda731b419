"""Which tokens of a batch are valid, which may be masked, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check

from .models import Inputs
from .token_game import require_inputs


def require_batch(inputs: Any, masks: Any) -> None:
    """Inputs and masks that fit, of at least one sample.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not require_inputs(inputs, masks):
        raise ValueError("inputs: expected at least one sample, got none")


def valid_tokens(inputs: Inputs, masks: Inputs | None) -> list[Tensor]:
    """M x (B, L_m) bool; (B, 0) for a missing modality."""
    example = next(x for x in inputs if x is not None)
    found = []
    for m, x in enumerate(inputs):
        mask = None if masks is None else masks[m]
        shape = (example.shape[0], 0) if x is None else x.shape[:2]
        if mask is None:
            found.append(torch.ones(shape, dtype=torch.bool, device=example.device))
        else:
            found.append(mask.to(torch.bool))
    return found


def candidates(valid: Sequence[Tensor], exempt: Sequence[int] = ()) -> list[Tensor]:
    """The tokens that may be masked, M x (B, L_m) bool: the valid ones but token 0 of the exempt modalities.

    As in the published evaluator a modality of one token alone is never exempt.

    Raises:
        TypeError, ValueError: exempt names another modality, or one twice.
    """
    for m in exempt:
        check.require_count("exempt", m, 0, len(valid) - 1)
    if len(set(exempt)) < len(exempt):
        raise ValueError(f"exempt: expected each modality once, got {tuple(exempt)}")
    found = [x.clone() for x in valid]
    for m in exempt:
        if found[m].shape[1] > 1:
            found[m][:, 0] = False
    return found


def percent_counts(candidate: Tensor, percent: float) -> Tensor:
    """How many of n candidates (..., L) are K percent of them: ceil(n K / 100), (...,) int64.

    At least one where there are any. As in the published evaluator, with exact arithmetic: its floating-point
    product makes 8 of 7 percent of 100. Both agree for K = 5, 10, 15, 20, 25.
    """
    share = Fraction(str(percent)) / 100
    # In Python's integers, as n times the numerator of a percentage like 100 / 7 has no place in 64 bits.
    counts = [-(-n * share.numerator // share.denominator) for n in range(candidate.shape[-1] + 1)]
    return torch.tensor(counts, device=candidate.device)[candidate.sum(dim=-1)]


def places(values: Tensor, candidate: Tensor) -> Tensor:
    """The rank of each candidate by its value, highest first, from 1 on; L + 1 for the others. (..., L) int64.

    Of equal values the first one comes first: where the published evaluator leaves it to topk, this is fixed.
    """
    order = values.sort(dim=-1, descending=True, stable=True)[1]
    allowed = candidate.expand_as(values).gather(-1, order)
    rank = torch.where(allowed, allowed.cumsum(dim=-1), values.shape[-1] + 1)
    return torch.zeros_like(rank).scatter_(-1, order, rank)


def min_max(values: Tensor, candidate: Tensor) -> Tensor:
    """(x - min) / (max - min) over the candidates of each row (..., L); 0 where all are equal, and elsewhere."""
    if not values.shape[-1]:
        return values
    low = values.masked_fill(~candidate, torch.inf).amin(dim=-1, keepdim=True)
    high = values.masked_fill(~candidate, -torch.inf).amax(dim=-1, keepdim=True)
    scaled = (values - low) / torch.where(high > low, high - low, 1.0)
    return scaled.masked_fill(~candidate, 0.0)
