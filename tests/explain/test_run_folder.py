"""Tests of the folder of the command `explain`: results never mix, other files stay, nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from flmoe_kernels.explain.report import command
from flmoe_kernels.explain.report.request import Request
from tests.support.explain_files import full_arrays, write_checkpoint, write_data

PROGRESS = "checkpoints/sample_00000.npz"
OTHERS = {"notes.txt", "sample_00007_SII.npz.bak", "checkpoints/epoch_1.pt", "a/index.html"}
OLD = {"sample_00009_SII_0_1.png", "faithfulness.npz"}


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def write(out: Path, *files: str) -> None:
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")


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
        failing.setattr(command, "page", lambda *_: exec("raise KeyboardInterrupt"))
        assert command.main(request, force=True) == command.INTERRUPTED
    assert names(out) == OTHERS | OLD | {PROGRESS}
    assert command.main(request, force=True) == 0
    first = names(out)
    assert OTHERS | {"index.html", "sample_00000_SII.npz"} <= first
    assert not {PROGRESS, "sample_00009_SII_0_1.png"} & first
    assert {(out / other).read_text() for other in OTHERS} == {"mine"}


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "out")
    request = Request(tmp_path / "layer.pt", tmp_path / "data.npz", tmp_path / "out")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        command.run(request, force=True)
