"""Tuning results in Triton's cache folder (TRITON_CACHE_DIR), so that other processes do not time again."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "flmoe_tuning.json"
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

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()


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


def read(key: TuningKey) -> Any:
    """The saved tiles, or None; warns if the file cannot be read. The caller compares them with its candidates."""
    try:
        path = _manager(key).get_file(FILE)
        return None if path is None else json.loads(Path(path).read_text())["tiles"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(key, f"ignored: {error!r}")
        return None


def write(result: TuningResult) -> None:
    """Write the file atomically; warns if it cannot be written."""
    try:
        _manager(result.key).put(json.dumps(asdict(result), indent=1), FILE, binary=False)
    except OSError as error:
        _warn(result.key, f"not written: {error}")


def _manager(key: TuningKey) -> Any:
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(key.digest())


def _warn(key: TuningKey, message: str) -> None:
    warnings.warn(
        f"{key.kernel}: tuning result {key.digest()}: {message}", TuningWarning, stacklevel=3
    )
