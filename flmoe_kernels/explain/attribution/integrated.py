"""Integrated gradients with the steps of the path in the batch dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flmoe_kernels.explain.games.models import Inputs
from flmoe_kernels.explain.games.tokens import per_feature, rows_of, valid_tokens

from .targets import LOGIT, Targets, require_finite

MIDPOINT, GAUSS, RIGHT = RULES = ("midpoint", "gauss_legendre", "right")
# Logits (N, C) of inputs and masks with N samples.
LogitsOf = Callable[[Inputs, Inputs | None], Tensor]


def quadrature(rule: str, n_steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n_steps,) in float64 of a rule on [0, 1]; the weights sum to 1.

    midpoint: error O(1 / n_steps^2), also for integrands with kinks. gauss_legendre: exact for polynomials of
    degree 2 n_steps - 1, so it suits smooth models but not kinks (ReLU). Nodes are the eigenvalues of the
    Legendre polynomials' recurrence (Golub and Welsch 1969). right: the right Riemann sum of the published
    evaluator, nodes s / n_steps for s = 1 to n_steps, error O(1 / n_steps).
    """
    if rule in (MIDPOINT, RIGHT):
        shift = 0.5 if rule == MIDPOINT else 1.0
        nodes = (torch.arange(n_steps, dtype=torch.float64) + shift) / n_steps
        return nodes, torch.full_like(nodes, 1.0 / n_steps)
    k = torch.arange(1, n_steps, dtype=torch.float64)
    beside = k / (4.0 * k * k - 1.0).sqrt()
    nodes, vectors = torch.linalg.eigh(beside.diag(1) + beside.diag(-1))
    return 0.5 * (nodes + 1.0), vectors[0].square()


@dataclass(frozen=True, eq=False)
class Path:
    """The start of the path from x0 to x, and the quadrature along it."""

    starts: Inputs  # x0, M x (B, L_m, ...), None for a missing modality
    rule: str
    n_steps: int
    max_batch: int  # rows of one pass: samples times steps


def integrated_gradients(
    logits_of: LogitsOf,
    inputs: Inputs,
    masks: Inputs | None,
    targets: Targets,
    path: Path,
    advance: Callable[[int], object] = int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(x - x0) * integral over t in [0, 1] of dF(x0 + t (x - x0)) / dx, F the target's logit.

    Returns these values M x (B, L_m, ...), the score F(x) (B,) and the error (B,), in float64. The error,
    F(x) - F(x0) - the sum of the values, is that of the quadrature. `advance` is called with the number of rows of
    each pass with gradients. Memory: that of logits_of for max_batch rows, and a few times the inputs.
    Source: Sundararajan, Taly and Yan, arXiv 1703.01365.
    """
    nodes, weights = quadrature(path.rule, path.n_steps)
    sums = [None if x is None else torch.zeros_like(x, dtype=torch.float64) for x in inputs]
    batch, device = _batch_of(inputs)
    valid = valid_tokens(inputs, masks)
    there = torch.cat(valid, dim=1).any(dim=1)
    with torch.no_grad():
        score, at_start = (
            _scores(logits_of, x, masks, targets, path.max_batch) for x in (inputs, path.starts)
        )
    require_finite(score.unsqueeze(1), "logits", there)
    require_finite(at_start.unsqueeze(1), "logits at the baseline", there)
    for samples in torch.arange(batch, device=device).split(path.max_batch):
        for chosen in torch.arange(path.n_steps).split(max(1, path.max_batch // len(samples))):
            gradients = _weighted_gradients(
                *(logits_of, inputs, masks, targets, path.starts, samples),
                *(nodes[chosen].to(device), weights[chosen].to(device)),
            )
            for total, gradient in zip(sums, gradients, strict=True):
                if total is not None and gradient is not None:
                    total[samples] += gradient
            advance(len(samples) * len(chosen))
    values = []
    for total, x, start, tokens in zip(sums, inputs, path.starts, valid, strict=True):
        if total is None or x is None or start is None:
            values.append(torch.zeros((batch, 0, 1), dtype=torch.float64, device=device))
        else:
            # Padded tokens may hold any value, also NaN.
            moved = total * (x.double() - start.double())
            values.append(torch.where(per_feature(tokens, x), moved, 0.0))
            require_finite(values[-1], "gradients between the baseline and the inputs", there)
    total_value = torch.stack([x.flatten(1).sum(dim=1) for x in values]).sum(dim=0)
    return values, score, score - at_start - total_value


def _weighted_gradients(
    logits_of: LogitsOf,
    inputs: Inputs,
    masks: Inputs | None,
    targets: Targets,
    starts: Inputs,
    samples: Tensor,
    nodes: Tensor,
    weights: Tensor,
) -> list[Tensor | None]:
    """Sum over the nodes of weight * gradient, M x (S, L_m, ...) in float64 for S samples."""
    count = len(nodes)
    rows = samples.repeat(count)
    points: list[Tensor | None] = []
    for x, start in zip(inputs, starts, strict=True):
        if x is None or start is None:
            points.append(None)
            continue
        # In half precision only the points are rounded; rounded nodes would shift all points alike.
        wide = torch.promote_types(x.dtype, torch.float32)
        t = nodes.to(wide).view(count, *[1] * x.dim())
        whole = torch.lerp(start[samples].to(wide), x[samples].to(wide), t)
        points.append(whole.to(x.dtype).flatten(0, 1).requires_grad_())
    present = [point for point in points if point is not None]
    with torch.enable_grad():
        score = targets.read(logits_of(points, rows_of(masks, rows)), LOGIT, rows).sum()
    if not score.requires_grad:
        raise ValueError("model: expected logits with a gradient by the inputs, got none")
    gradients = iter(torch.autograd.grad(score, present, materialize_grads=True))
    return [
        None
        if point is None
        else torch.einsum(
            "n,n...->...", weights, next(gradients).double().unflatten(0, (count, -1))
        )
        for point in points
    ]


def _scores(
    logits_of: LogitsOf, inputs: Inputs, masks: Inputs | None, targets: Targets, max_batch: int
) -> Tensor:
    batch, device = _batch_of(inputs)
    scores = []
    for rows in torch.arange(batch, device=device).split(max_batch):
        chosen = rows_of(inputs, rows)
        assert chosen is not None
        logits = logits_of(chosen, rows_of(masks, rows))
        scores.append(targets.read(logits, LOGIT, rows))
    return torch.cat(scores)


def _batch_of(inputs: Inputs) -> tuple[int, torch.device]:
    example = next(x for x in inputs if x is not None)
    return example.shape[0], example.device
