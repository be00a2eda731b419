"""Measurements of the command `profile`: time, rates, share of the limit, stages, memory.

A subject is a call that can be prepared repeatedly: a contestant of a case, or a user's own layer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cases import dtype_name
from .ceilings import Ceilings
from .costs import Cost
from .registry import words_of
from .stages import WARMUP, Breakdown, traced
from .timing import LEAST_BLOCKS, Blocks, Call, Clock, Spread, clock_for, measure_blocks

# Timing ends early once the interval of the median is this narrow.
PRECISION = 0.01
# Seconds that a command may take, if it has slow calls, and the same in units of `seconds`.
LEAST_LIMIT, LIMIT_FACTOR = 120.0, 24.0
# Measurements that take no longer are made even after the limit.
QUICK = 1.0
TRACED_CALLS = 3
BECAUSE = "because of the time limit, which a larger --seconds raises"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Limit:
    """Time limit: slow calls are measured less often, and what does not fit is left out and reported."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.now())

    @classmethod
    def of(cls, seconds: float) -> Limit:
        """The limit of a command that times every implementation for `seconds`."""
        return cls(max(LEAST_LIMIT, LIMIT_FACTOR * seconds))

    def left(self) -> float:
        return max(0.0, self.start + self.seconds - self.now())

    def part(self, count: int) -> Limit:
        """The limit of the next of `count` measurements of equal importance."""
        return Limit(self.left() / count, self.now)

    def allows(self, seconds: float) -> bool:
        return seconds <= max(QUICK, self.left())


@dataclass(frozen=True)
class Subject:
    """A call to profile.

    Attributes:
        what: name of the case, the same for subjects that are compared.
        contestant, kind, version: see `registry.Contestant`.
        dtype: of the call's tensors. device: "cpu", "cuda" or "cuda:N".
        cost: FLOP and bytes of one call.
        prepare: makes inputs and returns one call.
        peak: measures the bytes that a call needs beyond its inputs (None if the system does not report them);
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
class Profile:
    """Measurements of one subject.

    Attributes:
        ceilings: include the subject's dtype.
        breakdown, peak_bytes: None if not measured.
        ratio: time relative to the first subject; None for the first.
        notes: what was not measured or less often, and why.
    """

    subject: Subject
    spread: Spread
    ceilings: Ceilings
    breakdown: Breakdown | None
    peak_bytes: int | None
    ratio: Spread | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON.

        matmul, copy: FLOP/s of a large matrix product in this dtype, bytes/s of a large copy. least: minimum
        seconds according to the ceilings; limit: name of the limiting ceiling; share_of_limit: 1 at the limit, 0.1
        for a call that takes ten times as long.
        """
        subject, seconds = self.subject, self.spread.median
        least, limit = self.ceilings.roofline_seconds(subject.cost, subject.dtype)
        return {
            "what": subject.what,
            "contestant": subject.contestant,
            "kind": subject.kind,
            "version": subject.version,
            "dtype": dtype_name(subject.dtype),
            "device": subject.device,
            "spread": dataclasses.asdict(self.spread),
            "ratio": None if self.ratio is None else dataclasses.asdict(self.ratio),
            "flop": subject.cost.flop,
            "bytes": subject.cost.bytes,
            "flops_per_second": subject.cost.flop / seconds,
            "bytes_per_second": subject.cost.bytes / seconds,
            "matmul": self.ceilings.flops[dtype_name(subject.dtype)],
            "copy": self.ceilings.bytes_per_second,
            "least": least,
            "limit": limit,
            "share_of_limit": least / seconds,
            "peak_bytes": self.peak_bytes,
            "breakdown": None if self.breakdown is None else dataclasses.asdict(self.breakdown),
            "notes": list(self.notes),
        }


def profile_subjects(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    seconds: float,
    *,
    limit: Limit | None = None,
    trace: Path | None = None,
    clock: Clock | None = None,
    tell: Tell = lambda message: None,
) -> list[Profile]:
    """Profile subjects that do the same thing, in turn; the others are compared with the first.

    Args:
        ceilings: measured, include the subjects' dtype.
        seconds: of timing per subject.
        limit: of all measurements; default: `Limit.of(seconds)`.
        trace: file for the Chrome trace of the first subject.
        clock: replaces the device's clock.
        tell: reports the next step.
    """
    names = [subject.contestant for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"subjects: expected different contestants, got {names}")
    limit = limit or Limit.of(seconds)
    tell(f"{subjects[0].what}: timing {', '.join(names)}")
    # Timing may use half of the limit; stages and memory share the other half.
    most = max(seconds * len(subjects), limit.left() / 2)
    blocks = time_subjects(subjects, seconds, clock, most, limit.now)
    profiles = []
    for number, subject in enumerate(subjects):
        name, first = subject.contestant, number == 0
        spread = blocks.of(name)
        own = limit.part(len(subjects) - number)
        notes = []
        if spread.blocks < LEAST_BLOCKS:
            calls = "a single call" if spread.rounds == 1 else f"{spread.rounds} calls"
            notes.append(f"time: from {calls}, {BECAUSE}")
        breakdown = _breakdown_of(
            subject, spread.median, trace if first else None, own, notes, tell
        )
        peak = _peak_of(subject, spread.median, own, notes, tell)
        ratio = None if first else blocks.pair(names[0], name).ratio
        profiles.append(Profile(subject, spread, ceilings, breakdown, peak, ratio, tuple(notes)))
    return profiles


def _breakdown_of(
    subject: Subject,
    seconds: float,
    trace: Path | None,
    limit: Limit,
    notes: list[str],
    tell: Tell,
) -> Breakdown | None:
    """Trace a call that takes `seconds`: TRACED_CALLS times, or once, or, without a trace file, not at all."""
    calls, warmup = TRACED_CALLS, WARMUP
    if not limit.allows(2 * (calls + warmup) * seconds):  # the other half is for the memory
        calls, warmup = 1, 1
    if trace is None and not limit.allows((calls + warmup) * seconds):
        notes.append(f"stages: not measured, {BECAUSE}")
        return None
    tell(f"{subject.what}: tracing {subject.contestant}")
    return traced(subject.prepare(), subject.device, calls=calls, warmup=warmup, trace=trace)


def time_subjects(
    subjects: Sequence[Subject],
    seconds: float,
    clock: Clock | None = None,
    limit: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Blocks:
    """Time subjects in turn, for at most `seconds` each; slow subjects for at most `limit` seconds in total, by
    default twice as long."""
    return measure_blocks(
        lambda: {subject.contestant: subject.prepare() for subject in subjects},
        clock_for(subjects[0].device) if clock is None else ("given", clock),
        rounds=1,
        precision=PRECISION,
        seconds=seconds * len(subjects),
        limit=2 * seconds * len(subjects) if limit is None else limit,
        now=now,
    )


def _peak_of(
    subject: Subject, seconds: float, limit: Limit, notes: list[str], tell: Tell
) -> int | None:
    """Measure the peak; None if this fails or takes too long, so that the finished timing is kept."""
    if subject.peak is None:
        return None
    if not limit.allows(2 * seconds):
        notes.append(f"memory: not measured, {BECAUSE}")
        return None
    tell(f"{subject.what}: memory of {subject.contestant}")
    try:
        return subject.peak()
    except RuntimeError as error:
        notes.append(f"memory: not measured: {words_of(error)}")
        return None
