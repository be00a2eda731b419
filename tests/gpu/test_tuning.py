"""Tests of autotuning on a GPU: timer and CUDA graph capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels import pair_moe
from flmoe_kernels.core import backend as backends
from flmoe_kernels.core.error_budget import assert_within_budget
from flmoe_kernels.core.triton import tuning
from flmoe_kernels.core.triton.tuning import timing, tuner
from tests.support import pair_cases
from tests.support.inputs import as_dtype
from tests.support.tuning_trials import choices

RUNS, WHY_NOT = backends.backend_status()["triton"]
pytestmark = pytest.mark.skipif(
    not (RUNS and torch.cuda.is_available()), reason=f"no kernels run on a GPU here: {WHY_NOT}"
)
CASE = pair_cases.PairCase(320, 196, 32, 64, bias=False)


@pytest.fixture(autouse=True)
def no_choices() -> None:
    tuner.forget()


def forward(inputs: list[Tensor]) -> Tensor:
    y = pair_moe(*inputs, kinds=CASE.kinds, backend="triton")
    return y[0]


def test_the_fastest_tiles_are_chosen_and_correct() -> None:
    inputs = CASE.inputs(torch.bfloat16)
    moved = [x.cuda() for x in inputs]
    with tuning.autotune():
        results = pair_cases.run(CASE, moved, "triton")
        again = pair_cases.run(CASE, moved, "triton")
    assert all(map(torch.equal, results, again))
    assert set(choices()) == {"pair_moe.accumulate", "pair_moe.gradient"}
    assert {key.device for key in tuner._choices} == {torch.cuda.get_device_name()}
    low = pair_cases.run(CASE, inputs, "reference")
    oracle = pair_cases.run(CASE, as_dtype(inputs, torch.float64), "reference")
    assert_within_budget(results[0].cpu(), low[0], oracle[0], "y")


def test_a_capture_uses_the_table() -> None:
    moved = [x.cuda() for x in CASE.inputs(torch.bfloat16)]
    want = forward(moved)
    graph = torch.cuda.CUDAGraph()
    with tuning.autotune(), torch.cuda.graph(graph):
        assert timing.capturing(moved[0].device)
        found = forward(moved)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, want)
