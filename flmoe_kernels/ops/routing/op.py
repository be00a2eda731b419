"""torch.library registration of routing: backends, schemas, fakes, autograd.

The reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.flops import no_products
from flmoe_kernels.core.registration import define


def _kernels(backend: str) -> Any:
    """The backend's module with gate, limit and dispatch."""
    match backend:
        case "cpu":
            from . import cpu

            return cpu
        case "triton":
            from . import triton

            return triton
        case "cuda":
            from . import cuda

            return cuda
        case _:
            raise ValueError(f"backend: expected cpu, triton or cuda, got {backend!r}")


def _gate(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    index, weight = _kernels(backend).gate(*args)
    return weight, index


def _gate_fake(logits: Tensor, top_k: int, _over_all: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


def _gate_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.over_all, _ = inputs
    weight, index = output
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, index, weight)


def _gate_autograd(ctx: Any, grad: Tensor | None, _grad_index: None) -> tuple:
    """Derivative of the softmax. If it is over the chosen experts, the weights suffice."""
    if grad is None:
        return (None,) * 4
    logits, index, weight = ctx.saved_tensors
    wide = statistics_dtype(logits.dtype)
    grad, weight = grad.to(wide), weight.to(wide)
    inner = (grad * weight).sum(dim=1, keepdim=True)
    chosen = torch.zeros_like(logits, dtype=wide).scatter(1, index, weight * grad)
    if ctx.over_all:
        result = chosen - logits.to(wide).softmax(dim=1) * inner
    else:
        result = chosen.scatter_add(1, index, -weight * inner)
    return result.to(logits.dtype), None, None, None


def _dispatch_fake(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (experts, experts + 1, index.numel())
    counts, offsets, permutation = (index.new_empty((n,), dtype=torch.int32) for n in sizes)
    return counts, offsets, permutation


define(
    "routing_gate",
    "(Tensor logits, SymInt top_k, bool over_all) -> (Tensor weight, Tensor index)",
    _gate,
    _gate_fake,
    (_gate_setup, _gate_autograd),
    flops=no_products,
)
define(
    "routing_limit",
    "(Tensor index, Tensor? mask, SymInt experts, SymInt? capacity) -> Tensor",
    lambda backend, *args: _kernels(backend).limit(*args),
    lambda index, *_rest: index.new_empty(index.shape),
    flops=no_products,
)
define(
    "routing_dispatch",
    "(Tensor index, SymInt experts) -> (Tensor, Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).dispatch(*args),
    _dispatch_fake,
    flops=no_products,
)
