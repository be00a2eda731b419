"""Missing modalities: inputs that are None, samples with only padding, modality dropout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flmoe_kernels.core import validation as check

Masks = Sequence[Tensor | None] | None


@dataclass(frozen=True)
class Modalities:
    """The token sequences of a call."""

    inputs: list[Tensor]  # M x (B, L_m, D); a missing modality has only padding, or no tokens
    masks: list[Tensor | None] | None  # M x (B, L_m), True (or 1) = valid; None if there is no mask
    masked: tuple[bool, ...]  # whether the caller gave a mask for the modality
    absent: tuple[bool, ...]  # whether the input was None or had no tokens: missing in all samples


def prepare_modalities(
    inputs: Sequence[Tensor | None], masks: Masks, tokens: int, dropout: float
) -> Modalities:
    """Fill in modalities that are None or have no tokens with padding, `tokens` of them, and drop modalities."""
    given: list[Tensor | None] = list(masks or [None] * len(inputs))
    absent = tuple(x is None or x.shape[1] == 0 for x in inputs)
    like = [x for x in inputs if x is not None]
    if not like:
        raise ValueError("inputs: expected at least one modality, got None for all")
    filled: list[Tensor] = []
    all_masks: list[Tensor | None] = []
    for x, mask, missing in zip(inputs, given, absent, strict=True):
        if missing or x is None:
            x = like[0].new_zeros((like[0].shape[0], tokens, like[0].shape[2]))
            mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        filled.append(x)
        all_masks.append(mask)
    if dropout:
        all_masks = drop_modalities(filled, all_masks, dropout)
    none = all(mask is None for mask in all_masks)
    masked = tuple(mask is not None for mask in given)
    return Modalities(filled, None if none else all_masks, masked, absent)


def present_modalities(inputs: Sequence[Tensor | None], masks: Masks) -> Tensor | None:
    """Whether each sample has each modality, (B, M) bool; None if all samples have all modalities."""
    complete = all(x is not None and x.shape[1] > 0 for x in inputs)
    if complete and all(mask is None for mask in masks or ()):
        return None
    like = next(x for x in inputs if x is not None)
    columns = [
        torch.full((like.shape[0],), x is not None and x.shape[1] > 0, device=like.device)
        if mask is None
        else mask.bool().any(dim=1)
        for x, mask in zip(inputs, masks or [None] * len(inputs), strict=True)
    ]
    return torch.stack(columns, dim=1)


def valid_tokens(inputs: Sequence[Tensor | None], masks: Masks) -> list[Tensor]:
    """Valid tokens, M x (B, L_m) bool; (B, 0) for a missing modality."""
    like = next(x for x in inputs if x is not None)
    valid = []
    for x, mask in zip(inputs, masks or [None] * len(inputs), strict=True):
        shape = (like.shape[0], 0) if x is None else x.shape[:2]
        valid.append(
            torch.ones(shape, dtype=torch.bool, device=like.device)
            if mask is None
            else mask.to(torch.bool)
        )
    return valid


def drop_modalities(
    inputs: Sequence[Tensor | None], masks: Masks, rate: float
) -> list[Tensor | None]:
    """Masks that drop each modality of a sample with probability `rate`, but keep at least one present modality.

    If all modalities of a sample would be dropped, one of them, chosen at random, is kept. Draws from torch's
    generator.
    """
    check.require_probability("modality_dropout", rate)
    present = present_modalities(inputs, masks)
    like = next(x for x in inputs if x is not None)
    draw = torch.rand((like.shape[0], len(inputs)), device=like.device)
    if present is not None:
        draw = torch.where(present, draw, -1.0)
    keep = (draw >= rate).scatter(1, draw.argmax(dim=1, keepdim=True), True)
    masks = masks or [None] * len(inputs)
    return [
        None
        if x is None
        else keep[:, m : m + 1].expand(x.shape[:2])
        if mask is None
        else mask.bool() & keep[:, m : m + 1]
        for m, (x, mask) in enumerate(zip(inputs, masks, strict=True))
    ]
