"""Choice of a kernel's configuration by timing, once per process."""

from __future__ import annotations

import dataclasses
import functools
import platform
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from flmoe_kernels.core.settings import ScopedSetting, environment_choice

from . import timing
from .timing import Timer, Trial

Configuration = TypeVar("Configuration")
Make = Callable[[Configuration], Trial[Configuration]]

VARIABLE = "FLMOE_AUTOTUNE"
# Number of rounds over all candidates, so that clock drift affects all of them; and the fraction of the table's
# time that a candidate must beat, because smaller gains are noise.
_ROUNDS, _WORTH = 3, 0.98


class TuningWarning(UserWarning):
    """A candidate or a kernel cannot be tuned; the call continues without."""


@dataclasses.dataclass(frozen=True, order=True)
class TuningKey:
    """The properties that calls must have in common to share a configuration.

    kernel: "pair_moe.accumulate"; kind: its class in the launch table; dtype: "bfloat16"; sizes: names and
    numbers, some rounded to a bucket; device: its name.
    """

    kernel: str
    kind: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    device: str


def enabled_by_environment() -> bool:
    return environment_choice(VARIABLE, ("0", "1")) == "1"


@dataclasses.dataclass(frozen=True)
class _Setting:
    enabled: bool
    timer: Timer | None


_setting = ScopedSetting(_Setting(enabled_by_environment(), None))


def enabled() -> bool:
    return _setting.get().enabled


def given_timer() -> Timer | None:
    """The timer that was passed to `autotune`, or None."""
    return _setting.get().timer


@contextmanager
def autotune(enabled: bool = True, *, timer: Timer | None = None) -> Iterator[None]:
    """Within the `with` block, in all threads, every Triton kernel runs its fastest configuration.

    The first call of a kernel with a new class, dtype, size and device times the candidates on its own inputs,
    which synchronizes with the device, and keeps the fastest for the process. During CUDA graph capture nothing is
    timed: a call uses an earlier choice or the launch table. Without autotune and without FLMOE_AUTOTUNE=1, all
    calls use the launch table. The choice may change the order of sums, and so the last bits of results.

    Args:
        enabled: False disables a surrounding autotune or FLMOE_AUTOTUNE=1.
        timer: runs a trial at least once and returns its seconds; by default CUDA events on the trial's device.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {enabled!r}")
    with _setting.override(_Setting(enabled, timer)):
        yield


def bucket(size: int) -> int:
    """The next power of two, shared by all sizes up to it; 0 for 0."""
    return 1 << (size - 1).bit_length() if size else 0


def tuning_key(
    kernel: str, kind: str, dtype: torch.dtype, device: torch.device, **sizes: int
) -> TuningKey:
    """The key of one kernel of a call; sizes are buckets or exact."""
    dtype_name = str(dtype).removeprefix("torch.")
    return TuningKey(kernel, kind, dtype_name, tuple(sizes.items()), _device_name(device))


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    return _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_name(index: int) -> str:
    return str(torch.cuda.get_device_name(index))


# One choice per process: launches and the buffers between them must use the same configuration.
_choices: dict[TuningKey, Any] = {}
_choices_lock = threading.RLock()


def choose(
    key: TuningKey,
    candidates: Sequence[Configuration],
    prepare: Callable[[], Make[Configuration]],
    device: torch.device,
) -> Configuration:
    """The fastest of `candidates`, frozen dataclasses of integers; the first is that of the launch table.

    Returns the first if timing is impossible: no GPU, CUDA graph capture, too little memory.
    The choice is kept for the process. `prepare` is only called for timing: it allocates the shared buffers and
    returns the function that makes a trial.
    """
    with _choices_lock:
        if key not in _choices:
            _choices[key] = _find(key, candidates, prepare, device)
        choice: Configuration = _choices[key]
        return choice


def forget() -> None:
    """Clear the choices of this process, so that the next calls time again."""
    with _choices_lock:
        _choices.clear()


def _find(
    key: TuningKey,
    candidates: Sequence[Configuration],
    prepare: Callable[[], Make[Configuration]],
    device: torch.device,
) -> Configuration:
    timer = given_timer() or (timing.device_seconds if device.type == "cuda" else None)
    if timer is None or device.type == "meta" or timing.capturing(device):
        return candidates[0]
    try:
        return _fastest(key, candidates, prepare(), timer)
    except torch.cuda.OutOfMemoryError as error:
        # The call itself may fit into memory: trials need additional memory.
        _warn(key, f"not tuned: {error}")
        return candidates[0]
    finally:
        timing.release()


def _fastest(
    key: TuningKey,
    candidates: Sequence[Configuration],
    make: Make[Configuration],
    timer: Timer,
) -> Configuration:
    trials: list[Trial[Configuration]] = []
    expected: list[Tensor] = []
    for candidate in candidates:
        trial = _checked(key, make, candidate, expected)
        if trial is not None:
            trials.append(trial)
        elif not trials:
            # Without the results of the table's configuration there is nothing to compare with.
            return candidates[0]
    rounds = [[timer(trial) for trial in trials] for _ in range(_ROUNDS)]
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    best = min(range(len(trials)), key=seconds.__getitem__)
    return trials[best if seconds[best] <= _WORTH * seconds[0] else 0].tiles


def _checked(
    key: TuningKey,
    make: Make[Configuration],
    candidate: Configuration,
    expected: list[Tensor],
) -> Trial[Configuration] | None:
    """The trial of a candidate that compiles, runs and agrees with `expected`, which the first candidate fills."""
    try:
        trial = make(candidate)
        results = trial.run_afresh()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        # The compiler or the driver may reject a configuration: too many registers, too much shared memory.
        _warn(key, f"a candidate did not run: {candidate}: {error}")
        return None
    if not expected:
        expected.extend(result.clone() for result in results)
    elif not timing.agree(results, expected):
        _warn(key, f"a candidate gave different results: {candidate}")
        return None
    return trial


def _warn(key: TuningKey, message: str) -> None:
    warnings.warn(f"{key.kernel}: {message}", TuningWarning, stacklevel=3)
