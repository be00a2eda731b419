"""Autotune without a kernel: findings and their files, the choice among candidates, the commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import tuning
from flmoe_kernels.tuning import cache, switch, timer, tuner
from flmoe_kernels.tuning.finding import Finding, Question, decode, encode
from flmoe_kernels.tuning.trial import agree

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
QUESTION = Question("op.kernel", "16 bit", "bfloat16", (("rows", 64),), "a GPU", "3.7.1", "0.1")


@dataclasses.dataclass(frozen=True)
class Tiles:
    rows: int
    warps: int
    shared: tuple[int, ...] = (0, 0, 0)


TABLE, BETTER, WORSE = Tiles(64, 4), Tiles(32, 4), Tiles(128, 8)
FOUND = Finding(QUESTION, {"rows": 32, "warps": 4}, 1e-5, {"rows": 64, "warps": 4}, 2e-5, 3, 0)
SECONDS = {TABLE: 2e-5, BETTER: 1e-5, WORSE: 3e-5}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    tuner.forget()
    yield tmp_path / "cache" / "tuning"
    tuner.forget()


@dataclasses.dataclass
class Clock:
    """Times that were written down, and what it was asked to time."""

    seconds: dict[Tiles, float]
    timed: list[Tiles] = dataclasses.field(default_factory=list)

    def __call__(self, trial: tuning.Trial[Any]) -> float:
        trial.run()
        self.timed.append(trial.tiles)
        return self.seconds[trial.tiles]


def sums(
    spoil: Callable[[Tiles, Tensor], None] = lambda _tiles, _out: None,
) -> Callable[[], Callable[[Tiles], tuning.Trial[Tiles]]]:
    """Trials that add up a vector in blocks of rows; `spoil` may break one."""
    x = torch.rand(1000, generator=torch.Generator().manual_seed(5))

    def make(tiles: Tiles) -> tuning.Trial[Tiles]:
        out = torch.zeros(1)

        def run() -> None:
            out[0] = sum(part.sum() for part in x.split(tiles.rows))
            spoil(tiles, out)

        return tuning.Trial(tiles, CPU, run, lambda: [out])

    return lambda: make


def choose(clock: Clock | None, **options: Any) -> Tiles:
    """By a question's first call in this process."""
    tuner.forget()
    prepare = options.pop("prepare", sums())
    candidates = options.pop("candidates", (TABLE, BETTER, WORSE))
    with tuning.autotune(timer=clock):
        return tuning.choose(QUESTION, candidates, prepare, CPU)


def refuse(_trial: tuning.Trial[Any]) -> float:
    raise AssertionError("nothing is to be timed")


# ---- the choice


def test_the_fastest_candidate_is_chosen_and_remembered(folder: Path) -> None:
    clock = Clock(SECONDS)
    assert choose(clock) == BETTER
    assert set(clock.timed) == set(SECONDS)
    finding = decode((folder / f"{QUESTION.name()}.json").read_text())
    assert finding == FOUND
    # In this process, without a look into the file; and from the file.
    (folder / f"{QUESTION.name()}.json").write_text("gone")
    with tuning.autotune(timer=refuse):
        assert tuning.choose(QUESTION, (TABLE, BETTER), sums(), CPU) == BETTER
    cache.write(FOUND)
    tuner.forget()
    with tuning.autotune(timer=refuse):
        assert tuning.choose(QUESTION, (TABLE, BETTER), sums(), CPU) == BETTER


def test_a_hardly_faster_candidate_is_not_worth_it() -> None:
    assert choose(Clock(SECONDS | {BETTER: 1.99e-5})) == TABLE
    assert cache.read(QUESTION) == dataclasses.replace(FOUND, tiles=FOUND.table, seconds=2e-5)


def test_the_median_of_rounds_counts() -> None:
    class Jumpy(Clock):
        def __call__(self, trial: tuning.Trial[Any]) -> float:
            first = trial.tiles not in self.timed
            return super().__call__(trial) * (100 if first and trial.tiles == BETTER else 1)

    assert choose(Jumpy(SECONDS)) == BETTER


@pytest.mark.parametrize("wrong", [1.0, float("nan"), float("inf")])
def test_a_candidate_with_other_results_is_refused(wrong: float) -> None:
    def spoil(tiles: Tiles, out: Tensor) -> None:
        if tiles == BETTER:
            out += wrong

    clock = Clock(SECONDS)
    with pytest.warns(cache.TuningWarning, match="gave other results.*32"):
        assert choose(clock, prepare=sums(spoil)) == TABLE
    assert BETTER not in clock.timed
    found = cache.read(QUESTION)
    assert found is not None
    assert (found.tried, found.refused) == (3, 1)


