"""The interaction losses in the native CPU module."""

from __future__ import annotations

from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import expect


def losses(latents: Tensor) -> Tensor:
    expect("latents", latents, latents.shape, latents.dtype)
    latents = latents.contiguous()
    experts, views, _, _ = latents.shape
    if views != experts - 1 or views < 3:
        raise ValueError(f"latents: expected (M + 2, M + 1, B, width), got {tuple(latents.shape)}")
    out = empty((experts,), latents)
    native().loss_forward(
        dtype_code(latents), address(latents), address(out), *latents.shape, threads()
    )
    return out


def losses_backward(grad_losses: Tensor, latents: Tensor) -> Tensor:
    expect("latents", latents, latents.shape, latents.dtype)
    expect("grad_losses", grad_losses, latents.shape[:1], latents.dtype)
    latents, grad_losses = latents.contiguous(), grad_losses.contiguous()
    grad = empty(latents.shape, latents)
    native().loss_backward(
        dtype_code(latents),
        *map(address, (latents, grad_losses, grad)),
        *latents.shape,
        threads(),
    )
    return grad
