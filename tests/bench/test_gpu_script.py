"""Tests of bench/gpu.sh, its targets and its pytest plugin, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import targets
from bench.peers import peers
from flmoe_kernels.core.triton.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]


def gpu_script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_dry_run_executes_every_step(tmp_path: Path) -> None:
    """Takes most of a minute, because four processes import torch, one interprets and one compiles kernels."""
    pytest.importorskip("triton")
    done = gpu_script("--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {step["step"]: step["code"] for step in lines_of(tmp_path / "steps.jsonl")}
    assert steps == dict.fromkeys(("compile kernels", "tests", "sanitize", "targets"), "0")
    results = {result["target"]: result for result in lines_of(tmp_path / "targets.jsonl")}
    assert len(results) == 2
    for result in results.values():
        assert {"ratio", "graphs", "graph_to_called", "host_ms", "share"} <= set(result["values"])


def test_a_step_that_fails_or_has_no_time_is_recorded(tmp_path: Path) -> None:
    done = gpu_script("tests", "--dry-run", OUT=str(tmp_path), PYTHON="/bin/false")
    assert done.returncode == 1
    done = gpu_script("sanitize", "--dry-run", OUT=str(tmp_path), FLMOE_GPU_BUDGET="10")
    assert done.returncode == 1
    [step] = lines_of(tmp_path / "steps.jsonl")
    assert step == {"step": "sanitize", "code": "skipped", "seconds": 0}
    assert gpu_script("bench").returncode == 2
    assert gpu_script(PYTHON="/bin/false").stdout == "== no cuda device\n"


@pytest.mark.slow
def test_every_call_that_is_compiled_beforehand_can_be_recorded() -> None:
    """At the sizes of a GPU: takes a minute and four gigabytes."""
    pytest.importorskip("triton")
    from bench import warm
    from flmoe_kernels.core.triton.recording import recorded

    for call in warm.calls():
        with recorded(TARGETS[90]) as kernels:
            call()
        assert kernels


def test_every_target_names_a_case_and_a_peer() -> None:
    assert len({str(target) for target in targets.TARGETS}) == len(targets.TARGETS)
    for target in targets.TARGETS:
        for device in ("cpu", "cuda"):
            assert target.peer in {peer.name for peer in peers(target.case(device))}
