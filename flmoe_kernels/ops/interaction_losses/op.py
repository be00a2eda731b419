"""torch.library registration of the interaction losses: backends, schemas, fakes, autograd.

The reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

import functools
from typing import Any

from flmoe_kernels.core.flops import no_products
from flmoe_kernels.core.registration import Derivative, define


@functools.cache
def _kernels(backend: str) -> Any:
    """The backend's module with losses and losses_backward."""
    match backend:
        case "cpu":
            from . import cpu

            return cpu
        case "triton":
            from . import triton

            return triton
        case _:
            raise ValueError(f"backend: expected cpu or triton, got {backend!r}")


define(
    "interaction_losses",
    "(Tensor latents, Tensor? exists) -> Tensor",
    lambda backend, *args: _kernels(backend).losses(*args),
    lambda latents, exists: latents.new_empty(latents.shape[0]),
    Derivative(1, lambda latents, exists, _losses: ((latents, exists), ())),
    flops=no_products,
)
define(
    "interaction_losses_backward",
    "(Tensor grad_losses, Tensor latents, Tensor? exists) -> Tensor",
    lambda backend, *args: _kernels(backend).losses_backward(*args),
    lambda grad_losses, latents, exists: latents.new_empty(latents.shape),
    flops=no_products,
)
