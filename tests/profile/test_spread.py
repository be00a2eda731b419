"""The interval of a median: what it promises, and that two runs by fake clocks agree or are told apart."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flmoe_kernels.profile.ceilings import MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.costs import Cost
from flmoe_kernels.profile.profiles import Effort, Subject, profile_subjects
from flmoe_kernels.profile.spread import (
    CONFIDENCE,
    Spread,
    median_interval,
    ratio_of,
    spread_of,
    timed_blocks,
)

Call = Callable[[], Any]


@pytest.fixture(autouse=True)
def collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every block it would take longer than thousands of fake calls."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    [
        # From a table of the binomial distribution with p = 1/2.
        (1, 0, 0, 0.0),
        (5, 0, 4, 0.9375),
        (6, 0, 5, 0.96875),
        (9, 1, 7, 1 - 2 * 10 / 512),
        (11, 1, 9, 1 - 2 * 12 / 2048),
        (12, 2, 9, 1 - 2 * 79 / 4096),
        (20, 5, 14, 0.9586),
    ],
)
def test_interval_is_that_of_the_tables(count: int, low: int, high: int, confidence: float) -> None:
    values = random.Random(0).sample(range(count), count)
    found = median_interval(values)
    assert found[:2] == (low, high)
    assert found[2] == pytest.approx(confidence, abs=1e-4)


def test_interval_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="values: expected one at least"):
        median_interval([])


@pytest.mark.parametrize("count", [6, 11, 25])
def test_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    draw = random.Random(count)
    # Of no symmetric distribution: times have a long tail to one side.
    truth = 2.0**0.5
    trials = 2000
    held = 0
    for _ in range(trials):
        values = [(1 / (1 - draw.random())) ** 0.5 for _ in range(count)]
        low, high, confidence = median_interval(values)
        held += low <= truth <= high
    assert confidence >= CONFIDENCE
    # Three standard errors of the count, on both sides: an interval that is too wide is as wrong.
    room = 3 * (confidence * (1 - confidence) / trials) ** 0.5
    assert abs(held / trials - confidence) < room


def test_spread_is_over_blocks_and_quantiles_over_rounds() -> None:
    blocks = [[10.0 + b, 11.0 + b, 30.0 + b] for b in range(7)]
    found = spread_of(blocks)
    assert (found.median, found.low, found.high) == (14.0, 11.0, 17.0)
    assert (found.blocks, found.rounds) == (7, 21)
    rounds = sorted(x for block in blocks for x in block)
    fifths = statistics.quantiles(rounds, n=5, method="inclusive")
    assert (found.p20, found.p80) == (fifths[0], fifths[3])
    assert found.relative == pytest.approx(3 / 14)


def test_ratio_pairs_the_blocks() -> None:
    slow, fast = [[4.0], [40.0], [8.0]], [[2.0], [20.0], [2.0]]
    assert ratio_of(slow, fast)[0] == 2.0
    assert ratio_of(slow, fast)[1:] == (2.0, 4.0)
    with pytest.raises(ValueError, match="zip"):
        ratio_of(slow, fast[:2])


class FakeClock:
    """Tells the time that a fake machine takes: a base, noise of each call, a mood that lasts a while."""

    def __init__(self, seed: int, *, base: float = 1e-3, mood: float = 0.02) -> None:
        self.draw = random.Random(seed)
        self.base = base
        self.mood = mood
        self.made = 0

    def fresh(self) -> Call:
        # Where the inputs lie changes with every preparation and stays until the next.
        self.level = 1 + self.mood * self.draw.random()
        self.made += 1
        return lambda: None

    def __call__(self, call: Call) -> float:
        call()
        return self.base * self.level * (1 + 0.05 * self.draw.expovariate(1.0))


def run_of(clock: FakeClock, blocks: int = 11) -> Spread:
    return spread_of(timed_blocks({"ours": clock.fresh}, clock, seconds=0.2, blocks=blocks)["ours"])


def test_two_runs_of_one_machine_agree() -> None:
    agreed = 0
    for seed in range(300):
        one, other = FakeClock(seed, mood=0.08), FakeClock(10**6 + seed, mood=0.08)
        agreed += run_of(one).agrees(run_of(other))
    assert agreed >= 0.98 * 300


def test_two_runs_of_machines_that_differ_do_not() -> None:
    told = 0
    for seed in range(100):
        slower = FakeClock(10**6 + seed, base=1.05e-3)
        told += not run_of(FakeClock(seed)).agrees(run_of(slower))
    assert told >= 95


def test_an_interval_over_rounds_alone_would_be_too_narrow() -> None:
    # The control: of the same rounds, without blocks, runs agree far too seldom.
    agreed = 0
    for seed in range(200):
        spreads = []
        for clock in (FakeClock(seed, mood=0.08), FakeClock(10**6 + seed, mood=0.08)):
            [block] = timed_blocks({"ours": clock.fresh}, clock, seconds=0.2, blocks=1)["ours"]
            spreads.append(spread_of([[x] for x in block]))
        agreed += spreads[0].agrees(spreads[1])
    assert agreed < 0.7 * 200


def test_blocks_are_prepared_afresh_where_that_is_quick() -> None:
    quick, slow = FakeClock(0), FakeClock(1)
    ticks = iter(range(0, 10**6))
    found = timed_blocks(
        {"quick": quick.fresh}, quick, seconds=100.0, blocks=6, now=lambda: float(next(ticks))
    )
    assert quick.made == 6
    assert [len(block) for block in found["quick"]] == [101] * 6
    timed_blocks({"slow": slow.fresh}, slow, seconds=10.0, blocks=6, now=lambda: float(next(ticks)))
    assert slow.made == 1


def test_calls_take_turns_and_slow_ones_still_have_a_round() -> None:
    order: list[str] = []

    def make(name: str) -> Callable[[], Call]:
        return lambda: lambda: order.append(name)

    def clock(call: Call) -> float:
        call()
        return 50.0

    found = timed_blocks({"a": make("a"), "b": make("b")}, clock, seconds=1.0, blocks=3)
    assert found == {"a": [[50.0]] * 3, "b": [[50.0]] * 3}

    def quick(call: Call) -> float:
        call()
        return 0.1

    order.clear()
    timed_blocks({"a": make("a"), "b": make("b")}, quick, seconds=0.81, blocks=1)
    # One call while preparing and one to see how long it takes, of each; then turns.
    assert "".join(order) == "ab" + "ab" + "abba" + "abba"


def limits(matmul: float, copy: float) -> Ceilings:
    return Ceilings("cpu", {"float32": matmul}, copy)


def subject(clock: FakeClock, name: str = "ours") -> Subject:
    return Subject(
        what="fake",
        contestant=name,
        kind="ours",
        version="1",
        dtype=torch.float32,
        device="cpu",
        cost=Cost(flop=2_000_000, bytes=1_000_000),
        prepare=clock.fresh,
        peak=lambda: 42,
    )


def test_repeated_runs_are_told_to_agree_or_not() -> None:
    effort = Effort(seconds=0.2, blocks=11, calls=1, repeat=2)
    roof = limits(4e9, 1e9)
    clock = FakeClock(3)
    [found] = profile_subjects([subject(clock)], roof, effort, clock=clock)
    assert len(found.runs) == 2
    assert found.agrees
    assert found.spread.blocks == 22
    assert found.spread.median == pytest.approx(1.05e-3, rel=0.05)

    class Drifting(FakeClock):
        def fresh(self) -> Call:
            call = super().fresh()
            # The second run's blocks, after the machine has become slower.
            self.level *= 1.2 if self.made > 11 else 1.0
            return call

    drifting = Drifting(3)
    [found] = profile_subjects([subject(drifting)], roof, effort, clock=drifting)
    assert not found.agrees


def test_share_of_the_limit_and_which_one_binds() -> None:
    clock = FakeClock(0, mood=0.0)
    effort = Effort(seconds=0.05, blocks=2, calls=1)
    [found] = profile_subjects([subject(clock)], limits(4e9, 4e9), effort, clock=clock)
    assert found.limit == MATMUL
    assert found.share == pytest.approx(2e6 / 4e9 / found.spread.median)
    assert found.flops_per_second == pytest.approx(2e6 / found.spread.median)
    [found] = profile_subjects([subject(clock)], limits(4e9, 1e9), effort, clock=clock)
    assert found.limit == MEMORY
    assert found.share == pytest.approx(1e6 / 1e9 / found.spread.median)
    assert found.peak_bytes == 42


def test_second_subject_has_a_ratio_to_the_first() -> None:
    clock = FakeClock(0, mood=0.0)

    def timed(call: Call) -> float:
        return clock(call) * (3.0 if call is slow_call else 1.0)

    slow_call = clock.fresh()
    slow = subject(clock, "slow")
    object.__setattr__(slow, "prepare", lambda: slow_call)
    effort = Effort(seconds=0.2, blocks=6, calls=1)
    ours, peer = profile_subjects([subject(clock), slow], limits(1e9, 1e9), effort, clock=timed)
    assert ours.ratio is None
    assert peer.ratio is not None
    assert peer.ratio[0] == pytest.approx(3.0, rel=0.05)
    assert peer.ratio[1] <= peer.ratio[0] <= peer.ratio[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks: expected 1 at least, got 0"),
        ({"calls": 0}, "calls: expected 1 at least"),
        ({"repeat": 0}, "repeat: expected 1 at least"),
        ({"seconds": 0.0}, "seconds: expected more than 0"),
    ],
)
def test_effort_names_what_it_expects(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Effort(**settings)


def test_contestants_of_one_name_are_an_error() -> None:
    clock = FakeClock(0)
    with pytest.raises(ValueError, match="expected different contestants"):
        profile_subjects([subject(clock), subject(clock)], limits(1, 1), Effort(), clock=clock)
