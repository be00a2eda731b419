"""Profiles of subjects on fake clocks: agreement of repeated runs, shares of the limit, ratios."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flmoe_kernels.profile.ceilings import MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.costs import Cost
from flmoe_kernels.profile.profiles import Effort, Profile, Subject, profile_subjects
from tests.support.bench_machines import NoisyMachine

Call = Callable[[], Any]
EFFORT = Effort(seconds=0.2, calls=1)


@pytest.fixture(autouse=True)
def collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before every block it would take longer than thousands of fake calls."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def profile(
    machine: NoisyMachine, *seconds: float, copy: float = 1e9, effort: Effort = EFFORT
) -> list[Profile]:
    """Profiles of calls that take so many seconds, 2 MFLOP and 1 MB each; FLOP/s at most 4e9."""
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
    return profile_subjects(subjects, ceilings, effort, clock=machine.clock)


def quiet(seed: int = 0) -> NoisyMachine:
    return NoisyMachine(seed, noise=0.01, burst=0.0, placement=0.01, drift=0.0)


def test_repeated_runs_are_reported_to_agree_or_not() -> None:
    effort = Effort(seconds=0.2, calls=1, repeat=2)
    [found] = profile(quiet(), 1e-3, effort=effort)
    assert len(found.runs) == 2
    assert found.agrees
    assert found.spread.blocks == sum(run.blocks for run in found.runs)
    assert found.spread.median == pytest.approx(1e-3, rel=0.05)

    class Slowing(NoisyMachine):
        def call(self, seconds: float) -> Call:
            return super().call(seconds * (1.2 if self.calls > found.runs[0].rounds else 1.0))

    [found] = profile(Slowing(0, noise=0.01, burst=0.0, placement=0.01), 1e-3, effort=effort)
    assert not found.agrees


def test_share_of_the_limit_and_which_one_binds() -> None:
    [found] = profile(quiet(), 1e-3, copy=4e9)
    assert found.limit == MATMUL
    assert found.share == pytest.approx(2e6 / 4e9 / found.spread.median)
    assert found.flops_per_second == pytest.approx(2e6 / found.spread.median)
    assert found.peak_bytes == 42
    [found] = profile(quiet(), 1e-3, copy=1e9)
    assert found.limit == MEMORY
    assert found.share == pytest.approx(1e6 / 1e9 / found.spread.median)


def test_second_subject_has_a_ratio_to_the_first() -> None:
    ours, peer = profile(quiet(), 1e-3, 3e-3)
    assert ours.ratio is None
    assert peer.ratio is not None
    median, low, high = peer.ratio
    assert median == pytest.approx(3.0, rel=0.05)
    assert low <= median <= high


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calls": 0}, "calls: expected at least 1, got 0"),
        ({"repeat": 0}, "repeat: expected at least 1"),
        ({"seconds": 0.0}, "seconds: expected more than 0"),
    ],
)
def test_effort_names_what_it_expects(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Effort(**settings)


def test_contestants_of_one_name_are_an_error() -> None:
    subject = Subject(
        *("fake", "same", "ours", "1", torch.float32, "cpu", Cost(1, 1)), lambda: lambda: None, None
    )
    with pytest.raises(ValueError, match="expected different contestants"):
        profile_subjects([subject] * 2, Ceilings("cpu", {"float32": 1.0}, 1.0), EFFORT)
