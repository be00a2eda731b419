"""Steps of an encoder layer as fused Triton kernels: allocation and launches.

For layers that `fits` accepts. encoder_layers calls them with tensors that it allocated: rows are contiguous.
Counts are as in rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import Launch, run
from flmoe_kernels.ops.encoder.wants import rows_wanted

from . import linear_launch
from .fused_kernels import (
    mlp_gradient_kernel,
    mlp_kernel,
    norm_product_kernel,
    product_norm_gradient_kernel,
)
from .fused_launch import blocks, fits, launch_of
from .rows_launch import Dropout, norm_sum_launch
from .view_rows import ViewRows, view_rows

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
    computed, (mean, rstd) = view_rows(count, views, x.shape[1], x.device), _statistics(x)
    outer = weight.shape[1]
    out = x.new_empty((*x.shape[:2], outer))
    arguments = {
        **{"x": x, "gain": gain, "shift": shift, "w": weight, "outer": outer, "eps": eps},
        **{"out": out, "mean": mean, "rstd": rstd},
    }
    name, across = "norm_product", ("COLUMNS", outer)
    run(
        [launch_of(norm_product_kernel, name, x, arguments, across, computed, OUTER=outer)],
        x.device,
    )
    return out, mean, rstd


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
    wide = weights[0].shape[1]
    out = torch.empty_like(x)
    hidden = x.new_empty((*x.shape[:2], wide) if save else (0,))
    arguments = {
        **{"x": x, "gain": affine[0], "shift": affine[1], "wide": wide, "eps": eps},
        **dict(zip(("w_in", "b_in", "w_out", "b_out"), weights, strict=True)),
        **{"out": out, "hidden": hidden if save else None, "mean": mean, "rstd": rstd},
    }
    dropouts = {"": Dropout(*inner), "out_": Dropout(*outer)}
    rest = (("COLUMNS", wide), computed, dropouts)
    run([launch_of(mlp_kernel, "mlp", x, arguments, *rest, HIDDEN=wide)], x.device)
    return out, mean, rstd, hidden


def _norm_results(
    kernel: str, x: Tensor, gain: Tensor, wants: Sequence[bool], computed: ViewRows
) -> tuple[list[Tensor], dict[str, Any], list[Launch]]:
    """Gradients of residual, update, gain and shift, empty if not wanted; what the kernel that computes them
    stores; and the launch that adds its parts.

    `normed` is the place of the gradient of the norm's result.
    """
    grads = [x.new_empty(x.shape if want else (0,)) for want in wants[:2]]
    grads += [gain.new_empty(gain.shape if want else (0,)) for want in wants[2:]]
    stored = [grad if want else None for grad, want in zip(grads, wants, strict=True)]
    parts, sums = None, []
    normed = stored[1] if stored[0] is None else stored[0]
    if any(wants[2:]):
        shape = (x.shape[0], blocks(kernel, x, computed), 2, x.shape[2])
        parts = x.new_empty(shape, dtype=torch.float32)
        sums = [norm_sum_launch(parts, *stored[2:])]
        normed = torch.empty_like(x) if normed is None else normed
    of_rows = {"grad_residual": stored[0], "grad_update": stored[1]}
    return grads, {"normed": normed, **of_rows, "parts": parts}, sums


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
    computed = view_rows(count, views, x.shape[1], x.device)
    want_norm = (*rows_wanted(before[0], self_residual, wants), *wants[2:4])
    of_in, of_out = wants[4:6], wants[6:8]
    grads, results, sums = _norm_results("mlp_gradient", x, gain, want_norm, computed)
    results["activation"] = torch.empty_like(hidden) if of_out[0] else None
    results["grad_hidden"] = torch.empty_like(hidden) if any(of_in) else None
    found = []
    if any(result is not None for result in results.values()):
        wide = w_in.shape[1]
        arguments = {
            **{"grad_total": grad_total, "grad_out": grad_update, "wide": wide, **results},
            **{"x": x, "mean": mean, "rstd": rstd, "gain": gain, "hidden": hidden},
            **{"w_in": w_in, "w_out": w_out},
        }
        dropouts = {"hidden_": Dropout(*inner), "": Dropout(*before)}
        rest = (("COLUMNS", wide), computed, dropouts)
        constants: dict[str, Any] = {"HIDDEN": wide, "TWICE": self_residual}
        name = "mlp_gradient"
        found = [launch_of(mlp_gradient_kernel, name, x, arguments, *rest, **constants)]
    found += sums
    normed = (mean, rstd, gain, shift)
    for left, right, weight, want, norm in (
        (results["grad_hidden"], x, w_in, of_in, normed),
        (grad_update, results["activation"], w_out, of_out, None),
    ):
        both, more = linear_launch.weight_backward(
            left, right, weight, want[0], want[1], computed, norm
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
    computed = view_rows(count, views, x.shape[1], x.device)
    want_norm = (*rows_wanted(before[0], False, wants), *wants[2:4])
    name, found = "product_norm_gradient", []
    grads, results, sums = _norm_results(name, x, gain, want_norm, computed)
    if any(want_norm):
        inner = weight.shape[1]
        arguments = {
            **{"grad_total": grad_total, "grad": grad_out, "w": weight, "inner": inner},
            **{"x": x, "mean": mean, "rstd": rstd, "gain": gain, **results},
        }
        rest = (("DEPTH", inner), computed, {"": Dropout(*before)})
        found = [launch_of(product_norm_gradient_kernel, name, x, arguments, *rest, INNER=inner)]
    (of_weight, _), more = linear_launch.weight_backward(
        grad_out, x, weight, wants[4], False, computed, (mean, rstd, gain, shift)
    )
    run([*found, *sums, *more], x.device)
    return *grads, of_weight
