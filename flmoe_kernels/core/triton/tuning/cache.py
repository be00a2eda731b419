"""Tuning results on disk, one JSON file each (safe for concurrent processes).

The files are in the folder "tuning" of FLMOE_CACHE_DIR, or of flmoe_kernels in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import is_replaced, write_whole

FOLDER_VARIABLE = "FLMOE_CACHE_DIR"
FORMAT = 1
# A file has about one KiB; a much larger file is not a tuning result and is not read.
_MOST_BYTES = 2**16
_LONGEST = 256  # characters of a message
Tiles = dict[str, int]


class TuningWarning(UserWarning):
    """A tuning result cannot be used or saved; the call continues without it."""


@dataclass(frozen=True, order=True)
class TuningKey:
    """The properties that calls must have in common to share a configuration.

    kernel: "pair_moe.accumulate"; kind: its class in the launch table; dtype: "bfloat16"; sizes: names and
    numbers, some rounded to a bucket; device: its name; triton, package: versions.
    """

    kernel: str
    kind: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    device: str
    triton: str
    package: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"sizes": dict(self.sizes)}

    def file_name(self) -> str:
        text = json.dumps(self.as_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32] + ".json"


@dataclass(frozen=True)
class TuningResult:
    """The fastest configuration and that of the launch table, with the seconds of one run.

    tried, refused: the number of candidates, and of candidates that failed or gave different results.
    """

    key: TuningKey
    tiles: Tiles
    seconds: float
    table: Tiles
    table_seconds: float
    tried: int
    refused: int

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT} | asdict(self) | {"key": self.key.as_json()}


def encode(result: TuningResult) -> str:
    return json.dumps(result.as_json(), indent=1, allow_nan=False) + "\n"


def decode(text: str) -> TuningResult:
    """Parse the text of a tuning result file. A result only selects among the candidates of this version, so its
    values are compared with theirs and not checked here.

    Raises:
        ValueError: the text is not valid; the message gives the reason.
    """
    try:
        content = json.loads(text)
        if content.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        key = content.pop("key")
        sizes = tuple(key.pop("sizes").items())
        return TuningResult(TuningKey(**key, sizes=sizes), **content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # The message may quote the file, which may hold terminal codes.
        raise ValueError(f"not a tuning result ({ascii(str(error))[:_LONGEST]})") from error


def folder() -> Path:
    """The folder of tuning results, which may not exist yet.

    Raises:
        OSError: no environment variable gives a folder, and there is no home folder.
    """
    try:
        own = os.environ.get(FOLDER_VARIABLE)
        if own:
            return Path(own).expanduser() / "tuning"
        common = os.environ.get("XDG_CACHE_HOME")
        # By the specification of XDG_CACHE_HOME, relative paths are ignored.
        base = Path(common) if common and os.path.isabs(common) else Path.home() / ".cache"
        return base / "flmoe_kernels" / "tuning"
    except RuntimeError as error:
        raise OSError(f"{FOLDER_VARIABLE}: expected a folder where {error}") from error


def read(key: TuningKey) -> TuningResult | None:
    """The saved result or None; warns if the file is not valid."""
    try:
        path = folder() / key.file_name()
    except OSError as error:
        _warn(str(error))
        return None
    result = _load(path)
    if result is not None and result.key != key:
        _warn(f"{path}: ignored: it has another key")
        return None
    return result


def write(result: TuningResult) -> None:
    """Write the file atomically; warns if it cannot be written."""
    name = result.key.file_name()
    try:
        target = folder() / name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_replaced(target):
            raise OSError("not a regular file")  # writing to a pipe would wait for a reader
        write_whole(target, encode(result))
    except OSError as error:
        _warn(f"{name}: not written: {error}")


def _load(path: Path) -> TuningResult | None:
    try:
        return decode(_content(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _warn(f"{path}: ignored: {error}")
        return None


def _content(path: Path) -> str:
    with open(path, "rb", opener=_open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES} bytes")
    return content.decode()


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without blocking; opening a pipe would otherwise wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _warn(message: str) -> None:
    warnings.warn(message, TuningWarning, stacklevel=3)
