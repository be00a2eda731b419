"""torch.library registration of pair_moe: backends, schemas, fakes, autograd.

The reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.flops import values_of
from flmoe_kernels.core.registration import Derivative, define, first_order_only

from .call import REDUCE_POOL, PairCall
from .kinds import pair_backward_flops, pair_flops

_INPUTS = (
    "Tensor q, Tensor k, Tensor a, Tensor c, Tensor? gate_bias, Tensor? mask_a, Tensor? mask_b, "
    "int[] kinds, int top_k, float scale"
)
_NUM_INPUTS = 10


@functools.cache
def _kernels(backend: str) -> Any:
    """The backend's module with forward, backward, pair_map and top_pairs for a PairCall."""
    match backend:
        case "cpu":
            from . import cpu

            return cpu
        case "cuda":
            from . import cuda

            return cuda
        case "triton":
            from . import triton

            return triton
        case _:
            raise ValueError(f"backend: expected cpu, triton or cuda, got {backend!r}")


def _call(inputs: Sequence[Any]) -> PairCall:
    q, k, a, c, gate_bias, mask_a, mask_b, kinds, top_k, scale = inputs
    return PairCall(q, k, a, c, gate_bias, mask_a, mask_b, tuple(kinds), top_k, scale)


def _forward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    *inputs, reduce = args
    return _kernels(backend).forward(_call(inputs), reduce)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, reduce = args
    call = _call(inputs)
    mass = call.q.new_empty(call.q.shape[:3], dtype=call.statistics)
    return call.q.new_empty(call.y_shape(reduce), dtype=call.y_dtype(reduce)), mass


def _backward(
    backend: str, grad_y: Tensor, grad_mass: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *inputs, reduce, wants = args
    return _kernels(backend).backward(_call(inputs), reduce, grad_y, grad_mass, wants)


def _backward_fake(_grad_y: Tensor, _grad_mass: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    call, wants = _call(args[:_NUM_INPUTS]), args[-1]
    bias = call.q.new_empty((call.experts if wants[4] else 0,), dtype=call.statistics)
    inputs = zip((call.q, call.k, call.a, call.c), wants, strict=False)
    return (*(x.new_empty(x.shape if want else (0,)) for x, want in inputs), bias)


def _pair_map(backend: str, *args: Any) -> Tensor:
    *inputs, head = args
    return _kernels(backend).pair_map(_call(inputs), head)


def _pair_map_fake(*args: Any) -> Tensor:
    call = _call(args[:_NUM_INPUTS])
    shape = (call.batch, call.experts, call.rows, call.columns)
    return call.q.new_empty(shape, dtype=call.statistics)


def _top_pairs(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, head, count = args
    return _kernels(backend).top_pairs(_call(inputs), head, count)


def _top_pairs_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, _head, count = args
    call = _call(inputs)
    shape = (call.batch, call.experts + 1, count)
    i, j = (call.q.new_empty(shape, dtype=torch.int64) for _ in range(2))
    return call.q.new_empty(shape, dtype=call.statistics), i, j


def _derivative(grad_y: Tensor | None, grad_mass: Tensor | None, *args: Any) -> tuple:
    *inputs, reduce, _wants, _backend = args
    call = _call(inputs)
    if grad_y is None:
        grad_y = call.q.new_zeros(call.y_shape(reduce), dtype=call.y_dtype(reduce))
    *grads, grad_bias = torch.ops.flmoe.pair_moe_backward(grad_y, grad_mass, *args)
    if call.gate_bias is not None:
        grad_bias = grad_bias.to(call.gate_bias.dtype)
    return *grads, grad_bias


def _valid_pairs(call: PairCall) -> int:
    """Number of pairs of all samples; masked tokens do not count if the masks are known."""
    rows, columns = (
        None if mask is None else values_of(mask.sum(dim=1)) for mask in (call.mask_a, call.mask_b)
    )
    if rows is not None and columns is not None:
        return sum(i * j for i, j in zip(rows, columns, strict=True))
    if rows is not None:
        return sum(rows) * call.columns
    # Sizes may be symbolic, so they are only multiplied.
    return call.rows * (call.batch * call.columns if columns is None else sum(columns))


def _flops(*args: Any) -> int:
    *inputs, reduce = args
    call = _call(inputs)
    each = pair_flops(call.kinds, call.rank, call.width, reduce != REDUCE_POOL)
    return each * _valid_pairs(call)


def _backward_flops(_grad_y: Tensor, _grad_mass: Tensor | None, *args: Any) -> int:
    *inputs, reduce, wants = args
    call = _call(inputs)
    each = pair_backward_flops(call.kinds, call.rank, call.width, reduce != REDUCE_POOL, wants)
    return each * _valid_pairs(call)


def _scores_flops(*args: Any) -> int:
    call = _call(args[:_NUM_INPUTS])
    return pair_flops(call.kinds, call.rank, call.width, varies=False) * _valid_pairs(call)


define(
    "pair_moe",
    f"({_INPUTS}, str reduce) -> (Tensor y, Tensor mass)",
    _forward,
    _forward_fake,
    Derivative(5, lambda *args: (args[:7], args[7:11]), _derivative, results=2),
    flops=_flops,
)
define(
    "pair_moe_backward",
    f"(Tensor grad_y, Tensor? grad_mass, {_INPUTS}, str reduce, bool[] wants) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=_backward_flops,
)
define(
    "pair_map",
    f"({_INPUTS}, Tensor head) -> Tensor",
    _pair_map,
    _pair_map_fake,
    flops=_scores_flops,
)
define(
    "top_pairs",
    f"({_INPUTS}, Tensor head, SymInt count) -> (Tensor, Tensor, Tensor)",
    _top_pairs,
    _top_pairs_fake,
    flops=_scores_flops,
)
first_order_only("pair_map", "top_pairs", times="not differentiable")
