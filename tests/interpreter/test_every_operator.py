"""Properties of every operator on Triton: registration, layouts, gradients of some inputs."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.every_operator import (
    Recorded,
    calls,
    check_frozen,
    check_layouts,
    check_operator,
    few_subsets,
    operators_of,
    without_gradient,
)

CALLS = calls("triton", torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_frozen_inputs_have_no_gradient_and_change_no_other(name: str) -> None:
    """Every input alone, and all but the first."""
    count = len(CALLS[name].inputs)
    check_frozen(CALLS[name], itertools.islice(few_subsets(count), count + 1))


# Without dropout the same kernels run.
FEW = [name for name in CALLS if "p=0.0" not in name]


@pytest.mark.parametrize("name", FEW)
def test_results_have_the_same_bits_in_every_layout(name: str) -> None:
    check_layouts(CALLS[name])


@pytest.mark.parametrize("name", FEW)
def test_opcheck(name: str) -> None:
    """tests/ops traces the operators with the kernels of the CPU; shapes of results depend on the backend."""
    for op, arguments in operators_of(CALLS[name]):
        check_operator(op, arguments, "test_schema", "test_faketensor")


@pytest.mark.parametrize("name", without_gradient("triton", torch.float32))
def test_opcheck_without_a_gradient(name: str) -> None:
    with Recorded() as seen:
        without_gradient("triton", torch.float32)[name]()
    for op, arguments, _ in seen.found:
        check_operator(op, arguments, "test_schema", "test_faketensor")
