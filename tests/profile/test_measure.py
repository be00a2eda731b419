"""Tests of memory, work, ceilings and environment of a measurement."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch

from flmoe_kernels.profile import memory
from flmoe_kernels.profile.cases import BACKWARD, BOTH, FORWARD, Case
from flmoe_kernels.profile.ceilings import EXPONENTIALS, MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.environment import environment
from flmoe_kernels.profile.shapes import LayerShape, PairShape
from flmoe_kernels.profile.work import Cost, cost

MIB = 2**20


def hungry(count: int) -> Callable[[], list[bytearray]]:
    """A call that writes this many bytes in small pieces, after the same number was allocated and freed.

    The last piece keeps the heap from being returned to the system, so the call could reuse it.
    """
    inputs = [bytearray(b"x" * (3 * count))]
    pieces = [bytearray(b"x" * 65536) for _ in range(count // 65536)]
    inputs.append(pieces[-1])
    del pieces

    def call() -> list[bytearray]:
        assert inputs
        return [bytearray(b"x" * 65536) for _ in range(count // 65536)]

    return call


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc and glibc's malloc_trim")
def test_memory_excludes_inputs_and_bytes_freed_before() -> None:
    assert 60 * MIB < memory.peak_growth(hungry, 64 * MIB) < 80 * MIB


@pytest.mark.skipif(
    bool(memory.memory_unavailable_reason("cpu")), reason=memory.memory_unavailable_reason("cpu")
)
def test_memory_of_a_case_excludes_loading_and_inputs() -> None:
    """A new process prepares the case; a map of 640 x 640 pairs would take 6.25 MiB."""
    case = Case("pair_moe", PairShape("maps", 1, 640, 640), BOTH, variant="pool")
    peak = memory.peak_bytes(case, "cpu")
    assert peak is not None
    # At least the gradients of all inputs; loading in a first call would add tens of MiB.
    assert 640 * 2 * 4 * (32 + 64) * 4 <= peak < 12 * MIB


CEILINGS = Ceilings("cpu", {"float32": 100.0}, bytes_per_second=10.0, exponentials=5.0)


@pytest.mark.parametrize(
    ("work", "seconds", "binds"),
    [
        (Cost(1000, 10, 10), 10.0, MATMUL),
        (Cost(100, 100, 10), 10.0, MEMORY),
        (Cost(100, 10, 100), 20.0, EXPONENTIALS),
    ],
)
def test_the_limit_that_binds(work: Cost, seconds: float, binds: str) -> None:
    assert CEILINGS.roofline_seconds(work, torch.float32) == (seconds, binds)
    with pytest.raises(KeyError, match="bfloat16"):
        CEILINGS.roofline_seconds(work, torch.bfloat16)


def test_cost_by_hand() -> None:
    """A pair with R = 3 and V = 5: two logits and synergy's product; mass and y are written too. An attention."""
    shape = PairShape("one", 1, 1, 1, 3, 5, kinds=("synergy", "unique_a"))
    forward = cost(Case("pair_moe", shape, FORWARD, variant="pool"))
    assert forward.flop == 2 * 2 * 3 + 2 * 5
    assert forward.bytes == 4 * (2 * 2 * (3 + 5) + 2 * 5 + 2)
    assert forward.exponentials == 2
    backward = cost(Case("pair_moe", shape, BACKWARD, variant="pool"))
    assert backward.flop == 6 * 3 * 2 + 4 * 5 + 2 * 5
    both = cost(Case("pair_moe", shape, BOTH, variant="pool"))
    assert both == forward + backward
    layer = LayerShape("layer", 1, (2, 1), (1, None), 4, 2, 1, 3)  # 4 experts, 2 heads of width 2
    attention = cost(Case("expert_attention", layer, FORWARD, variant="plain"))
    # 2 valid tokens in 3 views; 4 scores a head; q, k, v, out, the statistics, and 4 int32 of cu_seqlens.
    assert attention.flop == 4 * 3 * 4 * 2 * 4 * 2
    assert attention.exponentials == 4 * 3 * 4 * 2
    assert attention.bytes == 4 * 3 * 2 * (4 * 4 + 2) * 4 + 4 * 4
    half = cost(Case("pair_moe", shape, FORWARD, torch.bfloat16, variant="none"))
    assert half.bytes == 2 * (2 * 2 * (3 + 5) + 2 * 5) + 4 * 2


def test_environment_is_json_and_names_the_machine() -> None:
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts["device"] == facts["cpu"]
    for name in ("threads", "instruction_set", "flmoe_kernels", "numpy", "python", "commit"):
        assert facts[name], name
