"""Reference of expert_attention, which stores all (L, L) maps."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flmoe_kernels.core.dropout import keep_mask, keep_scale


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output (G, rows, H, d) and log-sum-exp (G, rows, H) of q, k, v (G, rows, H, d).

    The rows cu_seqlens[p] to cu_seqlens[p + 1] - 1 of problem p attend only to each other:
    out = dropout(softmax(scale * q k^T)) v. Rows outside all problems give 0.
    """
    groups, rows, heads, _ = q.shape
    bounds = cu_seqlens.tolist()
    problems = len(bounds) - 1
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    pieces: list[Tensor] = [_zeros_of(*(x[:, : bounds[0]] for x in (q, k, v)))]
    sums: list[Tensor] = [q.new_zeros((groups, bounds[0], heads), dtype=stats)]
    for p, (first, last) in enumerate(itertools.pairwise(bounds)):
        query, key, value = (x[:, first:last].transpose(1, 2) for x in (q, k, v))
        scores = (query @ key.transpose(-2, -1)) * scale
        probabilities = scores.softmax(dim=-1)
        if seed is not None and dropout_p > 0:
            kept = _problem_mask(seed, dropout_p, groups, heads, last - first, problems, p)
            probabilities = probabilities * kept.to(q.device) * keep_scale(dropout_p)
        pieces.append((probabilities @ value).transpose(1, 2))
        sums.append(scores.to(stats).logsumexp(dim=-1).transpose(1, 2))
    tail = rows - bounds[-1]
    pieces.append(_zeros_of(*(x[:, bounds[-1] :] for x in (q, k, v))))
    sums.append(q.new_zeros((groups, tail, heads), dtype=stats))
    return torch.cat(pieces, dim=1), torch.cat(sums, dim=1)


def _zeros_of(*rows: Tensor) -> Tensor:
    """Zeros for rows outside all problems, with zero gradients for any values of the rows."""
    never = torch.zeros_like(rows[0], dtype=torch.bool)
    return torch.stack([torch.where(never, x, 0.0) for x in rows]).sum(dim=0)


def _problem_mask(
    seed: Tensor, dropout_p: float, groups: int, heads: int, length: int, problems: int, p: int
) -> Tensor:
    """Dropout mask (G, H, length, length) of problem p in every group; problems are numbered group by group."""
    device = seed.device
    ids = (torch.arange(groups, device=device) * problems + p).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(-1, 1, 1)
    row = torch.arange(length, device=device).view(-1, 1)
    return keep_mask(seed, dropout_p, ids, head, row, torch.arange(length, device=device))
