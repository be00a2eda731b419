"""Routing's CUDA kernels for comparisons: on a GPU and as host twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address

native = backends.native()


class Twin:
    """The GPU's blocks on the host. rows_per_block 0: the GPU's plan; order 0: no shuffling."""

    def __init__(self, order: int = 0, rows_per_block: int = 0) -> None:
        self.order, self.rows_per_block = order, rows_per_block

    def gate(self, logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
        tokens, experts = logits.shape
        index = torch.full((tokens, top_k), -7)
        weight = torch.empty((tokens, top_k), dtype=logits.dtype)
        tensors = [address(t) for t in (logits, index, weight)]
        sizes = (tokens, experts, top_k)
        code = dtype_code(logits)
        native.routing_twin_gate(code, tensors, sizes, over_all, self.order)
        return index, weight

    def limit(
        self, index: Tensor, mask: Tensor | None, experts: int, capacity: int | None
    ) -> Tensor:
        kept = torch.full_like(index, -7)
        tensors = [address(t) for t in (index, mask, kept)]
        sizes, most = (*index.shape, experts), -1 if capacity is None else capacity
        tail = (self.rows_per_block, self.order)
        native.routing_twin_limit(tensors, sizes, most, *tail)
        return kept

    def dispatch(self, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = (experts, experts + 1, index.numel())
        counts, offsets, places = (torch.full((n,), -7, dtype=torch.int32) for n in sizes)
        tensors = [address(t) for t in (index, counts, offsets, places)]
        tail = (self.rows_per_block, self.order)
        native.routing_twin_dispatch(tensors, index.numel(), experts, *tail)
        return counts, offsets, places


class Gpu:
    """The kernels on the GPU; results are copied to the host for comparison."""

    def __init__(self) -> None:
        from flmoe_kernels.ops.routing import cuda

        self.module = cuda

    def gate(self, logits: Tensor, top_k: int, over_all: bool) -> tuple[Tensor, Tensor]:
        index, weight = self.module.gate(logits.cuda(), top_k, over_all)
        return index.cpu(), weight.cpu()

    def limit(
        self, index: Tensor, mask: Tensor | None, experts: int, capacity: int | None
    ) -> Tensor:
        there = None if mask is None else mask.cuda()
        return self.module.limit(index.cuda(), there, experts, capacity).cpu()

    def dispatch(self, index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
        counts, offsets, places = self.module.dispatch(index.cuda(), experts)
        return counts.cpu(), offsets.cpu(), places.cpu()


def equal(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return all(map(equal, found, expected))


def random_index(tokens: int, choices: int, experts: int, seed: int, spread: int = 1) -> Tensor:
    """Random choices with dropped rows, and with experts out of range if spread is more than 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        -spread, experts + spread - 1, (tokens, choices), generator=generator
    ).contiguous()
