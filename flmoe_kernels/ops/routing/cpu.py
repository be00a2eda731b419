"""Routing in the native CPU module."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import contiguous, expect, expert_out_of_range


def gate(logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: expected 1 to {experts}, got {top_k}")
    expect("logits", logits, (tokens, experts), logits.dtype)
    logits = logits.contiguous()
    index = empty((tokens, top_k), logits, torch.int64)
    weight = empty((tokens, top_k), logits)
    tensors = [address(t) for t in (logits, index, weight)]
    sizes = (tokens, experts, top_k)
    native().routing_gate(dtype_code(logits), tensors, sizes, over_all, threads())
    return index, weight


def limit(index: Tensor, mask: Tensor | None, experts: int, capacity: int | None) -> Tensor:
    tokens, choices = index.shape
    expect("index", index, (tokens, choices), torch.int64)
    expect("mask", mask, (tokens,), torch.bool)
    index, mask = index.contiguous(), contiguous(mask)
    kept = empty(index.shape, index)
    tensors = [address(t) for t in (index, mask, kept)]
    most = -1 if capacity is None else capacity
    if not native().routing_limit(tensors, (tokens, choices, experts), most):
        raise expert_out_of_range(index, experts)
    return kept


def dispatch(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expect("index", index, index.shape, torch.int64)
    index = index.contiguous()
    counts = empty((experts,), index, torch.int32)
    offsets = empty((experts + 1,), index, torch.int32)
    permutation = empty((index.numel(),), index, torch.int32)
    tensors = [address(t) for t in (index, counts, offsets, permutation)]
    if not native().routing_dispatch(tensors, index.numel(), experts):
        raise expert_out_of_range(index, experts)
    return counts, offsets, permutation
