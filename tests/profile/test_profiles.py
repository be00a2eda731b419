"""Tests of profiles on simulated machines: shares of the limit, ratios."""

from __future__ import annotations

import gc

import pytest
import torch

from flmoe_kernels.profile.ceilings import MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.costs import Cost
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
    return profile_subjects(subjects, ceilings, 0.2, calls=1, clock=machine.clock)


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


def test_contestants_with_the_same_name_are_an_error() -> None:
    subject = Subject(
        *("fake", "same", "ours", "1", torch.float32, "cpu", Cost(1, 1)), lambda: lambda: None, None
    )
    with pytest.raises(ValueError, match="expected different contestants"):
        profile_subjects([subject] * 2, Ceilings("cpu", {"float32": 1.0}, 1.0), 0.2)
