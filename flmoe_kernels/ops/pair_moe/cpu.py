"""pair_moe in the native CPU module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import contiguous, expect, rows_contiguous

from .call import REDUCTIONS, PairCall
from .native_call import arguments, checked, checked_head, grad_view, head_view


def forward(call: PairCall, reduce: str) -> tuple[Tensor, Tensor]:
    call = checked(call)
    # The kernel skips masked rows.
    make = empty if call.mask_a is None else _zeros
    y = make(call.y_shape(reduce), call.q, call.y_dtype(reduce))
    mass = make(call.q.shape[:3], call.q, call.statistics)
    native().pair_forward(
        *arguments(call), threads(), REDUCTIONS.index(reduce), address(y), address(mass)
    )
    return y, mass


def backward(
    call: PairCall, reduce: str, grad_y: Tensor, grad_mass: Tensor | None, wants: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, a, c in their dtype, and of the gate's bias in the statistics dtype.

    Those not requested are empty.
    """
    call = checked(call)
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
        *arguments(call),
        threads(),
        REDUCTIONS.index(reduce),
        grad_view(grad_y, reduce),
        address(grad_mass),
        *(address(g) if want else 0 for g, want in zip((*grads, bias), wants, strict=True)),
        fresh,
    )
    q, k, a, c = (grad.to(call.q.dtype) for grad in grads)
    return q, k, a, c, bias


def pair_map(call: PairCall, head: Tensor) -> Tensor:
    call, head = checked(call), checked_head(call, head)
    shape = (call.batch, call.experts, call.rows, call.columns)
    masked = call.mask_a is not None or call.mask_b is not None
    phi = (_zeros if masked else empty)(shape, call.q, call.statistics)
    native().pair_map(*arguments(call), threads(), head_view(head), address(phi))
    return phi


def top_pairs(call: PairCall, head: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    call, head = checked(call), checked_head(call, head)
    shape = (call.batch, call.experts + 1, count)
    values = empty(shape, call.q, call.statistics)
    i, j = (empty(shape, call.q, torch.int64) for _ in range(2))
    sizes = (call.batch, call.experts, call.rows, call.columns, call.rank, call.width)
    candidates = empty((native().pair_candidates(sizes, count),), call.q, torch.uint8)
    tensors = (values, i, j, candidates)
    native().pair_top(*arguments(call), threads(), head_view(head), count, *map(address, tensors))
    return values, i, j


def _zeros(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return empty(shape, like, dtype).zero_()
