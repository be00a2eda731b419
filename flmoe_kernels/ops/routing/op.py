"""torch.library registration of routing: backends, schemas, fakes, autograd.

The reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.flops import no_products
from flmoe_kernels.core.registration import Derivative, define


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


def _gate_backward(grad: Tensor, *saved: Any) -> Tensor:
    """Derivative of the softmax. If it is over the chosen experts, the weights suffice."""
    logits, index, weight, over_all, *_ = saved
    wide = statistics_dtype(logits.dtype)
    grad, weight = grad.to(wide), weight.to(wide)
    inner = (grad * weight).sum(dim=1, keepdim=True)
    chosen = torch.zeros_like(logits, dtype=wide).scatter(1, index, weight * grad)
    if over_all:
        result = chosen - logits.to(wide).softmax(dim=1) * inner
    else:
        result = chosen.scatter_add(1, index, -weight * inner)
    return result.to(logits.dtype)


def _dispatch_fake(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (experts, experts + 1, index.numel())
    counts, offsets, permutation = (index.new_empty((n,), dtype=torch.int32) for n in sizes)
    return counts, offsets, permutation


define(
    "routing_gate",
    "(Tensor logits, SymInt top_k, bool over_all) -> (Tensor weight, Tensor index)",
    _gate,
    _gate_fake,
    Derivative(
        1,
        lambda logits, _k, over_all, weight, index: ((logits, index, weight), (over_all,)),
        _gate_backward,
    ),
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
