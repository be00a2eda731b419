"""A model's logits with some tokens absent: filled, or masked out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.layers.interaction_moe.subsets import has_subset_logits, subset_logits

from .memory import choose_batch
from .models import Inputs, expert_place, is_plain_pair_layer, logits_of, require_model
from .tokens import per_feature, require_samples, rows_of, valid_tokens

FILLS = ("zero", "mean", "drop")


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """A model and B samples, for logits with some tokens absent.

    Absent tokens are masked out (fill="drop") or filled: filled tokens are still attended, as in the published
    code. With "drop" every modality has a mask, even if the samples had none.
    """

    model: Any
    expert: int | None  # see `models.logits_of`
    inputs: Inputs
    masks: Inputs | None  # None if no modality has a mask
    valid: Sequence[Tensor]  # M x (B, L_m) bool
    fill: str
    fills: Sequence[Tensor | None]  # see `fill_values`
    max_batch: int  # rows of one call of the model

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
        sample: int | None = None,
    ) -> MaskedModel:
        """Build it for all samples or one. Raises TypeError or ValueError with the argument's name."""
        check.require_choice("fill", fill, FILLS)
        require_model(model, masking=fill == "drop")
        require_samples(inputs, masks)
        inputs = [None if x is None else x.detach() for x in inputs]
        if masks is not None and all(mask is None for mask in masks):
            masks = None
        if sample is not None:
            batch = next(len(x) for x in inputs if x is not None)
            check.require_count("sample", sample, 0, batch - 1)
            one = slice(sample, sample + 1)
            inputs, masks = rows_of(inputs, one) or [], rows_of(masks, one)
        place, fills = expert_place(model, expert), fill_values(fill, baseline, inputs)
        valid = valid_tokens(inputs, masks)
        expanded = len(valid[0]) > 1 or not has_subset_logits(model)
        most = choose_batch(max_batch, model, inputs, expanded=expanded)
        return cls(model, place, inputs, masks, valid, fill, fills, most)

    @property
    def samples(self) -> int:
        return len(self.valid[0])

    @property
    def device(self) -> torch.device:
        return self.valid[0].device

    @torch.no_grad()
    def full_logits(self) -> Tensor:
        """Return logits (B, C) of the mixture with all tokens; with "drop" every modality has a mask."""
        rows = torch.arange(self.samples, device=self.device)
        nothing = [None] * len(self.inputs)
        parts = [self.present(chosen, nothing) for chosen in rows.split(self.max_batch)]
        return torch.cat([logits_of(self.model, *given, None) for given in parts])

    def logits(self, rows: Tensor, absent: Sequence[Tensor]) -> Tensor:
        """Return logits (N, C) of samples `rows` (N,) without the tokens `absent`, M x (N, L_m) bool."""
        drops = self.fill == "drop"
        masks, fills = (self.valid, None) if drops else (self.masks, self.fills)
        logits = subset_logits(self.model, self.inputs, masks, rows, absent, fills, self.expert)
        if logits is not None:
            return logits
        return logits_of(self.model, *self.present(rows, absent), self.expert)

    def present(
        self, rows: Tensor, absent: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None] | None]:
        """Return inputs and masks of samples `rows` (N,) without the tokens `absent`, M x (N, L_m) or None."""
        packs = self.fill == "drop" and is_plain_pair_layer(self.model)
        inputs: list[Tensor | None] = []
        masks: list[Tensor | None] = []
        for m, (x, gone) in enumerate(zip(self.inputs, absent, strict=True)):
            if x is None:
                inputs.append(None)
                masks.append(None)
                continue
            # A single sample is expanded to all rows without copies.
            x = x.expand(len(rows), *x.shape[1:]) if self.samples == 1 else x[rows]
            mask = None if self.masks is None else self.masks[m]
            mask = None if mask is None else mask[rows]
            if self.fill == "drop":
                mask = self.valid[m][rows]
                if gone is not None:
                    mask = mask & ~gone
                    x, mask = packed_tokens(x, mask) if packs else (x, mask)
            elif gone is not None:
                fill = self.fills[m]
                assert fill is not None
                x = torch.where(per_feature(gone, x), fill, x)
            inputs.append(x)
            masks.append(mask)
        return inputs, masks if self.fill == "drop" or self.masks is not None else None


def packed_tokens(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Move the `kept` (B, L) tokens of x (B, L, ...) to the front; return (B, K, ...) and the mask (B, K).

    K is the largest number in a row. Synchronizes with the GPU.
    """
    longest = int(kept.sum(dim=1).max()) if len(kept) else 0
    order = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True)[1][:, :longest]
    rows = torch.arange(len(kept), device=kept.device).unsqueeze(1)
    return x[rows, order], kept.gather(1, order)


def fill_values(
    fill: str, baseline: Sequence[Tensor | None] | None, inputs: Inputs
) -> list[Tensor | None]:
    """Values that replace absent tokens of each modality, broadcastable to (B, L_m, ...); None with "drop"."""
    if fill != "mean" and baseline is not None:
        raise ValueError(f"baseline: expected None with fill={fill!r}")
    if fill == "drop":
        return [None] * len(inputs)
    for m, x in enumerate(inputs):
        if x is not None:
            check.require_floating(f"inputs[{m}]", x)
    if fill == "zero":
        return [None if x is None else x.new_zeros(()) for x in inputs]
    if not isinstance(baseline, list | tuple) or len(baseline) != len(inputs):
        raise ValueError(
            f"baseline: expected {len(inputs)} Tensors with fill='mean', one for each modality"
        )
    fills: list[Tensor | None] = []
    for m, (x, mean) in enumerate(zip(inputs, baseline, strict=True)):
        if x is None:
            fills.append(None)
            continue
        name = f"baseline[{m}]"
        check.require_tensor(name, mean)
        assert mean is not None
        check.require_same(name, mean, f"inputs[{m}]", x)
        shapes = tuple(x.shape[2:]), tuple(x.shape[1:])
        if tuple(mean.shape) not in shapes:
            raise ValueError(
                f"{name}: expected {shapes[0]} or {shapes[1]}, got {tuple(mean.shape)}"
            )
        fills.append(mean.detach())
    return fills
