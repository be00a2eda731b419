"""Public API of routing: choice of experts, capacity, order of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.operands import expert_out_of_range

from . import op as _op  # noqa: F401  registers flmoe::routing_gate, routing_limit, routing_dispatch
from . import reference

__all__ = ["Dispatch", "Routing", "dispatch", "gate", "limit", "require_index", "reweigh"]
_OPERATOR = "routing"
SELECTED, ALL = "selected", "all"


class Routing(NamedTuple):
    """Experts of each token: index (N, K) int64, best first, -1 = dropped; weight (N, K), 0 if dropped."""

    index: Tensor  # type: ignore[assignment]  # the common term, although tuple has a method `index`
    weight: Tensor


class Dispatch(NamedTuple):
    """Rows sorted by expert, all int32: counts (E), offsets (E + 1), and permutation (N * K).

    permutation[offsets[e]:offsets[e + 1]] are the positions n * K + k of expert e's rows, in token order; the
    dropped rows follow after offsets[E].
    """

    counts: Tensor
    offsets: Tensor
    permutation: Tensor


def gate(
    logits: Tensor,
    top_k: int,
    *,
    over: str = SELECTED,
    capacity: int | None = None,
    mask: Tensor | None = None,
    renormalize: bool = True,
    backend: str | None = None,
) -> Routing:
    """Choose each token's top_k experts and compute their weights.

    Ties go to the expert with the lower index. If an expert has more than `capacity` rows, it keeps the tokens
    with the lowest index (of one token, the better choice first) and drops the rest, deterministically.

    Args:
        logits: (N, E) float32, float64, bfloat16 or float16.
        top_k: K, 1 to E.
        over: "selected" for a softmax over the chosen experts, "all" for one over all E.
        capacity: maximum number of rows per expert; None for no limit.
        mask: (N) bool, True = valid; a masked token is dropped and uses no capacity.
        renormalize: with "selected", give a dropped choice's weight to the token's remaining choices.
        backend: "reference", "cpu", "triton" or "cuda"; default by device, see flmoe_kernels.use_backend.

    Returns:
        Routing; weight is differentiable.

    Raises:
        TypeError, ValueError: an argument is invalid; the error names it, what was expected and what it got.
        BackendUnavailable: the requested backend cannot run this.
    """
    check.require_tensor("logits", logits)
    check.require_floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected (N, E) with E from 1, got {tuple(logits.shape)}")
    check.require_count("top_k", top_k, 1, logits.shape[1])
    if over not in (SELECTED, ALL):
        raise ValueError(f"over: expected {SELECTED!r} or {ALL!r}, got {over!r}")
    if capacity is not None:
        check.require_count("capacity", capacity, 0)
    if mask is not None:
        _require_mask(mask, "logits", logits)
    name = backends.choose(_OPERATOR, logits, backend)
    if name == backends.REFERENCE:
        index, weight = reference.gate(logits, top_k, over == ALL)
    else:
        weight, index = torch.ops.flmoe.routing_gate(logits, top_k, over == ALL, name)
    if mask is None and capacity is None:
        return Routing(index, weight)
    free = Routing(index, weight)
    index = _limit(index, logits.shape[1], capacity, mask, name)
    share = over == SELECTED and renormalize and capacity is not None
    return Routing(index, reweigh(logits, free, index, share))


def limit(
    index: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Drop the choices of masked tokens, then those beyond an expert's capacity.

    An expert keeps the tokens with the lowest index (of one token, the better choice first), deterministically.

    Args:
        index: (N, K) int64 or int32, experts from 0 to num_experts - 1, or -1 for a choice already dropped.
        num_experts: E, at least 1.
        capacity: maximum number of rows per expert; None for no limit.
        mask: (N) bool, True = valid.
        backend: as in gate.

    Returns:
        (N, K) int64, -1 where dropped.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in gate; ValueError for an index out of range on the CPU. A
            GPU drops such a row, since a check would synchronize.
    """
    check.require_count("num_experts", num_experts, 1)
    index = require_index(index, num_experts)
    if capacity is not None:
        check.require_count("capacity", capacity, 0)
    if mask is not None:
        _require_mask(mask, "index", index)
    like = index.new_empty((0,), dtype=torch.float32)
    return _limit(index, num_experts, capacity, mask, backends.choose(_OPERATOR, like, backend))


def _limit(
    index: Tensor, experts: int, capacity: int | None, mask: Tensor | None, name: str
) -> Tensor:
    if name == backends.REFERENCE:
        return reference.limit(index, mask, experts, capacity)
    return torch.ops.flmoe.routing_limit(index, mask, experts, capacity, name)


def reweigh(logits: Tensor, free: Routing, index: Tensor, renormalize: bool) -> Tensor:
    """Weights (N, K) after dropping some of the choices in `free`: 0 where index (N, K) is -1.

    Renormalized weights are a softmax over the logits of the kept choices. They are not the free weights divided
    by their sum, because small weights have lost digits and the gradient of the division overflows.
    """
    dropped = index < 0
    if not renormalize:
        return torch.where(dropped, 0.0, free.weight)
    kept = ~dropped
    # A single kept choice has weight 1 for any logit: a constant, so that no gradient is inf - inf.
    single = kept.sum(dim=1, keepdim=True) < 2
    chosen = logits.gather(1, free.index).to(statistics_dtype(logits.dtype))
    shared = chosen.masked_fill(dropped & ~single, -torch.inf).softmax(dim=1)
    return torch.where(single, kept.to(shared.dtype), shared).to(logits.dtype)


def dispatch(index: Tensor, num_experts: int, *, backend: str | None = None) -> Dispatch:
    """Sort rows by expert, in token order within an expert.

    Args:
        index: (N, K) int64 or int32, experts from 0 to num_experts - 1, or -1 for a dropped row.
        num_experts: E, at least 1.
        backend: as in gate.

    Raises:
        TypeError, ValueError, BackendUnavailable: as in gate; ValueError for an index out of range on the CPU. A
            GPU drops such a row, since a check would synchronize.
    """
    check.require_count("num_experts", num_experts, 1)
    index = require_index(index, num_experts)
    like = index.new_empty((0,), dtype=torch.float32)
    name = backends.choose(_OPERATOR, like, backend)
    if name == backends.REFERENCE:
        return Dispatch(*reference.dispatch(index, num_experts))
    return Dispatch(*torch.ops.flmoe.routing_dispatch(index, num_experts, name))


def _require_mask(mask: Tensor, other: str, like: Tensor) -> None:
    check.require_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, True = valid, got {mask.dtype}")
    if mask.shape != like.shape[:1]:
        raise ValueError(f"mask: expected ({like.shape[0]},), got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"mask: expected device {like.device} as {other}, got {mask.device}")


def require_index(index: Tensor, experts: int, reads: bool = True) -> Tensor:
    """Validate index and return it as int64; values are only checked where reading them is free.

    reads: False if the kernels check the values, as the CPU's dispatch does.
    """
    check.require_tensor("index", index)
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"index: expected int64 or int32, got {index.dtype}")
    if index.dim() != 2 or index.shape[1] < 1:
        raise ValueError(f"index: expected (N, K) with K from 1, got {tuple(index.shape)}")
    readable = reads and check.readable(index) and index.numel()
    if readable and (int(index.min()) < -1 or int(index.max()) >= experts):
        raise expert_out_of_range(index, experts)
    return index.long()
