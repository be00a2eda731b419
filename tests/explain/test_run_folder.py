"""Tests of the folder of the command `explain`: runs never mix, other files stay, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from flmoe_kernels.explain.report import command, folder
from flmoe_kernels.explain.report.folder import FolderError, RunFolder
from flmoe_kernels.explain.report.request import Request
from tests.support.explain_files import full_arrays, write_checkpoint, write_data

FILES = {"attribution.npz": b"scores", "sample_00000_SII_0_1.png": b"map", "index.html": b"page"}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    files = tmp_path / "layer.pt", tmp_path / "data.npz"
    for file in files:
        file.write_bytes(file.name.encode())
    return files


def run(sources: tuple[Path, Path], out: Path, *, force: bool = False, **options: Any) -> None:
    """A run that writes FILES and the progress of one sample."""
    claimed = RunFolder(out, Request(*sources, out, **options), force)
    progress = claimed.claim()
    progress.mkdir(exist_ok=True)
    (progress / "sample_00000.npz").write_bytes(b"progress")
    claimed.publish(FILES)


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def unfinished(sources: tuple[Path, Path], out: Path, **options: Any) -> None:
    """A run that is stopped while it writes its page, by a signal that leaves it no time to clean up."""
    claimed = RunFolder(out, Request(*sources, out, **options), False)
    progress = claimed.claim()
    progress.mkdir()
    (progress / "sample_00000.npz").write_bytes(b"progress")
    (out / "attribution.npz").write_bytes(b"half")


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    return record


def test_a_run_records_what_it_wrote(sources: tuple[Path, Path], tmp_path: Path) -> None:
    run(sources, tmp_path / "out", seed=7)
    assert names(tmp_path / "out") == {"run.json", *FILES}
    record = record_of(tmp_path / "out")
    assert record["finished"]
    assert record["request"]["seed"] == 7
    assert record["sources"]["data"]["name"] == "data.npz"


def test_a_folder_with_results_is_refused_by_name(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(sources, out, samples=3)
    expected = (
        r"out: has the results of another run, of layer.pt on data.npz \(samples 3, .*--force"
    )
    with pytest.raises(FolderError, match=expected):
        run(sources, out)
    assert {name: (out / name).read_bytes() for name in FILES} == FILES


def test_force_replaces_what_a_run_wrote_and_nothing_else(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(sources, out)
    others = ["notes.txt", "sample_00007_SII.npz.bak", "checkpoints/epoch_1.pt", "a/index.html"]
    for name in others:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    claimed = RunFolder(out, Request(*sources, out, seed=1), True)
    assert (out / "index.html").exists(), "a request that turns out to be wrong removes nothing"
    claimed.claim()
    assert names(out) == {"run.json", *others}
    assert not record_of(out)["finished"]
    claimed.publish({"index.html": "second"})
    assert names(out) == {"run.json", "index.html", *others}
    assert {(out / name).read_text() for name in others} == {"mine"}
    assert record_of(out)["request"]["seed"] == 1


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["index.html", "attribution.npz", "checkpoints/sample_00000.npz"])
def test_files_that_no_run_wrote_are_never_replaced(
    name: str, force: bool, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(FolderError, match=f"out: has a file {name} that no run"):
        run(sources, out, force=force)
    assert names(out) == {name}
    assert (out / name).read_text() == "mine"


def test_an_equal_run_continues_an_unfinished_one(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    unfinished(sources, out, exempt=(1,), class_names=("a", "b"))
    claimed = RunFolder(out, Request(*sources, out, exempt=(1,), class_names=("a", "b")), False)
    assert (claimed.claim() / "sample_00000.npz").read_bytes() == b"progress"
    assert names(out) == {"run.json", "checkpoints/sample_00000.npz"}
    claimed.publish(FILES)
    assert names(out) == {"run.json", *FILES}


@pytest.mark.parametrize("changed", ["seed", "data"])
def test_another_run_does_not_continue_an_unfinished_one(
    changed: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    unfinished(sources, out)
    before = names(out)
    options: dict[str, Any] = {"seed": 1} if changed == "seed" else {}
    if changed == "data":
        sources[1].write_bytes(b"other samples in a file of the same name")
    with pytest.raises(
        FolderError, match=f"unfinished run, .* differs from this one in {changed};"
    ):
        run(sources, out, **options)
    assert names(out) == before
    claimed = RunFolder(out, Request(*sources, out, **options), True)
    claimed.claim()
    assert names(out) == {"run.json"}, "its progress is gone, too"
    claimed.publish(FILES)
    assert names(out) == {"run.json", *FILES}


def test_a_run_that_fails_while_it_writes_leaves_no_results(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    claimed = RunFolder(out, Request(*sources, out), False)
    claimed.claim()
    with pytest.raises(KeyboardInterrupt):
        claimed.publish({**FILES, "explanation.json": stop})
    assert names(out) == {"run.json"}
    assert not record_of(out)["finished"]


def test_of_two_runs_at_once_the_later_has_the_folder(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = RunFolder(out, Request(*sources, out), False)
    first.claim()
    second = RunFolder(out, Request(*sources, out, seed=1), True)
    second.claim()
    with pytest.raises(FolderError, match="another run has taken the folder"):
        first.publish({"index.html": "first"})
    assert names(out) == {"run.json"}
    second.publish({"index.html": "second"})
    assert (out / "index.html").read_text() == "second"


OWN = {"kind": folder.KIND, "format": 1, "finished": True, "request": {}, "sources": {}}
FORGED = {
    "a user's own run.json": '{"finished": true}',
    "cut": json.dumps(OWN)[:-9],
    "not all fields": json.dumps(OWN),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_record_is_not_trusted(kind: str, sources: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text(FORGED[kind])
    (out / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(FolderError, match="not a record of a run: a different file"):
            run(sources, out, force=force)
    assert names(out) == {"run.json", "notes.txt"}
    assert (out / "run.json").read_text() == FORGED[kind]


def test_a_file_in_place_of_the_folder_is_an_error(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        run(sources, tmp_path / "data.npz")


def no_space(*_: Any) -> None:
    raise OSError("no space left")


@pytest.mark.parametrize(("where", "fault"), [("draw", no_space), ("page", stop)])
def test_a_failed_run_never_stands_beside_an_earlier_page(
    where: str,
    fault: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
        assert record_of(out)["finished"]
    with monkeypatch.context() as failing:
        failing.setattr(command, where, fault)
        again = Request(*files, out, **quick | {"seed": 1})
        assert command.main(again, force=True) in (2, command.INTERRUPTED)
    left = names(out)
    assert left == {"run.json", "checkpoints/sample_00000.npz"}
    assert not record_of(out)["finished"]
    capsys.readouterr()
    assert command.main(again) == 0
    assert names(out) == first
    assert record_of(out)["request"]["seed"] == 1
