"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

Content = bytes | str | Callable[[Path], object]


def write_whole(target: Path, content: Content, *, make_folder: bool = False) -> None:
    """Write a file so that readers see the old content or the new one, never a part of it.

    A temporary file beside the target takes its place at the end. Whatever stops the write, Ctrl-C included,
    leaves the target as it was and no temporary file. The file's permissions follow the umask. A link keeps
    pointing to the file, which is replaced. A pipe or device, /dev/stdout for example, is written to directly.

    Args:
        target: the file.
        content: bytes; text, which is written as UTF-8; or a function that writes the file at the path it is
            given, whose suffix is the target's, since writers choose a format by it.
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
    # Not the process number: two containers may share a folder and the number.
    temporary = target.with_name(f".{uuid.uuid4().hex}.tmp{target.suffix}")
    try:
        _write(temporary, content)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # the content is on the disk before the name
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
    """Whether `write_whole` replaces the target: a regular file or nothing, and no name of an open file."""
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
