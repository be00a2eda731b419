"""A call made ready for timing: its inputs exist, and its results can be computed for the check."""

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
    """The timed call, and its results.

    Attributes:
        call: is timed; its return value is not used.
        outputs: computes the results anew, by name: those of the forward, and in the other phases also "gradient
            of ...". Without random numbers, or with numbers that all contestants with this output draw alike.
    """

    call: Callable[[], object]
    outputs: Callable[[], Outputs]


def prepare_function(
    function: Function,
    leaves: Mapping[str, Tensor],
    phase: str,
    through: Mapping[str, Form],
    *,
    context: Context = contextlib.nullcontext,
) -> Prepared:
    """A contestant that is a function of tensors.

    Args:
        function: of the leaves' values in order; returns the results by name, from which gradients flow back.
        leaves: what gradients are taken of.
        phase: "backward" is timed on a graph that was made once and is kept.
        through: the results that a timed backward starts from, with their shapes and dtypes. So nothing is
            computed here but the graph of "backward": a first call's memory can be measured.
        context: is entered around each call: autocast, precision of products.
    """
    inputs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    values = list(inputs.values())

    def compute() -> Mapping[str, Tensor]:
        with context():
            return function(*values)

    def timed_part() -> dict[str, Tensor]:
        results = compute()
        return {name: results[name] for name in through}

    def forward() -> None:
        with torch.no_grad():
            compute()

    def outputs() -> Outputs:
        # A forward that is timed without a graph is compared without one: compilers make other code for it.
        with torch.set_grad_enabled(phase != FORWARD):
            found = compute()
        results = {name: x.detach() for name, x in found.items()}
        if phase == FORWARD:
            return results
        with context():
            flowing = {name: x for name, x in found.items() if x.requires_grad}
            forms = {name: (x.shape, x.dtype) for name, x in flowing.items()}
            grads = _gradients(flowing, values, cotangents_of(forms, values[0].device))
        return results | {
            GRADIENT_OF + name: torch.zeros_like(x) if grad is None else grad
            for (name, x), grad in zip(inputs.items(), grads, strict=True)
        }

    if phase == FORWARD:
        return Prepared(forward, outputs)
    grads = cotangents_of(through, values[0].device)
    if phase == BACKWARD:
        graph = timed_part()
        return Prepared(lambda: _gradients(graph, values, grads, keep=True), outputs)
    return Prepared(lambda: _gradients(timed_part(), values, grads), outputs)


def cotangents_of(forms: Mapping[str, Form], device: torch.device) -> list[Tensor]:
    """Normal values of these shapes and dtypes, seeded by the names, which every dtype holds exactly."""
    found = []
    for name, (shape, dtype) in forms.items():
        generator = torch.Generator(device).manual_seed(sum(map(ord, name)))
        draw = torch.randn(tuple(shape), generator=generator, device=device)
        found.append(draw.to(torch.bfloat16).to(dtype))
    return found


def _gradients(
    outputs: Mapping[str, Tensor], leaves: list[Tensor], grads: list[Tensor], keep: bool = False
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        list(outputs.values()), leaves, grads, retain_graph=keep, allow_unused=True
    )
