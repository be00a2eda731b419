"""What a model says with some of its tokens masked: the base of all masking evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.attribution.targets import Targets

from .memory import batch_size
from .models import Inputs, expert_place, logits_of, require_model
from .token_game import FILLS, fill_values
from .tokens import require_batch


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """A model and B samples, to be asked for its logits with some tokens masked.

    Attributes:
        model, expert: see `models.logits_of`.
        inputs, masks: of the B samples.
        fill, fills: what is done to masked tokens, see `TokenGame`.
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
