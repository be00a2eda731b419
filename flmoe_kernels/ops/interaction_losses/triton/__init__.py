"""The parts of interaction_moe outside its encoder through Triton: what is allocated, and which launches fill it.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flmoe_kernels.core.triton.launches import expect, run

from . import launch as launches

__all__ = ["features", "features_backward", "losses", "losses_backward", "mix", "mix_backward"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def losses(latents: Tensor) -> Tensor:
    latents = _latents(latents)
    experts, _, batch, _ = latents.shape
    if not batch:
        return latents.new_full((experts,), float("nan"))
    out = latents.new_empty((experts,))
    blocks = launches.loss_blocks(latents)
    parts = None if blocks == 1 else latents.new_empty((experts, blocks), dtype=torch.float32)
    run(launches.loss_launches(latents, parts, out), latents.device)
    return out


def losses_backward(grad_losses: Tensor, latents: Tensor) -> Tensor:
    latents = _latents(latents)
    expect("grad_losses", grad_losses, latents.shape[:1], latents.dtype, latents.device)
    grad = torch.empty_like(latents)
    if grad.numel():
        run([launches.gradient_launch(grad_losses.contiguous(), latents, grad)], latents.device)
    return grad


def features(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], normalized: int
) -> tuple[Tensor, Tensor]:
    """Pooled tokens (B, M * D), and (B, M, 2) float32 for the backward."""
    _expect_dtype("tokens", tokens)
    batch, total, width = tokens.shape
    if sum(lengths) != total or min(lengths, default=0) < 1:
        raise ValueError(f"lengths: expected positive ones of sum {total}, got {list(lengths)}")
    expect("mask", mask, (batch, total), torch.bool, tokens.device)
    out = tokens.new_empty((batch, len(lengths) * width))
    statistics = tokens.new_empty((batch, len(lengths), 2), dtype=torch.float32)
    tokens, mask = tokens.contiguous(), _contiguous(mask)
    if out.numel():
        run(
            [launches.features_launch(tokens, mask, lengths, normalized, out, statistics)],
            tokens.device,
        )
    return out, statistics


def features_backward(
    grad_features: Tensor,
    features: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int],
) -> Tensor:
    _expect_dtype("features", features)
    batch, width = features.shape[0], features.shape[1] // max(len(lengths), 1)
    total, device = sum(lengths), features.device
    expect("features", features, (batch, len(lengths) * width), features.dtype, device)
    expect("grad_features", grad_features, features.shape, features.dtype, device)
    expect("statistics", statistics, (batch, len(lengths), 2), torch.float32, device)
    expect("mask", mask, (batch, total), torch.bool, device)
    grad = features.new_empty((batch, total, width))
    if grad.numel():
        grad_features, features = grad_features.contiguous(), features.contiguous()
        statistics, mask = statistics.contiguous(), _contiguous(mask)
        tensors = (grad_features, features, statistics, mask)
        run([launches.features_gradient_launch(*tensors, lengths, grad)], device)
    return grad


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


def mix_backward(
    grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    weights: Tensor,
    logits: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of scores (B, E) and of logits (E, B, C)."""
    logits = _logits(logits)
    experts, batch, classes = logits.shape
    for name, x in (("grad_weights", grad_weights), ("weights", weights)):
        expect(name, x, (batch, experts), logits.dtype, logits.device)
    expect("grad_mixed", grad_mixed, (batch, classes), logits.dtype, logits.device)
    grads = weights.new_empty(weights.shape), logits.new_empty(logits.shape)
    if batch:
        given = _contiguous(grad_weights), _contiguous(grad_mixed), weights.contiguous()
        run([launches.mix_gradient_launch(*given, logits, temperature, grads)], logits.device)
    return grads


def _latents(x: Tensor) -> Tensor:
    _expect_dtype("latents", x)
    if x.dim() != 4 or x.shape[1] != x.shape[0] - 1 or x.shape[1] < 3:
        raise ValueError(f"latents: expected (M + 2, M + 1, B, width), got {tuple(x.shape)}")
    return x.contiguous()


def _logits(x: Tensor) -> Tensor:
    """With the samples of an expert one after another; the experts may stand anywhere."""
    _expect_dtype("logits", x)
    if x.dim() != 3 or not x.shape[0]:
        raise ValueError(f"logits: expected (E, B, C) with E at least 1, got {tuple(x.shape)}")
    return x if x[0].is_contiguous() else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _expect_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
