"""Benchmarks of pair_moe: rate relative to torch.mm, memory at pair_long."""

from __future__ import annotations

import pytest
import torch

from flmoe_gate.floors import Floor
from flmoe_gate.gate import measure_pair
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.memory import memory_unavailable_reason, peak_bytes
from flmoe_kernels.profile.registry import prepare
from flmoe_kernels.profile.shapes import PAIR_BASE, PAIR_LONG
from flmoe_kernels.profile.work import cost

SGEMM_SIZE = 2048
SGEMM_SHARE = 0.5
LONG_BYTES = 256 * 2**20


def test_share_of_sgemm(cpu_only: None) -> None:
    """On one thread, the forward reaches at least half the FLOP rate of a large torch.mm."""
    case = Case("pair_moe", PAIR_BASE, FORWARD, variant="none")
    a, b = (torch.randn(SGEMM_SIZE, SGEMM_SIZE) for _ in range(2))
    calls = {"ours": prepare(case, "cpu").call, "peer": lambda: torch.mm(a, b)}
    plan = Floor(case.name, "torch.mm", SGEMM_SHARE, seconds=2.0)
    flop_ratio = cost(case).flop / (2 * SGEMM_SIZE**3)
    share = flop_ratio * measure_pair(lambda: calls, "cpu", plan).ratio.median
    assert share >= SGEMM_SHARE, f"{case.name}: {share:.0%} of the rate of torch.mm"


@pytest.mark.skipif(bool(memory_unavailable_reason("cpu")), reason=memory_unavailable_reason("cpu"))
@pytest.mark.parametrize("reduce", ["none", "pool"])
def test_memory_of_pair_long(cpu_only: None, reduce: str) -> None:
    """Forward and backward of 8192 x 8192 pairs take less memory than one map of the pairs, 256 MiB."""
    case = Case("pair_moe", PAIR_LONG, BOTH, variant=reduce)
    grown = peak_bytes(case, "cpu")
    assert grown is not None
    assert grown < LONG_BYTES, f"{case.name} grew by {grown / 2**20:.0f} MiB"
