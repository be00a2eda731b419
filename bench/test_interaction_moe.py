"""Benchmarks of the layer against the reference; memory of a training step."""

from __future__ import annotations

import pytest

from bench.suite import Comparison, compare
from flmoe_kernels.profile.cases import BOTH, Case
from flmoe_kernels.profile.gate import Against
from flmoe_kernels.profile.memory import memory_unavailable_reason, peak_bytes
from flmoe_kernels.profile.shapes import MMIMDB

MEMORY_FRACTION = 1 / 3


def test_against_peers(benchmark_against: Against, comparison: Comparison, full: bool) -> None:
    compare(benchmark_against, comparison, full)


@pytest.mark.skipif(bool(memory_unavailable_reason("cpu")), reason=memory_unavailable_reason("cpu"))
def test_training_memory(cpu_only: None) -> None:
    """Peak memory of a training step at mmimdb is at most a third of the reference's."""
    case = Case("interaction_moe", MMIMDB, BOTH)
    ours, peer = (peak_bytes(case, name) for name in ("cpu", "reference"))
    assert ours is not None
    assert peer is not None
    assert ours <= MEMORY_FRACTION * peer, (
        f"{case.name}: expected at most {MEMORY_FRACTION:.2f} of the reference's "
        f"{peer / 2**20:.0f} MiB, measured {ours / 2**20:.0f} MiB"
    )
