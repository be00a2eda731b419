"""Prepared calls: inputs are made, and results can be computed for the check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import BACKWARD, FORWARD

Outputs = dict[str, Tensor]
Function = Callable[..., Mapping[str, Tensor]]
Context = Callable[[], contextlib.AbstractContextManager[object]]
# Shape and dtype of a result.
Form = tuple[Sequence[int], torch.dtype]
GRADIENT_OF = "gradient of "


@dataclass(frozen=True)
class Prepared:
    """The timed call and its results.

    Attributes:
        call: the timed call; its return value is not used.
        outputs: computes the results again, by name: those of the forward, and in other phases also "gradient
            of ...". Without random numbers, or with numbers that are the same for all contestants.
    """

    call: Callable[[], object]
    outputs: Callable[[], Outputs]


def prepare_function(
    function: Function,
    leaves: Mapping[str, Tensor],
    phase: str,
    through: Mapping[str, Form],
) -> Prepared:
    """Prepare a contestant that is a function of tensors.

    Args:
        function: takes the leaves' values in order; returns the results by name, from which gradients flow back.
        leaves: tensors whose gradients are computed.
        phase: "backward" is timed on a graph that was made once and is kept.
        through: the results that a timed backward starts from, with their shapes and dtypes. They are passed so
            that only "backward" computes anything here: the memory of a first call can then be measured.
    """
    inputs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    values = list(inputs.values())

    def compute() -> Mapping[str, Tensor]:
        return function(*values)

    def timed_part() -> dict[str, Tensor]:
        results = compute()
        return {name: results[name] for name in through}

    def forward() -> None:
        with torch.no_grad():
            compute()

    def outputs() -> Outputs:
        # A forward is timed and compared without a graph, because compilers generate different code for it.
        with torch.set_grad_enabled(phase != FORWARD):
            computed = compute()
        results = {name: x.detach() for name, x in computed.items()}
        if phase == FORWARD:
            return results
        return results | gradients_by_name(computed, inputs)

    if phase == FORWARD:
        return Prepared(forward, outputs)
    grads = cotangents_of(through, values[0].device)
    if phase == BACKWARD:
        graph = timed_part()
        return Prepared(lambda: _gradients(graph, values, grads, keep=True), outputs)
    return Prepared(lambda: _gradients(timed_part(), values, grads), outputs)


def cotangents_of(forms: Mapping[str, Form], device: torch.device) -> list[Tensor]:
    """Draw normal values of these shapes and dtypes, seeded by the names; all dtypes represent them exactly."""
    cotangents = []
    for name, (shape, dtype) in forms.items():
        generator = torch.Generator(device).manual_seed(sum(map(ord, name)))
        draw = torch.randn(tuple(shape), generator=generator, device=device)
        cotangents.append(draw.to(torch.bfloat16).to(dtype))
    return cotangents


def gradients_by_name(results: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Outputs:
    """Gradients of all leaves for random output gradients of all results that require grad; 0 if unused."""
    flowing = {name: x for name, x in results.items() if x.requires_grad}
    forms = {name: (x.shape, x.dtype) for name, x in flowing.items()}
    values = list(leaves.values())
    grads = _gradients(flowing, values, cotangents_of(forms, values[0].device))
    return {
        GRADIENT_OF + name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(leaves.items(), grads, strict=True)
    }


def _gradients(
    outputs: Mapping[str, Tensor], leaves: list[Tensor], grads: list[Tensor], keep: bool = False
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        list(outputs.values()), leaves, grads, retain_graph=keep, allow_unused=True
    )
