"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

END_MARK = "<!-- end -->"
Content = bytes | str | Callable[[Path], object]


def write_whole(target: Path, content: Content, *, make_folder: bool = False) -> None:
    """Write a file so that readers see the old content or the new one, never a part of it.

    A temporary file beside the target takes its place at the end. Whatever stops the write, Ctrl-C included,
    leaves the target as it was and no temporary file. The file's permissions follow the umask. A link, pipe or
    device such as /dev/stdout is written to directly and stays what it is.

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
    # Not the process number: two containers may share a folder and the number.
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}.tmp{target.suffix}")
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
    """Whether `write_whole` replaces the target: it is a regular file or does not exist."""
    return not target.is_symlink() and (target.is_file() or not target.exists())


def is_writable(target: Path) -> bool:
    """Whether `write_whole` can write the target, as far as permissions tell."""
    if target.is_dir():
        return False
    if not is_replaced(target):
        return os.access(target, os.W_OK)
    return target.parent.is_dir() and os.access(target.parent, os.W_OK)


def write_marked(path: Path, mark: str, text: str) -> None:
    """Write text between the lines `mark` and END_MARK of a file, or a new file of these lines and the text.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file lacks one of the lines.
    """
    before, after = require_marks(path, mark)
    write_whole(path, f"{before}{mark}\n{text}{END_MARK}{after}")


def require_marks(path: Path, mark: str) -> tuple[str, str]:
    """The text before the line `mark` of a file and after its END_MARK; for a new file "" and a newline.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file lacks one of the lines.
    """
    if not is_writable(path):
        raise OSError(f"{path}: cannot be written")
    if not path.exists():
        return "", "\n"
    before, begin, rest = path.read_text(encoding="utf-8").partition(mark)
    _, end, after = rest.partition(END_MARK)
    if not (begin and end):
        raise ValueError(f"{path}: has no lines {mark} and {END_MARK} to write between")
    return before, after
