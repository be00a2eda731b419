"""The interaction losses through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.operands import expect, expect_float32_or_half
from flmoe_kernels.core.triton.launches import run

from . import launch as launches

__all__ = ["losses", "losses_backward"]


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


def _latents(x: Tensor) -> Tensor:
    expect_float32_or_half("latents", x)
    if x.dim() != 4 or x.shape[1] != x.shape[0] - 1 or x.shape[1] < 3:
        raise ValueError(f"latents: expected (M + 2, M + 1, B, width), got {tuple(x.shape)}")
    return x.contiguous()
