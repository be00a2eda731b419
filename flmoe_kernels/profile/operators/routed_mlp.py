"""routed_mlp: x, weights and biases of experts, and given choices to combined rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.ops.routed_mlp.api import routed_mlp
from flmoe_kernels.ops.routing.api import gate
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import RoutedShape

from . import draws


class Experts(NamedTuple):
    """Parameters of the experts; biases and w_gate are None if the variant has none."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    w_gate: Tensor | None = None


# (x, index, weight, experts) -> out
Routed = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def shape_of(case: Case) -> RoutedShape:
    assert isinstance(case.shape, RoutedShape)
    return case.shape


def make_inputs(shape: RoutedShape, variant: str, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Make index (N, K) and x, weight, w_in, w_out; by variant also b_in and b_out, or w_gate."""
    generator = draws.generator_of(device)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return draws.draw(*size, generator=generator, scale=scale)

    tokens, width, hidden, experts = shape.tokens, shape.width, shape.hidden, shape.experts
    logits = draws.draw_logits(tokens, experts, shape.choices, shape.load, generator)
    index, weight = gate(logits, shape.choices, backend=REFERENCE)
    leaves = {"x": draw(tokens, width), "weight": weight}
    leaves["w_in"] = draw(experts, hidden, width, scale=width**-0.5)
    leaves["w_out"] = draw(experts, width, hidden, scale=hidden**-0.5)
    if variant == "bias":
        leaves |= {"b_in": draw(experts, hidden), "b_out": draw(experts, width)}
    if variant == "swiglu":
        leaves["w_gate"] = draw(experts, hidden, width, scale=width**-0.5)
    return index, leaves


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    def routed(x: Tensor, index: Tensor, weight: Tensor, experts: Experts) -> Tensor:
        act = "gelu" if experts.w_gate is None else "silu"
        return routed_mlp(x, index, weight, act=act, backend=name, **experts._asdict())

    return prepare_routed(case, routed, dtype)


def prepare_routed(case: Case, routed: Routed, dtype: torch.dtype) -> Prepared:
    """Prepare a function that computes a routed MLP."""
    index, inputs = make_inputs(shape_of(case), case.variant, case.device)
    leaves = {key: draws.place(case, x, dtype) for key, x in inputs.items()}

    def function(*values: Tensor) -> Outputs:
        named = dict(zip(leaves, values, strict=True))
        x, weight = named.pop("x"), named.pop("weight")
        return {"out": routed(x, index, weight, Experts(**named))}

    through = {"out": (leaves["x"].shape, dtype)}
    return prepare_function(function, leaves, case.phase, through)
