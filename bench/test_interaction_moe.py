"""The layer against the reference layer, interleaved, with gates on speed and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.gates import Comparison, hold
from flmoe_kernels.profile.cases import BOTH, Case
from flmoe_kernels.profile.memory import memory_lack, peak_bytes
from flmoe_kernels.profile.shapes import MMIMDB

MEMORY_FRACTION = 1 / 3


def test_against_peers(benchmark: Any, comparison: Comparison) -> None:
    hold(benchmark, comparison)


@pytest.mark.skipif(bool(memory_lack("cpu")), reason=memory_lack("cpu"))
def test_training_memory() -> None:
    """Peak memory of a training step at mmimdb: at most a third of the reference's."""
    case = Case("interaction_moe", MMIMDB, BOTH, torch.float32)
    ours, peer = (peak_bytes(case, name) for name in ("cpu", "reference"))
    assert ours is not None
    assert peer is not None
    assert ours <= MEMORY_FRACTION * peer, (
        f"{case.name}: expected at most {MEMORY_FRACTION:.2f} of the reference's "
        f"{peer / 2**20:.0f} MiB, measured {ours / 2**20:.0f} MiB"
    )
