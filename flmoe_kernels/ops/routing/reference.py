"""Reference of routing in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    """Return index (N, K) int64 and weight (N, K) for logits (N, E), see api.gate."""
    # A stable sort: ties go to the expert with the lower index.
    index = logits.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    wide = logits.to(statistics_dtype(logits.dtype))
    weight = wide.softmax(dim=1).gather(1, index) if over_all else wide.gather(1, index).softmax(1)
    return index, weight.to(logits.dtype)


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    """Set index to -1 where masked or after an expert's first `capacity` rows, by token and choice."""
    if mask is not None:
        index = index.masked_fill(~mask[:, None], -1)
    if capacity is None:
        return index
    flat = index.reshape(-1)
    chosen = flat[:, None] == torch.arange(experts, device=index.device)
    place = (chosen.cumsum(dim=0) * chosen).sum(dim=1)
    return torch.where(place > capacity, -1, flat).view_as(index)


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (E), offsets (E + 1), permutation (N * K), int32, for index (N, K); see api.dispatch."""
    flat = index.reshape(-1).long()
    counts = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(dim=0)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    # Dropped rows go last.
    permutation = torch.where(flat < 0, experts, flat).argsort(stable=True)
    return counts.int(), offsets.int(), permutation.int()
