"""routing: gate with a capacity, then dispatch, as GShard's gate asks for them in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.ops.routing.api import dispatch, gate
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Outputs, Prepared, prepare_function
from flmoe_kernels.profile.shapes import RoutedShape

from . import common

ORACLE = REFERENCE
PEERS = (REFERENCE,)
_CAPACITY_FACTOR = 1.2


def lack(case: Case, name: str) -> str:
    return ""


def version(name: str) -> str:
    return torch.__version__


def shape_of(case: Case) -> RoutedShape:
    assert isinstance(case.shape, RoutedShape)
    return case.shape


def capacity_of(shape: RoutedShape) -> int:
    return math.ceil(_CAPACITY_FACTOR * shape.routed_rows / shape.experts)


def make_inputs(shape: RoutedShape, device: str) -> dict[str, Tensor]:
    generator = common.generator_of(device)
    return {"logits": common.draw(shape.tokens, shape.experts, generator=generator)}


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    shape = shape_of(case)

    def function(logits: Tensor) -> Outputs:
        index, weight = gate(logits, shape.choices, capacity=capacity_of(shape), backend=name)
        found = dispatch(index, shape.experts, backend=name)
        return {"index": index, "weight": weight, **found._asdict()}

    inputs = make_inputs(shape, case.device)
    leaves = {key: common.place(case, x, dtype) for key, x in inputs.items()}
    through = {"weight": ((shape.tokens, shape.choices), dtype)}
    return prepare_function(function, leaves, case.phase, through)
