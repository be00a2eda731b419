"""Memory of pair_moe at pair_long."""

from __future__ import annotations

import pytest

from flmoe_kernels.profile.cases import BOTH, Case
from flmoe_kernels.profile.memory import memory_unavailable_reason, peak_bytes
from flmoe_kernels.profile.shapes import PAIR_LONG

LONG_BYTES = 256 * 2**20


@pytest.mark.skipif(bool(memory_unavailable_reason("cpu")), reason=memory_unavailable_reason("cpu"))
@pytest.mark.parametrize("reduce", ["none", "pool"])
def test_memory_of_pair_long(cpu_only: None, reduce: str) -> None:
    """Forward and backward of 8192 x 8192 pairs take less memory than one map of the pairs, 256 MiB."""
    case = Case("pair_moe", PAIR_LONG, BOTH, variant=reduce)
    grown = peak_bytes(case, "cpu")
    assert grown is not None
    assert grown < LONG_BYTES, f"{case.name} grew by {grown / 2**20:.0f} MiB"
