"""Inputs and masks: validation, valid tokens, maskable tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.layers.modalities import valid_tokens as valid_tokens

from .coalitions import Ints
from .models import Inputs


def require_inputs(inputs: Any, masks: Any) -> int:
    """Check inputs M x (B, L_m, ...) or None, at least one present, and their masks; return B."""
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"inputs: expected a list of Tensors, got {type(inputs).__name__}")
    given = [(m, x) for m, x in enumerate(inputs) if x is not None]
    if not given:
        raise ValueError("inputs: expected at least one modality, got none")
    for m, x in given:
        check.require_tensor(f"inputs[{m}]", x)
        if x.dim() < 3 or x.shape[0] != given[0][1].shape[0]:
            batch = given[0][1].shape[0] if given[0][1].dim() > 2 else "batch"
            raise ValueError(
                f"inputs[{m}]: expected ({batch}, tokens, features), got {tuple(x.shape)}"
            )
    check.require_masks(inputs, masks)
    return int(given[0][1].shape[0])


def require_samples(inputs: Any, masks: Any) -> None:
    """Check inputs and masks as `require_inputs`, and that there is at least one sample."""
    if not require_inputs(inputs, masks):
        raise ValueError("inputs: expected at least one sample, got none")


def rows_of(tensors: Inputs | None, rows: Any) -> list[Tensor | None] | None:
    """Select samples of each tensor."""
    return None if tensors is None else [None if x is None else x[rows] for x in tensors]


def per_feature(flags: Tensor, x: Tensor) -> Tensor:
    """Reshape flags (B, L) of tokens x (B, L, ...) to the number of dimensions of x."""
    return flags.reshape(*flags.shape, *[1] * (x.dim() - 2))


def players_of(valid: Sequence[Tensor], sample: int) -> Ints:
    """Modality and position (n, 2) of the valid tokens M x (B, L_m) of one sample."""
    players = [np.zeros((0, 2), dtype=np.int64)]
    for m, flags in enumerate(valid):
        position = np.flatnonzero(flags[sample].cpu().numpy())
        players.append(np.stack([np.full_like(position, m), position], axis=1))
    return np.concatenate(players)


def flat_places(tokens: Ints, lengths: Sequence[int]) -> Ints:
    """Positions (n,) in the concatenated modalities, of tokens (n, 2): modality and position."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return (starts[tokens[:, 0]] + tokens[:, 1]).astype(np.int64)


def candidates(valid: Sequence[Tensor], exempt: Sequence[int] = ()) -> list[Tensor]:
    """Tokens that may be masked, M x (B, L_m) bool: valid tokens except token 0 of the exempt modalities.

    As in the published evaluator, a modality with a single token is never exempt.
    """
    if not isinstance(exempt, Collection) or getattr(exempt, "shape", None) == ():
        raise TypeError(
            f"exempt: expected a sequence of modalities, such as (0,), got {type(exempt).__name__}"
        )
    for m in exempt:
        check.require_count("exempt", m, 0, len(valid) - 1)
    if len(set(exempt)) < len(exempt):
        raise ValueError(f"exempt: expected distinct modalities, got {tuple(exempt)}")
    maskable = [x.clone() for x in valid]
    for m in exempt:
        if maskable[m].shape[1] > 1:
            maskable[m][:, 0] = False
    return maskable


def percent_counts(candidate: Tensor, percent: float | Fraction) -> Tensor:
    """K percent of the number n of candidates (..., L): ceil(n K / 100), (...,) int64, at least 1 if n > 0.

    As in the published evaluator, but in exact arithmetic; the evaluator's floating-point product gives 8 for
    7 percent of 100. Both agree for K = 5, 10, 15, 20, 25.
    """
    share = Fraction(str(percent)) / 100
    # Python integers: n times the numerator of a percentage like 100 / 7 overflows 64 bits.
    counts = [-(-n * share.numerator // share.denominator) for n in range(candidate.shape[-1] + 1)]
    return torch.tensor(counts, device=candidate.device)[candidate.sum(dim=-1)]


def places(values: Tensor, candidate: Tensor) -> Tensor:
    """Rank of each candidate by value, (..., L) int64: 1 for the highest; L + 1 for tokens that are no candidates.

    Equal values keep their order; the published evaluator leaves it to topk, which does not specify it.
    """
    order = values.sort(dim=-1, descending=True, stable=True)[1]
    allowed = candidate.expand_as(values).gather(-1, order)
    rank = torch.where(allowed, allowed.cumsum(dim=-1), values.shape[-1] + 1)
    return torch.zeros_like(rank).scatter_(-1, order, rank)


def min_max(values: Tensor, candidate: Tensor) -> Tensor:
    """(x - min) / (max - min) over the candidates of each row (..., L); 0 if all are equal; other tokens 0."""
    if not values.shape[-1]:
        return values
    low = values.masked_fill(~candidate, torch.inf).amin(dim=-1, keepdim=True)
    high = values.masked_fill(~candidate, -torch.inf).amax(dim=-1, keepdim=True)
    scaled = (values - low) / torch.where(high > low, high - low, 1.0)
    return scaled.masked_fill(~candidate, 0.0)


@torch.no_grad()
def token_means(
    samples: Iterable[tuple[Inputs, Inputs | None]], *, exempt: Sequence[int] = ()
) -> list[Tensor]:
    """Mean token (D_m, ...) of each modality over the valid tokens of a data set: the baseline of fill="mean".

    Args:
        samples: batches of (inputs, masks); a modality may be missing from some batches, but not from all.
        exempt: modalities whose token 0 is left out of the mean, as `faithfulness` never masks it; in batches
            with a single token of the modality it counts.

    Returns:
        Means, computed in float64, with the dtype and device of the first batch that has the modality.

    Raises:
        TypeError, ValueError: no batches, batches with different numbers of modalities, a modality without valid
            token, or exempt has an unknown or duplicate modality.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, float] = {}
    like: dict[int, Tensor] = {}
    modalities: int | None = None
    for inputs, masks in samples:
        modalities = len(inputs) if modalities is None else modalities
        if len(inputs) != modalities:
            raise ValueError(f"samples: expected {modalities} modalities, got {len(inputs)}")
        if all(x is None for x in inputs):
            continue
        require_inputs(inputs, masks)
        counted = candidates(valid_tokens(inputs, masks), exempt)
        for m, (x, flags) in enumerate(zip(inputs, counted, strict=True)):
            if x is not None:
                # Padded tokens may hold any value, also NaN.
                kept = torch.where(per_feature(flags, x), x.double(), 0.0).sum(dim=(0, 1))
                sums[m] = sums[m] + kept if m in sums else kept
                counts[m] = counts.get(m, 0.0) + float(flags.sum())
                like.setdefault(m, x)
    if not modalities:
        raise ValueError("samples: expected batches of (inputs, masks), got none")
    for m in range(modalities):
        if not counts.get(m):
            raise ValueError(f"samples: expected a valid token of modality {m}, got none")
    return [(sums[m] / counts[m]).to(like[m].dtype) for m in range(modalities)]
