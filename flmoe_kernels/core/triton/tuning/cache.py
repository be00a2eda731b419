"""The folder of findings: a small JSON file each, so that processes that tune at a time lose none.

It is FLMOE_CACHE_DIR, or else flmoe_kernels in XDG_CACHE_HOME or ~/.cache; findings lie in its folder "tuning".
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from flmoe_kernels.core.files import write_whole

from .finding import Finding, Question, decode, encode

FOLDER_VARIABLE = "FLMOE_CACHE_DIR"
_NAME = re.compile(r"[0-9a-f]{32}\.json")
# What a writer that was killed leaves.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.\w+\.tmp\.json")
# A finding has about one KiB: a larger file is something else, and is not read.
_MOST_BYTES = 2**16


class TuningWarning(UserWarning):
    """A finding that cannot be used or kept: the call goes on without it."""


def folder() -> Path:
    """Where findings lie, whether it is there or not.

    Raises:
        OSError: no variable names one and there is no home folder.
    """
    try:
        return _named_folder()
    except RuntimeError as error:
        raise OSError(f"{FOLDER_VARIABLE}: expected a folder where {error}") from error


def _named_folder() -> Path:
    own = os.environ.get(FOLDER_VARIABLE)
    if own:
        return Path(own).expanduser() / "tuning"
    common = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG_CACHE_HOME says that relative paths are to be ignored.
    base = Path(common) if common and os.path.isabs(common) else Path.home() / ".cache"
    return base / "flmoe_kernels" / "tuning"


def read(question: Question) -> Finding | None:
    """What was found before; None, with a warning where a file is not that finding, if there is nothing."""
    try:
        path = folder() / f"{question.name()}.json"
    except OSError as error:
        _warn(str(error))
        return None
    finding = _load(path)
    if finding is not None and finding.question != question:
        _warn(f"{path}: ignored: it answers another question")
        return None
    return finding


def write(finding: Finding) -> None:
    """The file appears whole or not at all; where it cannot be written, a warning."""
    name = finding.question.name()
    try:
        target = folder() / f"{name}.json"
        if target.exists() and not target.is_file():
            raise OSError("no regular file")  # writing to a pipe would wait for a reader
        write_whole(target, encode(finding), make_folder=True)
    except OSError as error:
        _warn(f"{name}.json: not written: {error}")


def findings() -> Iterator[Finding]:
    """All that can be read, by file name; a warning for each that cannot.

    Raises:
        OSError: there is a folder, and it cannot be listed.
    """
    for path in _files(_NAME):
        finding = _load(path)
        if finding is not None:
            yield finding


def clear() -> int:
    """Remove findings, readable or not, and what unfinished ones left, and nothing else in the folder.

    Returns how many findings; a warning for each that stays.

    Raises:
        OSError: there is a folder, and it cannot be listed.
    """
    for path in _files(_TEMPORARY):
        _remove(path)
    return sum(map(_remove, _files(_NAME)))


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _warn(f"{path}: not removed: {error}")
        return False
    return True


def _files(name: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in folder().iterdir() if name.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _load(path: Path) -> Finding | None:
    try:
        return decode(_content(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _warn(f"{path}: ignored: {error}")
        return None


def _content(path: Path) -> str:
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no regular file")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES} bytes")
    return content.decode()


def _without_waiting(path: str, flags: int) -> int:
    """A pipe would be waited for until somebody writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _warn(message: str) -> None:
    warnings.warn(message, TuningWarning, stacklevel=3)
