"""torch.library registration of expert_attention: backends, schemas, fakes, autograd.

`flmoe::expert_attention` takes q, k, v as three tensors; `flmoe::expert_attention_packed` takes one
(G, rows, 3, H, d) tensor, as a fused projection writes it, and returns one gradient of that shape. The reference
is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.flops import values_of
from flmoe_kernels.core.registration import Derivative, define

_TAIL = "Tensor cu_seqlens, Tensor? seed, float dropout_p, float scale"
_SAVED = "Tensor out, Tensor lse"


def _kernels(backend: str) -> Any:
    """The backend's module with forward, backward and empty for q, k, v (G, rows, H, d)."""
    match backend:
        case "cpu":
            from . import cpu

            return cpu
        case "triton":
            from . import triton

            return triton
        case _:
            raise ValueError(f"backend: expected cpu or triton, got {backend!r}")


def _forward(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    return _kernels(backend).forward(*args)


def _packed_forward(backend: str, qkv: Tensor, *tail: Any) -> tuple[Tensor, Tensor]:
    return _kernels(backend).forward(*qkv.unbind(2), *tail)


def _backward(
    backend: str, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    kernels = _kernels(backend)
    *tail, wants = args
    grads = tuple(kernels.empty(q.shape if want else (0,), q) for want in wants)
    wanted = [grad if want else None for grad, want in zip(grads, wants, strict=True)]
    kernels.backward(wanted, grad_out, q, k, v, *tail)
    return grads


def _packed_backward(backend: str, grad_out: Tensor, qkv: Tensor, *tail: Any) -> Tensor:
    kernels = _kernels(backend)
    grad = kernels.empty(qkv.shape, qkv)
    kernels.backward(grad.unbind(2), grad_out, *qkv.unbind(2), *tail)
    return grad


def _fake_output(x: Tensor, shape: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape), x.new_empty(shape[:3], dtype=statistics_dtype(x.dtype))


def product_flops(shape: Sequence[int], cu_seqlens: Tensor) -> int:
    """FLOP of one product of L x L scores with L rows, in all runs and heads, for q of this shape.

    If the lengths are unknown, all runs have the same length, as those of the layer have without masks.
    """
    groups, rows, heads, width = shape
    if bounds := values_of(cu_seqlens):
        pairs = sum((end - start) ** 2 for start, end in pairwise(bounds))
    else:
        pairs = rows * rows // torch.sym_max(cu_seqlens.shape[0] - 1, 1)
    return 2 * groups * heads * width * pairs


def _flops(q: Tensor, _k: Tensor, _v: Tensor, cu_seqlens: Tensor, *_rest: Any) -> int:
    return 2 * product_flops(q.shape, cu_seqlens)


def _backward_flops(_grad: Tensor, q: Tensor, *args: Any) -> int:
    """The scores again, then the gradients of v, the probabilities, q and k."""
    cu_seqlens, (want_q, want_k, want_v) = args[4], args[-1]
    count = 1 + want_v + (want_q or want_k) + want_q + want_k
    return count * product_flops(q.shape, cu_seqlens)


def _packed_shape(qkv: Tensor) -> Sequence[int]:
    return (*qkv.shape[:2], *qkv.shape[3:])


def _packed_flops(qkv: Tensor, cu_seqlens: Tensor, *_rest: Any) -> int:
    return 2 * product_flops(_packed_shape(qkv), cu_seqlens)


def _packed_backward_flops(
    _grad: Tensor, qkv: Tensor, _out: Tensor, _lse: Tensor, cu_seqlens: Tensor, *_rest: Any
) -> int:
    return 5 * product_flops(_packed_shape(qkv), cu_seqlens)


define(
    "expert_attention",
    f"(Tensor q, Tensor k, Tensor v, {_TAIL}) -> (Tensor, Tensor)",
    _forward,
    lambda q, *_rest: _fake_output(q, q.shape),
    Derivative(
        3,
        lambda q, k, v, cu, seed, p, scale, *results: ((q, k, v, *results, cu, seed), (p, scale)),
    ),
    flops=_flops,
)
define(
    "expert_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_SAVED}, {_TAIL}, bool[] wants) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    lambda _grad, q, *rest: tuple(q.new_empty(q.shape if want else (0,)) for want in rest[-1]),
    flops=_backward_flops,
)
define(
    "expert_attention_packed",
    f"(Tensor qkv, {_TAIL}) -> (Tensor, Tensor)",
    _packed_forward,
    lambda qkv, *_rest: _fake_output(qkv, _packed_shape(qkv)),
    Derivative(
        1,
        lambda qkv, cu, seed, p, scale, *results: ((qkv, *results, cu, seed), (p, scale)),
    ),
    flops=_packed_flops,
)
define(
    "expert_attention_packed_backward",
    f"(Tensor grad_out, Tensor qkv, {_SAVED}, {_TAIL}) -> Tensor",
    _packed_backward,
    lambda _grad, qkv, *_rest: qkv.new_empty(qkv.shape),
    flops=_packed_backward_flops,
)
