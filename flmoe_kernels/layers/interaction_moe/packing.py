"""Packing of valid tokens into rows without padding, and views of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from flmoe_kernels.core.validation import readable
from flmoe_kernels.layers.kept import kept


@dataclass(frozen=True)
class TokenPlan:
    """The n rows that are computed, ordered by sample, and by modality within a sample.

    compact: whether all rows are valid. False if the number of valid rows may not be read (tracing, a GPU): then
    n = B * L, the valid rows come first, and the last boundary is the number of valid rows.
    """

    position: Tensor  # (n,) int64, in the concatenated modalities, including padding
    modality: Tensor  # (n,) int32
    cu_samples: Tensor  # (B + 1,) int32, boundaries between samples
    cu_segments: Tensor  # (B * M + 1,) int32, boundaries between modalities of samples
    lengths: tuple[int, ...]  # L_m, including padding
    index: Tensor | None = (
        None  # (n,) int64, in the flattened (B, L) tokens; None if that is 0..n-1
    )
    valid: Tensor | None = None  # (B, L) bool, or None if all tokens are valid
    compact: bool = True

    @property
    def rows(self) -> int:
        return self.position.shape[0]

    @property
    def samples(self) -> int:
        return self.cu_samples.shape[0] - 1

    @property
    def modalities(self) -> int:
        return len(self.lengths)

    @property
    def present(self) -> Tensor | None:
        """Whether each sample has each modality, (B, M) bool; None without masks."""
        if self.valid is None:
            return None
        return (self.cu_segments[1:] > self.cu_segments[:-1]).view(-1, self.modalities)

    def pack(self, tokens: Tensor) -> Tensor:
        """(..., B, L, D) -> (..., n, D). Rows after the valid rows are 0: otherwise a NaN in the padding would
        reach the gradients of weights, because 0 * NaN is NaN."""
        if self.valid is not None and not self.compact:
            tokens = torch.where(self.valid.unsqueeze(-1), tokens, 0.0)
        flat = tokens.flatten(-3, -2)
        return flat if self.index is None else flat.index_select(-2, self.index)


def plan_tokens(
    batch: int,
    lengths: Sequence[int],
    masks: Sequence[Tensor | None] | None,
    device: torch.device,
    *,
    reads: bool = True,
) -> TokenPlan:
    """Plan the rows of M sequences with these lengths and masks (B, L_m), True = valid, None = all valid.

    Nothing is copied from the host, and nothing synchronizes with the device. reads: allow reading the number of
    valid tokens where that is free (on a CPU, outside of traces); the plan is then compact.
    """
    total = sum(lengths)
    positions, modality, samples, segments = _layout(batch, tuple(lengths), device)
    if masks is None or all(mask is None for mask in masks):
        return TokenPlan(positions, modality, samples, segments, tuple(lengths))
    valid = torch.cat(
        [
            torch.ones((batch, length), dtype=torch.bool, device=device)
            if mask is None
            else mask.to(torch.bool)
            for length, mask in zip(lengths, masks, strict=True)
        ],
        dim=1,
    )
    compact = reads and readable(valid)
    flat = valid.flatten()
    # The number of valid tokens before each token, and of all.
    before = torch.cat([samples[:1], flat.cumsum(0, dtype=torch.int32)])
    index = flat.nonzero().flatten() if compact else _valid_first(flat, before)
    position = index % total
    return TokenPlan(
        position=position,
        modality=modality[position],
        cu_samples=before.index_select(0, samples),
        cu_segments=before.index_select(0, segments),
        lengths=tuple(lengths),
        index=index,
        valid=valid,
        compact=compact,
    )


def _valid_first(valid: Tensor, before: Tensor) -> Tensor:
    """The indices 0..n-1, those of valid tokens first, both in order; by a prefix sum, without sorting."""
    token = torch.arange(valid.shape[0], device=valid.device)
    row = torch.where(valid, before[:-1], before[-1:] + token - before[:-1])
    return token.scatter(0, row, token)


@kept
def _layout(
    batch: int, lengths: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """position, modality, cu_samples and cu_segments of TokenPlan, for the rows of all tokens.

    Computed by comparisons, to avoid copying lengths to the device.
    """
    total = sum(lengths)
    place = torch.arange(total, device=device)
    modality = torch.zeros(total, dtype=torch.int32, device=device)
    for end in accumulate(lengths[:-1]):
        modality += place >= end
    samples = total * torch.arange(batch + 1, dtype=torch.int32, device=device)
    starts = accumulate(lengths[:-1], initial=0)
    segments = torch.stack([samples + start for start in starts], dim=1).flatten()
    return (
        place.repeat(batch),
        modality.repeat(batch),
        samples,
        segments[: batch * len(lengths) + 1].contiguous(),
    )


@dataclass(frozen=True)
class Views:
    """The views of a call: the full view, then for each modality in `replaced` a view with its tokens replaced."""

    replaced: tuple[int, ...] = ()
    # (B, M) bool, whether the view that replaces a modality exists for a sample; None: all exist.
    exists: Tensor | None = None
    folded: bool = (
        False  # whether the rows of views that do not exist are omitted, see `fold_views`
    )

    @property
    def count(self) -> int:
        return 1 + len(self.replaced)

    def places(self, plan: TokenPlan) -> Tensor:
        """For each row the place of its modality in `replaced`, or a larger number: (n,) int32."""
        if self.replaced == tuple(range(plan.modalities)):
            return plan.modality
        places = torch.full_like(plan.modality, plan.modalities)
        for place, m in enumerate(self.replaced):
            places.masked_fill_(plan.modality == m, place)
        return places

    def all_modalities(self, views: Tensor, dim: int, modalities: int) -> Tensor:
        """Add zeros along `dim` for modalities without a view, so that there are 1 + M views."""
        if len(self.replaced) == modalities:
            return views
        full, *others = views.unbind(dim)
        zeros = torch.zeros_like(full)
        by_modality = dict(zip(self.replaced, others, strict=True))
        return torch.stack([full, *(by_modality.get(m, zeros) for m in range(modalities))], dim)


def plan_views(plan: TokenPlan, replaced: Sequence[int], *, fold: bool) -> Views:
    """Plan the full view and, for each modality in `replaced`, a view of the samples that have this modality.

    fold: omit the rows of views that do not exist, if the masks can be read on the host (compact plan).
    """
    exists = plan.present
    if len(replaced) < plan.modalities:
        if exists is None:
            shape = (plan.samples, plan.modalities)
            exists = torch.ones(shape, dtype=torch.bool, device=plan.position.device)
        for m in set(range(plan.modalities)) - {*replaced}:
            exists[:, m] = False
    if plan.valid is None or exists is None or not plan.compact:
        return Views(tuple(replaced), exists)
    complete = exists[:, list(replaced)].all()
    whole = bool(complete) and len(replaced) == plan.modalities
    return Views(tuple(replaced), None if whole else exists, fold and not bool(complete))


def fold_views(plan: TokenPlan, views: Views) -> tuple[TokenPlan, Tensor]:
    """Return a plan of V * B samples, one for each view and sample (empty if the view does not exist), and the
    index of each of its rows in the 2 n rows: n original rows, then n rows with replaced tokens."""
    assert views.exists is not None
    counts = plan.cu_segments.diff().view(-1, plan.modalities)
    sizes = counts.sum(dim=1)
    row = torch.arange(plan.rows, device=counts.device)
    sample = torch.repeat_interleave(sizes)
    rows, segments = [row], [counts]
    for m in views.replaced:
        there = views.exists[:, m]
        place = row + plan.rows * (plan.modality == m)
        rows.append(place[there[sample]])
        segments.append(torch.where(there.unsqueeze(1), counts, 0))
    ends = torch.stack(segments).flatten().cumsum(0).to(torch.int32)
    cu_segments = torch.cat([ends.new_zeros(1), ends])
    places = torch.cat(rows)
    source = places % plan.rows
    folded = replace(
        plan,
        index=None,
        position=plan.position[source],
        modality=plan.modality[source],
        cu_samples=cu_segments[:: plan.modalities].contiguous(),
        cu_segments=cu_segments,
    )
    return folded, places
