"""Timing calls in turn: seconds of every round, their quantiles, and ratios that a noisy machine does not bend.

`paired` builds on the same clocks for the gate: blocks of rounds on fresh inputs until an interval is narrow. Here
is the plain form for scripts and for scans over many sizes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .paired import device_seconds, wall_seconds
from .shapes import is_cuda
from .spread import median_interval

Call = Callable[[], Any]
Clock = Callable[[Call], float]
LEAST_ROUNDS = 3
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and the 20th and 80th percentile of `rounds` calls."""

    p50: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Ratio:
    """Seconds of a peer over seconds of ours: the median of the rounds' ratios.

    The true median lies from low to high with probability `confidence`, whatever the distribution of times: at
    least 95% from six rounds on, less of fewer.
    """

    p50: float
    low: float
    high: float
    confidence: float
    rounds: int


def timing_of(seconds: Sequence[float]) -> Timing:
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], len(seconds))
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[3], len(seconds))


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Of rounds that timed both, one right after the other.

    Raises:
        ValueError: other numbers of rounds.
    """
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    return Ratio(statistics.median(ratios), *median_interval(ratios), len(ratios))


def clock_of(device: str) -> Clock:
    """Events on the device's stream, after all that was launched before; the wall clock elsewhere."""
    if not is_cuda(device):
        return wall_seconds

    def clock(call: Call) -> float:
        # Events belong to the current device, which need not be the one that is timed.
        with torch.cuda.device(device):
            return device_seconds(call)

    return clock


def interleave(
    calls: Mapping[str, Call],
    rounds: int | None = None,
    *,
    seconds: float | None = None,
    device: str = "cpu",
    warmup: int = 1,
    clock: Clock | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float]]:
    """Seconds of every round of every call; the calls take turns, another one first in each round.

    So a noisy moment of the machine meets all of them.

    Args:
        rounds: how many; None for as many as fit into `seconds`, from LEAST_ROUNDS to MOST_ROUNDS.
        device: of what the calls compute on, for the clock.
        warmup: untimed rounds before, which load, compile and allocate.
        clock: makes a call and tells how long it took, in place of the device's.
        now: what `seconds` are counted by.

    Raises:
        ValueError: neither rounds nor seconds, or both.
    """
    if (rounds is None) == (seconds is None):
        raise ValueError(f"rounds or seconds: expected one of them, got {rounds} and {seconds}")
    timed = clock or clock_of(device)
    for _ in range(warmup):
        for call in calls.values():
            timed(call)
    found: dict[str, list[float]] = {name: [] for name in calls}
    names, start, done = list(calls), now(), 0
    while True:
        first = done % len(names)
        for name in (*names[first:], *names[:first]):
            found[name].append(timed(calls[name]))
        done += 1
        if rounds is not None and done >= rounds:
            return found
        over = seconds is not None and (now() - start >= seconds or done >= MOST_ROUNDS)
        if over and done >= LEAST_ROUNDS:
            return found


def timings(samples: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    return {name: timing_of(values) for name, values in samples.items()}
