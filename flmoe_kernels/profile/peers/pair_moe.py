"""pair_moe: the reference, eager and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.ops.pair_moe.api import pair_moe
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.prepared import Form, Prepared, prepare_function
from flmoe_kernels.profile.shapes import PairShape, is_cuda

from . import common

COMPILED = "compiled"
ORACLE = REFERENCE
PEERS = (REFERENCE, COMPILED)
# Maps of pairs that the reference holds at a time, forward and backward, in float32.
_MAPS = 6
_ROOM = {"cpu": 4 * 2**30, "cuda": 48 * 2**30}


def lack(case: Case, name: str) -> str:
    shape = shape_of(case)
    held = _MAPS * 4 * len(shape.kinds) * shape.pairs
    kind = "cuda" if is_cuda(case.device) else "cpu"
    if held > _ROOM[kind]:
        return f"its maps of all pairs would take about {held / 2**30:.0f} GiB"
    return common.compile_lack(case) if name == COMPILED else ""


def version(name: str) -> str:
    return torch.__version__


def shape_of(case: Case) -> PairShape:
    assert isinstance(case.shape, PairShape)
    return case.shape


def make_inputs(shape: PairShape, device: str) -> dict[str, Tensor]:
    """q, k, a, c in float32."""
    generator = common.generator_of(device)
    sizes = {
        "q": (shape.rows, shape.rank),
        "k": (shape.columns, shape.rank),
        "a": (shape.rows, shape.width),
        "c": (shape.columns, shape.width),
    }
    return {
        name: common.draw(shape.batch, len(shape.kinds), *size, generator=generator)
        for name, size in sizes.items()
    }


def function_of(case: Case, name: str) -> Callable[..., dict[str, Tensor]]:
    """q, k, a, c -> y and mass."""
    kinds = shape_of(case).kinds
    if name == COMPILED:
        return _compiled(kinds, case.variant)
    return _function(kinds, case.variant, name)


def _function(
    kinds: tuple[str, ...], reduce: str, backend: str
) -> Callable[..., dict[str, Tensor]]:
    def call(q: Tensor, k: Tensor, a: Tensor, c: Tensor) -> dict[str, Tensor]:
        y, mass = pair_moe(q, k, a, c, kinds=kinds, reduce=reduce, backend=backend)
        return {"y": y, "mass": mass}

    return call


@functools.cache
def _compiled(kinds: tuple[str, ...], reduce: str) -> Callable[..., dict[str, Tensor]]:
    """One function for all shapes, so that each is compiled once however often it is made ready."""
    return common.compiled(_function(kinds, reduce, REFERENCE))


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    inputs = make_inputs(shape_of(case), case.device)
    leaves = {key: common.place(case, x, dtype) for key, x in inputs.items()}
    # Networks use y; mass is for explanations.
    through = {"y": form_of_y(case, dtype)}
    return prepare_function(function_of(case, name), leaves, case.phase, through)


def form_of_y(case: Case, dtype: torch.dtype) -> Form:
    shape = shape_of(case)
    sample = (shape.batch, len(shape.kinds))
    if case.variant == "pool":
        return (*sample, shape.width), statistics_dtype(dtype)
    return (*sample, shape.rows, shape.width), dtype
