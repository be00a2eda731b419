"""The folder of findings: a small JSON file each, so that processes that tune at a time lose none.

It is FLMOE_CACHE_DIR, or else flmoe_kernels in XDG_CACHE_HOME or ~/.cache; findings lie in its folder "tuning".
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from .finding import Finding, Question, decode, encode

FOLDER_VARIABLE = "FLMOE_CACHE_DIR"
_NAME = re.compile(r"[0-9a-f]{32}\.json")
# A finding has about one KiB: a larger file is something else, and is not read.
_MOST_BYTES = 2**16


class TuningWarning(UserWarning):
    """A finding that cannot be used or kept: the call goes on without it."""


def folder() -> Path:
    own = os.environ.get(FOLDER_VARIABLE)
    if own:
        return Path(own).expanduser() / "tuning"
    common = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG_CACHE_HOME says that relative paths are to be ignored.
    base = Path(common) if common and os.path.isabs(common) else Path.home() / ".cache"
    return base / "flmoe_kernels" / "tuning"


def read(question: Question) -> Finding | None:
    """What was found before; None, with a warning where a file is not that finding, if there is nothing."""
    path = folder() / f"{question.name()}.json"
    finding = _load(path)
    if finding is not None and finding.question != question:
        warnings.warn(f"{path}: ignored: it answers another question", TuningWarning, stacklevel=2)
        return None
    return finding


def write(finding: Finding) -> None:
    """The file appears whole or not at all; where it cannot be written, a warning."""
    target = folder() / f"{finding.question.name()}.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(encode(finding))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"{target}: not written: {error}", TuningWarning, stacklevel=2)


def findings() -> Iterator[Finding]:
    """All that can be read, by file name; a warning for each that cannot."""
    for path in _files():
        finding = _load(path)
        if finding is not None:
            yield finding


def clear() -> int:
    """Remove findings, readable or not, and nothing else in the folder. Returns how many."""
    count = 0
    for path in _files():
        path.unlink(missing_ok=True)
        count += 1
    return count


def _files() -> list[Path]:
    try:
        return sorted(path for path in folder().iterdir() if _NAME.fullmatch(path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _load(path: Path) -> Finding | None:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(f"{path}: ignored: {error}", TuningWarning, stacklevel=3)
        return None
    try:
        if len(content) > _MOST_BYTES:
            raise ValueError(f"longer than {_MOST_BYTES} bytes")
        return decode(content.decode())
    except ValueError as error:
        warnings.warn(f"{path}: ignored: {error}", TuningWarning, stacklevel=3)
        return None
