"""The encoder's operators in plain PyTorch, with the same dropout masks.

E experts, R rows, K input, F hidden and N output width, D width, V views, n rows of one view, S segments.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from flmoe_kernels.core.dropout import keep_mask, keep_scale


def dropout(x: Tensor, seed: Tensor | None, p: float, stream: int = 0) -> Tensor:
    """Dropout of x (E, R, D) with counters (stream, expert, row, column)."""
    if seed is None or p == 0:
        return x
    experts, rows, width = x.shape
    head = torch.arange(experts).view(-1, 1, 1)
    row = torch.arange(rows).view(-1, 1)
    kept = keep_mask(seed, p, stream, head, row, torch.arange(width))
    return torch.where(kept, x * keep_scale(p), 0.0)


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear maps x (E, R, K), weight (E, N, K), bias (E, N) -> (E, R, N)."""
    out = x @ weight.mT
    return out if bias is None else out + bias.unsqueeze(1)


def expert_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm of x (E, R, D) with each expert's gain and shift (E, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * gain.unsqueeze(1) + shift.unsqueeze(1)


def dropout_add_norm(
    residual: Tensor | None,
    update: Tensor,
    gain: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return residual + dropout(update), or without residual u + dropout(u), u = dropout(update), and its norm."""
    dropped = dropout(update, seed, p)
    base = dropout(dropped, seed, p, stream=1) if residual is None else residual
    total = base + dropped
    return total, expert_norm(total, gain, shift, eps)


def expert_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    """Return dropout(GELU(x w_in^T + b_in)) w_out^T + b_out, with the exact error function."""
    hidden = dropout(F.gelu(expert_linear(x, w_in, b_in)), seed, p)
    return expert_linear(hidden, w_out, b_out)


def dropout_add_pool(
    residual: Tensor,
    update: Tensor,
    cu_segments: Tensor,
    views: int,
    seed: Tensor | None,
    p: float,
) -> Tensor:
    """Means (E, V, S, D) of residual + dropout(update), (E, V * n, D), over the segments of each view."""
    experts, rows, width = residual.shape
    total = (residual + dropout(update, seed, p)).view(experts, views, rows // views, width)
    bounds = cu_segments.tolist()
    means = [total[:, :, a:b].sum(dim=2) / max(b - a, 1) for a, b in itertools.pairwise(bounds)]
    return torch.stack(means, dim=2)


def expand_views(x: Tensor, modality: Tensor, views: int) -> Tensor:
    """Expand x (E, 2, n, D), original and replaced rows, to (E, V, n, D): view v replaces modality v - 1."""
    replaced = modality.view(1, -1) == torch.arange(views).view(-1, 1) - 1
    return torch.where(replaced.view(1, views, -1, 1), x[:, 1:2], x[:, 0:1])
