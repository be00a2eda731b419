"""torch.library registration of the reweighting: backends, schemas, fakes, autograd.

Only Triton has kernels, where one operator saves launches; on a CPU torch's own operators are as fast. The
reference is not registered: api.py calls it, and autograd differentiates it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.backend import BackendUnavailable
from flmoe_kernels.core.flops import no_products
from flmoe_kernels.core.registration import define, first_order_only

_OPS = torch.ops.flmoe


@functools.cache
def _kernels(backend: str) -> Any:
    """The backend's module with features, mix and their backward functions."""
    match backend:
        case "triton":
            from . import triton

            return triton
        case _:
            raise BackendUnavailable(f"reweighting: this operator has no {backend} kernels")


def _features_fake(
    tokens: Tensor, mask: Tensor | None, lengths: Sequence[int], normalized: int
) -> tuple[Tensor, Tensor]:
    batch, modalities = tokens.shape[0], len(lengths)
    pooled = tokens.new_empty((batch, modalities * tokens.shape[2]))
    return pooled, tokens.new_empty((batch, modalities, 2), dtype=torch.float32)


def _features_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, mask, ctx.lengths, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, mask)


def _features_autograd(ctx: Any, grad: Tensor | None, _statistics: None) -> tuple:
    if grad is None:
        return (None,) * 5
    tail = (ctx.lengths, ctx.backend)
    grad = _OPS.reweighting_features_backward(grad, *ctx.saved_tensors, *tail)
    return (grad, *(None,) * 4)


def _mix_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, logits, ctx.temperature, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], logits)


def _mix_autograd(ctx: Any, grad_weights: Tensor | None, grad_mixed: Tensor | None) -> tuple:
    if grad_weights is None and grad_mixed is None:
        return (None,) * 4
    tail = (ctx.temperature, ctx.backend)
    wants = ctx.needs_input_grad[:2]
    grads = _OPS.mix_experts_backward(grad_weights, grad_mixed, *ctx.saved_tensors, wants, *tail)
    return (*(g if want else None for g, want in zip(grads, wants, strict=True)), None, None)


def _mix_backward_flops(
    _grad_weights: Tensor | None,
    grad_mixed: Tensor | None,
    _weights: Tensor,
    logits: Tensor,
    wants: Sequence[bool],
    _temperature: float,
) -> int:
    return 0 if grad_mixed is None else sum(wants) * 2 * logits.numel()


define(
    "reweighting_features",
    "(Tensor tokens, Tensor? mask, SymInt[] lengths, int normalized) -> (Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).features(*args),
    _features_fake,
    (_features_setup, _features_autograd),
    flops=no_products,
)
define(
    "reweighting_features_backward",
    "(Tensor grad_features, Tensor features, Tensor statistics, Tensor? mask, SymInt[] lengths) "
    "-> Tensor",
    lambda backend, *args: _kernels(backend).features_backward(*args),
    lambda grad, features, statistics, mask, lengths: features.new_empty(
        (features.shape[0], sum(lengths), features.shape[1] // len(lengths))
    ),
    flops=no_products,
)
define(
    "mix_experts",
    "(Tensor scores, Tensor logits, float temperature) -> (Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).mix(*args),
    lambda scores, logits, temperature: (
        scores.new_empty(scores.shape),
        logits.new_empty(logits.shape[1:]),
    ),
    (_mix_setup, _mix_autograd),
    flops=lambda scores, logits, temperature: 2 * logits.numel(),
)
define(
    "mix_experts_backward",
    "(Tensor? grad_weights, Tensor? grad_mixed, Tensor weights, Tensor logits, bool[] wants, "
    "float temperature) -> (Tensor, Tensor)",
    lambda backend, *args: _kernels(backend).mix_backward(*args),
    lambda grad_weights, grad_mixed, weights, logits, wants, temperature: tuple(
        x.new_empty(x.shape if want else (0,))
        for x, want in zip((weights, logits), wants, strict=True)
    ),
    flops=_mix_backward_flops,
)
first_order_only("reweighting_features_backward", "mix_experts_backward")
