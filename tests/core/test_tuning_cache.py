"""Tests of tuning result files: atomic writes, validation, no code execution."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flmoe_kernels.core.triton.tuning import cache
from flmoe_kernels.core.triton.tuning.cache import decode, encode
from tests.support.programs import output_of
from tests.support.tuning_trials import (
    BETTER,
    KEY,
    RESULT,
    SECONDS,
    Clock,
    choose,
    empty_cache,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def path(folder: Path) -> Path:
    """Path of KEY's file; its folder exists."""
    folder.mkdir(parents=True)
    return folder / KEY.file_name()


def test_a_saved_result_is_read_back() -> None:
    assert decode(encode(RESULT)) == RESULT
    assert json.loads(encode(RESULT))["format"] == 1


def changed(**fields: Any) -> str:
    """Text of the file with changed fields; `key` changes fields of its key."""
    content = json.loads(encode(RESULT))
    if isinstance(fields.get("key"), dict):
        fields["key"] = content["key"] | fields["key"]
    return json.dumps(content | fields)


INVALID = {
    "no JSON": "{",
    "a list": "[1]",
    "nothing": "",
    "deep": "[" * 100_000,
    "format 2": changed(format=2),
    "a field more": changed(code="import os"),
    "a field that moves the cursor": changed(**{"\x1b[2J": 1}),
    "a key of text": changed(key="op"),
    "a list of sizes": changed(key={"sizes": [1]}),
}


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID.keys())
def test_invalid_files_are_ignored_with_a_warning(text: str, path: Path) -> None:
    with pytest.raises(ValueError, match=r"^not a tuning result \([ -~]+\)$"):
        decode(text)
    path.write_text(text)
    with pytest.warns(cache.TuningWarning, match=r"ignored"):
        assert choose(Clock(SECONDS)) == BETTER
    assert cache.read(KEY) == RESULT, "the next process reads a valid file"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a file was run')",))


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"\xff" * 10, b" " * 2**17])
def test_foreign_files_are_never_run_or_read_whole(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.warns(cache.TuningWarning, match="ignored"):
        assert cache.read(KEY) is None


def test_pipes_are_ignored(path: Path) -> None:
    os.mkfifo(path)
    with pytest.warns(cache.TuningWarning, match="ignored: not a regular file"):
        assert cache.read(KEY) is None
    with pytest.warns(cache.TuningWarning, match="not written: not a regular file"):
        cache.write(RESULT)


def test_a_file_with_another_key_is_ignored(folder: Path) -> None:
    cache.write(RESULT)
    other = dataclasses.replace(KEY, triton="3.8.0")
    assert other.file_name() != KEY.file_name()
    (folder / KEY.file_name()).rename(folder / other.file_name())
    with pytest.warns(cache.TuningWarning, match="another key"):
        assert cache.read(other) is None


@pytest.mark.parametrize("tiles", [{"rows": 4096, "warps": 32}, {"rows": "32"}, {}, [32], None])
def test_a_file_cannot_add_a_configuration(tiles: Any) -> None:
    cache.write(dataclasses.replace(RESULT, tiles=tiles))
    clock = Clock(SECONDS)
    assert choose(clock) == BETTER
    assert clock.timed
    assert cache.read(KEY) == RESULT


def test_a_folder_that_cannot_be_written_is_a_warning(folder: Path) -> None:
    folder.parent.write_text("no folder")
    with pytest.warns(cache.TuningWarning, match="not written"):
        assert choose(Clock(SECONDS)) == BETTER


def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache.folder() == tmp_path / "cache" / "tuning"
    monkeypatch.delenv(cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "flmoe_kernels" / "tuning"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache.folder() == tmp_path / "me" / ".cache" / "flmoe_kernels" / "tuning"


def test_a_new_process_reads_saved_results() -> None:
    assert choose(Clock(SECONDS)) == BETTER
    code = "from tests.support.tuning_trials import choose, refuse; print(choose(refuse))"
    assert output_of(code) == str(BETTER)
