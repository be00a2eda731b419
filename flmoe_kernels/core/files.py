"""Atomic writing of files."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

Content = bytes | str | Callable[[Path], object]


def write_whole(target: Path, content: Content, *, make_folder: bool = False) -> None:
    """Write a file atomically: readers see the old content or the new content, never a part of it.

    A temporary file beside the target replaces it at the end. If the write fails or is interrupted (Ctrl-C), the
    target is unchanged and the temporary file is removed. The file's permissions follow the umask. If the target
    is a link, the file that it points to is replaced. A pipe or device, such as /dev/stdout, is written directly.

    Args:
        target: the file.
        content: bytes; text, which is written as UTF-8; or a function that writes a file to a given path, which
            has the target's suffix, because writers choose the format by the suffix.
        make_folder: create missing folders.

    Raises:
        OSError: the file cannot be written.
    """
    if make_folder:
        target.parent.mkdir(parents=True, exist_ok=True)
    if not is_replaced(target):
        _write(target, content)
        return
    target = target.resolve()
    # Not the process id: two containers may share a folder and have the same id.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp{target.suffix}")
    try:
        _write(temporary, content)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # the content must be on disk before the rename
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, content: Content) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        content(path)


def is_replaced(target: Path) -> bool:
    """Whether `write_whole` replaces the target: a regular or missing file, but not the path of an open file."""
    folder = target.parent.resolve()
    opened = folder == Path("/dev") or folder.parts[1:2] == ("proc",)  # /dev/stdout, /dev/fd/1
    return not opened and (target.is_file() or not target.exists())


def is_writable(target: Path) -> bool:
    """Whether `write_whole` can write the target, as far as permissions tell."""
    if target.is_dir():
        return False
    if not is_replaced(target):
        return os.access(target, os.W_OK)
    folder = target.resolve().parent
    return folder.is_dir() and os.access(folder, os.W_OK)
