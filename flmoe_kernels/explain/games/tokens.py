"""Inputs and masks: validation, valid tokens, and which of them may be masked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flmoe_kernels.core import validation as check

from .coalitions import Ints
from .models import Inputs


def require_inputs(inputs: Any, masks: Any) -> int:
    """The batch size B of inputs M x (B, L_m, ...) or None, at least one given, and masks that fit."""
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
    """As `require_inputs`, with at least one sample."""
    if not require_inputs(inputs, masks):
        raise ValueError("inputs: expected at least one sample, got none")


def rows_of(tensors: Inputs | None, rows: Any) -> list[Tensor | None] | None:
    """Some samples of each tensor."""
    return None if tensors is None else [None if x is None else x[rows] for x in tensors]


def per_feature(flags: Tensor, x: Tensor) -> Tensor:
    """Flags (B, L) of tokens x (B, L, ...), with as many dimensions as x."""
    return flags.reshape(*flags.shape, *[1] * (x.dim() - 2))


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


def players_of(valid: Sequence[Tensor], sample: int) -> Ints:
    """Modality and position (n, 2) of the valid tokens M x (B, L_m) of one sample."""
    found = [np.zeros((0, 2), dtype=np.int64)]
    for m, flags in enumerate(valid):
        position = np.flatnonzero(flags[sample].cpu().numpy())
        found.append(np.stack([np.full_like(position, m), position], axis=1))
    return np.concatenate(found)


def flat_places(tokens: Ints, lengths: Sequence[int]) -> Ints:
    """(n,): positions in the concatenated modalities of tokens (n, 2), modality and position."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return (starts[tokens[:, 0]] + tokens[:, 1]).astype(np.int64)


def candidates(valid: Sequence[Tensor], exempt: Sequence[int] = ()) -> list[Tensor]:
    """The tokens that may be masked, M x (B, L_m) bool: the valid ones except token 0 of the exempt modalities.

    As in the published evaluator a modality of a single token is never exempt.
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
    """K percent of the number n of candidates (..., L): ceil(n K / 100), (...,) int64.

    At least 1 if n > 0. As in the published evaluator, but in exact arithmetic: its floating-point product gives
    8 for 7 percent of 100. Both agree for K = 5, 10, 15, 20, 25.
    """
    share = Fraction(str(percent)) / 100
    # Python integers: n times the numerator of a percentage like 100 / 7 overflows 64 bits.
    counts = [-(-n * share.numerator // share.denominator) for n in range(candidate.shape[-1] + 1)]
    return torch.tensor(counts, device=candidate.device)[candidate.sum(dim=-1)]


def places(values: Tensor, candidate: Tensor) -> Tensor:
    """The rank of each candidate by its value, highest first, from 1 on; L + 1 for the others. (..., L) int64.

    Of equal values the first one comes first; the published evaluator leaves their order to topk.
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


@torch.no_grad()
def token_means(
    samples: Iterable[tuple[Inputs, Inputs | None]], *, exempt: Sequence[int] = ()
) -> list[Tensor]:
    """Each modality's mean token (D_m, ...) over the valid tokens of a data set: the baseline of fill="mean".

    Args:
        samples: batches of (inputs, masks); a modality may be missing from some, not from all.
        exempt: modalities whose token 0 is left out of the mean, as `faithfulness` leaves it unmasked; it counts
            in batches that have one token of the modality.

    Returns:
        Summed in float64, in the dtype and on the device of the first batch that has the modality.

    Raises:
        TypeError, ValueError: no batches, batches of different numbers of modalities, a modality without a valid
            token, or exempt names an unknown modality or one twice.
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
                # Padded tokens may hold anything, NaN too.
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
