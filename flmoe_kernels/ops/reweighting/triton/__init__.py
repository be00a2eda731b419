"""The reweighting through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.operands import contiguous, expect, expect_float32_or_half
from flmoe_kernels.core.triton.launches import run
from flmoe_kernels.core.triton.plans import planned

from . import launch as launches

__all__ = ["features", "features_backward", "mix", "mix_backward"]


@planned(2)
def features(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], normalized: int
) -> tuple[Tensor, Tensor]:
    """Pooled tokens (B, M * D), and (B, M, 2) float32 for the backward."""
    expect_float32_or_half("tokens", tokens)
    batch, total, width = tokens.shape
    if sum(lengths) != total or not lengths or min(lengths) < 0:
        raise ValueError(f"lengths: expected lengths with the sum {total}, got {list(lengths)}")
    expect("mask", mask, (batch, total), torch.bool, tokens.device)
    out = tokens.new_empty((batch, len(lengths) * width))
    statistics = tokens.new_empty((batch, len(lengths), 2), dtype=torch.float32)
    tokens, mask = tokens.contiguous(), contiguous(mask)
    if out.numel():
        run(
            [launches.features_launch(tokens, mask, lengths, normalized, out, statistics)],
            tokens.device,
        )
    return out, statistics


@planned(4)
def features_backward(
    grad_features: Tensor,
    features: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
) -> Tensor:
    expect_float32_or_half("features", features)
    batch, width = features.shape[0], features.shape[1] // max(len(lengths), 1)
    total, device = sum(lengths), features.device
    expect("features", features, (batch, len(lengths) * width), features.dtype, device)
    expect("grad_features", grad_features, features.shape, features.dtype, device)
    expect("statistics", statistics, (batch, len(lengths), 2), torch.float32, device)
    expect("mask", mask, (batch, total), torch.bool, device)
    grad = features.new_empty((batch, total, width))
    if grad.numel():
        grad_features, features = grad_features.contiguous(), features.contiguous()
        statistics, mask = statistics.contiguous(), contiguous(mask)
        tensors = (grad_features, features, statistics, mask)
        run([launches.features_gradient_launch(*tensors, lengths, grad)], device)
    return grad


@planned(2)
def mix(scores: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Weights (B, E) and the mixture (B, C) of logits (E, B, C)."""
    logits = _logits(logits)
    experts, batch, classes = logits.shape
    expect("scores", scores, (batch, experts), logits.dtype, logits.device)
    weights, mixed = scores.new_empty((batch, experts)), logits.new_empty((batch, classes))
    if batch:
        found = launches.mix_launch(scores.contiguous(), logits, temperature, weights, mixed)
        run([found], logits.device)
    return weights, mixed


@planned(4)
def mix_backward(
    grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    weights: Tensor,
    logits: Tensor,
    wants: Sequence[bool],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of scores (B, E) and of logits (E, B, C); those not requested are empty."""
    logits = _logits(logits)
    experts, batch, classes = logits.shape
    for name, x in (("grad_weights", grad_weights), ("weights", weights)):
        expect(name, x, (batch, experts), logits.dtype, logits.device)
    expect("grad_mixed", grad_mixed, (batch, classes), logits.dtype, logits.device)
    of_scores, of_logits = (
        x.new_empty(x.shape if want else (0,))
        for x, want in zip((weights, logits), wants, strict=True)
    )
    if batch:
        given = contiguous(grad_weights), contiguous(grad_mixed), weights.contiguous()
        grads = of_scores if wants[0] else None, of_logits if wants[1] else None
        run([launches.mix_gradient_launch(*given, logits, temperature, grads)], logits.device)
    return of_scores, of_logits


def _logits(x: Tensor) -> Tensor:
    """With the samples of an expert one after another; the experts may stand anywhere."""
    expect_float32_or_half("logits", x)
    if x.dim() != 3 or not x.shape[0]:
        raise ValueError(f"logits: expected (E, B, C) with E at least 1, got {tuple(x.shape)}")
    return x if x[0].is_contiguous() else x.contiguous()
