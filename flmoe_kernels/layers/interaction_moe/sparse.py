"""The routed MLPs of one encoder layer for all interaction experts and views at once.

Every interaction expert has a gate of its own, which sees one modality of one view at a time, as the reference
calls it: capacity and losses are per call. What the gates choose is put together under common expert numbers,
e * X + index, so that the experts' products are one grouped matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import Routing

from .packing import TokenPlan

GateLosses = list[list[Tensor]]


@dataclass(frozen=True)
class RoutedWeights:
    """The gates, one per interaction expert, and the weights of their X experts each, stacked."""

    gates: tuple[Any, ...]
    w_in: Tensor  # (E * X, F, D)
    b_in: Tensor  # (E * X, F)
    w_out: Tensor  # (E * X, D, F)
    b_out: Tensor  # (E * X, D)


@dataclass(frozen=True)
class ModalityRows:
    """The n rows of a plan, modality after modality, in each the samples in order.

    Attributes:
        order: (n,) int64, the row that stands at each place.
        place: (n,) int64, the place of each row.
        sizes: rows of each modality.
        tokens: tokens of each modality, padding counted: what a gate's capacity is a share of.
        valid: (n,) bool by place; None where all are valid.
    """

    order: Tensor
    place: Tensor
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    valid: Tensor | None


def rows_by_modality(plan: TokenPlan) -> ModalityRows:
    """Nothing waits for data but in a compact plan with padding, whose rows have been counted already."""
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
    """The routed MLPs of one layer index, interaction expert after expert, in `dtype`. Gradients flow back."""
    first, second = ([getattr(mlp.experts, name) for mlp in mlps] for name in ("htoh4", "h4toh"))
    return RoutedWeights(
        gates=tuple(mlp.gate for mlp in mlps),
        w_in=torch.cat([part.weight for part in first]).to(dtype),
        b_in=torch.cat([part.bias for part in first]).to(dtype),
        w_out=torch.cat([part.weight for part in second]).to(dtype),
        b_out=torch.cat([part.bias for part in second]).to(dtype),
    )


def routed_update(
    normed: Tensor, weights: RoutedWeights, rows: ModalityRows, views: int, backend: str
) -> tuple[Tensor, GateLosses]:
    """What the routed MLPs make of rows (E, V * n, D), and the loss of every interaction expert and view."""
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


def sum_losses(layers: Sequence[GateLosses], experts: int, views: int, like: Tensor) -> GateLosses:
    """The losses of all sparse layers together; zeros of the kind of `like` where there is none."""
    total = like.new_zeros((experts * views,))
    if layers:
        total = torch.stack([torch.stack(list(chain(*losses))) for losses in layers]).sum(dim=0)
    flat = total.unbind(0)
    return [list(flat[e * views : (e + 1) * views]) for e in range(experts)]


def _route(x: Tensor, weights: RoutedWeights, rows: ModalityRows) -> tuple[Routing, list[Tensor]]:
    """Choices (E * V * n, K) for rows x (E * V, n, D) in their own order; a loss for each E * V."""
    problems, n, width = x.shape
    views = problems // len(weights.gates)
    x = x.index_select(1, rows.order)
    if rows.valid is not None:
        # What stands in padded rows is arbitrary, NaN included, and would reach the losses as 0 * NaN.
        x = torch.where(rows.valid[:, None], x, 0.0)
    parts = x.view(problems * n, width).split(rows.sizes * problems)
    masks = [None] * len(rows.sizes) if rows.valid is None else rows.valid.split(rows.sizes)
    chosen, losses = [], []
    for problem in range(problems):
        gate = weights.gates[problem // views]
        mine = parts[problem * len(masks) : (problem + 1) * len(masks)]
        found = [
            gate.route(part, mask, tokens)
            for part, mask, tokens in zip(mine, masks, rows.tokens, strict=True)
        ]
        chosen += [(index, weight) for index, weight, _ in found]
        losses.append(torch.stack([loss for *_, loss in found]).sum())
    index, weight = (
        torch.cat(each).unflatten(0, (problems, n)).index_select(1, rows.place).flatten(0, 1)
        for each in zip(*chosen, strict=True)
    )
    return Routing(index, weight), losses
