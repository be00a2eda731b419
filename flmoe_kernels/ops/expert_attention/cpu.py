"""expert_attention in the native CPU module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flmoe_kernels.core.dropout import DRAWS, keep_threshold
from flmoe_kernels.core.dtypes import dtype_code, statistics_dtype
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import expect, expect_bounds, expect_seed, rows_contiguous

__all__ = ["backward", "empty", "forward"]


def _view(x: Tensor) -> tuple[int, int, int, int]:
    group, row, head, _ = x.stride()
    return x.data_ptr(), group, row, head


def _expect(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, seed: Tensor | None) -> None:
    if q.dim() != 4:
        raise ValueError(f"q: expected (G, rows, H, d), got {tuple(q.shape)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(name, x, q.shape, q.dtype)
    expect_bounds("cu_seqlens", cu_seqlens)
    expect_seed(seed)


def _common(
    q: Tensor, cu_seqlens: Tensor, seed: Tensor | None, dropout_p: float, scale: float
) -> tuple:
    groups, rows, heads, width = q.shape
    sizes = (groups, cu_seqlens.numel() - 1, rows, heads, width)
    threshold = DRAWS if seed is None else keep_threshold(dropout_p)
    return cu_seqlens.data_ptr(), sizes, scale, address(seed), threshold


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _expect(q, k, v, cu_seqlens, seed)
    q, k, v, cu_seqlens = (*map(rows_contiguous, (q, k, v)), cu_seqlens.contiguous())
    out = empty(q.shape, q)
    lse = empty(q.shape[:3], q, statistics_dtype(q.dtype))
    native().attention_forward(
        dtype_code(q),
        _view(q),
        _view(k),
        _view(v),
        *_common(q, cu_seqlens, seed, dropout_p, scale),
        out.data_ptr(),
        lse.data_ptr(),
        threads(),
    )
    return out, lse


def backward(
    grads: Sequence[Tensor | None],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> None:
    """Write the gradients of q, k and v to `grads`, whose last dimension is contiguous; None if not wanted."""
    _expect(q, k, v, cu_seqlens, seed)
    expect("grad_out", grad_out, q.shape, q.dtype)
    expect("out", out, q.shape, q.dtype)
    expect("lse", lse, q.shape[:3], statistics_dtype(q.dtype))
    out, lse = out.contiguous(), lse.contiguous()
    q, k, v, grad_out = map(rows_contiguous, (q, k, v, grad_out))
    cu_seqlens = cu_seqlens.contiguous()
    native().attention_backward(
        dtype_code(q),
        _view(q),
        _view(k),
        _view(v),
        *_common(q, cu_seqlens, seed, dropout_p, scale),
        out.data_ptr(),
        lse.data_ptr(),
        threads(),
        _view(grad_out),
        *((0, 0, 0, 0) if grad is None else _view(grad) for grad in grads),
    )
