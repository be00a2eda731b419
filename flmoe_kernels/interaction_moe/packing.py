"""Where the valid tokens are: rows without padding, and the runs of samples and modalities among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPlan:
    """The n rows that are computed, sample after sample, modality after modality within a sample.

    Attributes:
        index: (n,) int64, each row's place in the flattened (B, L) tokens, or None when that is 0..n-1.
        position: (n,) int64, its position in the concatenation of the modalities, padding counted.
        modality: (n,) int32.
        cu_samples: (B + 1,) int32, runs of rows of one sample.
        cu_segments: (B * M + 1,) int32, runs of rows of one sample and modality.
        lengths: L_m, padding counted.
        compact: no rows but the valid ones. False when their number may not be read (tracing, a GPU):
            then n = B * L, the valid rows stand first, and the runs end before the others.
    """

    index: Tensor | None
    position: Tensor
    modality: Tensor
    cu_samples: Tensor
    cu_segments: Tensor
    lengths: tuple[int, ...]
    compact: bool

    @property
    def rows(self) -> int:
        return self.position.shape[0]

    @property
    def samples(self) -> int:
        return self.cu_samples.shape[0] - 1

    @property
    def modalities(self) -> int:
        return len(self.lengths)

    def pack(self, tokens: Tensor) -> Tensor:
        """(..., B, L, D) -> (..., n, D)."""
        flat = tokens.flatten(-3, -2)
        return flat if self.index is None else flat.index_select(-2, self.index)


def plan_tokens(
    batch: int, lengths: Sequence[int], masks: Sequence[Tensor | None] | None, device: torch.device
) -> TokenPlan:
    """The plan for M sequences of these lengths and masks (B, L_m), True = valid, None = all valid."""
    total = sum(lengths)
    sizes = torch.tensor(lengths, device=device)
    modality = torch.repeat_interleave(
        torch.arange(len(lengths), device=device, dtype=torch.int32), sizes, output_size=total
    )
    if masks is None or all(mask is None for mask in masks):
        position = torch.arange(total, device=device).repeat(batch)
        counts = sizes.repeat(batch)
        return _with_runs(None, position, modality.repeat(batch), counts, lengths, True)
    valid = torch.cat(
        [
            torch.ones((batch, length), dtype=torch.bool, device=device)
            if mask is None
            else mask.to(torch.bool)
            for length, mask in zip(lengths, masks, strict=True)
        ],
        dim=1,
    )
    counts = torch.stack([part.sum(dim=1) for part in valid.split(list(lengths), dim=1)], dim=1)
    compact = device.type == "cpu" and not torch.compiler.is_compiling()
    flat = valid.flatten()
    first = torch.argsort((~flat).to(torch.uint8), stable=True) if not compact else flat.nonzero()
    index = first.flatten()
    position = index % total
    return _with_runs(index, position, modality[position], counts.flatten(), lengths, compact)


def _with_runs(
    index: Tensor | None,
    position: Tensor,
    modality: Tensor,
    counts: Tensor,
    lengths: Sequence[int],
    compact: bool,
) -> TokenPlan:
    ends = counts.cumsum(0).to(torch.int32)
    segments = torch.cat([ends.new_zeros(1), ends])
    return TokenPlan(
        index=index,
        position=position,
        modality=modality,
        cu_samples=segments[:: len(lengths)].contiguous(),
        cu_segments=segments,
        lengths=tuple(lengths),
        compact=compact,
    )
