"""Benchmarks of the fixed cost of a call, with 16 tokens."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest

from flmoe_gate.machine import keep_freed_memory, torch_threads
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.registry import default_ours, prepare
from flmoe_kernels.profile.shapes import LayerShape, PairShape, RoutedShape, Shape

PAIR = PairShape("pair_16", 1, 16, 16)
ROUTED = RoutedShape("routed_16", 16, 64, 128, 4, 2)
LAYER = LayerShape("layer_16", 1, (8, 8), (None, None), 64, 4, 1, 4)


# A processor's clock changes from minute to minute.
TOLERANCE = 1.2


class Limit(NamedTuple):
    """Limit of a call in microseconds of processor time, one thread of an AMD Zen 5."""

    operator: str
    variant: str
    shape: Shape
    phase: str
    microseconds: float


LIMITS = (
    Limit("pair_moe", "none", PAIR, FORWARD, 60),
    Limit("pair_moe", "none", PAIR, BOTH, 200),
    Limit("routed_mlp", "bias", ROUTED, FORWARD, 60),
    Limit("routed_mlp", "bias", ROUTED, BOTH, 250),
    Limit("interaction_moe", "", LAYER, FORWARD, 800),
    Limit("interaction_moe", "", LAYER, BOTH, 3000),
)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("limit", LIMITS, ids=lambda x: f"{x.operator}-{x.phase}")
def test_fixed_cost(
    benchmark: Any, cpu_only: None, pytestconfig: pytest.Config, limit: Limit
) -> None:
    """The fastest of many rounds; with --gate it must be within the limit and the tolerance."""
    keep_freed_memory()
    case = Case(limit.operator, limit.shape, limit.phase, variant=limit.variant)
    call = prepare(case, default_ours(case)).call
    with torch_threads(1):
        benchmark.pedantic(call, rounds=50, iterations=20, warmup_rounds=2)
    microseconds = 1e6 * benchmark.stats["min"]
    benchmark.extra_info.update(limit_microseconds=limit.microseconds)
    if pytestconfig.getoption("--gate"):
        most = TOLERANCE * limit.microseconds
        assert microseconds <= most, (
            f"{case.name}: expected at most {most:.0f} us, measured {microseconds:.0f}"
        )
