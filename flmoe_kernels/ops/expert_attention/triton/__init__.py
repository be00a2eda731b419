"""expert_attention through Triton: what is allocated, and which launches fill it.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import expect, run

from .choice import tiles_of
from .launch import (
    attend_launch,
    key_gradient_launch,
    query_gradient_launch,
    readable,
    rows_contiguous,
)
from .table import AttentionCall

__all__ = ["backward", "forward"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Writes the gradients of q, k and v into `grads`, whose last dimension is contiguous."""
    call = readable(_checked(AttentionCall(q, k, v, cu_seqlens, seed, dropout_p, scale)))
    for name, x in (("grad_out", grad_out), ("out", out)):
        expect(name, x, q.shape, q.dtype, q.device)
    expect("lse", lse, q.shape[:3], torch.float32, q.device)
    if q.numel():
        delta = q.new_empty(q.shape[:3], dtype=torch.float32)
        grad_out, out, lse = rows_contiguous(grad_out), rows_contiguous(out), lse.contiguous()
        of_query, of_key = tiles_of("query_gradient", call), tiles_of("key_gradient", call)
        grad_q, grad_k, grad_v = grads
        # The second reads the delta that the first writes.
        launches = [
            query_gradient_launch(of_query, call, grad_out, out, lse, delta, grad_q),
            key_gradient_launch(of_key, call, grad_out, lse, delta, grad_k, grad_v),
        ]
        run(launches, q.device)


def _checked(call: AttentionCall) -> AttentionCall:
    """Fail unless the kernels can read this call: an operator may be called past the package's doors."""
    q = call.q
    if q.dim() != 4:
        raise ValueError(f"q: expected (G, rows, H, d), got {tuple(q.shape)}")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q: expected float32, bfloat16 or float16, got {q.dtype}")
    for name, x in (("k", call.k), ("v", call.v)):
        expect(name, x, q.shape, q.dtype, q.device)
    expect("cu_seqlens", call.cu_seqlens, (max(call.problems, 0) + 1,), torch.int32, q.device)
    if call.seed is not None:
        expect("seed", call.seed.reshape(-1), (1,), torch.int64, q.device)
    return call
