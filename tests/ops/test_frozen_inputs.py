"""Gradients of some inputs of an operator: equal to those of all inputs, and nothing else is computed."""

from __future__ import annotations

import pytest
import torch

from tests.support.frozen_inputs import calls, check, subsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", calls("cpu", torch.float32))
def test_frozen_inputs_have_no_gradient_and_change_no_other(name: str, dtype: torch.dtype) -> None:
    call = calls("cpu", dtype)[name]
    for wanted in subsets(len(call.inputs)):
        check(call, wanted)
