"""Peer of expert_attention: torch's scaled_dot_product_attention in its own layout, without padding.

All samples must have the same number of valid tokens.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.operators import expert_attention as operator
from flmoe_kernels.profile.prepared import Prepared

PEERS = ("unpadded sdpa",)


def unavailable_reason(case: Case, name: str) -> str:
    return "samples have different lengths" if operator.shape_of(case).ragged else ""


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    """Timed in the layout of scaled_dot_product_attention; the check converts packed rows to it and back."""
    leaves = operator.make_leaves(case, dtype)
    length = operator.shape_of(case).valid_tokens[0]
    heads = {key: _to_heads(x, length) for key, x in leaves.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)

    def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (_to_heads(x, length) for x in (q, k, v))
        return attend(query, key, value, 0.0).transpose(1, 2).reshape(q.shape)

    timed = operator.ready(functools.partial(attend, p=operator.rate_of(case)), heads, case.phase)
    return Prepared(timed.call, lambda: operator.ready(checked, leaves, case.phase).outputs())


def _to_heads(rows: Tensor, length: int) -> Tensor:
    """Packed rows (E, n, H, d) of problems with L rows each as (E * problems, H, L, d)."""
    return rows.reshape(-1, length, *rows.shape[2:]).transpose(1, 2).contiguous()
