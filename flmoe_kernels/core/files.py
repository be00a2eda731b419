"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

END_MARK = "<!-- end -->"


def write_marked(path: Path, mark: str, text: str) -> None:
    """Write text between the lines `mark` and END_MARK of a file, in place of what is there, or all as a new one.

    Raises:
        OSError: the file cannot be written.
        ValueError: the file lacks one of the lines.
    """
    before, after = require_marks(path, mark)
    page = f"{before}{mark}\n{text}{END_MARK}{after}"
    write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))


def require_marks(path: Path, mark: str) -> tuple[str, str]:
    """What precedes the line `mark` of a file, and what follows its END_MARK; a new file has but its last newline.

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


def is_replaced(target: Path) -> bool:
    """Whether writing puts a new file in its place: not for a link, nor for a pipe or device as /dev/stdout."""
    return not target.is_symlink() and (target.is_file() or not target.exists())


def is_writable(target: Path) -> bool:
    if target.is_dir():
        return False
    if not is_replaced(target):
        return os.access(target, os.W_OK)
    return target.parent.is_dir() and os.access(target.parent, os.W_OK)


def write_whole(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file of this name in a folder beside it, and put that in its place.

    What is no plain file is written to and stays what it is.
    """
    if not is_replaced(target):
        write(target)
        return
    # A folder of our own, in which nobody can have laid a link; the name keeps its ending, which tells formats.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        write(part)
        os.replace(part, target)
