"""Routing in the CUDA kernels of the native module, on the current stream.

Nothing here synchronizes with the GPU, and allocations depend only on shapes, so that calls can be captured in a
CUDA graph (after one call outside of a capture, which loads the kernels). Checking the values of an index would
synchronize, so an expert out of range, for which the CPU kernels raise an error, counts as dropped here.

Every function raises BackendUnavailable with the reason if the native module was built without CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address, cuda_queue, native_cuda
from flmoe_kernels.core.operands import contiguous, expect

# Rows are numbered in int32 by a permutation.
_MOST_ROWS = 2**31 - 1


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    native = native_cuda()
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
    _require_cuda("logits", logits)
    _countable("logits", tokens * top_k)
    logits = logits.contiguous()
    index = logits.new_empty((tokens, top_k), dtype=torch.int64)
    weight = logits.new_empty((tokens, top_k))
    with cuda_queue(logits.device) as queue:
        native.cuda_routing_gate(
            dtype_code(logits),
            [address(t) for t in (logits, index, weight)],
            (tokens, experts, top_k),
            over_all,
            queue,
        )
    return index, weight


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    native = native_cuda()
    tokens, choices = index.shape
    _require_cuda("index", index, torch.int64)
    expect("mask", mask, (tokens,), torch.bool, index.device)
    _countable("index", index.numel())
    index, mask = index.contiguous(), contiguous(mask)
    kept = torch.empty_like(index)
    counters = _counters(index, experts if capacity is not None else 0)
    with cuda_queue(index.device) as queue:
        native.cuda_routing_limit(
            [address(t) for t in (index, mask, kept)],
            (tokens, choices, experts),
            -1 if capacity is None else capacity,
            (address(counters), counters.numel()),
            queue,
        )
    return kept


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    native = native_cuda()
    _require_cuda("index", index, torch.int64)
    _countable("index", index.numel())
    index = index.contiguous()
    counts = index.new_empty((experts,), dtype=torch.int32)
    offsets = index.new_empty((experts + 1,), dtype=torch.int32)
    permutation = index.new_empty((index.numel(),), dtype=torch.int32)
    counters = _counters(index, experts + 1)
    with cuda_queue(index.device) as queue:
        native.cuda_routing_dispatch(
            [address(t) for t in (index, counts, offsets, permutation)],
            index.numel(),
            experts,
            (address(counters), counters.numel()),
            queue,
        )
    return counts, offsets, permutation


def _require_cuda(name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    if not x.is_cuda or (dtype is not None and x.dtype != dtype):
        raise ValueError(
            f"{name}: expected {dtype or x.dtype} on a CUDA device, got {x.dtype} on {x.device}"
        )


def _counters(index: Tensor, bins: int) -> Tensor:
    """Buffer that passes counts between launches: one int32 per bin and block of rows, from torch's allocator."""
    count = native_cuda().routing_counters(index.numel(), bins) if bins else 0
    return index.new_empty((count,), dtype=torch.int32)


def _countable(name: str, rows: int) -> None:
    if rows > _MOST_ROWS:
        raise ValueError(f"{name}: expected at most {_MOST_ROWS} rows N * K, got {rows}")
