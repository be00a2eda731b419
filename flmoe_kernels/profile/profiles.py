"""Measurements of the command `profile`: time, rates, share of the limit, stages, memory.

A subject is a call that can be made anew: a contestant of a case, or a user's own layer. Its Profile has plain
values, which `output` shows and writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import dtype_name
from .ceilings import Ceilings
from .costs import Cost
from .registry import words_of
from .stages import Breakdown
from .timing import Blocks, Clock, Spread, clock_for, measure_blocks
from .trace import traced

Call = Callable[[], Any]
# Timing ends early once the interval of the median is this narrow.
PRECISION = 0.01


@dataclass(frozen=True)
class Subject:
    """A call to profile.

    Attributes:
        what: name of the case, the same for subjects that are compared.
        contestant, kind, version: see `registry.Contestant`.
        dtype: of the call's tensors. device: "cpu", "cuda" or "cuda:N".
        cost: FLOP and bytes of one call.
        prepare: makes inputs and returns one call.
        peak: measures the bytes that a call needs beyond its inputs (None where the system does not report them);
            None for no measurement.
    """

    what: str
    contestant: str
    kind: str
    version: str
    dtype: torch.dtype
    device: str
    cost: Cost
    prepare: Callable[[], Call]
    peak: Callable[[], int | None] | None


@dataclass(frozen=True)
class Effort:
    """Seconds of timing for each subject, calls under the profiler, repetitions of all timing."""

    seconds: float = 10.0
    calls: int = 3
    repeat: int = 1

    def __post_init__(self) -> None:
        for name in ("calls", "repeat"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")


@dataclass(frozen=True)
class Profile:
    """Measurements of one subject.

    Attributes:
        spread: the timing, over the blocks of all repetitions.
        runs: the timing of each repetition.
        matmul, copy: measured ceilings: FLOP/s of a large matrix product in this dtype, bytes/s of a large copy.
        least: least seconds that the ceilings allow; limit: which of them sets it.
        ratio: time over that of the first subject, median with its interval; None for the first.
    """

    what: str
    contestant: str
    kind: str
    version: str
    dtype: str
    device: str
    spread: Spread
    runs: tuple[Spread, ...]
    flop: int
    bytes: int
    matmul: float
    copy: float
    least: float
    limit: str
    peak_bytes: int | None
    breakdown: Breakdown
    ratio: tuple[float, float, float] | None

    @property
    def agrees(self) -> bool:
        """Whether all repetitions agree within their intervals."""
        return all(one.agrees(other) for one in self.runs for other in self.runs)

    @property
    def share(self) -> float:
        """The least time over the median: 1 is the limit, 0.1 is ten times as slow."""
        return self.least / self.spread.median

    @property
    def flops_per_second(self) -> float:
        return self.flop / self.spread.median

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.spread.median

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = dataclasses.asdict(self)
        return found | {
            "agrees": self.agrees,
            "share_of_limit": self.share,
            "flops_per_second": self.flops_per_second,
            "bytes_per_second": self.bytes_per_second,
        }


def profile_subjects(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    effort: Effort,
    *,
    trace: Path | None = None,
    clock: Clock | None = None,
    tell: Callable[[str], None] = lambda message: None,
) -> list[Profile]:
    """Profile subjects that do the same thing, in turns, the first being what the others are compared with.

    Args:
        ceilings: measured, with the subjects' dtype among them.
        trace: where to write the Chrome trace of the first subject.
        clock: makes a call and tells its seconds, in place of the device's.
        tell: is told what is done next.
    """
    names = [subject.contestant for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"subjects: expected different contestants, got {names}")
    timed = clock_for(subjects[0].device) if clock is None else ("given", clock)
    runs = []
    for number in range(effort.repeat):
        tell(f"timing {', '.join(names)}" + (f", run {number + 1}" if effort.repeat > 1 else ""))
        runs.append(time_subjects(subjects, timed, effort.seconds))
    every = Blocks(timed[0], [block for run in runs for block in run.seconds])
    found = []
    for number, subject in enumerate(subjects):
        name = subject.contestant
        tell(f"tracing {name}")
        path = trace if number == 0 else None
        breakdown = traced(subject.prepare(), subject.device, calls=effort.calls, trace=path)
        peak = _peak_of(subject, tell)
        spreads = tuple(run.of(name) for run in runs)
        ratio = None
        if number:
            paired = every.pair(names[0], name).ratio
            ratio = (paired.median, paired.low, paired.high)
        found.append(_profile(subject, every.of(name), spreads, ceilings, breakdown, ratio, peak))
    return found


def time_subjects(subjects: Sequence[Subject], clock: tuple[str, Clock], seconds: float) -> Blocks:
    """Time subjects in turn, for at most `seconds` each."""
    return measure_blocks(
        lambda: {subject.contestant: subject.prepare() for subject in subjects},
        clock,
        rounds=1,
        precision=PRECISION,
        seconds=seconds * len(subjects),
    )


def _peak_of(subject: Subject, tell: Callable[[str], None]) -> int | None:
    """None as well where measuring fails: the timing, which is done by then, is not lost for it."""
    if subject.peak is None:
        return None
    tell(f"memory of {subject.contestant}")
    try:
        return subject.peak()
    except RuntimeError as error:
        tell(f"memory of {subject.contestant} was not measured: {words_of(error)}")
        return None


def _profile(
    subject: Subject,
    spread: Spread,
    runs: tuple[Spread, ...],
    ceilings: Ceilings,
    breakdown: Breakdown,
    ratio: tuple[float, float, float] | None,
    peak: int | None,
) -> Profile:
    least, limit = ceilings.roofline_seconds(subject.cost, subject.dtype)
    return Profile(
        spread=spread,
        what=subject.what,
        contestant=subject.contestant,
        kind=subject.kind,
        version=subject.version,
        dtype=dtype_name(subject.dtype),
        device=subject.device,
        runs=runs,
        flop=subject.cost.flop,
        bytes=subject.cost.bytes,
        matmul=ceilings.flops[dtype_name(subject.dtype)],
        copy=ceilings.bytes_per_second,
        least=least,
        limit=limit,
        peak_bytes=peak,
        breakdown=breakdown,
        ratio=ratio,
    )
