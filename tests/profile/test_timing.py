"""Tests of timing on simulated machines: slowdowns, noise, intervals."""

from __future__ import annotations

import gc
import random

import pytest

from flmoe_gate.floors import Floor
from flmoe_gate.gate import Verdict
from flmoe_gate.timing import (
    LEAST_BLOCKS,
    measure_blocks,
    median_interval,
)
from tests.support.bench_machines import NoisyMachine

OURS, PEER = 0.004, 0.010
EXPECTED = PEER / OURS
FLOOR = Floor("op/shape/forward/float32", "peer", EXPECTED, precision=0.02)
SLOWER = 1.3


@pytest.fixture(autouse=True)
def no_collection_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the garbage collection, which takes longer than a thousand simulated rounds."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.mark.parametrize("noise", [0.01, 0.15])
def test_planted_slowdown_is_caught_and_noise_is_not(noise: float) -> None:
    """All slowdowns are caught, and the same number of clean runs gives no alarm."""
    missed, alarms = [], []
    for seed in range(20):
        for ours, wrong in ((OURS, alarms), (SLOWER * OURS, missed)):
            machine = NoisyMachine(seed, noise=noise)
            paired = machine.measure(FLOOR, ours, PEER, FLOOR.bound(EXPECTED))
            verdict = Verdict(FLOOR, EXPECTED, "any machine", paired)
            if verdict.passed == (ours is not OURS):
                wrong.append(seed)
    assert missed == []
    assert alarms == []


def test_a_slowdown_within_the_tolerance_passes() -> None:
    """Negative control of the test above: 5% is less than the tolerance of 10%."""
    assert FLOOR.tolerance == 0.10
    for seed in range(20):
        found = NoisyMachine(seed).measure(FLOOR, 1.05 * OURS, PEER)
        assert Verdict(FLOOR, EXPECTED, "any machine", found).passed


def test_interval_holds_the_true_ratio() -> None:
    """It does in about 95 of 100 runs, even if the placement of buffers biases all rounds of a block."""
    held = 0
    for seed in range(100):
        found = NoisyMachine(seed, placement=0.04).measure(FLOOR, OURS, PEER)
        held += found.ratio.low <= EXPECTED <= found.ratio.high
    assert 89 <= held < 100


def test_the_time_limit_is_kept() -> None:
    """Slow calls get the minimum number of blocks, with one round each."""
    machine = NoisyMachine(0)
    found = machine.measure(FLOOR, 2.0, 5.0)
    assert found.ratio.blocks == LEAST_BLOCKS
    assert found.ratio.rounds == LEAST_BLOCKS
    # Between these limits, the time limit ends the rounds if the interval stays wide.
    machine = NoisyMachine(0, noise=0.3)
    machine.measure(FLOOR, 0.04, 0.1)
    assert FLOOR.seconds <= machine.now < 2 * FLOOR.seconds


@pytest.mark.parametrize(("limit", "blocks"), [(2.0, 1), (30.0, 4), (100.0, LEAST_BLOCKS)])
def test_slow_calls_get_fewer_blocks_within_a_limit(limit: float, blocks: int) -> None:
    machine = NoisyMachine(0, noise=0.01, burst=0.0, placement=0.01, drift=0.0)
    found = measure_blocks(
        lambda: {"ours": machine.call(2.0), "peer": machine.call(5.0)},
        ("fake", machine.clock),
        rounds=1,
        precision=0.01,
        seconds=1.0,
        limit=limit,
        now=lambda: machine.now,
    )
    paired = found.pair("ours", "peer")
    assert paired.ratio.median == pytest.approx(2.5, rel=0.05)
    assert (paired.ratio.blocks, paired.ratio.rounds) == (blocks, blocks)
    assert paired.ratio.confidence == max(0.0, 1 - 2 * 0.5**blocks)
    assert machine.now < 7.3 * max(2, 1 + limit / 7)


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    [
        # From a table of the binomial distribution with p = 1/2.
        (5, 0, 4, 0.9375),
        (11, 1, 9, 1 - 2 * 12 / 2048),
        (20, 5, 14, 0.9586),
    ],
)
def test_interval_agrees_with_tables(count: int, low: int, high: int, confidence: float) -> None:
    values = random.Random(0).sample(range(count), count)
    found = median_interval(values)
    assert found[:2] == (low, high)
    assert found[2] == pytest.approx(confidence, abs=1e-4)
    with pytest.raises(ValueError, match="values: expected at least one"):
        median_interval([])
