"""Entry points of the fusion encoder's operators: docstrings and backend choice.

InteractionMoE calls them several times per layer with validated tensors and a backend from core.backend.choose.
Nothing is validated here: the kernels of every backend check shapes, dtypes and devices (ValueError naming the
argument), and the reference relies on PyTorch's own errors.

Sizes: E experts, R rows, K input, F hidden and N output width, D width, V views, n rows of one view, S segments.
All floating-point tensors of a call have one dtype: float32, bfloat16, float16, or float64 if the backend
supports it.
Kernels are differentiable once, and deterministic for any number of threads. Dropout with rate p uses the
counters of core.dropout with `seed` (one int64); if the seed is None, nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE

from . import layers_op as _layers_op  # noqa: F401  registers encoder_layers
from . import op as _op  # noqa: F401  registers the other operators
from . import reference

_OPS = torch.ops.flmoe


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """Linear maps x (E, R, K), weight (E, N, K), bias (E, N) or None -> (E, R, N). 2 E R K N FLOP."""
    if backend == REFERENCE:
        return reference.expert_linear(x, weight, bias)
    return _OPS.expert_linear(x, weight, bias, backend)


def expert_norm(x: Tensor, gain: Tensor, shift: Tensor, eps: float, backend: str) -> Tensor:
    """Layer norm of x (E, R, D) with each expert's gain and shift (E, D)."""
    if backend == REFERENCE:
        return reference.expert_norm(x, gain, shift, eps)
    return _OPS.expert_norm(x, gain, shift, eps, backend)[0]


def dropout_add_norm(
    residual: Tensor | None,
    update: Tensor,
    gain: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return sum = residual + dropout(update) (E, R, D), and its layer norm with gain and shift (E, D).

    If residual is None, sum = u + dropout(u) with u = dropout(update), as in I2MoE.
    """
    if backend == REFERENCE:
        return reference.dropout_add_norm(residual, update, gain, shift, seed, p, eps)
    return _OPS.dropout_add_norm(residual, update, gain, shift, seed, p, eps, backend)[:2]


def expert_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    seed: Tensor | None,
    p: float,
    backend: str,
) -> Tensor:
    """Return dropout(GELU(x w_in^T + b_in)) w_out^T + b_out (E, R, N), with the exact error function.

    x (E, R, K), w_in (E, F, K), b_in (E, F), w_out (E, N, F), b_out (E, N). 2 E R F (K + N) FLOP; keeps the
    hidden rows (E, R, F) before the GELU for the backward.
    """
    if backend == REFERENCE:
        return reference.expert_mlp(x, w_in, b_in, w_out, b_out, seed, p)
    return _OPS.expert_mlp(x, w_in, b_in, w_out, b_out, seed, p, backend)[0]


def dropout_add_pool(
    residual: Tensor,
    update: Tensor,
    cu_segments: Tensor,
    views: int,
    seed: Tensor | None,
    p: float,
    backend: str,
) -> Tensor:
    """Means (E, V, S, D) of residual + dropout(update), both (E, V * n, D), over the segments of each view.

    cu_segments: (S + 1) int32 within 0..n, non-decreasing; the mean of an empty segment is 0.
    """
    if backend == REFERENCE:
        return reference.dropout_add_pool(residual, update, cu_segments, views, seed, p)
    return _OPS.dropout_add_pool(residual, update, cu_segments, views, seed, p, backend)


def expand_views(x: Tensor, modality: Tensor, views: int, backend: str) -> Tensor:
    """Expand x (E, 2, n, D), the original and the replaced rows, to (E, V, n, D): view v replaces modality v - 1.

    modality: (n) int32, the modality of each row.
    """
    if backend == REFERENCE:
        return reference.expand_views(x, modality, views)
    return _OPS.expand_views(x, modality, views, backend)


def encoder_layers(
    rows: Tensor,
    modality: Tensor | None,
    index: Tensor | None,
    cu_samples: Tensor,
    cu_segments: Tensor,
    count: Tensor | None,
    weights: Sequence[Tensor],
    seeds: Tensor | None,
    rates: Sequence[float],
    heads: int,
    views: int,
    eps: float,
    self_residual: bool,
    differentiable: bool,
    backend: str,
) -> Tensor:
    """Mean latents (E, V * S, D) of dense fusion encoders, with dropout and gradients.

    Args:
        rows: embedded rows, (E, copies, n, D).
        modality: (n,) int32, see `expand_views`; there are then 2 copies.
        index: (R,) int64, the place of each row among the copies * n rows; `views` is then 1.
        cu_samples, cu_segments: int32 boundaries of samples, which attend to themselves, and of the segments whose
            means are taken; of one view.
        count: one int32, the number of valid rows; they come first among the n rows of every copy and view, and
            padding follows. None: all n rows are valid. Triton only.
        weights: 12 tensors for each layer of each expert, see inference.layer_shapes; in any dtype.
        seeds: (4 * layers,) int64, or None without dropout.
        rates: 4 of each layer: attention, attention branch, MLP, output.
        self_residual: the attention branch is added to itself, as in I2MoE.
        differentiable: whether gradients may be requested; if False, intermediates are not saved.
    """
    return _OPS.encoder_layers(
        *(rows, modality, index, cu_samples, cu_segments, count, weights, seeds),
        *(rates, heads, views, eps, self_residual, differentiable, backend),
    )[0]


def encoder_inference(
    rows: Tensor,
    index: Tensor | None,
    cu_samples: Tensor,
    cu_segments: Tensor,
    weights: Sequence[Tensor],
    experts: int,
    heads: int,
    eps: float,
    self_residual: bool,
    backend: str,
) -> Tensor:
    """Mean latents (E, S, D) of dense fusion encoders, without dropout and gradients; the CPU backend has it.

    Args:
        rows: a table of embedded rows, (1, R, D) or (E, R, D).
        index: (n,) int64, the row of the table for each computed row; None: the table itself.
        cu_samples, cu_segments: int32 boundaries of samples, which attend to themselves, and of the segments of
            each sample, the same number in all samples.
        weights: 12 tensors for each layer of each expert, see inference.layer_shapes.
        self_residual: the attention branch is added to itself, as in I2MoE.
    """
    return _OPS.encoder_inference(
        *(
            rows,
            index,
            cu_samples,
            cu_segments,
            weights,
            experts,
            heads,
            eps,
            self_residual,
            backend,
        )
    )
