"""Which tokens are masked under a budget, and what a model then says: the base of all masking evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .. import validation as check
from .games import FILLS, fill_values, require_inputs
from .memory import batch_size
from .models import Inputs, expert_place, logits_of, require_model
from .targets import Targets


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
    scaled = -candidate.sum(dim=-1) * share.numerator
    return -torch.div(scaled, share.denominator, rounding_mode="floor")


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


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """A model and B samples, to be asked for its logits with some tokens masked.

    Attributes:
        model, expert: see `models.logits_of`.
        inputs, masks: of the B samples.
        fill, fills: what is done to masked tokens, see `games.TokenGame`.
        max_batch: rows of one call of the model.
    """

    model: Any
    expert: int | None
    inputs: Inputs
    masks: Inputs | None
    fill: str
    fills: Sequence[Tensor | None]
    max_batch: int

    @classmethod
    def of(
        cls,
        model: Any,
        inputs: Inputs,
        masks: Inputs | None,
        fill: str,
        baseline: Sequence[Tensor | None] | None,
        expert: str | int | None,
        max_batch: int | None,
    ) -> MaskedModel:
        """Raises TypeError, ValueError: naming the argument, what was expected and what came."""
        check.require_choice("fill", fill, FILLS)
        require_model(model, masking=fill == "drop")
        require_batch(inputs, masks)
        inputs = [None if x is None else x.detach() for x in inputs]
        fills = fill_values(fill, baseline, inputs)
        given = [x for x in inputs if x is not None]
        if max_batch is None:
            max_batch = batch_size(sum(x[:1].nbytes for x in given), given[0].device)
        check.require_count("max_batch", max_batch, 1)
        place = expert_place(model, expert)
        return cls(model, place, inputs, masks, fill, fills, max_batch)

    @property
    def samples(self) -> int:
        return next(x.shape[0] for x in self.inputs if x is not None)

    @property
    def device(self) -> torch.device:
        return next(x.device for x in self.inputs if x is not None)

    @torch.no_grad()
    def full_logits(self, of_mixture: bool = False) -> Tensor:
        """Logits (B, C) of the samples as they are; with fill "drop" under a mask for every modality."""
        rows = torch.arange(self.samples, device=self.device)
        found = []
        for chosen in rows.split(self.max_batch):
            hidden = [None for _ in self.inputs]
            found.append(self._logits(chosen, hidden, None if of_mixture else self.expert))
        return torch.cat(found)

    @torch.no_grad()
    def read(
        self, targets: Targets, metrics: Sequence[str], rows: Tensor, hidden: Sequence[Tensor]
    ) -> Tensor:
        """Metrics (Q, N) in float64 of samples rows (N,) with the tokens hidden M x (N, L_m) bool masked."""
        found = []
        for start in range(0, len(rows), self.max_batch):
            stop = start + self.max_batch
            chosen = rows[start:stop]
            logits = self._logits(chosen, [each[start:stop] for each in hidden], self.expert)
            found.append(torch.stack([targets.read(logits, each, chosen) for each in metrics]))
        return torch.cat(found, dim=1).double()

    def _logits(self, rows: Tensor, hidden: Sequence[Tensor | None], expert: int | None) -> Tensor:
        inputs: list[Tensor | None] = []
        masks: list[Tensor | None] = []
        for m, (x, gone) in enumerate(zip(self.inputs, hidden, strict=True)):
            mask = None if self.masks is None else self.masks[m]
            if x is None:
                inputs.append(None)
                masks.append(None)
                continue
            part = x[rows]
            mask = None if mask is None else mask[rows]
            if self.fill == "drop":
                valid = part.new_ones(part.shape[:2], dtype=torch.bool) if mask is None else mask
                valid = valid.to(torch.bool)
                mask = valid if gone is None else valid & ~gone
            elif gone is not None:
                fill = self.fills[m]
                assert fill is not None
                part = torch.where(gone.view(*gone.shape, *[1] * (x.dim() - 2)), fill, part)
            inputs.append(part)
            masks.append(mask)
        given = self.fill == "drop" or self.masks is not None
        return logits_of(self.model, inputs, masks if given else None, expert)
