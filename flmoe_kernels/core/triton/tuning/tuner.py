"""The choice among candidate configurations of a kernel: by file, or by time on the inputs of a call."""

from __future__ import annotations

import dataclasses
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import cache, timer
from .finding import Finding, Question, Tiles
from .switch import Timer, given_timer
from .trial import Trial, agree

Configuration = TypeVar("Configuration")

# Rounds over all candidates, so that a drifting clock drifts for each; and by how much the table must be beaten:
# less is noise.
_ROUNDS, _WORTH = 3, 0.98

# One answer for the life of a process: launches and the buffers between them are cut by the same configuration.
_answers: dict[Question, Any] = {}
_lock = threading.RLock()


def choose(
    question: Question,
    candidates: Sequence[Configuration],
    prepare: Callable[[], Callable[[Configuration], Trial[Configuration]]],
    device: torch.device,
) -> Configuration:
    """The fastest of `candidates`, frozen dataclasses of numbers, of which the first is the launch table's.

    It is the table's where nothing is known and nothing can be timed: without a device, under capture, and where
    memory does not suffice. That answer too stays for the life of the process. `prepare` makes what all trials
    share, where there is something to time, and returns what makes one.
    """
    with _lock:
        if question not in _answers:
            _answers[question] = _find(question, candidates, prepare, device)
        answer: Configuration = _answers[question]
        return answer


def forget() -> None:
    """Ask anew: of files, and then of the clock."""
    with _lock:
        _answers.clear()


def described(configuration: Any) -> Tiles:
    """The whole numbers of a configuration by name."""
    values = dataclasses.asdict(configuration)
    return {name: value for name, value in values.items() if isinstance(value, int)}


def _find(
    question: Question,
    candidates: Sequence[Configuration],
    prepare: Callable[[], Callable[[Configuration], Trial[Configuration]]],
    device: torch.device,
) -> Configuration:
    clock = given_timer() or (timer.device_seconds if device.type == "cuda" else None)
    if clock is None or device.type == "meta":
        return candidates[0]
    known = cache.read(question)
    if known is not None:
        # Only what the candidates hold: a file decides among launches that this version would try.
        for candidate in candidates:
            if described(candidate) == known.tiles:
                return candidate
    if timer.capturing(device):
        return candidates[0]
    try:
        best, finding = _fastest(question, candidates, prepare(), clock)
    except torch.cuda.OutOfMemoryError as error:
        # The call itself may well fit: trials need memory beside it.
        _warn(question, f"not tuned: {error}")
        return candidates[0]
    finally:
        timer.release()
    if finding is not None:
        cache.write(finding)
    return best


def _fastest(
    question: Question,
    candidates: Sequence[Configuration],
    make: Callable[[Configuration], Trial[Configuration]],
    clock: Timer,
) -> tuple[Configuration, Finding | None]:
    trials: list[Trial[Configuration]] = []
    wanted: list[Tensor] = []
    for candidate in candidates:
        trial = _sound(question, make, candidate, wanted)
        if trial is not None:
            trials.append(trial)
        elif not trials:
            # Without the table's own results there is nothing to compare with.
            return candidates[0], None
    rounds = [[clock(trial) for trial in trials] for _ in range(_ROUNDS)]
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    best = min(range(len(trials)), key=seconds.__getitem__)
    if seconds[best] > _WORTH * seconds[0]:
        best = 0
    finding = Finding(
        question,
        described(trials[best].tiles),
        seconds[best],
        described(candidates[0]),
        seconds[0],
        len(candidates),
        len(candidates) - len(trials),
    )
    return trials[best].tiles, finding


def _sound(
    question: Question,
    make: Callable[[Configuration], Trial[Configuration]],
    candidate: Configuration,
    wanted: list[Tensor],
) -> Trial[Configuration] | None:
    """The trial of a candidate that compiles, runs and agrees with `wanted`, which the first one fills."""
    try:
        trial = make(candidate)
        trial.run_afresh()
        results = list(trial.results())
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        # Whatever the compiler or the driver says of a configuration: too many registers, too much memory.
        _warn(question, f"a candidate did not run: {described(candidate)}: {error}")
        return None
    if not wanted:
        wanted.extend(result.clone() for result in results)
    elif not agree(results, wanted):
        _warn(question, f"a candidate gave other results: {described(candidate)}")
        return None
    return trial


def _warn(question: Question, message: str) -> None:
    warnings.warn(f"{question.kernel}: {message}", cache.TuningWarning, stacklevel=3)
