"""Tests of plans without a GPU; tests/interpreter/test_plans.py compares results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

from flmoe_kernels.core.triton import plans
from flmoe_kernels.ops.pair_moe.api import pair_moe
from tests.support.inputs import draw
from tests.support.triton_driver import compiled_to_ptx

DEVICE = 2000  # a number of this file, because Triton keeps loaded kernels by the number
CPU = torch.device("cpu")
Started = tuple[str, int, list[Any]]


def flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        else:
            yield value.data_ptr() if isinstance(value, Tensor) else value


@pytest.fixture
def started() -> Iterator[list[Started]]:
    """Name, number of programs and arguments of every launch."""
    launches: list[Started] = []

    def launch(source: Any, _: Any, grid: tuple[int, ...], _kernel: Any, values: list[Any]) -> None:
        launches.append((source.hash(), grid[0], list(flat(values))))

    with compiled_to_ptx(90, str, launch, DEVICE):
        yield launches


def step(bias: Tensor) -> None:
    x = [draw(2, 3, n, 32, seed=n).requires_grad_() for n in (40, 24, 40, 24)]
    kinds = ["unique_a", "synergy", "redundancy"]
    out = pair_moe(*x, kinds=kinds, gate_bias=bias, backend="triton")
    torch.autograd.grad(out.y.sum() + out.mass.sum(), x)


def test_addresses_are_those_of_the_tensors(
    started: list[Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated call passes addresses of the places where a call with tensors has them."""
    seen: list[tuple[plans.Plan, Any]] = []
    original = plans.Plan.launch

    def launch(plan: plans.Plan, device: torch.device, buffers: Any) -> None:
        seen.append((plan, buffers))
        original(plan, device, buffers)

    monkeypatch.setattr(plans.Plan, "launch", launch)
    for _ in range(4):
        step(torch.zeros(3))
    first, second = seen[:2], seen[2:]
    assert [plan for plan, _ in first] == [plan for plan, _ in second]
    for plan, buffers in second:
        started.clear()
        original(plan, CPU, buffers)
        addresses = started.copy()
        with monkeypatch.context() as patch:
            patch.setattr(plans, "hooked", lambda: True)
            original(plan, CPU, buffers)
        assert started[len(addresses) :] == addresses
        assert len(addresses) == len(plan._steps) > 0


def test_other_alignment_has_other_kernels(started: list[Started]) -> None:
    """A kernel for aligned addresses must not get others."""
    biases = [torch.zeros(8)[first : first + 3] for first in (0, 1, 4)]
    for _ in range(4):
        step(biases[0])
    forwards: dict[int, str] = {}
    for i, bias in enumerate(biases):
        for _ in range(2):
            started.clear()
            step(bias)
            assert forwards.setdefault(i, started[0][0]) == started[0][0]
    assert forwards[0] == forwards[2] != forwards[1]
