"""The interaction losses in the native CPU module."""

from __future__ import annotations

from torch import Tensor

from flmoe_kernels.core.dtypes import dtype_code
from flmoe_kernels.core.native import address, empty, native, threads
from flmoe_kernels.core.operands import contiguous, expect

from .call import check_shapes


def losses(latents: Tensor, exists: Tensor | None) -> Tensor:
    latents, exists = _checked(latents, exists)
    out = empty(latents.shape[:1], latents)
    native().loss_forward(
        dtype_code(latents), *map(address, (latents, exists, out)), *latents.shape, threads()
    )
    return out


def losses_backward(grad_losses: Tensor, latents: Tensor, exists: Tensor | None) -> Tensor:
    latents, exists = _checked(latents, exists)
    expect("grad_losses", grad_losses, latents.shape[:1], latents.dtype)
    grad_losses = grad_losses.contiguous()
    grad = empty(latents.shape, latents)
    native().loss_backward(
        dtype_code(latents),
        *map(address, (latents, exists, grad_losses, grad)),
        *latents.shape,
        threads(),
    )
    return grad


def _checked(latents: Tensor, exists: Tensor | None) -> tuple[Tensor, Tensor | None]:
    expect("latents", latents, latents.shape, latents.dtype)
    check_shapes(latents, exists)
    return latents.contiguous(), contiguous(exists)
