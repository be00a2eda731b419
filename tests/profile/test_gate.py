"""The gate: who fails, what it says, and how often it looks again."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from flmoe_kernels.profile import check, gate
from flmoe_kernels.profile.floors import Floor, Floors, Here, Machine
from flmoe_kernels.profile.paired import Paired
from tests.support.bench_machines import Given

CASE = "routing/routed_small_e4/forward/float32"
FLOOR = Floor(CASE, "reference", 1.5, tolerance=0.12)
HERE = Here("AMD EPYC", "avx512", "", "2.13.0")
FLOORS = Floors((FLOOR,), (Machine("big", isa="avx512", ratio={FLOOR.key: 2.5}),))
BOUND = 2.5 * 0.88


def never(floor: Floor, bound: float) -> Paired:
    raise AssertionError(f"{floor.case} was measured again")


def verdict_of(*ratios: float, half: float = 0.02) -> gate.Verdict:
    """The gate's verdict where attempts give these ratios; asserts that all of them are asked for."""
    left = [Given(ratio, half).paired() for ratio in ratios]

    def attempt(floor: Floor, bound: float) -> Paired:
        assert floor is FLOOR
        assert bound == pytest.approx(BOUND)
        return left.pop(0)

    (verdict,) = gate.run_gate(FLOORS, [FLOOR], HERE, attempt, attempt)
    assert not left
    return verdict


def test_what_reaches_the_bound_passes_at_once() -> None:
    (verdict,) = gate.run_gate(FLOORS, [FLOOR], HERE, lambda *_: Given(2.4).paired(), never)
    assert verdict.passed
    assert (verdict.expected, verdict.source, len(verdict.attempts)) == (2.5, "big", 1)
    assert verdict.bound == pytest.approx(BOUND)


def test_an_interval_that_reaches_the_bound_is_no_regression() -> None:
    """The median is below; that it truly is, is not known."""
    assert verdict_of(BOUND * 0.95, half=0.06).passed
    assert not verdict_of(BOUND * 0.95, BOUND * 0.95, half=0.04).passed


def test_it_fails_only_when_a_second_attempt_falls_short_too() -> None:
    assert verdict_of(1.9, 2.4).passed
    failed = verdict_of(1.9, 1.92)
    assert not failed.passed
    assert [attempt.ratio for attempt in failed.attempts] == [1.9, 1.92]


def test_without_a_second_attempt_the_first_decides() -> None:
    (verdict,) = gate.run_gate(FLOORS, [FLOOR], HERE, lambda *_: Given(1.9).paired(), None)
    assert not verdict.passed
    assert len(verdict.attempts) == 1


def test_the_message_has_all_that_one_wants_to_know() -> None:
    message = verdict_of(1.9, 1.92).message()
    for part in (
        *("SLOWER", CASE, "expected 2.50x reference (big)", "at least 2.20x", "tolerance of 12%"),
        "measured 1.90x (1.86 to 1.94 for the median of 30 rounds",
        "again in a fresh process 1.92x (1.88 to 1.96",
    ):
        assert part in message
    assert verdict_of(2.4).message().startswith(f"ok: {CASE}: expected 2.50x")


def test_verdicts_survive_the_result_file() -> None:
    verdict = verdict_of(1.9, 1.92)
    fields = verdict.as_dict()
    assert fields["passed"] is False
    assert fields["case"] == CASE
    assert fields["bound"] == pytest.approx(BOUND)
    assert tuple(map(gate.paired_from, fields["attempts"])) == verdict.attempts


def test_choosing_floors() -> None:
    slow = Floor("routing/routed_small_e16/forward/float32", "reference", 1.5, quick=False)
    gpu = Floor(CASE, "reference", 3.0, device="cuda")
    floors = Floors((FLOOR, slow, gpu))
    assert gpu.key == f"{CASE} vs reference on cuda"

    def chosen(device: str = "cpu", case: str | None = None, op: str | None = None, full=False):
        return gate.choose(floors, device, case, op, full)

    assert chosen() == [FLOOR]
    assert chosen(full=True) == [FLOOR, slow]
    assert chosen(op="routing", full=True) == [FLOOR, slow]
    assert chosen(case=slow.case) == [slow]
    assert chosen("cuda") == [gpu]
    with pytest.raises(LookupError, match="no floor of device cpu, operator pair_moe; maybe with"):
        chosen(op="pair_moe")


def test_what_is_expected_from_now_on_is_the_median_of_several_processes() -> None:
    other = dataclasses.replace(FLOOR, peer="compiled")
    order = []
    ratios = {FLOOR.key: [2.0, 9.0, 2.5], other.key: [4.0, 3.0, 1.0]}

    told = []

    def tell(floor: Floor, run: int) -> None:
        told.append((floor.key, run))

    def measure(floor: Floor, bound: float) -> Paired:
        order.append((floor.key, bound))
        return Given(ratios[floor.key].pop(0)).paired()

    floors = dataclasses.replace(FLOORS, floors=(FLOOR, other))
    found = list(gate.survey(floors, [FLOOR, other], HERE, measure, tell))
    assert [verdict.attempts[-1].ratio for verdict in found] == [2.5, 3.0]
    assert order == 3 * [(verdict.floor.key, verdict.bound) for verdict in found]
    assert told == [(floor.key, run) for run in range(3) for floor in (FLOOR, other)]


def test_a_real_measurement() -> None:
    """Of the smallest case there is, checked and timed, in this process and in a fresh one."""
    quick = Floor(CASE, "reference", 1e-3, rounds=6, precision=1.0, seconds=0.5)
    found = gate.measure_here(quick, 1.0)
    assert found.clock == "processor"
    assert found.ours.p50 > 0
    assert found.low <= found.ratio <= found.high
    assert found.blocks >= 6


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        (Floor(CASE, "nobody", 1.0), "no contestant 'nobody'; there are: "),
        (Floor(CASE, "reference", 1.0, ours="triton"), "triton cannot run here: "),
        (Floor("routing/nowhere/forward/float32", "reference", 1.0), "no such case on cpu"),
    ],
)
def test_what_cannot_be_measured_says_why(floor: Floor, message: str) -> None:
    with pytest.raises(gate.Unmeasured, match=re.escape(message)):
        gate.measure_here(floor, 1.0)


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from flmoe_kernels.profile import paired

    def disagree(*_: object) -> None:
        raise check.WrongAnswer("cpu computes something else")

    monkeypatch.setattr(check, "agree", disagree)
    monkeypatch.setattr(paired, "measure_blocks", never)
    with pytest.raises(check.WrongAnswer):
        gate.measure_here(FLOOR, 1.0)


def test_threads_are_as_they_were_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from flmoe_kernels.profile import paired

    seen = []

    def stop(*_: object, **__: object) -> None:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "agree", lambda *_: None)
    monkeypatch.setattr(paired, "measure_blocks", stop)
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        gate.measure_here(FLOOR, 1.0)
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_a_fresh_process_that_fails_says_so(tmp_path: Path) -> None:
    again = gate.measure_elsewhere(tmp_path / "absent.toml")
    with pytest.raises(
        gate.Unmeasured, match=r"a fresh process ended with 2: (?s:.*)cannot be read"
    ):
        again(FLOOR, 1.0)


def test_a_wrong_answer_in_a_fresh_process_is_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"a warning\n{gate.WRONG}cpu is off\n")

    monkeypatch.setattr(gate.subprocess, "run", ended)
    with pytest.raises(check.WrongAnswer, match=r"^cpu is off$"):
        gate.measure_elsewhere(tmp_path / "floors.toml")(FLOOR, 1.0)
