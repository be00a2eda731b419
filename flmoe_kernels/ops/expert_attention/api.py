"""Public API of expert_attention: docstring, validation, choice of the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core import backend as backends
from flmoe_kernels.core import dropout as rng
from flmoe_kernels.core import validation as check
from flmoe_kernels.core.dtypes import without_autocast

from . import op as _op  # noqa: F401  registers flmoe::expert_attention
from .reference import attention_reference

__all__ = ["expert_attention", "expert_attention_packed"]
_OPERATOR = "expert_attention"


def expert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head softmax attention over packed rows: the rows of a problem attend only to each other.

    Problem p (an expert, view and sample) consists of the rows cu_seqlens[p] to cu_seqlens[p + 1] - 1. In each
    head, out = dropout(softmax(scale * q k^T)) v. Padded tokens are not stored. A problem may be empty; rows that
    belong to no problem give 0. Neither the forward nor the backward allocates an (L, L) buffer: the backward
    recomputes the probabilities from the log-sum-exp and the dropout mask from (seed, problem, head, row, column),
    see flmoe_kernels.core.dropout. Deterministic for any number of threads; autocast has no effect.

    Args:
        q, k, v: (rows, H, d), or (G, rows, H, d) for G groups with the same cu_seqlens (problems are then
            numbered group by group). float32, bfloat16, float16, or float64 if the backend supports it. Copied if
            the last dimension is not contiguous. Any H and d.
        cu_seqlens: (P + 1,) int32 on the same device, non-decreasing, within 0..rows.
        dropout_p: dropout rate of the attention probabilities, 0 to 1.
        seed: one int64 on the same device; if None and dropout_p > 0, drawn from torch's generator.
        scale: factor of the scores; default d^-1/2.
        return_lse: also return the log-sum-exp of each row's scaled scores, (rows, H) or (G, rows, H),
            float32 (float64 for float64). No gradient flows through it.
        backend: "reference", "cpu" or "triton"; default by device, see flmoe_kernels.use_backend.

    Returns:
        out, shaped as q; with return_lse (out, lse).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; the error names it.
        BackendUnavailable: the requested backend cannot run this.

    Cost: 4 * L^2 * d FLOP per problem and head, memory O(rows * H * d).
    Source: the fusion attention of FL-I2MoE (arXiv 2603.13326), tiled with an online softmax
    (arXiv 2205.14135).
    """
    _validate(q, k, v, cu_seqlens, dropout_p)
    if dropout_p > 0:
        seed = rng.new_seed(q.device) if seed is None else seed
        check.require_seed("seed", seed, q.device)
    else:
        seed = None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    grouped = q.dim() == 4
    q4, k4, v4 = (q, k, v) if grouped else (q[None], k[None], v[None])
    chosen = backends.choose(_OPERATOR, q, backend)
    tail = (cu_seqlens, seed, dropout_p, scale)
    if chosen == backends.REFERENCE:
        # Autocast would change the dtype of the products; it has no effect on the kernels either.
        with without_autocast(q.device):
            out, lse = attention_reference(q4, k4, v4, *tail)
        lse = lse.detach()
    else:
        out, lse = torch.ops.flmoe.expert_attention(q4, k4, v4, *tail, chosen)
    out, lse = (out, lse) if grouped else (out[0], lse[0])
    return (out, lse) if return_lse else out


def expert_attention_packed(
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Compute expert_attention of q, k, v packed as a fused projection writes them; for use in layers.

    Args:
        qkv: (G, rows, 3, H, d). Nothing is validated here; the kernels check the tensors.
        backend: the result of core.backend.choose, not the reference.
        others: as in expert_attention.

    Returns:
        out (G, rows, H, d) and lse (G, rows, H). The gradient is one tensor, shaped as qkv.
    """
    return torch.ops.flmoe.expert_attention_packed(qkv, cu_seqlens, seed, dropout_p, scale, backend)


def _validate(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, dropout_p: float) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        check.require_tensor(name, x)
    check.require_floating("q", q)
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected (rows, H, d) or (G, rows, H, d), got {tuple(q.shape)}")
    if q.shape[-1] < 1 or q.shape[-2] < 1:
        raise ValueError(f"q: expected at least one head of width 1, got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(f"{name}: expected shape {tuple(q.shape)} as q, got {tuple(x.shape)}")
        check.require_same(name, x, "q", q)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens: expected int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: expected (P + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: expected device {q.device}, got {cu_seqlens.device}")
    check.require_probability("dropout_p", dropout_p)
    if check.is_batched(cu_seqlens):
        raise ValueError(
            "cu_seqlens: expected the same lengths in all calls of a function under vmap, got a batched Tensor"
        )
    # Where values are not read, the kernels themselves stay in bounds.
    if check.readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        rows = q.shape[-3]
        if bounds[0] < 0 or bounds[-1] > rows or sorted(bounds) != bounds:
            raise ValueError(
                f"cu_seqlens: expected non-decreasing values from 0 to {rows} rows, got {bounds}"
            )
