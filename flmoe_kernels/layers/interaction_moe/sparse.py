"""Routed MLPs of one encoder layer for all interaction experts and views.

Every interaction expert has its own gate. As in the reference, each call of a gate gets one modality of one view;
capacity and losses are per call. The choices of all gates are combined under common expert numbers, e * X + index,
so that the products of all experts are one grouped matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import Routing

from .fusion import update_by_modality
from .packing import TokenPlan

GateLosses = list[list[Tensor]]


@dataclass(frozen=True)
class RoutedWeights:
    """One gate per interaction expert, and the stacked weights of their X experts each."""

    gates: tuple[Any, ...]
    w_in: Tensor  # (E * X, F, D)
    b_in: Tensor  # (E * X, F)
    w_out: Tensor  # (E * X, D, F)
    b_out: Tensor  # (E * X, D)


@dataclass(frozen=True)
class ModalityRows:
    """The n rows of a plan, sorted by modality, and by sample within a modality."""

    order: Tensor  # (n,) int64, the row at each place
    place: Tensor  # (n,) int64, the place of each row
    sizes: tuple[int, ...]  # number of rows of each modality
    tokens: tuple[int, ...]  # the same including padding; a gate's capacity is a fraction of it
    valid: Tensor | None  # (n,) bool by place; None if all are valid


def rows_by_modality(plan: TokenPlan) -> ModalityRows:
    """Sort the rows by modality. Reads values only for a compact plan with padding, which has counted its rows."""
    order = torch.argsort(plan.modality, stable=True)
    place = torch.argsort(order)
    tokens = tuple(plan.samples * length for length in plan.lengths)
    sizes, valid = tokens, None
    if not plan.compact:
        valid = order < plan.cu_samples[-1]
    elif plan.index is not None:
        sizes = tuple(torch.bincount(plan.modality, minlength=plan.modalities).tolist())
    return ModalityRows(order, place, sizes, tokens, valid)


def stack_routed(mlps: Sequence[Any], dtype: torch.dtype) -> RoutedWeights:
    """Stack the routed MLPs of one layer index over the interaction experts, in `dtype`. Gradients flow back."""
    first, second = ([getattr(mlp.experts, name) for mlp in mlps] for name in ("htoh4", "h4toh"))
    return RoutedWeights(
        gates=tuple(mlp.gate for mlp in mlps),
        # Stacked, which checks that all have the same shape.
        w_in=torch.stack([part.weight for part in first]).flatten(0, 1).to(dtype),
        b_in=torch.stack([part.bias for part in first]).flatten(0, 1).to(dtype),
        w_out=torch.stack([part.weight for part in second]).flatten(0, 1).to(dtype),
        b_out=torch.stack([part.bias for part in second]).flatten(0, 1).to(dtype),
    )


def routed_update(
    normed: Tensor, weights: RoutedWeights, rows: ModalityRows, views: int, backend: str
) -> tuple[Tensor, GateLosses]:
    """Apply the routed MLPs to rows (E, V * n, D); also return the loss of every interaction expert and view."""
    experts, count, width = normed.shape
    routing, losses = _route(normed.view(experts * views, count // views, width), weights, rows)
    per_expert = weights.w_in.shape[0] // experts
    first = torch.arange(0, experts * per_expert, per_expert, device=normed.device)
    index = routing.index.view(experts, routing.index.numel() // experts)
    index = torch.where(index < 0, index, index + first[:, None]).view_as(routing.weight)
    update = routed_mlp(
        normed.view(experts * count, width),
        index,
        # Under autocast some gates compute in float32.
        routing.weight.to(normed.dtype),
        weights.w_in,
        weights.b_in,
        weights.w_out,
        weights.b_out,
        backend=backend,
    )
    return update.view(experts, count, width), [
        losses[e * views : (e + 1) * views] for e in range(experts)
    ]


def called_update(rows: Tensor, mlp: RoutedMLP, plan: TokenPlan) -> Tensor:
    """Apply a routed MLP to rows (1, n, D) by calling it once per modality with the padded tokens (B, L_m, D)."""
    width, flat = rows.shape[-1], rows[0]
    if plan.index is not None:
        whole = flat.new_zeros((plan.samples * sum(plan.lengths), width))
        flat = whole.index_copy(0, plan.index, flat)
    parts = flat.view(plan.samples, sum(plan.lengths), width).split(list(plan.lengths), dim=1)
    masks: Sequence[Tensor | None] = [None] * len(parts)
    if plan.valid is not None:
        masks = plan.valid.split(list(plan.lengths), dim=1)
    updates = update_by_modality(mlp, parts, masks)
    return plan.pack(torch.cat(updates, dim=1).to(rows.dtype)).unsqueeze(0)


def sum_losses(layers: Sequence[GateLosses], experts: int, views: int, like: Tensor) -> Tensor:
    """Sum of the losses of all sparse layers, (E, V); zeros with the dtype and device of `like` without any."""
    if not layers:
        return like.new_zeros((experts, views))
    total = torch.stack([torch.stack(list(chain(*losses))) for losses in layers]).sum(dim=0)
    return total.view(experts, views)


def _route(x: Tensor, weights: RoutedWeights, rows: ModalityRows) -> tuple[Routing, list[Tensor]]:
    """Route rows x (E * V, n, D): choices (E * V * n, K) in the order of the rows, and one loss per E * V."""
    problems, n, width = x.shape
    views = problems // len(weights.gates)
    x = x.index_select(1, rows.order)
    if rows.valid is not None:
        # Padded rows have arbitrary values, NaN included, which would reach the losses as 0 * NaN.
        x = torch.where(rows.valid[:, None], x, 0.0)
    parts = x.view(problems * n, width).split(rows.sizes * problems)
    masks = [None] * len(rows.sizes) if rows.valid is None else rows.valid.split(rows.sizes)
    chosen, losses = [], []
    for problem in range(problems):
        gate = weights.gates[problem // views]
        mine = parts[problem * len(masks) : (problem + 1) * len(masks)]
        routed = [
            gate.route(part, mask, tokens)
            for part, mask, tokens in zip(mine, masks, rows.tokens, strict=True)
        ]
        chosen += [(index, weight) for index, weight, _ in routed]
        losses.append(torch.stack([loss for *_, loss in routed]).sum())
    index, weight = (
        torch.cat(pieces).unflatten(0, (problems, n)).index_select(1, rows.place).flatten(0, 1)
        for pieces in zip(*chosen, strict=True)
    )
    return Routing(index, weight), losses
