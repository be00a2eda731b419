"""Sums and capacities over the ranks of a process group (torch.distributed)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flmoe_kernels.core import validation as check
from flmoe_kernels.ops.routing.api import dispatch, limit


def ranks_of(group: Any = None) -> int:
    """How many ranks a process group has; None is the default group.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """
    if not _is_initialized():
        raise ValueError(
            "group: expected torch.distributed to be initialised (init_process_group), got a process "
            "without a group"
        )
    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError("group: expected one that this process is in, got another")
    return ranks


def require_ranks(world_size: int, group: Any = None) -> None:
    """ValueError unless the group has world_size ranks, of which this process is one."""
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
    """routing.limit for a capacity that all ranks share: as one process that holds their tokens in rank order.

    Args:
        index: (N, K) int64 or int32, experts from 0 to experts - 1, or -1 for a choice already dropped.
        mask: (N) bool, True = valid, or None.
        experts: E, of all ranks.
        capacity: rows, from all ranks, that an expert takes at most; the same on every rank.
        group: as in parallel_routed_mlp.
        backend: of the sorting, as in dispatch.

    Returns:
        (N, K) int64, -1 where dropped. E integers per rank travel; nothing waits.

    Raises:
        TypeError, ValueError, BackendUnavailable: as routing.limit.
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
    # The dropped rows, which come last, look at some expert's room; they stay dropped whatever it is.
    expert = chosen.clamp(min=0)
    place = torch.arange(len(order), device=index.device) - offsets[expert]
    kept = torch.where(place < room[expert], chosen, -1)
    return torch.empty_like(chosen).scatter_(0, order, kept).view(index.shape)


def sum_over_ranks(x: Tensor, group: Any = None) -> Tensor:
    """x added up over the ranks, the same on all of them; any shape, of which all ranks have the same.

    The gradient is that of the sum of all ranks' objectives: added up over the ranks as well. All ranks take part
    in both directions, and x requires a gradient on all of them or on none.

    Raises:
        ValueError: torch.distributed is not initialised, or this process is not in the group.
    """
    ranks_of(group)
    return _Sum.apply(x, group)


def tokens_over_ranks(tokens: int, device: torch.device, group: Any = None) -> int:
    """How many tokens all ranks have together. The host waits: a capacity is a number that it computes with."""
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
