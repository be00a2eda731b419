"""Triton kernels of backwards with frozen inputs compile for GPUs; tests/interpreter compares their results."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flmoe_kernels.core.triton.recording import recorded
from flmoe_kernels.core.triton.target import TARGETS
from tests.support.every_operator import OperatorCall, calls, gradients_of, layers

BFLOAT16 = torch.bfloat16
# Without duplicates: calls that differ only in sizes launch the same kernels.
CALLS: dict[str, OperatorCall] = {
    name: call
    for name, call in calls("triton", BFLOAT16).items()
    if "p=0.0" not in name and "experts" not in name
}
# With the fused steps, which narrower layers do not have.
CALLS["encoder_layers"] = layers("triton", BFLOAT16, width=16, hidden=16)["encoder_layers, views"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_backwards_with_one_wanted_gradient_compile(name: str) -> None:
    call = CALLS[name]
    # The gradients of all experts are computed together.
    places = range(min(len(call.inputs), 13))
    with recorded(TARGETS[90]) as kernels:
        for place in places:
            gradients_of(call, [i == place for i in range(len(call.inputs))])
    assert len(kernels) >= len(places)
    for kernel in kernels:
        kernel.compile(90)
