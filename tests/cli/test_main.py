"""Tests of the command line: `info`, `--version`, error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flmoe_kernels._version import __version__
from flmoe_kernels.cli.errors import needs_extra
from flmoe_kernels.cli.main import app
from flmoe_kernels.core import backend
from flmoe_kernels.profile import first_use
from tests.support.programs import run_python


def run_cli(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-mflmoe_kernels", *arguments],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_json_is_pure_and_complete(tmp_path: Path) -> None:
    result = run_cli("info", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert set(facts) >= {
        "versions",
        "missing",
        "devices",
        "instruction_set",
        "threads",
        "backends",
    }
    assert facts["versions"]["flmoe_kernels"] == __version__
    assert set(facts["versions"]) == {"flmoe_kernels", "python", "torch", "numpy", "triton"}
    # A missing version has a reason.
    assert {name for name, value in facts["versions"].items() if value is None} == set(
        facts["missing"]
    )
    assert facts["devices"]["cpu"]
    assert facts["threads"] >= 1
    assert set(facts["backends"]) == {"reference", "cpu", "triton", "cuda"}
    for name, state in facts["backends"].items():
        assert state["ok"] is True or state["reason"], f"{name} does not run and gives no reason"
    assert (facts["instruction_set"] is not None) == facts["backends"]["cpu"]["ok"]


def test_info_table_for_people() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for word in ("torch", "instruction set", "threads", "reference", "triton"):
        assert word in result.stdout


def test_check_compares_every_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/core/test_self_check.py tests the comparison itself."""
    monkeypatch.setattr(first_use, "failure", lambda *_: "")
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0, result.output
    for op, backends in backend.CAPABILITIES.items():
        for dtype in backends["cpu"]:
            assert f"right: {op} cpu {str(dtype).removeprefix('torch.')}\n" in result.stdout


@pytest.mark.parametrize(
    ("cpu", "error", "line"),
    [
        ((True, ""), "error 3 of 2", "WRONG: pair_moe cpu float64: error 3 of 2\n"),
        ((False, "not built"), "", "not checked: cpu: not built\n"),
    ],
)
def test_check_fails_for_a_wrong_or_missing_kernel(
    cpu: tuple[bool, str], error: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "backend_status", lambda: {"cpu": cpu})
    monkeypatch.setattr(first_use, "failure", lambda op, *_: error if op == "pair_moe" else "")
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 1
    assert line in result.stdout


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.split() == ["flmoe_kernels", __version__]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_standard_output_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "flmoe_kernels", "info"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.returncode == 2
    expected = "error: standard output: cannot be written: No space left on device\n"
    assert result.stderr == expected


def test_an_unknown_setting_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = run_cli("info", cwd=tmp_path, FLMOE_BACKEND="nope")
    assert (result.returncode, result.stdout) == (2, "")
    message = "FLMOE_BACKEND: expected one of reference, cpu, triton, cuda, got 'nope'"
    assert result.stderr == f"error: {message}\n"


def test_an_unknown_setting_is_an_error_of_the_import() -> None:
    result = run_python("import flmoe_kernels", FLMOE_ISA="AVX2")
    message = "FLMOE_ISA: expected one of avx512bf16, avx512, avx2, baseline, got 'AVX2'"
    assert result.returncode == 1
    assert result.stderr.endswith(f"ValueError: {message}\n")


def test_missing_extra_is_one_line_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as stopped, needs_extra("demo"):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")
    assert stopped.value.exit_code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "sklearn" in message
    assert "pip install 'flmoe-kernels[demo]'" in message
