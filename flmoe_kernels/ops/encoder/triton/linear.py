"""expert_linear in Triton: checks, allocation and launches.

No call synchronizes with the GPU, and allocations and launches depend only on shapes, so that CUDA graphs can
capture them.
"""

from __future__ import annotations

from torch import Tensor

from flmoe_kernels.core.operands import expect, expect_float32_or_half
from flmoe_kernels.core.triton.launches import run

from . import linear_launch as launches
from .view_rows import view_rows

# Block offsets of rows and columns, and numbers of tiles, are 32 bits wide.
_MOST_ROWS, _MOST_WIDTH = 2**30, 2**24


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, count: Tensor | None = None, views: int = 1
) -> Tensor:
    """Linear maps x (E, R, K), weight (E, N, K), bias (E, N) -> (E, R, N).

    With a count only the first `count` of the R / views rows of each view are read and written.
    """
    _check(x, weight)
    expect("bias", bias, weight.shape[:2], x.dtype, x.device)
    computed = view_rows(count, views, x.shape[1], x.device)
    out, found = launches.forward(x, weight, bias, computed)
    run(found, x.device)
    return out


def linear_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    want_x: bool,
    want_weight: bool,
    want_bias: bool,
    count: Tensor | None = None,
    views: int = 1,
    *,
    zeros: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; gradients that are not requested are empty.

    With a count the gradient of x is 0 in the other rows, or not written unless `zeros`.
    """
    _check(x, weight)
    expect("grad_out", grad_out, (*x.shape[:2], weight.shape[1]), x.dtype, x.device)
    computed = view_rows(count, views, x.shape[1], x.device)
    wants = (want_x, want_weight, want_bias)
    grads, found = launches.backward(grad_out, x, weight, *wants, computed, zeros=zeros)
    run(found, x.device)
    return grads


def _check(x: Tensor, weight: Tensor) -> None:
    """Fail unless the kernels can read these: an operator can be called without the public API."""
    expect_float32_or_half("x", x)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected three dimensions, got {tuple(tensor.shape)}")
    expect("x", x, (weight.shape[0], x.shape[1], weight.shape[2]), x.dtype, x.device)
    expect("weight", weight, weight.shape, x.dtype, x.device)
    if x.shape[1] > _MOST_ROWS or max(weight.shape[1:]) > _MOST_WIDTH:
        raise ValueError(
            f"x, weight: expected up to 2^30 rows and widths of 2^24, got {tuple(x.shape)} "
            f"and {tuple(weight.shape)}"
        )
