"""Tests of timing on simulated machines: slowdowns, noise, intervals."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from flmoe_gate import timing
from flmoe_gate.floors import Floor
from flmoe_gate.gate import Verdict, bound_of
from flmoe_gate.timing import (
    LEAST_BLOCKS,
    clock_for,
    measure_blocks,
    median_interval,
    processor_seconds,
    wall_seconds,
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


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
def test_planted_slowdown_is_caught_and_noise_is_not(noise: float) -> None:
    """All slowdowns are caught, and the same number of clean runs gives no alarm."""
    missed, alarms = [], []
    for seed in range(40):
        for ours, wrong in ((OURS, alarms), (SLOWER * OURS, missed)):
            machine = NoisyMachine(seed, noise=noise)
            paired = machine.measure(FLOOR, ours, PEER, bound_of(FLOOR, EXPECTED))
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


def test_inputs_are_new_for_every_block_unless_expensive() -> None:
    for dear, times in ((0.0, LEAST_BLOCKS), (5.0, 1)):
        machine = NoisyMachine(0, noise=0.001, placement=0.001, burst=0)
        made = []

        def prepare(machine: NoisyMachine = machine, dear: float = dear, made: list = made) -> dict:
            made.append(1)
            machine.now += dear
            return {"ours": machine.call(0.004), "peer": machine.call(0.01)}

        measure_blocks(
            prepare,
            ("fake", machine.clock),
            rounds=1,
            precision=0.5,
            seconds=8.0,
            now=lambda m=machine: m.now,
        )
        assert len(made) == times


def test_processor_seconds_do_not_count_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock counts waiting, so the regression check uses processor time."""
    wall, processor = [100.0], [7.0]
    clocks = {"perf_counter": lambda: wall[0], "process_time": lambda: processor[0]}
    monkeypatch.setattr(timing, "time", SimpleNamespace(**clocks))

    def work() -> None:
        """Run for 0.25 s and wait for 2 s."""
        processor[0] += 0.25
        wall[0] += 2.25

    assert processor_seconds(work) == 0.25
    assert wall_seconds(work) == 2.25
    assert clock_for("cpu", 1) == ("processor", processor_seconds)
    assert clock_for("cpu", 2) == ("wall", wall_seconds)
    assert clock_for("cpu") == ("wall", wall_seconds)


def test_events_are_recorded_on_the_timed_device(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []

    @contextlib.contextmanager
    def device(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.pop()

    def seconds(call: Callable[[], object]) -> float:
        call()
        return float(inside == ["cuda:1"])

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(timing, "device_seconds", seconds)
    name, clock = clock_for("cuda:1", 1)
    assert (name, clock(lambda: None)) == ("device", 1.0)


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    [
        # From a table of the binomial distribution with p = 1/2.
        (1, 0, 0, 0.0),
        (5, 0, 4, 0.9375),
        (6, 0, 5, 0.96875),
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
