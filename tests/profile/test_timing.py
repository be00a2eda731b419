"""The statistics of the gate on machines of known noise: what is slower is caught, what is noise is not."""

from __future__ import annotations

import gc
import time

import pytest

from flmoe_kernels.profile.floors import Floor
from flmoe_kernels.profile.gate import falls_short, judge
from flmoe_kernels.profile.paired import (
    LEAST_BLOCKS,
    MOST_BLOCKS,
    UNDECIDED,
    Blocks,
    clock_for,
    measure_blocks,
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
    """A collection of all that torch made takes longer than a thousand rounds of a machine that is not there."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15])
def test_planted_slowdown_is_caught_and_noise_is_not(noise: float) -> None:
    """All of them; and no alarm in as many clean runs."""
    missed, alarms = [], []
    for seed in range(40):
        for ours, wrong in ((OURS, alarms), (SLOWER * OURS, missed)):
            machine = NoisyMachine(seed, noise=noise)
            verdict = judge(
                FLOOR,
                EXPECTED,
                "any machine",
                lambda floor, bound, m=machine, s=ours: m.measure(floor, s, PEER, bound),
                lambda floor, bound, s=ours, n=seed: NoisyMachine(1000 + n, noise=noise).measure(
                    floor, s, PEER, bound
                ),
            )
            if verdict.passed == (ours is not OURS):
                wrong.append(seed)
    assert missed == []
    assert alarms == []


def test_a_slowdown_within_the_tolerance_passes() -> None:
    """The control of the above: 5% is less than the tolerance of 10%."""
    assert FLOOR.tolerance == 0.10
    for seed in range(20):
        found = NoisyMachine(seed).measure(FLOOR, 1.05 * OURS, PEER)
        assert not falls_short(found, EXPECTED * (1 - FLOOR.tolerance))


def test_interval_holds_the_true_ratio() -> None:
    """About 95 of 100 times, also where the placement of buffers biases all rounds of a block."""
    held = 0
    for seed in range(100):
        found = NoisyMachine(seed, placement=0.04).measure(FLOOR, OURS, PEER)
        held += found.low <= EXPECTED <= found.high
    assert 89 <= held < 100


def test_rounds_go_on_until_the_interval_is_narrow() -> None:
    quiet = NoisyMachine(0, noise=0.001, burst=0, placement=0.0).measure(FLOOR, OURS, PEER)
    noisy = NoisyMachine(0, noise=0.2, burst=0.3, placement=0.05).measure(FLOOR, OURS, PEER)
    assert quiet.blocks == LEAST_BLOCKS
    assert quiet.rounds == 30
    assert LEAST_BLOCKS < noisy.blocks <= MOST_BLOCKS


def test_time_is_kept_to() -> None:
    """Slow calls get the least number of blocks, of one round."""
    machine = NoisyMachine(0)
    found = machine.measure(FLOOR, 2.0, 5.0)
    assert found.blocks == LEAST_BLOCKS
    assert found.rounds == LEAST_BLOCKS
    # In between, the budget ends the rounds of a machine that never gets precise.
    machine = NoisyMachine(0, noise=0.3)
    machine.measure(FLOOR, 0.04, 0.1)
    assert FLOOR.seconds <= machine.now < 2 * FLOOR.seconds


def test_an_open_question_gets_more_time() -> None:
    """A bound in the middle of the interval is never decided: three times as long, and no longer."""
    machine = NoisyMachine(0, noise=0.3)
    machine.measure(FLOOR, 0.04, 0.1, bound=EXPECTED)
    assert UNDECIDED * FLOOR.seconds <= machine.now < (UNDECIDED + 1) * FLOOR.seconds
    # One that lies far away costs nothing.
    machine = NoisyMachine(0, noise=0.3)
    machine.measure(FLOOR, 0.04, 0.1, bound=0.5 * EXPECTED)
    assert machine.now < 2 * FLOOR.seconds


def test_short_calls_are_timed_several_at_a_time() -> None:
    machine = NoisyMachine(0, noise=0.0, burst=0, placement=0, drift=0)
    found = machine.measure(FLOOR, 1e-5, 3e-5)
    assert found.ours.p50 == pytest.approx(1e-5)
    assert found.ratio == pytest.approx(3.0)
    assert machine.calls > 200 * found.rounds


def test_every_call_goes_first_in_turn() -> None:
    order: list[str] = []
    machine = NoisyMachine(0)

    def named(name: str) -> object:
        run = machine.call(0.01)

        def call() -> None:
            order.append(name)
            run()

        return call

    measure_blocks(
        lambda: {name: named(name) for name in "abc"},  # type: ignore[misc]
        ("fake", machine.clock),
        rounds=1,
        precision=1.0,
        seconds=100.0,
        now=lambda: machine.now,
    )
    # Two rounds that settle things, then the first block: one call of each untimed, and rounds.
    block = "".join(order)[6 : 6 + 3 + 15]
    assert block == "abc" + "abcbcacababcbca"


def test_inputs_are_fresh_for_every_block_unless_they_are_dear() -> None:
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


def test_no_garbage_is_collected_within_rounds() -> None:
    machine, states = NoisyMachine(0), []
    run = machine.call(0.01)

    def watched() -> None:
        states.append(gc.isenabled())
        run()

    assert gc.isenabled()
    measure_blocks(
        lambda: {"one": watched},
        ("fake", machine.clock),
        rounds=1,
        precision=1.0,
        seconds=100.0,
        now=lambda: machine.now,
    )
    assert gc.isenabled()
    # The two that settle things, before any block; preparing is free to collect as well.
    assert states[:2] == [True, True]
    assert not any(states[2:])


def test_processor_seconds_do_not_count_waiting() -> None:
    """The wall clock does: that is what the gate's clock is for."""
    assert processor_seconds(lambda: time.sleep(0.05)) < 0.02
    assert wall_seconds(lambda: time.sleep(0.05)) >= 0.05

    def work() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    assert processor_seconds(work) >= 0.02
    assert clock_for("cpu", 1) == ("processor", processor_seconds)
    assert clock_for("cpu", 2) == ("wall", wall_seconds)
    assert clock_for("cuda", 1)[0] == "device"
    assert clock_for("cuda:1", 1)[0] == "device"


def test_a_block_counts_once() -> None:
    """A block's median is one observation, however many rounds it has."""
    blocks = Blocks("fake", [{"ours": [1.0] * 99, "peer": [2.0] * 99}])
    blocks.seconds.extend({"ours": [1.0], "peer": [value]} for value in (3.0, 3.1))
    found = blocks.pair("ours", "peer")
    assert (found.ratio, found.low, found.high) == (3.0, 2.0, 3.1)
    assert (found.blocks, found.rounds) == (3, 101)
    assert blocks.width() == pytest.approx(1 / 3)
