"""Tests of profiles on simulated machines: shares of the limit, ratios."""

from __future__ import annotations

import gc

import pytest
import torch

from flmoe_kernels.profile.ceilings import MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.costs import Cost
from flmoe_kernels.profile.output import tables
from flmoe_kernels.profile.profiles import Profile, Subject, profile_subjects
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
    clocks = {"clock": machine.clock, "now": lambda: machine.now}
    return profile_subjects(subjects, ceilings, 0.2, **clocks)


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


@pytest.mark.parametrize(
    ("seconds", "rounds"), [((0.1, 0.2), 6), ((9.0, 20.0), 4), ((60.0, 70.0), 1)]
)
def test_slow_calls_are_timed_less_often_and_the_result_says_so(
    seconds: tuple[float, float], rounds: int
) -> None:
    machine = quiet()
    profiles = profile(machine, *seconds)
    calls = "a single call" if rounds == 1 else f"{rounds} calls"
    notes = [f"time: from {calls}, because they are slow"] if rounds < 6 else []
    for found, own in zip(profiles, seconds, strict=True):
        assert found.spread.median == pytest.approx(own, rel=0.1)
        assert found.spread.rounds == rounds if notes else found.spread.rounds >= rounds
        assert list(found.notes) == found.as_dict()["notes"] == notes
    text = "\n".join(map(str, tables(profiles)))
    assert ("call 0: time: from" in text) == bool(notes)


def test_contestants_with_the_same_name_are_an_error() -> None:
    subject = Subject(
        *("fake", "same", "ours", "1", torch.float32, "cpu", Cost(1, 1)), lambda: lambda: None, None
    )
    with pytest.raises(ValueError, match="expected different contestants"):
        profile_subjects([subject] * 2, Ceilings("cpu", {"float32": 1.0}, 1.0), 0.2)
