"""torch.library registration of the interaction losses: backends, schemas, fakes, autograd.

The reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.flops import no_products
from flmoe_kernels.core.registration import define, first_order_only


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


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    latents, exists, ctx.backend = inputs
    ctx.save_for_backward(latents, exists)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    op = torch.ops.flmoe.interaction_losses_backward
    return op(grad, *ctx.saved_tensors, ctx.backend), None, None


define(
    "interaction_losses",
    "(Tensor latents, Tensor? exists) -> Tensor",
    lambda backend, *args: _kernels(backend).losses(*args),
    lambda latents, exists: latents.new_empty(latents.shape[0]),
    (_setup, _autograd),
    flops=no_products,
)
define(
    "interaction_losses_backward",
    "(Tensor grad_losses, Tensor latents, Tensor? exists) -> Tensor",
    lambda backend, *args: _kernels(backend).losses_backward(*args),
    lambda grad_losses, latents, exists: latents.new_empty(latents.shape),
    flops=no_products,
)
first_order_only("interaction_losses_backward")
