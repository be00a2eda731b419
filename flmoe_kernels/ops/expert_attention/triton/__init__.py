"""expert_attention through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.operands import (
    expect,
    expect_bounds,
    expect_float32_or_half,
    expect_seed,
)
from flmoe_kernels.core.triton.launches import Launch, run

from .choice import tiles_of
from .launch import (
    attend_launch,
    gradient_launch,
    key_gradient_launch,
    query_gradient_launch,
    readable,
    rows_contiguous,
)
from .table import AttentionCall, is_short

__all__ = ["backward", "empty", "forward"]


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    call = readable(_checked(AttentionCall(q, k, v, cu_seqlens, seed, dropout_p, scale)))
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        run([attend_launch(tiles_of("attend", call), call, out, lse)], q.device)
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
    """Writes the gradients of q, k and v into `grads`, strided as by rows_contiguous; None if not wanted."""
    call = readable(_checked(AttentionCall(q, k, v, cu_seqlens, seed, dropout_p, scale)))
    for name, x in (("grad_out", grad_out), ("out", out)):
        expect(name, x, q.shape, q.dtype, q.device)
    expect("lse", lse, q.shape[:3], torch.float32, q.device)
    if q.numel():
        grad_out, out = rows_contiguous(grad_out), rows_contiguous(out)
        run(_gradients(call, grad_out, out, lse.contiguous(), grads), q.device)


def _gradients(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, grads: Sequence[Tensor | None]
) -> Iterator[Launch]:
    if is_short(call):
        yield gradient_launch(tiles_of("gradient", call), call, grad_out, out, lse, grads)
        return
    grad_q, grad_k, grad_v = grads
    delta = torch.empty_like(lse)
    if grad_q is not None or grad_k is not None:
        tiles = tiles_of("query_gradient", call)
        yield query_gradient_launch(tiles, call, grad_out, out, lse, delta, grad_q)
    if grad_k is not None or grad_v is not None:
        # For the gradient of k it reads the delta that the first launch writes.
        tiles = tiles_of("key_gradient", call)
        yield key_gradient_launch(tiles, call, grad_out, lse, delta, grad_k, grad_v)


def _checked(call: AttentionCall) -> AttentionCall:
    """Fail unless the kernels can read this call: an operator may be called directly."""
    q = call.q
    if q.dim() != 4:
        raise ValueError(f"q: expected (G, rows, H, d), got {tuple(q.shape)}")
    expect_float32_or_half("q", q)
    for name, x in (("k", call.k), ("v", call.v)):
        expect(name, x, q.shape, q.dtype, q.device)
    expect_bounds("cu_seqlens", call.cu_seqlens, q.device)
    expect_seed(call.seed, q.device)
    return call
