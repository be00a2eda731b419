"""pair_moe against its peers and the machine's own sgemm, interleaved, with gates on speed and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gates import Comparison, hold
from bench.products import SGEMM_FLOP, sgemm
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.contestants import prepare
from flmoe_kernels.profile.costs import cost
from flmoe_kernels.profile.measure import interleave, timings
from flmoe_kernels.profile.memory import memory_lack, peak_bytes
from flmoe_kernels.profile.shapes import PAIR_BASE, PAIR_LONG

SGEMM_SHARE = 0.5
LONG_BYTES = 256 * 2**20


def test_against_peers(benchmark: Any, comparison: Comparison) -> None:
    hold(benchmark, comparison)


def test_share_of_sgemm() -> None:
    """The forward makes its products at half the rate of a large matrix product, or more."""
    case = Case("pair_moe", PAIR_BASE, FORWARD, torch.float32, "cpu", "none")
    found = timings(interleave({"ours": prepare(case, "cpu").call, "sgemm": sgemm()}, 15, warmup=3))
    share = cost(case).flop / found["ours"].p50 / (SGEMM_FLOP / found["sgemm"].p50)
    assert share >= SGEMM_SHARE, f"{case.name}: {share:.0%} of the sgemm rate"


@pytest.mark.skipif(bool(memory_lack("cpu")), reason=memory_lack("cpu"))
@pytest.mark.parametrize("reduce", ["none", "pool"])
def test_memory_of_pair_long(reduce: str) -> None:
    """8192 x 8192 pairs forward and backward: far less than one map of them, 256 MiB."""
    case = Case("pair_moe", PAIR_LONG, BOTH, torch.float32, "cpu", reduce)
    grown = peak_bytes(case, "cpu")
    assert grown is not None
    assert grown < LONG_BYTES, f"{case.name} grew by {grown / 2**20:.0f} MiB"
