"""routing: gate with a capacity, then dispatch, as in training with GShard's gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flmoe_kernels.ops.routing.api import dispatch, gate
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import RoutedShape

from . import draws

_CAPACITY_FACTOR = 1.2


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    shape = case.shape
    assert isinstance(shape, RoutedShape)
    capacity = math.ceil(_CAPACITY_FACTOR * shape.routed_rows / shape.experts)

    def function(logits: Tensor) -> Outputs:
        index, weight = gate(logits, shape.choices, capacity=capacity, backend=name)
        rows = dispatch(index, shape.experts, backend=name)
        return {"index": index, "weight": weight, **rows._asdict()}

    generator = draws.generator_of(case.device)
    sizes = (shape.tokens, shape.experts, shape.choices)
    logits = draws.draw_logits(*sizes, shape.load, generator)
    leaves = {"logits": draws.place(case, logits, dtype)}
    through = {"weight": ((shape.tokens, shape.choices), dtype)}
    return prepare_function(function, leaves, case.phase, through)
