"""The trial of the gate counts what the gate said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gate_trial
from flmoe_kernels.profile.floors import Floor, load_floors
from flmoe_kernels.profile.gate import Verdict, known_cases
from tests.support.bench_machines import Given


def found_of(case: str, passed: bool) -> dict[str, Any]:
    ratio = 2.0 if passed else 1.5
    attempts = (Given(ratio).paired(),) * (1 if passed else 2)
    return Verdict(Floor(case, "reference", 2.0), 2.0, "here", attempts).as_dict()


def test_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One false alarm of three; of each planted case one of two is missed."""
    calls: list[tuple[str, ...]] = []

    def run_gate(floors: Path, *options: str) -> tuple[int, list[dict[str, Any]], float]:
        calls.append(options)
        fails = len(calls) == 2 if "--plant" not in options else len(calls) % 2 == 0
        return int(fails), [found_of("some/case", not fails)], 1.0

    monkeypatch.setattr(gate_trial, "run_gate", run_gate)
    monkeypatch.setattr(gate_trial, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(gate_trial, "native_share", lambda case: 0.6)
    out = tmp_path / "trials.json"
    monkeypatch.setattr(
        sys, "argv", ["gate_trial.py", "--clean", "3", "--planted", "2", "--out", str(out)]
    )
    gate_trial.main()
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed["false alarms"] == "1 of 3"
    assert printed["caught"] == dict.fromkeys(gate_trial.PLANTED, "1 of 2")
    assert written["clean"]["found"][1][0]["attempts"][0] == [1.5, 1.47, 1.53]
    # 30% of the call is half of the time that its kernels take 60% of.
    assert {trial["planted_share"] for trial in written["planted"]} == {0.5}
    assert (
        "--only",
        f"{gate_trial.PLANTED[0]} vs reference",
        "--plant",
        "pair_moe:0.5000",
    ) in calls


def test_planted_cases_are_floors_of_the_repository() -> None:
    floors = load_floors(gate_trial.BENCH / "floors.toml", known_cases()).floors
    assert set(gate_trial.PLANTED) <= {floor.case for floor in floors if floor.quick}


def test_a_core_is_kept_busy_and_let_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    real = subprocess.Popen

    def popen(*arguments: Any, **more: Any) -> Any:
        started.append(real(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with gate_trial.busy_core(True):
        assert started[0].poll() is None
    assert started[0].returncode is not None
    with gate_trial.busy_core(False):
        assert len(started) == 1


def test_a_gate_that_cannot_run_ends_the_trial(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the gate ended with 2"):
        gate_trial.run_gate(tmp_path / "absent.toml")
