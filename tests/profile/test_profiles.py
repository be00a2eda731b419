"""Tests of profiles on simulated machines: shares of the limit, ratios."""

from __future__ import annotations

import gc

import pytest

from flmoe_kernels.profile import profiles
from flmoe_kernels.profile.cases import FORWARD, Case
from flmoe_kernels.profile.ceilings import MATMUL, MEMORY, Ceilings
from flmoe_kernels.profile.prepared import Prepared
from flmoe_kernels.profile.profiles import Profile, profile_case
from flmoe_kernels.profile.registry import Contestant
from flmoe_kernels.profile.work import cost
from tests.support.bench_machines import NoisyMachine
from tests.support.profile_shapes import PAIR


@pytest.fixture(autouse=True)
def collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the garbage collection, which would take longer than thousands of simulated calls."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


CASE = Case("pair_moe", PAIR, FORWARD, variant="none")
FLOP, BYTES = cost(CASE).flop, cost(CASE).bytes


def profile(machine: NoisyMachine, *seconds: float, copy: float = BYTES * 1e3) -> list[Profile]:
    """Profiles of calls with these durations in seconds; the ceiling of products is 2000 calls per second."""
    fakes = [
        Contestant(
            f"call {number}", "ours", "1", "", lambda *_, own=own: Prepared(machine.call(own), dict)
        )
        for number, own in enumerate(seconds)
    ]
    ceilings = Ceilings("cpu", {"float32": FLOP * 2e3}, copy)
    clocks = {"clock": machine.clock, "now": lambda: machine.now}
    return profile_case(CASE, fakes, ceilings, 0.2, **clocks)


@pytest.fixture(autouse=True)
def measured_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "peak_bytes", lambda *_: 42)


def quiet() -> NoisyMachine:
    return NoisyMachine(0, noise=0.01, burst=0.0, placement=0.01, drift=0.0)


@pytest.mark.parametrize(("copy", "limit", "least"), [(4e3, MATMUL, 5e-4), (1e3, MEMORY, 1e-3)])
def test_share_of_the_limit_and_which_one_binds(copy: float, limit: str, least: float) -> None:
    [measured] = profile(quiet(), 2e-3, copy=BYTES * copy)
    found, seconds = measured.as_dict(), measured.spread.median
    assert seconds == pytest.approx(2e-3, rel=0.05)
    assert found["limit"] == limit
    assert found["share_of_limit"] == pytest.approx(least / seconds)
    assert found["flops_per_second"] == pytest.approx(FLOP / seconds)
    assert found["peak_bytes"] == 42
