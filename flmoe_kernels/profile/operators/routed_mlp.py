"""routed_mlp: x, weights and biases of experts, and given choices to combined rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import gate
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import RoutedShape

from . import draws

# index, x, weight, w_in, b_in, w_out, b_out -> out; without biases b_in and b_out are None.
Routed = Callable[..., Tensor]


def shape_of(case: Case) -> RoutedShape:
    assert isinstance(case.shape, RoutedShape)
    return case.shape


def make_inputs(shape: RoutedShape, biased: bool, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Make index (N, K) and x, weight, w_in, w_out, with biases also b_in and b_out."""
    generator = draws.generator_of(device)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return draws.draw(*size, generator=generator, scale=scale)

    tokens, width, hidden, experts = shape.tokens, shape.width, shape.hidden, shape.experts
    logits = draws.draw_logits(tokens, experts, shape.choices, shape.load, generator)
    index, weight = gate(logits, shape.choices, backend=REFERENCE)
    leaves = {"x": draw(tokens, width), "weight": weight}
    leaves["w_in"] = draw(experts, hidden, width, scale=width**-0.5)
    leaves["w_out"] = draw(experts, width, hidden, scale=hidden**-0.5)
    if biased:
        leaves |= {"b_in": draw(experts, hidden), "b_out": draw(experts, width)}
    return index, leaves


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    def routed(index: Tensor, x: Tensor, weight: Tensor, *weights: Tensor | None) -> Tensor:
        w_in, b_in, w_out, b_out = weights
        assert w_in is not None
        assert w_out is not None
        return routed_mlp(x, index, weight, w_in, b_in, w_out, b_out, backend=name)

    return prepare_routed(case, routed, dtype)


def prepare_routed(case: Case, routed: Routed, dtype: torch.dtype) -> Prepared:
    """Prepare a function that computes a routed MLP."""
    index, inputs = make_inputs(shape_of(case), case.variant == "bias", case.device)
    leaves = {key: draws.place(case, x, dtype) for key, x in inputs.items()}

    def function(
        x: Tensor,
        weight: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None = None,
        b_out: Tensor | None = None,
    ) -> Outputs:
        return {"out": routed(index, x, weight, w_in, b_in, w_out, b_out)}

    through = {"out": (leaves["x"].shape, dtype)}
    return prepare_function(function, leaves, case.phase, through)
