"""torch.library registration of what interaction_moe computes around its encoder. Glue only.

`interaction_losses` is on every backend with kernels. `reweighting_features` and `mix_experts` are on Triton
alone, where each saves launches; on a CPU torch's own operators are as good. The backend is the last argument, so
that a gradient is computed by the backend that computed the value.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.backend import CPU, BackendUnavailable
from flmoe_kernels.core.native import first_order_only

_OPS = torch.ops.flmoe


def _define(name: str, schema: str, function: str, fake: Callable) -> None:
    """Register "(schema, str backend='cpu')" -> results, computed by `function` of a backend's module."""
    arguments, results = schema.split(" -> ")
    torch.library.define(f"flmoe::{name}", f"({arguments[1:-1]}, str backend='{CPU}') -> {results}")
    count = len(getattr(_OPS, name).default._schema.arguments) - 1

    def kernel(*args: Any) -> Any:
        # torch leaves out a trailing argument that is its schema's default.
        backend = args[count] if len(args) > count else CPU
        found = getattr(importlib.import_module(f".{backend}", __package__), function, None)
        if found is None:
            raise BackendUnavailable(f"{name}: this operator has no {backend} kernels")
        return found(*args[:count])

    torch.library.impl(f"flmoe::{name}", ("cpu", "cuda"), kernel)
    torch.library.register_fake(f"flmoe::{name}", lambda *args: fake(*args[:count]))


# ---- interaction_losses ----

_define(
    "interaction_losses",
    "(Tensor latents) -> Tensor",
    "losses",
    lambda latents: latents.new_empty(latents.shape[0]),
)
_define(
    "interaction_losses_backward",
    "(Tensor grad_losses, Tensor latents) -> Tensor",
    "losses_backward",
    lambda grad_losses, latents: latents.new_empty(latents.shape),
)


def _losses_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    latents, ctx.backend = inputs
    ctx.save_for_backward(latents)


def _losses_autograd(ctx: Any, grad: Tensor) -> tuple:
    return _OPS.interaction_losses_backward(grad, *ctx.saved_tensors, ctx.backend), None


torch.library.register_autograd(
    "flmoe::interaction_losses", _losses_autograd, setup_context=_losses_setup
)


# ---- reweighting_features ----


def _features_fake(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], normalized: int
) -> tuple[Tensor, Tensor]:
    batch, modalities = tokens.shape[0], len(lengths)
    pooled = tokens.new_empty((batch, modalities * tokens.shape[2]))
    return pooled, tokens.new_empty((batch, modalities, 2), dtype=torch.float32)


_define(
    "reweighting_features",
    "(Tensor tokens, Tensor? mask, SymInt[] lengths, int normalized) -> (Tensor, Tensor)",
    "features",
    _features_fake,
)
_define(
    "reweighting_features_backward",
    "(Tensor grad_features, Tensor features, Tensor statistics, Tensor? mask, SymInt[] lengths) "
    "-> Tensor",
    "features_backward",
    lambda grad, features, statistics, mask, lengths: features.new_empty(
        (features.shape[0], sum(lengths), features.shape[1] // len(lengths))
    ),
)


def _features_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, mask, ctx.lengths, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, mask)


def _features_autograd(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple:
    if grad is None:
        return (None,) * 5
    tail = (ctx.lengths, ctx.backend)
    found = _OPS.reweighting_features_backward(grad, *ctx.saved_tensors, *tail)
    return (found, *(None,) * 4)


torch.library.register_autograd(
    "flmoe::reweighting_features", _features_autograd, setup_context=_features_setup
)


# ---- mix_experts ----

_define(
    "mix_experts",
    "(Tensor scores, Tensor logits, float temperature) -> (Tensor, Tensor)",
    "mix",
    lambda scores, logits, temperature: (
        scores.new_empty(scores.shape),
        logits.new_empty(logits.shape[1:]),
    ),
)
_define(
    "mix_experts_backward",
    "(Tensor? grad_weights, Tensor? grad_mixed, Tensor weights, Tensor logits, float temperature) "
    "-> (Tensor, Tensor)",
    "mix_backward",
    lambda grad_weights, grad_mixed, weights, logits, temperature: (
        weights.new_empty(weights.shape),
        logits.new_empty(logits.shape),
    ),
)


def _mix_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, logits, ctx.temperature, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], logits)


def _mix_autograd(ctx: Any, grad_weights: Tensor | None, grad_mixed: Tensor | None) -> tuple:
    if grad_weights is None and grad_mixed is None:
        return (None,) * 4
    tail = (ctx.temperature, ctx.backend)
    found = _OPS.mix_experts_backward(grad_weights, grad_mixed, *ctx.saved_tensors, *tail)
    return (*found, None, None)


torch.library.register_autograd("flmoe::mix_experts", _mix_autograd, setup_context=_mix_setup)

for _name in ("interaction_losses", "reweighting_features", "mix_experts"):
    first_order_only(f"flmoe::{_name}_backward")
