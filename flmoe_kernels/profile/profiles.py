"""One thing under the profiler: how fast it is here, how far from the limit, where its time goes.

A subject is a call that can be made anew: a contestant of a case of the registry, or a user's own layer. What is
found of it is a Profile of plain values; `profile_output` shows and writes them.
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
from .failures import words_of
from .measure import Clock, clock_of
from .spread import BLOCKS, Spread, ratio_of, spread_of, timed_blocks
from .stages import Breakdown
from .trace import traced

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """What is profiled.

    Attributes:
        what: the case's name, the same for all that are compared with one another.
        contestant, kind, version: who computes, see `prepared.Contestant`.
        dtype: of the call's tensors. device: "cpu", "cuda" or "cuda:N".
        cost: what one call must do.
        prepare: makes inputs and returns one call.
        peak: measures the bytes that a call needs beyond its inputs, or tells None where the system does not
            say; None for no measurement.
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
    """How much is measured: seconds and blocks of timing, calls under the profiler, repetitions of all timing."""

    seconds: float = 10.0
    blocks: int = BLOCKS
    calls: int = 3
    repeat: int = 1

    def __post_init__(self) -> None:
        for name, least in (("blocks", 1), ("calls", 1), ("repeat", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: expected {least} at least, got {value}")
        if not self.seconds > 0:
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")


@dataclass(frozen=True)
class Profile:
    """What was found of one subject.

    Attributes:
        spread: the timing, over the blocks of all repetitions.
        runs: the timing of each repetition.
        matmul, copy: measured ceilings: FLOP/s of a large matrix product in this dtype, bytes/s of a large copy.
        least: seconds that the ceilings allow at best, and `limit` which of them it comes from.
        ratio: median time over that of the first subject, with its interval; None for the first.
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
    clock = clock or clock_of(subjects[0].device)
    timings = []
    for number in range(effort.repeat):
        tell(f"timing {', '.join(names)}" + (f", run {number + 1}" if effort.repeat > 1 else ""))
        timings.append(
            timed_blocks(
                {subject.contestant: subject.prepare for subject in subjects},
                clock,
                seconds=effort.seconds * len(subjects),
                blocks=effort.blocks,
            )
        )
    every = {name: [block for timing in timings for block in timing[name]] for name in names}
    found = []
    for number, subject in enumerate(subjects):
        tell(f"tracing {subject.contestant}")
        path = trace if number == 0 else None
        breakdown = traced(subject.prepare(), subject.device, calls=effort.calls, trace=path)
        peak = _peak_of(subject, tell)
        runs = tuple(spread_of(timing[subject.contestant]) for timing in timings)
        spread = spread_of(every[subject.contestant])
        ratio = ratio_of(every[subject.contestant], every[names[0]]) if number else None
        found.append(_profile(subject, spread, runs, ceilings, breakdown, ratio, peak))
    return found


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
