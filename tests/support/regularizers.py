"""The published regularizers and this package's: values, gradients and the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flmoe_kernels
from tests.support.inputs import draw
from tests.support.script_models import NotInThisCode, close, row

CLOSE = 1e-10
SHAPES = ((4, 8, 5), (4, 3, 16), (2, 1, 7), (5, 6, 6), (4, 9, 1), (1, 4, 3))


@row("regularizers and their warm-up")
def regularizers(published: Any) -> str:
    if not hasattr(published, "module") or published.compat == "i2moe":
        raise NotInThisCode  # only FL-I2MoE's checkout has the module
    code = published.module("src.imoe.regularizers")
    found = []
    for shape in SHAPES:
        for change in (None, _dead_latent, _constant_feature, _equal_experts):
            latents = draw(*shape, dtype=torch.float64)
            if change is not None:
                change(latents)
            weights = draw(shape[1], shape[0], dtype=torch.float64, seed=1).softmax(dim=1)
            for ours, theirs, more in (
                (flmoe_kernels.rep_cos, code.compute_rep_cos_loss, []),
                (flmoe_kernels.rep_cos, code.compute_rep_cos_loss, [weights]),
                (flmoe_kernels.rep_barlow, code.compute_expert_barlow_loss, []),
                (flmoe_kernels.rep_cka, code.compute_expert_cka_loss, []),
            ):
                results = [_value_and_gradients(f, latents, more) for f in (ours, theirs)]
                found.append(close(*results, limit=CLOSE))
    for warmup in range(6):
        for epoch in range(-1, 8):
            mine = flmoe_kernels.warmup_scale(epoch, warmup)
            assert mine == code.lambda_warmup_scale(epoch, warmup), (epoch, warmup)
    return f"{len(found)} values and gradients equal to {CLOSE:.0e}; warm-up equal"


def _value_and_gradients(
    function: Callable[..., Tensor], latents: Tensor, more: list[Tensor]
) -> list[Tensor]:
    """The value, and the gradients of the latents and other arguments; 0 where there is none."""
    experts = [z.clone().requires_grad_() for z in latents]
    rest = [x.clone().requires_grad_() for x in more]
    value = function(experts, *rest)
    leaves = [*experts, *rest]
    if not value.requires_grad:
        return [value, *(torch.zeros_like(x) for x in leaves)]
    found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return [value.detach(), *found]


def _dead_latent(latents: Tensor) -> None:
    latents[0] = 0


def _constant_feature(latents: Tensor) -> None:
    latents[:, :, 0] = 0.5


def _equal_experts(latents: Tensor) -> None:
    latents[:] = latents[:1].clone()
