"""Gradients of some inputs of an operator on Triton: equal to those of all, and no kernel runs for the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels.core.triton.launches import Launch
from tests.support.frozen_inputs import calls, check, few_subsets, gradients_of

CALLS = calls("triton", torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_frozen_inputs_have_no_gradient_and_change_no_other(name: str) -> None:
    call = CALLS[name]
    for wanted in few_subsets(len(call.inputs)):
        check(call, wanted)


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
