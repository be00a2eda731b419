"""Tests of atomic file writes and of one-line error messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flmoe_kernels.core import files
from flmoe_kernels.profile.registry import words_of

CONTENTS: list[files.Content] = [b"new", "new", lambda path: path.write_text("new")]


@pytest.mark.parametrize("content", CONTENTS, ids=["bytes", "text", "function"])
def test_a_file_is_replaced_with_the_permissions_of_the_umask(
    tmp_path: Path, content: files.Content
) -> None:
    target = tmp_path / "folder" / "file.json"
    with pytest.raises(FileNotFoundError):
        files.write_whole(target, content)
    before = os.umask(0o027)
    try:
        for _ in range(2):
            files.write_whole(target, content, make_folder=True)
    finally:
        os.umask(before)
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, reason: type[BaseException]
) -> None:
    target = tmp_path / "file.png"
    target.write_text("old")

    def half(path: Path) -> None:
        assert path.suffix == ".png"
        path.write_text("ha")
        raise reason

    with pytest.raises(reason):
        files.write_whole(target, half)
    assert [path.name for path in tmp_path.iterdir()] == ["file.png"]
    assert target.read_text() == "old"


def test_two_processes_write_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes in different containers may have the same process id."""
    target, replace = tmp_path / "found", os.replace

    def second(source: Path, destination: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        files.write_whole(target, b"the other's")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", second)
    files.write_whole(target, b"mine")
    assert target.read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    files.write_whole(link, "old")

    def half(path: Path) -> None:
        path.write_text("ha")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        files.write_whole(link, half)
    assert real.read_text() == "old"
    files.write_whole(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_a_device_is_written_to_directly(tmp_path: Path) -> None:
    device = Path(os.devnull)
    assert files.is_writable(device)
    assert not files.is_replaced(device)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory.\nTried to allocate"), "CUDA out of memory."),
        (
            RuntimeError("backend='inductor' raised:\n\n no ptxas\nmore"),
            "backend='inductor' raised: no ptxas",
        ),
        (MemoryError(), "MemoryError"),
        (ValueError("x" * 999), "x" * 300),
    ],
    ids=["first line", "announced", "type", "long"],
)
def test_a_failure_in_one_line(error: Exception, words: str) -> None:
    assert words_of(error) == words
