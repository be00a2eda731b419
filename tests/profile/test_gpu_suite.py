"""bench/gpu.sh and its module, as far as a machine without a GPU can tell: the CPU stands in, at tiny sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flmoe_kernels.profile import ceilings, gpu, suite, targets
from flmoe_kernels.profile.cases import BOTH, FORWARD, Case
from flmoe_kernels.profile.ceilings import Ceilings
from flmoe_kernels.profile.check import WrongAnswer
from flmoe_kernels.profile.contestants import Contestant, prepare
from flmoe_kernels.profile.gpu import GROUPS, Group
from flmoe_kernels.profile.prepared import Prepared
from flmoe_kernels.profile.results import load_runs

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
CEILINGS = Ceilings("cpu", {"bfloat16": 1e11, "float32": 1e11}, 1e10)
ROUTING = next(group for group in GROUPS if group.name == "routing")


def test_groups_hold_every_case_that_a_target_is_about() -> None:
    timed = {case.name for group in GROUPS for case in gpu.cases_of(group, "cuda", tiny=False)}
    assert {target.case for target in targets.GPU_TARGETS} <= timed


@pytest.mark.parametrize("tiny", [False, True])
def test_a_dry_run_has_the_names_of_the_real_one(tiny: bool) -> None:
    for group in GROUPS:
        for case in gpu.cases_of(group, "cpu", tiny):
            real = gpu.cases_of(group, "cuda", tiny=False)
            assert case.name in {one.name for one in real}
            assert case.dtype == torch.bfloat16
            assert (case.shape not in [one.shape for one in real]) == tiny


class FakeRun:
    """Groups that take given seconds of a fake clock, and note the deadline that they got."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds
        self.deadlines: list[float] = []

    def __call__(self, group: Group, seconds: float, path: Path) -> str:
        self.deadlines.append(seconds)
        self.now += min(self.seconds, seconds)
        return "" if self.seconds <= seconds else "stopped"


def test_groups_share_the_budget_and_the_rest_is_skipped() -> None:
    run = FakeRun(100.0)
    found = list(gpu.run_groups(GROUPS[:5], 330.0, run, Path(), now=lambda: run.now))
    assert run.deadlines == [200.0, 200.0, 130.0, 30.0]
    words = [wrong for _, wrong in found]
    assert words == ["", "", "", "stopped", "skipped: 0 s are left of 330"]
    assert [group for group, _ in found] == list(GROUPS[:5])


def _module(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Groups run this code instead."""
    (folder / "instead_of_a_group.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(gpu, "MODULE", "instead_of_a_group")


def test_a_group_that_hangs_is_stopped_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import json, sys, time
with open(sys.argv[sys.argv.index("--lines") + 1], "w") as file:
    file.write(json.dumps({"rows": [], "detail": {"case": "first"}}) + "\\n" + '{"rows": [')
    file.flush()
    time.sleep(600)
"""
    _module(tmp_path, monkeypatch, code)
    path = tmp_path / f"{ROUTING.name}.jsonl"
    assert gpu.run_apart(ROUTING, 3.0, path) == "stopped after 3 s"
    assert gpu.gather(tmp_path) == ([], [{"case": "first"}])


def test_a_group_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "raise SystemExit('no kernel image is available')")
    found = gpu.run_apart(ROUTING, 60.0, tmp_path / "lines")
    assert found == "failed: no kernel image is available"
    assert gpu.gather(tmp_path) == ([], [])


