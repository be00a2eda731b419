"""Tests of the host cost of a training step on the Triton kernels: counts that must not grow."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from tests.support import host_cost

# At the shape mimic. Lower them when a change launches or compiles less.
LAUNCHES, KERNELS, NEW_KERNELS, OPERATORS, MOST_ATEN_CALLS = 47, 30, 0, 7, 1720


@pytest.mark.slow
def test_a_training_step_at_mimic() -> None:
    """In a process of its own, where no kernel is compiled yet; the compiler takes a minute."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(host_cost.measure, "mimic").result()
    assert found[host_cost.LAUNCHES] == LAUNCHES
    assert found[host_cost.KERNELS] == KERNELS
    assert found[host_cost.NEW_KERNELS] == NEW_KERNELS
    assert found[host_cost.OPERATORS] == OPERATORS
    assert 0 < found[host_cost.ATEN] <= MOST_ATEN_CALLS
