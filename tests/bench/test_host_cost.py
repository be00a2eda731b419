"""Tests of the host cost of a training step on the Triton kernels: counts that must not grow."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from tests.support import host_cost

# At the shape mimic. Lower them when a change launches or compiles less.
LAUNCHES, KERNELS, NEW_KERNELS, OPERATORS, MOST_ATEN_CALLS = 47, 30, 0, 7, 910

PAIR_ATEN_CALLS = 2  # its results


def in_a_new_process(measure: Callable[..., dict[str, float]], *shape: str) -> dict[str, float]:
    """Where no kernel is compiled yet, and where new tensors are not filled as in tests."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *shape).result()


@pytest.mark.slow
def test_a_training_step_at_mimic() -> None:
    """The compiler takes a minute."""
    found = in_a_new_process(host_cost.measure, "mimic")
    assert found[host_cost.LAUNCHES] == LAUNCHES
    assert found[host_cost.KERNELS] == KERNELS
    assert found[host_cost.NEW_KERNELS] == NEW_KERNELS
    assert found[host_cost.OPERATORS] == OPERATORS
    assert 0 < found[host_cost.ATEN] <= MOST_ATEN_CALLS


@pytest.mark.slow
def test_a_forward_of_pair_moe() -> None:
    found = in_a_new_process(host_cost.measure_pairs)
    assert found[host_cost.PAIR_ATEN] == PAIR_ATEN_CALLS
    assert found[host_cost.NEW_KERNELS] == NEW_KERNELS
