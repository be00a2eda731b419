"""Tests of the command `explain`: options, names of targets and tokens, its folder."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from flmoe_kernels.cli.main import app
from flmoe_kernels.explain.report import command
from flmoe_kernels.explain.report.findings import targets_of
from flmoe_kernels.explain.report.request import Request
from tests.support.explain_files import full_arrays, write_checkpoint, write_data
from tests.support.refusals import assert_refused


def test_targets() -> None:
    arrays = full_arrays()
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])

    def found(target: str | None, labels: Any) -> list[int]:
        labels = None if labels is None else torch.as_tensor(labels)
        features: Any = types.SimpleNamespace(labels=labels)
        asked = Request(Path("layer.pt"), Path("data.npz"), Path("out"), target=target)
        return targets_of(asked, features, logits).tolist()

    several = [[True, False, True, False], [False] * 4, [False, False, False, True]]
    assert found(None, None) == found("predicted", arrays["labels"]) == [1, 0, 3]
    assert found(None, arrays["labels"]) == found("label", arrays["labels"]) == [0, 3, 1]
    assert found("label", several) == [2, 0, 3]
    assert found("3", None) == [3, 3, 3]
    assert_refused(lambda: found("4", None), "target: expected a class from 0 to 3, got 4")
    assert_refused(lambda: found("label", None), "target: expected labels in the file")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--pairs", "some", "pairs: expected one of across, all"),
        ("--target", "4", "target: expected a class from 0 to 3, got 4"),
        ("--budget", "3", "budget: expected at least"),
        ("--data", "none.npz", "none.npz: cannot be read: No such file or directory"),
        ("--data", "layer.pt", "layer.pt: "),
        ("--out", "layer.pt", "layer.pt: expected a folder, got a file"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    option: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    write_data(tmp_path, full_arrays())
    monkeypatch.chdir(tmp_path)
    options = {"--checkpoint": "layer.pt", "--data": "data.npz", "--out": str(tmp_path / "out")}
    words = [word for pair in (options | {option: value}).items() for word in pair]
    result = CliRunner().invoke(app, ["explain", *words])
    assert result.exit_code == 2, result.output
    [line] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out" / "index.html").exists()


PROGRESS = "checkpoints/sample_00000.npz"
OTHERS = {"notes.txt", "sample_00007_SII.npz.bak", "checkpoints/epoch_1.pt", "a/index.html"}
OLD = {"sample_00009_SII_0_1.png", "faithfulness.npz"}


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def write(out: Path, *files: str) -> None:
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_results_are_replaced_only_with_force_and_other_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_checkpoint(tmp_path), write_data(tmp_path, full_arrays())
    out = tmp_path / "out"
    quick: dict[str, Any] = {"samples": 1, "budget": 32, "top": 1, "repeats": 0}
    write(out, *OTHERS, *OLD)
    request = Request(*files, out, **quick)
    assert command.main(request) == 2
    assert "has results (faithfulness.npz); use another folder, or" in capsys.readouterr().err
    # A request that cannot be run is refused before anything is removed.
    for wrong in ({"budget": 5}, {"exempt": (2,)}, {"class_names": ("a", "b")}):
        assert command.main(Request(*files, out, **quick | wrong), force=True) == 2
        assert names(out) == OTHERS | OLD
    with monkeypatch.context() as failing:
        failing.setattr(command, "draw", interrupted)
        assert command.main(request, force=True) == command.INTERRUPTED
    assert names(out) == OTHERS | OLD | {PROGRESS}
    assert command.main(request, force=True) == 0
    first = names(out)
    assert OTHERS | {"index.html", "sample_00000_SII.npz"} <= first
    assert not {PROGRESS, "sample_00009_SII_0_1.png"} & first
    assert {(out / other).read_text() for other in OTHERS} == {"mine"}
