"""Properties of every operator on the CPU: registration, layouts, gradients of some inputs."""

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
    subsets,
    without_gradient,
)

DTYPES = (torch.float32, torch.bfloat16)
NAMES = list(calls("cpu", torch.float32))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_frozen_inputs_have_no_gradient_and_change_no_other(name: str, dtype: torch.dtype) -> None:
    call = calls("cpu", dtype)[name]
    count = len(call.inputs)
    check_frozen(call, subsets(count) if count < 9 else few_subsets(count))


@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_results_have_the_same_bits_in_every_layout(name: str, dtype: torch.dtype) -> None:
    check_layouts(calls("cpu", dtype)[name])


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    call = calls("cpu", torch.float64)[name]
    leaves = [x.clone().requires_grad_() for x in call.inputs]
    assert torch.autograd.gradcheck(call.function, leaves, fast_mode=True)


# Without dropout the same operators run.
FEW = [name for name in NAMES if "p=0.0" not in name]


@pytest.mark.parametrize(("name", "dtype"), [*zip(FEW, itertools.cycle(DTYPES))], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    for op, arguments in operators_of(calls("cpu", dtype)[name]):
        check_operator(op, arguments)


@each_dtype
@pytest.mark.parametrize("name", without_gradient("cpu", torch.float32))
def test_opcheck_without_a_gradient(name: str, dtype: torch.dtype) -> None:
    with Recorded() as seen:
        without_gradient("cpu", dtype)[name]()
    for op, arguments, _ in seen.found:
        check_operator(op, arguments)


def test_no_operator_is_left_out() -> None:
    tested = {op for call in calls("cpu", torch.float32).values() for op, _ in operators_of(call)}
    with Recorded() as seen:
        for run in without_gradient("cpu", torch.float32).values():
            run()
    names = {str(op).split(".")[1] for op in (*tested, *(op for op, *_ in seen.found))}
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("flmoe::")
    }
    # The reweighting has kernels for a GPU only; tests/interpreter checks them.
    assert {name for name in registered - names if "mix_" not in name} == {
        "reweighting_features",
        "reweighting_features_backward",
    }
