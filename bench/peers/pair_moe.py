"""Peer of pair_moe: the compiled reference."""

from __future__ import annotations

import functools

import torch

from flmoe_kernels.core.backend import REFERENCE
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.operators import pair_moe as operator
from flmoe_kernels.profile.prepared import Prepared

from . import common

COMPILED = "compiled"
PEERS = (COMPILED,)


def unavailable_reason(case: Case, name: str) -> str:
    return operator.reference_unavailable_reason(case)


@functools.cache
def _compiled(kinds: tuple[str, ...], reduce: str) -> operator.Function:
    """One cached function for all shapes, so that each shape is compiled only once."""
    common.prepare_compiler()
    return torch.compile(operator.function_of(kinds, reduce, REFERENCE), dynamic=False)


def prepare(case: Case, name: str, dtype: torch.dtype) -> Prepared:
    function = _compiled(operator.shape_of(case).kinds, case.variant)
    return operator.prepare_pairs(case, function, dtype)
