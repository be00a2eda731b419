"""pair_moe in the native CPU module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import contiguous, expect, rows_contiguous

from .call import REDUCE_EXPERTS, REDUCE_NONE, REDUCTIONS, PairCall

View = tuple[int, int, int, int]


def forward(call: PairCall, reduce: str) -> tuple[Tensor, Tensor]:
    call = _checked(call)
    # The kernel skips masked rows.
    make = empty if call.mask_a is None else _zeros
    y = make(call.y_shape(reduce), call.q, call.y_dtype(reduce))
    mass = make(call.q.shape[:3], call.q, call.statistics)
    native().pair_forward(*_common(call), REDUCTIONS.index(reduce), address(y), address(mass))
    return y, mass


def backward(
    call: PairCall, reduce: str, grad_y: Tensor, grad_mass: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, a, c in their dtype, and of the gate's bias in the statistics dtype.

    Those not requested are empty.
    """
    call = _checked(call)
    expect("grad_y", grad_y, call.y_shape(reduce), call.y_dtype(reduce))
    expect("grad_mass", grad_mass, call.q.shape[:3], call.statistics)
    grad_mass = contiguous(grad_mass)
    grad_y = rows_contiguous(grad_y)
    # The kernel skips masked tokens, and everything if a side has no valid tokens.
    fresh = call.mask_a is None and call.mask_b is None and call.rows > 0 and call.columns > 0
    make = empty if fresh else _zeros
    # Half precision is added up in float32 and rounded once.
    inputs = zip((call.q, call.k, call.a, call.c), wants, strict=False)
    grads = [make(x.shape if want else (0,), x, call.statistics) for x, want in inputs]
    bias = empty((call.experts if wants[4] else 0,), call.q, call.statistics)
    native().pair_backward(
        *_common(call),
        REDUCTIONS.index(reduce),
        _grad_view(grad_y, reduce),
        address(grad_mass),
        *(address(g) if want else 0 for g, want in zip((*grads, bias), wants, strict=True)),
        fresh,
    )
    q, k, a, c = (grad.to(call.q.dtype) for grad in grads)
    return q, k, a, c, bias


def pair_map(call: PairCall, head: Tensor) -> Tensor:
    call, head = _checked(call), _checked_head(call, head)
    shape = (call.batch, call.experts, call.rows, call.columns)
    masked = call.mask_a is not None or call.mask_b is not None
    phi = (_zeros if masked else empty)(shape, call.q, call.statistics)
    native().pair_map(*_common(call), _head_view(head), address(phi))
    return phi


def top_pairs(call: PairCall, head: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    call, head = _checked(call), _checked_head(call, head)
    shape = (call.batch, call.experts + 1, count)
    values = empty(shape, call.q, call.statistics)
    i, j = (empty(shape, call.q, torch.int64) for _ in range(2))
    sizes = (call.batch, call.experts, call.rows, call.columns, call.rank, call.width)
    candidates = empty((native().pair_candidates(sizes, count),), call.q, torch.uint8)
    tensors = (values, i, j, candidates)
    native().pair_top(*_common(call), _head_view(head), count, *map(address, tensors))
    return values, i, j


def _zeros(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return empty(shape, like, dtype).zero_()


def _checked(call: PairCall) -> PairCall:
    """Return the call in the form that the kernels read; ValueError if they must not read it."""
    batch, experts, rows, rank = call.q.shape
    columns, width = call.columns, call.width
    expect("q", call.q, (batch, experts, rows, rank), call.q.dtype)
    expect("k", call.k, (batch, experts, columns, rank), call.q.dtype)
    expect("a", call.a, (batch, experts, rows, width), call.q.dtype)
    expect("c", call.c, (batch, experts, columns, width), call.q.dtype)
    bias, mask_a, mask_b = call.gate_bias, call.mask_a, call.mask_b
    expect("mask_a", mask_a, (batch, rows), torch.bool)
    expect("mask_b", mask_b, (batch, columns), torch.bool)
    if bias is not None:
        expect("gate_bias", bias, (experts,), bias.dtype)
        bias = bias.to(call.statistics).contiguous()
    return call._replace(
        q=rows_contiguous(call.q),
        k=rows_contiguous(call.k),
        a=rows_contiguous(call.a),
        c=rows_contiguous(call.c),
        gate_bias=bias,
        mask_a=contiguous(mask_a),
        mask_b=contiguous(mask_b),
    )


def _checked_head(call: PairCall, head: Tensor) -> Tensor:
    expect("head", head, (call.batch, call.experts, call.width), call.q.dtype)
    return rows_contiguous(head)


def _view(x: Tensor) -> View:
    """Address and strides of sample, token, expert of x (B, E, L, width)."""
    sample, expert, row, _ = x.stride()
    return x.data_ptr(), sample, row, expert


def _grad_view(x: Tensor, reduce: str) -> View:
    if reduce == REDUCE_NONE:
        return _view(x)
    sample, other, _ = x.stride()
    row, expert = (other, 0) if reduce == REDUCE_EXPERTS else (0, other)
    return x.data_ptr(), sample, row, expert


def _head_view(x: Tensor) -> View:
    sample, expert, _ = x.stride()
    return x.data_ptr(), sample, 0, expert


def _common(call: PairCall) -> tuple:
    tensors = (
        *map(_view, (call.q, call.k, call.a, call.c)),
        *map(address, (call.gate_bias, call.mask_a, call.mask_b)),
    )
    sizes = (call.batch, call.experts, call.rows, call.columns, call.rank, call.width)
    options = (list(call.kinds), call.top_k, call.scale, threads())
    return dtype_code(call.q), tensors, sizes, *options