def test_a_candidate_that_does_not_run_is_refused() -> None:
    def spoil(tiles: Tiles, _out: Tensor) -> None:
        if tiles == BETTER:
            raise RuntimeError("out of shared memory")

    with pytest.warns(cache.TuningWarning, match="did not run.*out of shared memory"):
        assert choose(Clock(SECONDS), prepare=sums(spoil)) == TABLE


def test_without_the_tables_results_nothing_is_compared(folder: Path) -> None:
    def spoil(tiles: Tiles, _out: Tensor) -> None:
        if tiles == TABLE:
            raise RuntimeError("no")

    with pytest.warns(cache.TuningWarning, match="did not run"):
        assert choose(Clock(SECONDS), prepare=sums(spoil)) == TABLE
    assert not folder.exists()


def test_results_agree_up_to_roundings_of_sums() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = x.to(dtype)
        eps = torch.finfo(dtype).eps
        assert agree([y * (1 + eps)], [y])
        assert not agree([y + 0.1], [y])
        assert not agree([torch.zeros_like(y)], [y])
        assert not agree([y[:1]], [y])
    odd = x.clone()
    odd[0, 0], odd[0, 1] = float("nan"), float("inf")
    assert agree([odd], [odd.clone()])
    assert not agree([x], [odd])
    assert not agree([odd], [x])
    assert not agree([], [x])


# ---- when nothing may be timed


def test_under_capture_the_table_or_what_is_known(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(timer, "capturing", lambda _device: True)
    prepared: list[int] = []
    clock = Clock(SECONDS)
    assert choose(clock, prepare=lambda: prepared.append(1)) == TABLE
    assert not clock.timed
    assert not prepared
    assert not folder.exists()
    # The answer of a capture stays, so that what it recorded and what runs beside it are cut alike.
    monkeypatch.setattr(timer, "capturing", lambda _device: False)
    with tuning.autotune(timer=clock):
        assert tuning.choose(QUESTION, (TABLE, BETTER), sums(), CPU) == TABLE
    monkeypatch.setattr(timer, "capturing", lambda _device: True)
    cache.write(FOUND)
    assert choose(clock) == BETTER
    assert not clock.timed


def test_the_devices_clock_is_the_median_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With events that count milliseconds: a run takes one, the third and the fourth take 50."""
    now, runs = [0.0], [0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def run() -> None:
        runs[0] += 1
        now[0] += 50.0 if runs[0] in (3, 4) else 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(timer, "_FLUSHED", 16)
    timer.release()
    assert timer.device_seconds(tuning.Trial(TABLE, CPU, run, list)) == pytest.approx(1e-3)
    assert runs[0] == timer._RUNS
    timer.release()


def test_a_cpu_is_not_captured() -> None:
    assert not timer.capturing(CPU)


def test_without_a_clock_the_table(folder: Path) -> None:
    cache.write(FOUND)
    assert choose(None) == TABLE
    assert choose(Clock(SECONDS)) == BETTER


def test_off_by_default_and_within_autotune_false() -> None:
    assert not tuning.enabled()
    with tuning.autotune():
        assert tuning.enabled()
        with tuning.autotune(False):
            assert not tuning.enabled()
        assert tuning.enabled()
    assert not tuning.enabled()


def test_the_environment_switches_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(switch.VARIABLE, value)
        assert switch.from_environment() == on
    monkeypatch.setenv(switch.VARIABLE, "yes")
    with pytest.raises(ValueError, match="FLMOE_AUTOTUNE: expected 0 or 1, got 'yes'"):
        switch.from_environment()
    code = "from flmoe_kernels import tuning; print(tuning.enabled())"
    assert python(code, FLMOE_AUTOTUNE="1").stdout.strip() == "True"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---- files


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
from test_tuning import BETTER, CPU, QUESTION, TABLE, refuse, sums
from flmoe_kernels import tuning
with tuning.autotune(timer=refuse):
    print(tuning.choose(QUESTION, (TABLE, BETTER), sums(), CPU) == BETTER)
"""
    result = python(f"import os; os.chdir({str(ROOT)!r})\n{code}")
    assert result.stdout.strip() == "True", result.stderr
