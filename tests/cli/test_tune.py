"""Tests of the commands that show and clear saved autotuning results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flmoe_kernels.core.triton.tuning import cache
from tests.support.tuning_trials import RESULT


def test_an_invalid_folder_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, "~nobody-of-this-name/cache")
    runner = pytest.importorskip("typer.testing").CliRunner()
    from flmoe_kernels.cli.tune import app

    for command in ("show", "clear"):
        result = runner.invoke(app, [command])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: FLMOE_CACHE_DIR: expected a folder")


def test_show_and_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path))
    folder = cache.folder()
    runner = pytest.importorskip("typer.testing").CliRunner()
    from flmoe_kernels.cli.tune import app

    assert "no results in" in runner.invoke(app, ["show"]).stdout
    cache.write(RESULT)
    (folder / f"{'0' * 32}.json").write_text("{")
    (folder / "notes.txt").write_text("mine")
    result = runner.invoke(app, ["show"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("op.kernel", "16 bit, bfloat16", "rows 32 warps 4", "10.0", "20.0", "2.00x"):
        assert text in result.stdout
    assert "no JSON" in result.stderr
    printed = json.loads(runner.invoke(app, ["show", "--json"]).stdout)
    assert printed["results"] == [json.loads(cache.encode(RESULT))]
    assert "removed 2 results" in runner.invoke(app, ["clear"]).stdout
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert "removed 0 results" in runner.invoke(app, ["clear"]).stdout