def test_a_case_that_fails_does_not_stop_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = gpu.measure_entry

    def measure(entry: suite.Entry, *arguments: Any) -> Any:
        if entry.case.phase == FORWARD:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return real(entry, *arguments)

    monkeypatch.setattr(gpu, "measure_entry", measure)
    group = Group("two", "routing", "routed_small_e4", (FORWARD, BOTH))
    path = tmp_path / "routing.jsonl"
    gpu.measure_group(group, "cpu", True, CEILINGS, 0.01, path)
    rows, (first, second) = gpu.gather(tmp_path)
    assert first["failed"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "test_profiling_gpu.py" in first["traceback"]
    assert "failed" not in second
    assert {row["case"] for row in rows} == {second["case"]}
    out = capsys.readouterr().out.splitlines()
    assert "an illegal memory access" in out[0]
    assert "GB/s" in out[1]
    assert "of the bound (memory)" in out[1]


def detail(*timed: str, left_out: tuple[str, ...] = (), ms: float = 1.0) -> dict[str, Any]:
    return {
        "case": "a",
        "contestants": [{"name": name, "p50": ms} for name in ("triton", *timed)],
        "left_out": [{"name": name, "why_not": "why"} for name in left_out],
    }


def test_a_case_of_several_groups_is_one(tmp_path: Path) -> None:
    first, second = detail("reference", left_out=("compiled",)), detail("compiled", ms=2.0)
    rows = [{"case": "a", "contestant": name} for name in ("triton", "reference", "compiled")]
    for group, found, some in ((GROUPS[0], first, rows[:2]), (GROUPS[7], second, rows[::2])):
        line = json.dumps({"rows": some, "detail": found}) + "\n"
        (tmp_path / f"{group.name}.jsonl").write_text(line)
    together, (merged,) = gpu.gather(tmp_path)
    assert together == rows
    seconds = {one["name"]: one["p50"] for one in merged["contestants"]}
    assert seconds == {"triton": 1.0, "reference": 1.0, "compiled": 2.0}
    assert merged["contestants"][0]["name"] == "triton"
    assert merged["left_out"] == []
    failed = {"case": "a", "failed": "WrongAnswer: y"}
    assert gpu.merge(first, failed) == gpu.merge(failed, first) == failed


def test_the_whole_way_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceilings, a process for the group, the file, the table of targets."""
    monkeypatch.setitem(ceilings._SIDE, "cpu", 128)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**20)
    arguments = ["--device", "cpu", "--dry-run", "--seconds", "0.01", "--only", "routing"]
    assert gpu.main([*arguments, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-3].endswith("0 met, 0 missed, 13 not measured")
    assert "a dry run: tiny sizes" in out
    path = tmp_path / gpu.FILE_NAME
    (run,) = json.loads(path.read_text())["runs"]
    assert run["dry_run"]
    assert run["environment"]["commit"]
    (detail,) = run["details"]
    assert detail["case"] == "routing/routed_large/forward/bfloat16"
    ours, peer = detail["contestants"]
    assert ours["p20"] <= ours["p50"] <= ours["p80"]
    assert peer["ratio"] > 0
    assert ours["bytes_per_second"] == pytest.approx(detail["bytes"] / ours["p50"])
    assert {one["name"] for one in detail["left_out"]} == {"triton", "cuda"}
    # `bench compare` reads it.
    assert [row.contestant for row in load_runs(path)[0].rows] == ["cpu", "reference"]


def test_without_a_gpu_the_module_says_so(capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "there is no CUDA device\n"


def test_results_lie_under_the_devices_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "device_name", lambda device: "NVIDIA H200 (141 GB)")
    assert gpu.results_folder("cuda", False) == Path("bench/results/nvidia-h200-141-gb")
    assert gpu.results_folder("cpu", True) is None
    monkeypatch.setenv("OUT", "elsewhere")
    assert gpu.results_folder("cuda", False) == gpu.results_folder("cpu", True) == Path("elsewhere")


def test_the_module_needs_neither_typer_nor_rich_nor_triton() -> None:
    hidden = "import sys; sys.modules.update(typer=None, rich=None, matplotlib=None, pytest=None)\n"
    code = hidden + "from flmoe_kernels.profile import gpu, suite\nprint(len(suite.full()))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


# A failing peer in a suite


CASE = Case("routing", gpu.tiny_shape(gpu.named.ROUTED_LARGE), FORWARD)


def broken(words: str) -> Callable[..., Prepared]:
    def make(case: Case, one: Contestant | str, dtype: Any = None) -> Prepared:
        name = one if isinstance(one, str) else one.name
        if name == "reference" and dtype is None:
            raise RuntimeError(words)
        return prepare(case, one, dtype)

    return make


def test_a_peer_that_fails_is_left_out_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "prepare", broken("CUDA out of memory.\nTried to allocate"))
    seen: list[dict[str, Any]] = []
    found = suite.run_suite(
        [suite.entry_of(CASE)], seconds=0.01, memory=False, ceilings=CEILINGS, report=seen.append
    )
    (run,) = found["runs"]
    assert seen == run["details"]
    (detail,) = run["details"]
    assert [one["name"] for one in detail["contestants"]] == ["cpu"]
    reasons = {one["name"]: one["why_not"] for one in detail["left_out"]}
    assert reasons["reference"] == "failed: CUDA out of memory."
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(("kind", "bad"), [("ours", True), ("peer", False)])
def test_another_backend_of_ours_that_is_wrong_is_told(kind: str, bad: bool) -> None:
    """Beside the default one, which is timed all the same; what cannot run at all is no failure."""
    one = {"name": "triton", "kind": kind, "why_not": "failed: y is off"}
    found = detail("reference") | {"left_out": [one]}
    assert gpu.is_bad(found) == bad
    assert gpu.failing(found) == [one]
    assert not gpu.is_bad(found | {"left_out": [one | {"why_not": "there is no CUDA device"}]})
    assert gpu.is_bad({"case": "a", "failed": "RuntimeError: x"})


def test_what_was_measured_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(group: Group, seconds: float, path: Path, extra: Any) -> str:
        if group.name != GROUPS[0].name:
            raise KeyboardInterrupt
        path.write_text(json.dumps({"rows": [], "detail": {"case": "a", "failed": "x"}}) + "\n")
        return ""

    monkeypatch.setitem(ceilings._SIDE, "cpu", 128)
    monkeypatch.setitem(ceilings._COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(gpu, "run_apart", run)
    assert gpu.main(["--device", "cpu", "--dry-run", "--out", str(tmp_path)]) == 1
    assert "interrupted" in capsys.readouterr().out
    (run_,) = json.loads((tmp_path / gpu.FILE_NAME).read_text())["runs"]
    assert [one["case"] for one in run_["details"]] == ["a"]


def test_a_memory_that_cannot_be_measured_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(case: Case, one: Contestant) -> int:
        if one.name == "reference":
            raise RuntimeError("the process that was to measure its memory ended early, with -9")
        return 42

    monkeypatch.setattr(suite, "peak_bytes", ended)
    (run,) = suite.run_suite([suite.entry_of(CASE)], seconds=0.01)["runs"]
    peaks = {one["name"]: one["peak_bytes"] for one in run["details"][0]["contestants"]}
    assert peaks == {"cpu": 42, "reference": None}


def test_ours_that_fails_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, *contestants: Any) -> None:
        raise WrongAnswer("cpu is wrong")

    monkeypatch.setattr(suite, "agree", wrong)
    with pytest.raises(WrongAnswer, match="cpu is wrong"):
        suite.run_suite([suite.entry_of(CASE)], seconds=0.01, memory=False)


def test_quick_is_a_part_of_full() -> None:
    full = {entry.case for entry in suite.full()}
    assert {entry.case for entry in suite.quick()} < full
    assert {entry.case.operator for entry in suite.quick()} == {c.operator for c in full}
    for entry in suite.quick():
        assert entry.peers, entry


# The script

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@needs_bash
def test_the_script_reads() -> None:
    done = subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_bash
def test_an_unknown_step_is_an_error() -> None:
    done = script("instal")
    assert done.returncode == 2
    assert "unknown step 'instal'" in done.stderr


@needs_bash
def test_steps_without_time_are_skipped_and_that_is_a_failure() -> None:
    done = script("--dry-run", "install", "sanitize", "bench", FLMOE_GPU_BUDGET="5")
    assert done.returncode == 1
    assert "install: left out in a dry run" in done.stdout
    assert "sanitize (without the tool): skipped" in done.stdout
    assert "== not done: sanitize (without the tool) (skipped) bench (skipped)" in done.stdout


@needs_bash
def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path) -> None:
    """A Python that stands in: its first call fails, the next one hangs."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *--sanitize*) exit 3;; *) sleep 600;; esac\n', encoding="utf-8"
    )
    python.chmod(0o755)
    budget = {"PYTHON": str(python), "FLMOE_GPU_BUDGET": "5", "FLMOE_GPU_LEAST": "1"}
    done = script("--dry-run", "sanitize", "bench", **budget)
    assert "failed with exit code 3" in done.stdout
    assert "== bench: stopped after" in done.stdout
    assert done.returncode == 1
