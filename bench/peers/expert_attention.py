"""Peers of expert_attention: torch's scaled_dot_product_attention in its own layout.

One peer pads rows to the longest sample and masks keys, as the published layer does. The other uses no padding,
which works because all samples of the named shapes have the same number of valid tokens.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.operators import expert_attention as operator
from flmoe_kernels.profile.prepared import Prepared
from flmoe_kernels.profile.shapes import LayerShape

PADDED, DENSE = "reference+sdpa", "unpadded sdpa"
PEERS = (PADDED, DENSE)


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    """Timed in the layout of scaled_dot_product_attention; the check converts packed rows to it and back."""
    leaves = operator.make_leaves(case, dtype)
    shape = operator.shape_of(case)
    mask = None if name == DENSE else _key_mask(shape).to(case.device)
    heads = {key: _to_heads(shape, x, mask) for key, x in leaves.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        keys = None if mask is None else mask[None, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=p)

    def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (_to_heads(shape, x, mask) for x in (q, k, v))
        return _to_rows(shape, attend(query, key, value, 0.0), mask)

    timed = operator.ready(functools.partial(attend, p=operator.rate_of(case)), heads, case.phase)
    return Prepared(timed.call, lambda: operator.ready(checked, leaves, case.phase).outputs())


def _key_mask(shape: LayerShape) -> Tensor:
    """(L,) bool: valid tokens of a sample; the padding of a modality is at its end."""
    counts = zip(shape.tokens, shape.valid, strict=True)
    return torch.cat([torch.arange(n) < (n if valid is None else valid) for n, valid in counts])


def _to_heads(shape: LayerShape, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Packed rows (E, n, H, d) as (E * problems, H, L, d); L counts all tokens if a mask is given."""
    width = rows.shape[-1]
    x = rows.reshape(-1, shape.valid_tokens, shape.heads, width)
    if mask is not None:
        place = mask.nonzero().squeeze(1)
        x = x.new_zeros(len(x), len(mask), shape.heads, width).index_copy(1, place, x)
    return x.transpose(1, 2).contiguous()


def _to_rows(shape: LayerShape, heads: Tensor, mask: Tensor | None) -> Tensor:
    x = heads.transpose(1, 2)
    if mask is not None:
        x = x[:, mask]
    return x.reshape(shape.fusion_models, -1, shape.heads, x.shape[-1])
