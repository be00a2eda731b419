"""Tuning results on disk, one JSON file each (safe for concurrent processes).

The files are in the folder "tuning" of FLMOE_CACHE_DIR, or of flmoe_kernels in XDG_CACHE_HOME or ~/.cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import is_replaced, write_whole

FOLDER_VARIABLE = "FLMOE_CACHE_DIR"
FORMAT = 1
_NAME = re.compile(r"[0-9a-f]{32}\.json")
# Temporary files of a killed process, see core/files.py.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}(\.\w+)?\.tmp\.json")
# A file has about one KiB; a much larger file is not a tuning result and is not read.
_MOST_BYTES = 2**16
# Limits on what a file may hold: fields and values of a configuration, characters of a word, seconds.
_MOST_FIELDS, _LARGEST, _LONGEST, _MOST_SECONDS = 32, 2**16, 256, 1e6
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
    """Parse the text of a tuning result file.

    Raises:
        ValueError: the text is not valid; the message gives the reason.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from error
    fields = [field.name for field in dataclasses.fields(TuningResult)]
    _expect_keys("the file", content, "format", *fields)
    if content["format"] != FORMAT or isinstance(content["format"], bool):
        raise ValueError(f"format: expected {FORMAT}, got {_short(content['format'])}")
    return TuningResult(
        _key(content["key"]),
        _integers("tiles", content["tiles"]),
        _seconds("seconds", content["seconds"]),
        _integers("table", content["table"]),
        _seconds("table_seconds", content["table_seconds"]),
        _integer("tried", content["tried"]),
        _integer("refused", content["refused"]),
    )


def _key(content: Any) -> TuningKey:
    words = ("kernel", "kind", "dtype", "device", "triton", "package")
    _expect_keys("key", content, *words, "sizes")
    for name in words:
        _expect_word(f"key.{name}", content[name])
    sizes = _integers("key.sizes", content["sizes"], 2**62)
    return TuningKey(**{name: content[name] for name in words}, sizes=tuple(sizes.items()))


def _expect_word(name: str, value: Any) -> None:
    """Check a string, which must be printable because `tune show` prints it on a terminal."""
    if not isinstance(value, str) or len(value) > _LONGEST or not value.isprintable():
        raise ValueError(
            f"{name}: expected up to {_LONGEST} printable characters, got {_short(value)}"
        )


def _short(value: Any) -> str:
    return ascii(value)[:_LONGEST]


def _expect_keys(name: str, content: Any, *keys: str) -> None:
    if not isinstance(content, dict) or set(content) != set(keys):
        got = sorted(content) if isinstance(content, dict) else content
        expected = ", ".join(sorted(keys))
        raise ValueError(f"{name}: expected an object of {expected}, got {_short(got)}")


def _integers(name: str, content: Any, largest: int = _LARGEST) -> Tiles:
    if not isinstance(content, dict) or not 0 < len(content) <= _MOST_FIELDS:
        raise ValueError(f"{name}: expected an object of up to {_MOST_FIELDS} integers")
    for key in content:
        _expect_word(f"a key of {name}", key)
    return {key: _integer(f"{name}.{key}", content[key], largest) for key in content}


def _integer(name: str, value: Any, largest: int = _LARGEST) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ValueError(f"{name}: expected an integer from 0 to {largest}, got {_short(value)}")
    return value


def _seconds(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < _MOST_SECONDS:
        raise ValueError(f"{name}: expected seconds, got {_short(value)}")
    return float(value)


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


def results() -> Iterator[TuningResult]:
    """All valid results, sorted by file name; warns about every invalid file.

    Raises:
        OSError: the folder exists and cannot be listed.
    """
    for path in _files(_NAME):
        result = _load(path)
        if result is not None:
            yield result


def clear() -> int:
    """Remove all results, valid or not, and temporary files of killed processes, but no other files.

    Returns the number of removed results; warns about every file that cannot be removed.

    Raises:
        OSError: the folder exists and cannot be listed.
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
