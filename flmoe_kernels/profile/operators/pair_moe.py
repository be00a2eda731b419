"""pair_moe: q, k, a, c to y and mass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.ops.pair_moe.api import pair_moe
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Form, Prepared, prepare_function
from flmoe_kernels.profile.shapes import PairShape, is_cuda

from . import draws

Function = Callable[..., dict[str, Tensor]]
# Number of pair maps that the reference holds at the same time, forward and backward, in float32.
_MAPS = 6
_ROOM = {"cpu": 4 * 2**30, "cuda": 48 * 2**30}


def reference_unavailable_reason(case: Case) -> str:
    shape = shape_of(case)
    held = _MAPS * 4 * len(shape.kinds) * shape.pairs
    if held > _ROOM["cuda" if is_cuda(case.device) else "cpu"]:
        return f"its maps of all pairs would take about {held / 2**30:.0f} GiB"
    return ""


def shape_of(case: Case) -> PairShape:
    assert isinstance(case.shape, PairShape)
    return case.shape


def make_inputs(shape: PairShape, device: str) -> dict[str, Tensor]:
    """Make q, k, a, c in float32."""
    generator = draws.generator_of(device)
    sizes = {
        "q": (shape.rows, shape.rank),
        "k": (shape.columns, shape.rank),
        "a": (shape.rows, shape.width),
        "c": (shape.columns, shape.width),
    }
    return {
        name: draws.draw(shape.batch, len(shape.kinds), *size, generator=generator)
        for name, size in sizes.items()
    }


def function_of(kinds: tuple[str, ...], reduce: str, backend: str) -> Function:
    """Return a function from q, k, a, c to y and mass."""

    def call(q: Tensor, k: Tensor, a: Tensor, c: Tensor) -> dict[str, Tensor]:
        y, mass = pair_moe(q, k, a, c, kinds=kinds, reduce=reduce, backend=backend)
        return {"y": y, "mass": mass}

    return call


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    return prepare_pairs(case, function_of(shape_of(case).kinds, case.variant, name), dtype)


def prepare_pairs(case: Case, function: Function, dtype: torch.dtype) -> Prepared:
    """Prepare a function from q, k, a, c to y and mass."""
    inputs = make_inputs(shape_of(case), case.device)
    leaves = {key: draws.place(case, x, dtype) for key, x in inputs.items()}
    # Networks use y; mass is for explanations.
    return prepare_function(function, leaves, case.phase, {"y": _form_of_y(case, dtype)})


def _form_of_y(case: Case, dtype: torch.dtype) -> Form:
    shape = shape_of(case)
    sample = (shape.batch, len(shape.kinds))
    if case.variant == "pool":
        return (*sample, shape.width), statistics_dtype(dtype)
    return (*sample, shape.rows, shape.width), dtype
