"""Routing through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it. Reading the values of an index would wait, so a row out of range counts as dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous, expect
from flmoe_kernels.core.triton.launches import run

from . import launch as launches

__all__ = ["dispatch", "gate", "limit"]
# Places are int32, and so are the kernels' sums of a few more of them.
_MOST_ROWS = 2**30


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
    index = logits.new_empty((tokens, top_k), dtype=torch.int64)
    weight = logits.new_empty((tokens, top_k))
    run([launches.gate_launch(logits.contiguous(), index, weight, over_all)], logits.device)
    return index, weight


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    _check_rows(index)
    expect("mask", mask, index.shape[:1], torch.bool, index.device)
    index, mask = index.contiguous(), contiguous(mask)
    kept = torch.empty_like(index)
    before, found = None, []
    if capacity is not None:
        before, totals = _counters(index, experts)
        found += launches.count_launches(index, mask, before, totals)
    most = min(index.numel(), capacity or 0)
    found.append(launches.limit_launch(index, mask, before, kept, experts, most))
    run(found, index.device)
    return kept


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(index)
    index = index.contiguous()
    sizes = (experts, experts + 1, index.numel())
    if not index.numel():
        counts, offsets, permutation = (index.new_zeros((n,), dtype=torch.int32) for n in sizes)
        return counts, offsets, permutation
    counts, offsets, permutation = (index.new_empty((n,), dtype=torch.int32) for n in sizes)
    before, totals = _counters(index, experts)
    found = launches.count_launches(index, None, before, totals)
    found.append(launches.place_launch(index, before, totals, counts, offsets, permutation))
    run(found, index.device)
    return counts, offsets, permutation


def _counters(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    blocks = launches.count_blocks(index)
    counts = index.new_empty((blocks, experts + 1), dtype=torch.int32)
    return counts, index.new_empty((experts + 1,), dtype=torch.int32)


def _check_rows(index: Tensor) -> None:
    expect("index", index, index.shape, torch.int64, index.device)
    if index.numel() > _MOST_ROWS:
        raise ValueError(f"index: expected up to 2^30 rows N * K, got {index.numel()}")
