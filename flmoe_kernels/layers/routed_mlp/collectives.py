"""Sums and capacities over the ranks of a process group (torch.distributed)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.ops.routing.api import dispatch, limit


def ranks_of(group: Any = None) -> int:
    """The number of ranks in a process group; None is the default group."""
    if backends.transforming():
        raise NotImplementedError(
            "group: expert parallelism supports neither torch.func transforms nor forward-mode AD; "
            "a layer with world_size=1 does"
        )
    if not _is_initialized():
        raise ValueError(
            "group: expected torch.distributed to be initialised (init_process_group), got a process "
            "without a group"
        )
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError("group: expected a group that contains this process")
    return ranks


def require_ranks(world_size: int, group: Any = None) -> None:
    """Raise ValueError unless the group has world_size ranks and contains this process."""
    if not _is_initialized():
        raise ValueError(
            f"world_size: expected 1, got {world_size}: torch.distributed is not initialised "
            "(init_process_group)"
        )
    ranks = ranks_of(group)
    if ranks != world_size:
        raise ValueError(f"world_size: expected {ranks}, the ranks of the group, got {world_size}")


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def limit_over_ranks(
    index: Tensor,
    mask: Tensor | None,
    experts: int,
    capacity: int,
    group: Any = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Apply routing.limit with a capacity shared by all ranks, as in one process with all tokens in rank order.

    `experts` and `capacity`, the rows per expert, count all ranks together and are the same on each. Every rank
    sends E integers; the host does not synchronize.
    """
    ranks = ranks_of(group)
    check.require_count("capacity", capacity, 0)
    index = limit(index, experts, mask=mask, backend=backend)
    counts, offsets, permutation = dispatch(index, experts, backend=backend)
    table = counts.new_empty((ranks, experts), dtype=torch.int64)
    dist.all_gather(list(table.unbind(0)), counts.long(), group=group)
    room = capacity - table[: dist.get_rank(group)].sum(dim=0)
    order = permutation.long()
    chosen = index.reshape(-1)[order]
    # The dropped rows, which come last, read the room of some expert, but stay dropped in any case.
    expert = chosen.clamp(min=0)
    place = torch.arange(len(order), device=index.device) - offsets[expert]
    kept = torch.where(place < room[expert], chosen, -1)
    return torch.empty_like(chosen).scatter_(0, order, kept).view(index.shape)


def sum_over_ranks(x: Tensor, group: Any = None) -> Tensor:
    """Sum x over the ranks; every rank gets the result. x may have any shape, but the same on all ranks.

    The gradient is that of the sum of all ranks' objectives: it is also summed over the ranks. All ranks must take
    part in both directions, and x must require a gradient on all ranks or on none.
    """
    ranks_of(group)
    return _Sum.apply(x, group)


def tokens_over_ranks(tokens: int, device: torch.device, group: Any = None) -> int:
    """The number of tokens on all ranks together. The host synchronizes, because it computes the capacity."""
    ranks_of(group)
    total = torch.tensor(tokens, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    return int(total)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None
