"""The interaction losses through the native CPU module."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import native
from ..cpu_runtime import address, dtype_code, threads


def losses(latents: Tensor) -> Tensor:
    latents = latents.contiguous()
    out = torch.empty(latents.shape[0], dtype=latents.dtype)
    native().loss_forward(
        dtype_code(latents), address(latents), address(out), *latents.shape, threads()
    )
    return out


def losses_backward(grad_losses: Tensor, latents: Tensor) -> Tensor:
    latents, grad_losses = latents.contiguous(), grad_losses.contiguous()
    grad = torch.empty(latents.shape, dtype=latents.dtype)
    native().loss_backward(
        dtype_code(latents),
        *map(address, (latents, grad_losses, grad)),
        *latents.shape,
        threads(),
    )
    return grad
