"""The files in which autotune keeps what it found: written whole, checked when read, never run."""

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
from flmoe_kernels.core.triton.tuning.finding import decode, encode
from tests.support.tuning_trials import (
    BETTER,
    FOUND,
    QUESTION,
    ROOT,
    SECONDS,
    Clock,
    choose,
    own_folder,
    python,
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from own_folder(tmp_path, monkeypatch)


def test_a_finding_survives_its_file() -> None:
    assert decode(encode(FOUND)) == FOUND


def changed(**fields: Any) -> str:
    return json.dumps(json.loads(encode(FOUND)) | fields)


BAD = {
    "no JSON": "{",
    "a list": "[1]",
    "nothing": "",
    "deep": "[" * 100_000,
    "schema 2": changed(schema=2),
    "schema true": changed(schema=True),
    "a field more": changed(code="import os"),
    "no tiles": changed(tiles={}),
    "tiles of text": changed(tiles={"rows": "32"}),
    "tiles of fractions": changed(tiles={"rows": 0.5}),
    "tiles of truths": changed(tiles={"rows": True}),
    "negative tiles": changed(tiles={"rows": -1}),
    "huge tiles": changed(tiles={"rows": 2**40}),
    "a list of tiles": changed(tiles=[32]),
    "no seconds": changed(seconds=0),
    "negative seconds": changed(table_seconds=-1.0),
    "infinite seconds": changed(seconds=1e999),
    "seconds of text": changed(seconds="1"),
    "seconds beyond a float": changed(seconds=10**400),
    "a question of text": changed(question="op"),
    "a question of numbers": changed(
        question=json.loads(encode(FOUND))["question"] | {"kernel": 1}
    ),
    "a device that moves the cursor": changed(
        question=json.loads(encode(FOUND))["question"] | {"device": "GPU\x1b[2J"}
    ),
    "a long device": changed(
        question=json.loads(encode(FOUND))["question"] | {"device": "x" * 999}
    ),
    "a key that moves the cursor": changed(tiles={"\x1b[2J": 1}),
    "tried": changed(tried=-1),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_invalid_files_are_ignored_with_a_warning(text: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(text)
    folder.mkdir(parents=True)
    (folder / f"{QUESTION.name()}.json").write_text(text)
    with pytest.warns(cache.TuningWarning, match=r"ignored"):
        assert choose(Clock(SECONDS)) == BETTER
    assert cache.read(QUESTION) == FOUND, "the next process finds a valid one"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a file was run')",))


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"\xff" * 10, b" " * 2**17])
def test_foreign_files_are_never_run_or_read_whole(content: bytes, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / f"{QUESTION.name()}.json").write_bytes(content)
    with pytest.warns(cache.TuningWarning, match="ignored"):
        assert cache.read(QUESTION) is None


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.mkfifo(folder / f"{QUESTION.name()}.json")
    with pytest.warns(cache.TuningWarning, match="ignored: no regular file"):
        assert cache.read(QUESTION) is None


def test_a_complaint_is_short(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / f"{QUESTION.name()}.json").write_text(changed(schema="x" * 50_000))
    with pytest.warns(cache.TuningWarning, match="schema: expected 1") as caught:
        assert cache.read(QUESTION) is None
    assert len(str(caught[0].message)) < 1000


def test_a_folder_in_a_findings_place_is_named_and_stays(folder: Path) -> None:
    cache.write(FOUND)
    (folder / f"{'0' * 32}.json").mkdir()
    (folder / f".{QUESTION.name()}.abc_1.tmp.json").write_text("of a writer that was killed")
    with pytest.warns(cache.TuningWarning, match="ignored"):
        assert list(cache.findings()) == [FOUND]
    with pytest.warns(cache.TuningWarning, match="not removed"):
        assert cache.clear() == 1
    assert [path.name for path in folder.iterdir()] == [f"{'0' * 32}.json"]


def test_without_a_home_a_call_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, "~nobody-of-this-name/cache")
    with pytest.raises(OSError, match="FLMOE_CACHE_DIR: expected a folder where"):
        cache.folder()
    with pytest.warns(cache.TuningWarning, match="FLMOE_CACHE_DIR"):
        assert choose(Clock(SECONDS)) == BETTER


def test_a_file_that_answers_another_question_is_ignored(folder: Path) -> None:
    cache.write(FOUND)
    other = dataclasses.replace(QUESTION, triton="3.8.0")
    assert other.name() != QUESTION.name()
    (folder / f"{QUESTION.name()}.json").rename(folder / f"{other.name()}.json")
    with pytest.warns(cache.TuningWarning, match="another question"):
        assert cache.read(other) is None


def test_a_file_cannot_bring_a_configuration_of_its_own() -> None:
    cache.write(dataclasses.replace(FOUND, tiles={"rows": 4096, "warps": 32}))
    clock = Clock(SECONDS)
    assert choose(clock) == BETTER
    assert clock.timed
    assert cache.read(QUESTION) == FOUND


def test_a_folder_that_cannot_be_written_is_a_warning(folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("no folder")
    with pytest.warns(cache.TuningWarning, match="not written"):
        assert choose(Clock(SECONDS)) == BETTER


def test_a_write_that_fails_leaves_the_old_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write(FOUND)

    def fail(*_paths: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(cache.TuningWarning, match="disk full"):
        cache.write(dataclasses.replace(FOUND, seconds=1e-6))
    assert cache.read(QUESTION) == FOUND
    assert [path.name for path in folder.iterdir()] == [f"{QUESTION.name()}.json"]


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


def test_a_fresh_process_reads_what_another_found(folder: Path) -> None:
    assert choose(Clock(SECONDS)) == BETTER
    code = """
import sys; sys.path.insert(0, "tests")
from tuning_trials import BETTER, CPU, QUESTION, TABLE, refuse, sums
from flmoe_kernels import tuning
with tuning.autotune(timer=refuse):
    print(tuning.choose(QUESTION, (TABLE, BETTER), sums(), CPU) == BETTER)
"""
    result = python(f"import os; os.chdir({str(ROOT)!r})\n{code}")
    assert result.stdout.strip() == "True", result.stderr
