"""Peers of expert_attention: torch's scaled_dot_product_attention in its own layout.

One peer pads rows to the longest sample and masks keys, as the published layer does. The other uses no padding,
which works if all samples have the same number of valid tokens.
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


def unavailable_reason(case: Case, name: str) -> str:
    if name == DENSE and operator.shape_of(case).ragged:
        return "samples have different lengths"
    return ""


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    """Timed in the layout of scaled_dot_product_attention; the check converts packed rows to it and back."""
    leaves = operator.make_leaves(case, dtype)
    shape = operator.shape_of(case)
    mask = _no_padding(shape) if name == DENSE else _key_mask(shape)
    mask = mask.to(case.device).repeat(shape.views, 1)
    keys = None if name == DENSE else mask.repeat(shape.fusion_models, 1)[:, None, None]
    heads = {key: _to_heads(x, mask) for key, x in leaves.items()}

    def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=p)

    def checked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query, key, value = (_to_heads(x, mask) for x in (q, k, v))
        return _to_rows(attend(query, key, value, 0.0), mask)

    timed = operator.ready(functools.partial(attend, p=operator.rate_of(case)), heads, case.phase)
    return Prepared(timed.call, lambda: operator.ready(checked, leaves, case.phase).outputs())


def _no_padding(shape: LayerShape) -> Tensor:
    return torch.ones(shape.batch, shape.valid_tokens[0], dtype=torch.bool)


def _key_mask(shape: LayerShape) -> Tensor:
    """(B, L) bool: valid tokens of each sample; the padding of a modality is at its end."""
    sizes = zip(shape.padded_tokens, shape.lengths, strict=True)
    return torch.cat([torch.arange(n) < torch.tensor(valid)[:, None] for n, valid in sizes], 1)


def _to_heads(rows: Tensor, mask: Tensor) -> Tensor:
    """Packed rows (E, n, H, d) as (E * problems, H, L, d); mask: (problems, L), where the rows belong."""
    experts, _, heads, width = rows.shape
    place = mask.flatten().nonzero().squeeze(1)
    x = rows.new_zeros(experts, mask.numel(), heads, width).index_copy(1, place, rows)
    return x.view(-1, mask.shape[1], heads, width).transpose(1, 2).contiguous()


def _to_rows(heads: Tensor, mask: Tensor) -> Tensor:
    x = heads.transpose(1, 2)
    return x.reshape(-1, mask.numel(), *x.shape[2:])[:, mask.flatten()]
