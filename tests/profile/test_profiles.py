"""Tests of profiles on simulated machines: shares of the limit, ratios."""

from __future__ import annotations

import gc

import pytest
import torch

from flmoe_kernels.profile.ceilings import MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.costs import Cost
from flmoe_kernels.profile.output import tables
from flmoe_kernels.profile.profiles import (
    BECAUSE,
    LEAST_LIMIT,
    Limit,
    Profile,
    Subject,
    profile_subjects,
)
from tests.support.bench_machines import NoisyMachine


@pytest.fixture(autouse=True)
def collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the garbage collection, which would take longer than thousands of simulated calls."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def profile(machine: NoisyMachine, *seconds: float, copy: float = 1e9) -> list[Profile]:
    """Profiles of calls with these durations in seconds, 2 MFLOP and 1 MB each; the ceiling is 4e9 FLOP/s."""
    subjects = [
        Subject(
            what="fake",
            contestant=f"call {number}",
            kind="ours",
            version="1",
            dtype=torch.float32,
            device="cpu",
            cost=Cost(flop=2_000_000, bytes=1_000_000),
            prepare=lambda own=own: machine.call(own),  # type: ignore[misc]
            peak=lambda: 42,
        )
        for number, own in enumerate(seconds)
    ]
    ceilings = Ceilings("cpu", {"float32": 4e9}, copy)
    limit = Limit(30.0, lambda: machine.now)
    return profile_subjects(subjects, ceilings, 0.2, limit=limit, clock=machine.clock)


def quiet(seed: int = 0) -> NoisyMachine:
    return NoisyMachine(seed, noise=0.01, burst=0.0, placement=0.01, drift=0.0)


def test_share_of_the_limit_and_which_one_binds() -> None:
    [profile_] = profile(quiet(), 1e-3, copy=4e9)
    found, seconds = profile_.as_dict(), profile_.spread.median
    assert seconds == pytest.approx(1e-3, rel=0.05)
    assert found["limit"] == MATMUL
    assert found["share_of_limit"] == pytest.approx(2e6 / 4e9 / seconds)
    assert found["flops_per_second"] == pytest.approx(2e6 / seconds)
    assert found["peak_bytes"] == 42
    [profile_] = profile(quiet(), 1e-3, copy=1e9)
    found = profile_.as_dict()
    assert found["limit"] == MEMORY
    assert found["share_of_limit"] == pytest.approx(1e6 / 1e9 / profile_.spread.median)


def test_slow_calls_are_measured_less_often_and_the_result_says_so() -> None:
    """The limit is 30 s: half of it for the time, the rest for stages and memory."""
    for seconds, rounds, traced, peak in (
        ((0.1, 0.2), 6, True, 42),
        ((1.1, 2.1), 4, True, 42),
        ((2.6, 2.6), 2, True, None),
        ((9.0, 40.0), 1, False, None),
    ):
        machine = quiet()
        profiles = profile(machine, *seconds)
        for found, own in zip(profiles, seconds, strict=True):
            assert found.spread.median == pytest.approx(own, rel=0.1)
            assert found.spread.rounds >= rounds if rounds == 6 else found.spread.rounds == rounds
            assert (found.breakdown is not None, found.peak_bytes) == (traced, peak)
            calls = "a single call" if rounds == 1 else f"{rounds} calls"
            notes = [f"time: from {calls}, {BECAUSE}"] if rounds < 6 else []
            notes += [] if traced else [f"stages: not measured, {BECAUSE}"]
            notes += [] if peak else [f"memory: not measured, {BECAUSE}"]
            assert list(found.notes) == found.as_dict()["notes"] == notes
        text = "\n".join(map(str, tables(profiles)))
        assert ("call 0: time: from" in text) == (rounds < 6)
        # No more than a first and a second call of each beyond the limit.
        assert machine.now < 30.0 + 3 * sum(seconds)


def test_the_limit_grows_with_the_requested_seconds() -> None:
    assert Limit.of(0.1).seconds == Limit.of(5.0).seconds == LEAST_LIMIT
    assert Limit.of(50.0).seconds == 10 * LEAST_LIMIT
    now = [100.0]
    limit = Limit(60.0, lambda: now[0])
    now[0] += 20.0
    assert (limit.left(), limit.part(2).left()) == (40.0, 20.0)
    now[0] += 50.0
    assert limit.left() == 0.0
    assert limit.allows(0.5)
    assert not limit.allows(2.0)


def test_contestants_with_the_same_name_are_an_error() -> None:
    subject = Subject(
        *("fake", "same", "ours", "1", torch.float32, "cpu", Cost(1, 1)), lambda: lambda: None, None
    )
    with pytest.raises(ValueError, match="expected different contestants"):
        profile_subjects([subject] * 2, Ceilings("cpu", {"float32": 1.0}, 1.0), 0.2)
