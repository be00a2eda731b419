"""Reference of pair_moe in plain PyTorch, which stores all (La, Lb) maps.

    logit[b,e,i,j] = scale * q[b,e,i] . k[b,e,j] + gate_bias[e]
    p[b,:,i,j]     = softmax over the experts; with top_k only over the top_k largest, the rest 0;
                     0 where a token is masked
    y[b,e,i]       = sum over j of p * (s1[e] a_i + s2[e] c_j + s3[e] a_i * c_j)

A masked token adds nothing and gets no gradient, whatever its values are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.dtypes import without_autocast

from .call import REDUCE_EXPERTS, REDUCE_POOL, PairCall
from .kinds import coefficients_of


def forward(call: PairCall, reduce: str) -> tuple[Tensor, Tensor]:
    """Return y in the inputs' dtype (for "pool" the statistics dtype), and mass (B, E, La) in the latter."""
    # Autocast would compute the gate and the sums in half precision.
    with without_autocast(call.q.device):
        return _forward(call, reduce)


def _forward(call: PairCall, reduce: str) -> tuple[Tensor, Tensor]:
    q, k, a, c = _without_masked(call)
    p = _gate(call, q, k)
    mass = p.sum(dim=3)
    per_expert = []
    for e, (s1, s2, s3) in enumerate(coefficients_of(call.kinds)):
        left = a[:, e]
        y = torch.zeros_like(left)
        if s1:
            y = y + s1 * left * mass[:, e, :, None].to(left.dtype)
        if s2 or s3:
            t = p[:, e].to(c.dtype) @ c[:, e]
            y = y + (s2 * t if s2 else s3 * left * t)
        per_expert.append(y)
    y = torch.stack(per_expert, dim=1)
    if reduce == REDUCE_EXPERTS:
        y = y.sum(dim=1)
    elif reduce == REDUCE_POOL:
        y = y.sum(dim=2, dtype=call.statistics)
    return y, mass


def pair_map(call: PairCall, head: Tensor) -> Tensor:
    """phi (B, E, La, Lb) = p * (message . head) for head (B, E, V), in the statistics dtype."""
    with without_autocast(call.q.device):
        return _pair_map(call, head)


def _pair_map(call: PairCall, head: Tensor) -> Tensor:
    q, k, a, c = (x.to(call.statistics) for x in _without_masked(call))
    w = head.to(call.statistics)
    values = []
    for e, (s1, s2, s3) in enumerate(coefficients_of(call.kinds)):
        value = q.new_zeros((call.batch, call.rows, call.columns))
        if s1:
            value = value + s1 * torch.einsum("biv,bv->bi", a[:, e], w[:, e])[:, :, None]
        if s2:
            value = value + s2 * torch.einsum("bjv,bv->bj", c[:, e], w[:, e])[:, None, :]
        if s3:
            value = value + s3 * ((a[:, e] * w[:, e, None]) @ c[:, e].mT)
        values.append(value)
    return _gate(call, q, k) * torch.stack(values, dim=1)


def top_pairs(call: PairCall, head: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest contributions of each expert and, last, of the sum over experts.

    Returns:
        values (B, E + 1, count) in the statistics dtype, i and j (B, E + 1, count) int64; in descending order,
        ties by (i, j), NaN first as in torch.topk; -inf and -1 if fewer pairs are valid.
    """
    phi = pair_map(call, head)
    phi = torch.cat([phi, phi.sum(dim=1, keepdim=True)], dim=1)
    found, places = phi.flatten(2).sort(dim=2, descending=True, stable=True)
    valid = _valid_pairs(call)
    if valid is not None:
        # Valid pairs first, in their order: a valid pair with -inf comes before all masked pairs.
        there = valid.flatten(2).expand(found.shape).gather(2, places)
        order = (~there).to(torch.uint8).argsort(dim=2, stable=True)
        there, found, places = (x.gather(2, order) for x in (there, found, places))
        found, places = found.masked_fill(~there, -torch.inf), places.masked_fill(~there, -1)
    missing = max(count - places.shape[2], 0)
    found = F.pad(found[:, :, :count], (0, missing), value=-torch.inf)
    places = F.pad(places[:, :, :count], (0, missing), value=-1)
    columns = max(call.columns, 1)
    i, j = (torch.where(places < 0, -1, x) for x in (places // columns, places % columns))
    return found, i, j


def _without_masked(call: PairCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, a, c with zeros for masked tokens, so that NaN in padding has no effect."""

    def keep(x: Tensor, mask: Tensor | None) -> Tensor:
        return x if mask is None else torch.where(mask[:, None, :, None], x, 0.0)

    return (
        keep(call.q, call.mask_a),
        keep(call.k, call.mask_b),
        keep(call.a, call.mask_a),
        keep(call.c, call.mask_b),
    )


def _gate(call: PairCall, q: Tensor, k: Tensor) -> Tensor:
    """Probabilities p (B, E, La, Lb) in the statistics dtype."""
    logits = (q.to(call.statistics) @ k.to(call.statistics).mT) * call.scale
    if call.gate_bias is not None:
        logits = logits + call.gate_bias.to(logits.dtype)[:, None, None]
    if call.top_k < call.experts:
        kept = _rank(logits) < call.top_k
        p = torch.where(kept, logits.masked_fill(~kept, -torch.inf).softmax(dim=1), 0.0)
    else:
        p = logits.softmax(dim=1)
    valid = _valid_pairs(call)
    return p if valid is None else torch.where(valid, p, 0.0)


def _rank(logits: Tensor) -> Tensor:
    """Rank of each expert: the number of experts with a larger logit, or an equal logit and a lower index."""
    ranks = []
    for e in range(logits.shape[1]):
        own = logits[:, e : e + 1]
        before = (logits[:, :e] >= own).sum(dim=1) + (logits[:, e + 1 :] > own).sum(dim=1)
        ranks.append(before)
    return torch.stack(ranks, dim=1)


def _valid_pairs(call: PairCall) -> Tensor | None:
    """Mask of valid pairs, (B, 1, La, Lb) bool, or None if no token is masked."""
    if call.mask_a is None and call.mask_b is None:
        return None
    valid = torch.ones((), dtype=torch.bool, device=call.q.device)
    if call.mask_a is not None:
        valid = valid & call.mask_a[:, None, :, None]
    if call.mask_b is not None:
        valid = valid & call.mask_b[:, None, None, :]
    return valid.expand(call.batch, 1, call.rows, call.columns)
