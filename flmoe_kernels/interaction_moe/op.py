"""torch.library registration of the interaction losses: schema, fake, autograd. Glue only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cpu_runtime import first_order_only
from . import cpu

torch.library.define("flmoe::interaction_losses", "(Tensor latents) -> Tensor")
torch.library.define(
    "flmoe::interaction_losses_backward", "(Tensor grad_losses, Tensor latents) -> Tensor"
)
torch.library.impl("flmoe::interaction_losses", "cpu", cpu.losses)
torch.library.impl("flmoe::interaction_losses_backward", "cpu", cpu.losses_backward)


@torch.library.register_fake("flmoe::interaction_losses")
def _(latents: Tensor) -> Tensor:
    return latents.new_empty(latents.shape[0])


@torch.library.register_fake("flmoe::interaction_losses_backward")
def _(grad_losses: Tensor, latents: Tensor) -> Tensor:
    return latents.new_empty(latents.shape)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.flmoe.interaction_losses_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("flmoe::interaction_losses", _autograd, setup_context=_setup)
first_order_only("flmoe::interaction_losses_backward")
