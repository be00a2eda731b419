"""Comparison of registered operators and their gradients with references in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.ops.interaction_losses.reference import interaction_losses
from tests.support.inputs import as_dtype, gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EPS = 1e-5
OPS = torch.ops.flmoe
Operator = Callable[..., Any]


def on_triton(name: str) -> Operator:
    """A registered operator on its Triton kernels."""
    operator = getattr(OPS, name)
    return lambda *arguments: operator(*arguments, "triton")


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def evaluate(operator: Operator, arguments: Sequence[Any], outputs: int) -> list[Tensor]:
    """First results of an operator, and gradients of its floating arguments."""
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.dtype.is_floating_point]
    results = tensors(operator(*arguments))[:outputs]
    return [*(x.detach() for x in results), *gradients(results, leaves)]


def compare(
    operator: Operator,
    oracle: Operator,
    arguments: Sequence[Any],
    dtype: torch.dtype,
    outputs: int = 1,
    magnitude: float = 0.0,
    may_vanish: bool = False,
    gradient_magnitude: float | None = None,
) -> list[list[Tensor]]:
    """Check results and gradients; return (kernel, reference, reference in float64) of each.

    gradient_magnitude: None for the largest value of all gradients.
    """
    inputs = list(arguments)
    found = [
        evaluate(operator, as_dtype(inputs, dtype, requires_grad=True), outputs),
        evaluate(oracle, as_dtype(inputs, dtype, requires_grad=True), outputs),
        evaluate(
            oracle, as_dtype(as_dtype(inputs, dtype), torch.float64, requires_grad=True), outputs
        ),
    ]
    if gradient_magnitude is None:
        sizes = (float(x.abs().max()) for x in found[2][outputs:] if x.numel())
        gradient_magnitude = max(sizes, default=0.0)
    triples = [list(triple) for triple in zip(*found, strict=True)]
    for i, triple in enumerate(triples):
        name = f"result {i}" if i < outputs else f"gradient {i - outputs}"
        assert_within_budget(
            *triple,
            f"{name} in {dtype}",
            magnitude=magnitude if i < outputs else gradient_magnitude,
            may_vanish=may_vanish,
        )
    return triples


def reference_losses(latents: Tensor, exists: Tensor | None = None) -> Tensor:
    views = [list(expert.unbind(0)) for expert in latents.unbind(0)]
    return torch.stack(interaction_losses(views, exists))


def loss_arguments(latents: Tensor) -> Iterator[list[Any]]:
    """Arguments of the interaction losses: all views, some views, and no uniqueness experts."""
    batch, modalities = latents.shape[2], latents.shape[1] - 1
    exists = torch.rand(batch, modalities, generator=torch.Generator().manual_seed(batch)) < 0.7
    yield [latents, None]
    yield [latents, exists]
    yield [latents[-2:], exists]
