"""Properties of every operator on Triton: registration, layouts, gradients of some inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels.core.triton.launches import Launch
from tests.support.every_operator import (
    Recorded,
    calls,
    check_frozen,
    check_layouts,
    check_operator,
    few_subsets,
    gradients_of,
    operators_of,
    without_gradient,
)

CALLS = calls("triton", torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_frozen_inputs_have_no_gradient_and_change_no_other(name: str) -> None:
    check_frozen(CALLS[name], few_subsets(len(CALLS[name].inputs)))


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


# Operator, wanted inputs, kernels of the backward in order.
LAUNCHES = (
    ("expert_attention, p=0.0", ".1.", ["gradient_kernel"]),
    ("expert_attention, p=0.5", "1..", ["query_gradient_kernel"]),
    ("expert_attention, p=0.5", ".1.", ["query_gradient_kernel", "key_gradient_kernel"]),
    ("expert_attention, p=0.5", "..1", ["key_gradient_kernel"]),
    ("expert_linear, p=0.0", "1..", ["product_kernel"]),
    ("expert_linear, p=0.0", "..1", ["weight_gradient_kernel"]),
    ("expert_norm, p=0.0", "1..", ["norm_gradient_kernel"]),
    ("expert_norm, p=0.0", ".1.", ["norm_gradient_kernel", "norm_sum_kernel"]),
    ("pair_moe, none", "..1..", ["gradient_kernel"]),
    ("pair_moe, none", "...1.", ["project_kernel", "gradient_kernel"]),
    ("pair_moe, none", "....1", ["project_kernel", "gradient_kernel"]),
    ("pair_moe, none", ".1...", ["project_kernel", "gradient_kernel"]),
    ("pair_moe, none", "11111", ["project_kernel", "gradient_kernel", "gradient_kernel"]),
    ("routed_mlp", "1.....", ["hidden_gradient_kernel", "rows_kernel", "sum_kernel"]),
    ("routed_mlp", ".1....", ["hidden_gradient_kernel", "choice_gradient_kernel"]),
    ("routed_mlp", "..1...", ["hidden_gradient_kernel", "weight_gradient_kernel"]),
    ("routed_mlp", ".....1", ["weight_gradient_kernel"]),
    ("routed_mlp, gated", "......1.", ["hidden_gradient_kernel", "weight_gradient_kernel"]),
    ("routed_mlp, gated", "1.......", ["hidden_gradient_kernel", "rows_kernel", "sum_kernel"]),
)


@pytest.mark.parametrize(("name", "wanted", "kernels"), LAUNCHES)
def test_kernels_of_unwanted_gradients_are_not_launched(
    name: str, wanted: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    run = Launch.run

    def recorded(launch: Launch, *args: Any) -> None:
        launched.append(launch.kernel.fn.__name__)
        run(launch, *args)

    monkeypatch.setattr(Launch, "run", recorded)
    gradients_of(CALLS[name], [each == "1" for each in wanted])
    assert launched[-len(kernels) :] == kernels
    assert not [each for each in launched[: -len(kernels)] if "gradient" in each]
