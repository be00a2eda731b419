"""The interaction losses through Triton: allocations, and the launches that fill them.

No call waits for the GPU, and what is allocated and launched depends on shapes alone, so that CUDA graphs can
capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flmoe_kernels.core.operands import expect, expect_float32_or_half
from flmoe_kernels.core.triton.launches import run
from flmoe_kernels.core.triton.plans import planned

from ..call import check_shapes
from . import launch as launches

__all__ = ["losses", "losses_backward"]


@planned(2)
def losses(latents: Tensor, exists: Tensor | None) -> Tensor:
    latents, exists = _checked(latents, exists)
    experts, _, batch, _ = latents.shape
    if not batch:
        return latents.new_full((experts,), float("nan"))
    out = latents.new_empty((experts,))
    shape = (experts, launches.loss_blocks(latents))
    parts = latents.new_empty(shape, dtype=torch.float32)
    run(launches.loss_launches(latents, exists, parts, out), latents.device)
    return out


@planned(3)
def losses_backward(grad_losses: Tensor, latents: Tensor, exists: Tensor | None) -> Tensor:
    latents, exists = _checked(latents, exists)
    expect("grad_losses", grad_losses, latents.shape[:1], latents.dtype, latents.device)
    grad = torch.empty_like(latents)
    if grad.numel():
        launch = launches.gradient_launch(grad_losses.contiguous(), latents, exists, grad)
        run([launch], latents.device)
    return grad


def _checked(latents: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor | None]:
    expect_float32_or_half("latents", latents)
    check_shapes(latents, exists)
    return latents.contiguous(), None if exists is None else exists.contiguous()
