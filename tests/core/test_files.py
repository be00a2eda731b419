"""Tests of atomic file writes and of one-line error messages."""

from __future__ import annotations

import errno
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from flmoe_kernels.core import files

CONTENTS: list[files.Content] = [b"new", "new", lambda stream: stream.write(b"new")]


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


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError("no space"), ValueError("format")])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, reason: BaseException, linked: bool
) -> None:
    target = tmp_path / "file.png"
    target.write_text("old")
    names = {"file.png"}
    if linked:
        (tmp_path / "link.png").symlink_to(target)
        names |= {"link.png"}

    def half(stream: BinaryIO) -> None:
        stream.write(b"ha")
        raise reason

    with pytest.raises(type(reason), match=str(reason)):
        files.write_whole(tmp_path / sorted(names)[-1], half)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert target.read_text() == "old"
    files.write_whole(tmp_path / sorted(names)[-1], "new")
    assert target.read_text() == "new"
    assert (tmp_path / sorted(names)[-1]).is_symlink() == linked


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "content", [b"new", "new", lambda stream: torch.save({"a": torch.ones(50)}, stream)]
)
def test_a_full_device_is_one_line(content: files.Content) -> None:
    message = r"^/dev/full: cannot be written: No space left on device$"
    with pytest.raises(OSError, match=message) as failed:
        files.write_whole(Path("/dev/full"), content)
    assert failed.value.errno == errno.ENOSPC


def test_targets_that_cannot_be_written_are_named_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, kind, reason, early in (
        ("none/x.json", FileNotFoundError, "No such file or directory", "no such folder"),
        ("file/x.json", NotADirectoryError, "Not a directory", "no such folder"),
        (".", IsADirectoryError, "Is a directory", "is a folder, expected a file to write"),
        ("loop", OSError, "Too many levels of symbolic links", "cannot be written"),
        (f"{'x' * 300}.json", OSError, "File name too long", "File name too long"),
    ):
        target = tmp_path / name
        with pytest.raises(kind) as failed:
            files.write_whole(target, "new")
        assert str(failed.value) == f"{target}: cannot be written: {reason}"
        assert early in files.unwritable_reason(target)
    with pytest.raises(NotADirectoryError, match=r"x\.json: cannot be written: Not a directory$"):
        files.write_whole(tmp_path / "file" / "folder" / "x.json", "new", make_folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
    assert files.unwritable_reason(tmp_path / "new.json") == ""


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(10**6))


def with_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NOT_REGULAR = "is a device, pipe or socket, expected a regular file"
UNREADABLE: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda path: None, "cannot be read: No such file or directory"),
    ("folder", lambda path: path.mkdir(), "is a folder, expected a file"),
    ("pipe", os.mkfifo, NOT_REGULAR),
    ("socket", with_socket, NOT_REGULAR),
    ("device", lambda path: path.symlink_to("/dev/zero"), NOT_REGULAR),
    ("loop", lambda path: path.symlink_to(path), "cannot be read: Too many levels of symb.*"),
    ("empty", lambda path: path.touch(), "is empty"),
    ("sparse", lambda path: (path.touch(), os.truncate(path, 2**30)), "expected at most .* bytes"),
    ("unpacked", zipped, r"expected at most \d+ bytes, the available memory, got 1000000"),
]


@pytest.mark.parametrize(("write", "reason"), [pytest.param(*row, id=i) for i, *row in UNREADABLE])
def test_a_file_that_cannot_be_read_whole_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], object],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has at most about 100 characters
    monkeypatch.setattr(files, "available_bytes", lambda device: 10**5)
    path = Path("file")
    path.write_bytes(b"0123456789abcdefghi")
    assert files.checked_head(path) == b"0123456789abcdef"
    path.unlink()
    write(path)
    with pytest.raises(OSError, match=rf"^file: {reason}[^\n]*$"):
        files.checked_head(path)
