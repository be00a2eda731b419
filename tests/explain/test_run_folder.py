"""Tests of the folder of the command `explain`: results never mix, other files stay, nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from flmoe_kernels.explain.report import command
from flmoe_kernels.explain.report.folder import FolderError, claim, publish, require_free
from flmoe_kernels.explain.report.request import Request
from tests.support.explain_files import full_arrays, write_checkpoint, write_data

FILES = {"attribution.npz": b"scores", "sample_00000_SII_0_1.png": b"map", "index.html": b"page"}
PROGRESS = "checkpoints/sample_00000.npz"


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def write(out: Path, *files: str) -> None:
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def no_space(*_: Any) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize("name", FILES)
def test_results_are_replaced_only_with_force(name: str, tmp_path: Path) -> None:
    others = {"notes.txt", "sample_00007_SII.npz.bak", "checkpoints/epoch_1.pt", "a/index.html"}
    write(tmp_path, *others)
    require_free(tmp_path, force=False)
    write(tmp_path, name, PROGRESS)
    with pytest.raises(
        FolderError, match=rf"has results \({name}\); use another folder, or .*--force"
    ):
        require_free(tmp_path, force=False)
    require_free(tmp_path, force=True)
    assert name in names(tmp_path), "a request that turns out to be wrong removes nothing"
    claim(tmp_path, force=True)
    assert names(tmp_path) == others
    publish(tmp_path, FILES)
    assert names(tmp_path) == others | set(FILES)
    assert {(tmp_path / other).read_text() for other in others} == {"mine"}


def test_progress_stays_until_the_results_are_written(tmp_path: Path) -> None:
    write(tmp_path, PROGRESS)
    require_free(tmp_path, force=False)
    assert claim(tmp_path, force=False) == tmp_path / "checkpoints"
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, {**FILES, "explanation.json": stop})
    assert names(tmp_path) == {PROGRESS}
    publish(tmp_path, FILES)
    assert names(tmp_path) == set(FILES)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "out")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        require_free(tmp_path / "out", force=True)


@pytest.mark.parametrize(("where", "fault"), [("draw", no_space), ("page", stop)])
def test_a_failed_run_never_stands_beside_an_earlier_page(
    where: str, fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_checkpoint(tmp_path), write_data(tmp_path, full_arrays())
    out = tmp_path / "out"
    quick: dict[str, Any] = {"samples": 1, "budget": 32, "top": 1, "repeats": 0}
    assert command.main(Request(*files, out, **quick)) == 0
    first = names(out)
    assert "index.html" in first
    # A request that cannot be run is refused before the earlier run is touched.
    for wrong in (
        Request(tmp_path / "missing.pt", files[1], out, **quick),
        Request(*files, out, **quick | {"budget": 5}),
        Request(*files, out, **quick | {"exempt": (2,)}),
        Request(*files, out, **quick | {"class_names": ("a", "b")}),
    ):
        assert command.main(wrong, force=True) == 2
        assert names(out) == first
    again = Request(*files, out, **quick | {"seed": 1})
    with monkeypatch.context() as failing:
        failing.setattr(command, where, fault)
        assert command.main(again, force=True) in (2, command.INTERRUPTED)
    assert names(out) == {PROGRESS}
    # The progress of another request is not used.
    assert command.main(Request(*files, out, **quick | {"seed": 2})) == 2
    assert command.main(again) == 0
    assert names(out) == first
