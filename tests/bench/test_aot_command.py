"""The command `aot` on a few kernels: what it prints and writes, and that what must fail fails."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

pytest.importorskip("triton")

from bench.aot.__main__ import aot
from bench.aot.budget import load, save
from bench.aot.report import MARK

app = typer.Typer()
app.command()(aot)
FAILING = ("--cases", "aot_failing_cases", "--arch", "sm_90")
FINE = "test/fine/good/bfloat16"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """Every failing case and the fine one in one process, and the folder of what was written."""
    folder = tmp_path_factory.mktemp("aot")
    path = folder / "empty.json"
    path.write_text('{"triton": "", "spills": [], "limits": {}}')
    written = ("--json", folder / "rows.json", "--markdown", folder / "table.md")
    return run(*FAILING, "--budget", path, "--processes", "1", *written), folder


def test_what_fails_is_said_and_ends_with_1(compiled: tuple[Result, Path]) -> None:
    result, _ = compiled
    assert result.exit_code == 1, result.output
    lines = dict(line.split(": ", 1) for line in result.stderr.splitlines() if ": " in line)
    wrong = {name.split("/")[1]: text for name, text in lines.items() if name.startswith("test/")}
    assert set(wrong) == {"by_sum", "capped", "wrong", "deadly"}
    assert wrong["by_sum"] == "has matrix products, but no matrix instructions"
    assert wrong["capped"].startswith("spills ")
    assert wrong["capped"].endswith("bytes a thread, allowed are 0")
    assert wrong["wrong"].startswith("does not compile: ")
    assert "the compiler's process ended with 7" in wrong["deadly"]


def test_json_holds_what_was_compiled(compiled: tuple[Result, Path]) -> None:
    _, folder = compiled
    facts = json.loads((folder / "rows.json").read_text())
    assert facts["architectures"]["sm_90"]["multiprocessors"] == 132
    rows = {row["kernel"]: row for row in facts["rows"]}
    fine = rows["fine"]
    assert fine["failures"] == []
    assert fine["report"]["matrix"]
    assert fine["report"]["spilled"] == 0
    assert fine["flop"] == 2 * 32**3
    assert fine["times"]["limit"] == "launch"
    assert fine["times"]["seconds"] == facts["launch_seconds"] == 3e-6
    assert rows["capped"]["report"]["registers"] <= 64
    assert rows["capped"]["report"]["spilled"] > 0
    # One that the compiler's end took with it says what the compiler said.
    assert "an assertion of the compiler" in rows["deadly"]["error"]
    assert rows["deadly"]["held"]["blocks"] == 0


def test_table_has_a_line_for_each_case(compiled: tuple[Result, Path]) -> None:
    result, folder = compiled
    text = (folder / "table.md").read_text()
    assert text.startswith(f"{MARK}\n")
    for case in ("fine/good", "by_sum/bad", "capped/bad", "wrong/bad", "deadly/bad"):
        assert f"test/{case}/bfloat16" in result.stdout
        assert f"| {case}/bfloat16 |" in text
    assert text.count("does not compile") == 2


def test_a_budget_holds_until_it_is_one_register_too_small(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    path.write_text(
        '{"triton": "", "limits": {}, "spills": [{"cases": "test/[cdw]*", "architectures": [90], '
        '"bytes": 9, "reason": "kept"}]}'
    )
    fine = (*FAILING, "--shape", "good", "--budget", path)
    assert run(*fine, "--write-budget", path).exit_code == 0
    budget = load(path)
    assert [each.reason for each in budget.spills] == ["kept"]
    assert list(budget.limits) == [(FINE, 90)]
    limits = budget.limits[FINE, 90]
    less = dataclasses.replace(limits, registers=limits.registers - 1)
    save(path, dataclasses.replace(budget, limits={(FINE, 90): less}))
    result = run(*fine)
    assert result.exit_code == 1
    wrong = f"{FINE} on sm_90: takes {limits.registers} registers, the budget is {less.registers}"
    assert result.stderr.strip() == wrong
    save(path, budget)
    assert run(*fine).exit_code == 0


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    for arguments, message in (
        (("--arch", "sm_75"), "arch: expected some of sm_80, sm_90, sm_100, got 'sm_75'"),
        (("--op", "softmax"), "operator: expected one of pair_moe"),
        (("--op", "routing", "--dtype", "float32"), "no case is of this operator, shape and dtype"),
        (("--cases", "no_such_module"), "cases: No module named 'no_such_module'"),
        (("--budget", tmp_path / "none.json"), "none.json"),
        (("--budget", Path(__file__)), "not a budget"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
