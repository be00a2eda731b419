"""Steps of an encoder layer as fused Triton kernels: allocation and launches.

For layers that `fits` accepts. encoder_layers calls them with tensors that it allocated: rows are contiguous.
Counts are as in rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import run
from flmoe_kernels.core.triton.tables import architecture_of
from flmoe_kernels.ops.encoder.wants import rows_wanted

from . import fused_launch as launches
from . import linear_launch
from .fused_launch import fits
from .rows_launch import Dropout, norm_sum_launch
from .view_rows import view_rows

__all__ = [
    "add_linear",
    "fits",
    "norm_linear",
    "norm_linear_backward",
    "norm_mlp",
    "norm_mlp_backward",
]

# Seed and rate of a dropout.
Drop = tuple[Tensor | None, float]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return mean, rstd


def norm_linear(
    x: Tensor,
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    eps: float,
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm(x) (E, R, D) times weight (E, N, D), mean and rstd of the norm."""
    computed, statistics = view_rows(count, views, x.shape[1], x.device), _statistics(x)
    out = x.new_empty((*x.shape[:2], weight.shape[1]))
    results, architecture = (out, *statistics), architecture_of(x.device)
    found = launches.norm_product(x, (gain, shift), weight, eps, results, computed, architecture)
    run([found], x.device)
    return results


def add_linear(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    p: float,
    count: Tensor | None = None,
    views: int = 1,
) -> Tensor:
    """Return residual + dropout(y), y the linear map of x. Without a residual: u + dropout(u) with u = dropout(y),
    as the published layer does."""
    computed, added = view_rows(count, views, x.shape[1], x.device), (residual, Dropout(seed, p))
    out, found = linear_launch.forward(x, weight, bias, computed, added)
    run(found, x.device)
    return out


def norm_mlp(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    inner: Drop,
    outer: Drop,
    eps: float,
    save: bool,
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x + dropout(MLP of norm(x)), mean and rstd of the norm, and the hidden rows before the GELU, empty
    unless `save`.

    affine: gain and shift; weights: w_in, b_in, w_out, b_out; inner, outer: dropout after the GELU and of the MLP.
    """
    computed, (mean, rstd) = view_rows(count, views, x.shape[1], x.device), _statistics(x)
    out = torch.empty_like(x)
    hidden = x.new_empty((*x.shape[:2], weights[0].shape[1]) if save else (0,))
    results = (out, hidden if save else None, mean, rstd)
    dropouts, architecture = (Dropout(*inner), Dropout(*outer)), architecture_of(x.device)
    found = launches.mlp(x, affine, weights, dropouts, eps, results, computed, architecture)
    run([found], x.device)
    return out, mean, rstd, hidden


def _norm_results(
    x: Tensor, gain: Tensor, wants: Sequence[bool], blocks: int
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Gradients of residual, update, gain and shift, empty if not wanted, and what the kernel that computes them
    stores."""
    grads = [x.new_empty(x.shape if want else (0,)) for want in wants[:2]]
    grads += [gain.new_empty(gain.shape if want else (0,)) for want in wants[2:]]
    parts = None
    if any(wants[2:]):
        shape = (x.shape[0], blocks, 2, x.shape[2])
        parts = x.new_empty(shape, dtype=torch.float32)
    normed = next((grad for grad, want in zip(grads[:2], wants, strict=False) if want), None)
    if normed is None and parts is not None:
        normed = torch.empty_like(x)
    return grads, (normed, *_given(grads[:2], wants[:2]), parts)


def _given(grads: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor | None]:
    return [grad if want else None for grad, want in zip(grads, wants, strict=True)]


def norm_mlp_backward(
    grad_total: Tensor,
    grad_update: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    affine: tuple[Tensor, Tensor],
    w_in: Tensor,
    w_out: Tensor,
    inner: Drop,
    before: Drop,
    self_residual: bool,
    wants: Sequence[bool],
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, ...]:
    """Gradients of the residual and the update of which x is the sum, gain, shift, w_in, b_in, w_out, b_out.

    grad_total: of the result of norm_mlp; grad_update: the dropout of it. saved: x, mean, rstd, hidden. before:
    the dropout of x's update. See rows_wanted; gradients that are not requested are empty.
    """
    x, mean, rstd, hidden = saved
    gain, shift = affine
    architecture = architecture_of(x.device)
    computed = view_rows(count, views, x.shape[1], x.device)
    want_norm = (*rows_wanted(before[0], self_residual, wants), *wants[2:4])
    of_in, of_out = wants[4:6], wants[6:8]
    blocks = launches.blocks("mlp_gradient", x, computed, architecture)
    grads, results = _norm_results(x, gain, want_norm, blocks)
    activation = torch.empty_like(hidden) if of_out[0] else None
    of_hidden = torch.empty_like(hidden) if any(of_in) else None
    stored = (activation, of_hidden, *results)
    found = []
    if any(result is not None for result in stored):
        gradient = launches.mlp_gradient(
            (grad_total, grad_update),
            (x, mean, rstd, gain, hidden),
            (w_in, w_out),
            (Dropout(*inner), Dropout(*before)),
            self_residual,
            stored,
            computed,
            architecture,
        )
        found.append(gradient)
    if results[-1] is not None:
        found.append(norm_sum_launch(results[-1], *_given(grads[2:], want_norm[2:])))
    normed = (mean, rstd, gain, shift)
    for left, right, weight, want, norm in (
        (of_hidden, x, w_in, of_in, normed),
        (grad_update, activation, w_out, of_out, None),
    ):
        both, more = linear_launch.weight_backward(
            left, right, weight, want[0], want[1], computed, norm, architecture
        )
        grads += both
        found += more
    run(found, x.device)
    return tuple(grads)


def norm_linear_backward(
    grad_total: Tensor | None,
    grad_out: Tensor,
    saved: tuple[Tensor, Tensor, Tensor],
    affine: tuple[Tensor, Tensor],
    weight: Tensor,
    before: Drop,
    wants: Sequence[bool],
    count: Tensor | None = None,
    views: int = 1,
) -> tuple[Tensor, ...]:
    """Gradients of the residual and the update of which x is the sum, gain, shift and weight.

    grad_total: gradient of x that does not pass through the norm; grad_out: gradient of the product with weight.
    saved: x, mean, rstd. before: seed and rate of the update's dropout. The rest is as in norm_mlp_backward.
    """
    x, mean, rstd = saved
    gain, shift = affine
    architecture = architecture_of(x.device)
    computed = view_rows(count, views, x.shape[1], x.device)
    want_norm = (*rows_wanted(before[0], False, wants), *wants[2:4])
    blocks = launches.blocks("product_norm_gradient", x, computed, architecture)
    grads, results = _norm_results(x, gain, want_norm, blocks)
    found = []
    if any(want_norm):
        gradient = launches.product_norm_gradient(
            (grad_total, grad_out),
            (x, mean, rstd, gain),
            weight,
            Dropout(*before),
            results,
            computed,
            architecture,
        )
        found.append(gradient)
    if results[-1] is not None:
        found.append(norm_sum_launch(results[-1], *_given(grads[2:], want_norm[2:])))
    (of_weight, _), more = linear_launch.weight_backward(
        grad_out, x, weight, wants[4], False, computed, (mean, rstd, gain, shift), architecture
    )
    run([*found, *more], x.device)
    return *grads, of_weight
