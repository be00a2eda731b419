"""Measurements of the command `profile`: time, rates, share of the limit, stages, memory.

A subject is a call that can be prepared repeatedly: a contestant of a case, or a user's own layer.
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
from .stages import Breakdown, traced
from .timing import Blocks, Call, Clock, Spread, clock_for, measure_blocks

# Timing ends early once the interval of the median is this narrow.
PRECISION = 0.01
Tell = Callable[[str], None]


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
        ratio: time relative to the first subject; None for the first.
    """

    subject: Subject
    spread: Spread
    ceilings: Ceilings
    breakdown: Breakdown
    peak_bytes: int | None
    ratio: Spread | None

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
            "breakdown": dataclasses.asdict(self.breakdown),
        }


def profile_subjects(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    seconds: float,
    *,
    calls: int = 3,
    trace: Path | None = None,
    clock: Clock | None = None,
    tell: Tell = lambda message: None,
) -> list[Profile]:
    """Profile subjects that do the same thing, in turn; the others are compared with the first.

    Args:
        ceilings: measured, include the subjects' dtype.
        seconds: of timing per subject.
        calls: number of calls under the profiler.
        trace: file for the Chrome trace of the first subject.
        clock: replaces the device's clock.
        tell: reports the next step.
    """
    names = [subject.contestant for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"subjects: expected different contestants, got {names}")
    tell(f"timing {', '.join(names)}")
    blocks = time_subjects(subjects, seconds, clock)
    profiles = []
    for subject in subjects:
        name, first = subject.contestant, subject is subjects[0]
        tell(f"tracing {name}")
        path = trace if first else None
        breakdown = traced(subject.prepare(), subject.device, calls=calls, trace=path)
        peak = _peak_of(subject, tell)
        ratio = None if first else blocks.pair(names[0], name).ratio
        profiles.append(Profile(subject, blocks.of(name), ceilings, breakdown, peak, ratio))
    return profiles


def time_subjects(
    subjects: Sequence[Subject], seconds: float, clock: Clock | None = None
) -> Blocks:
    """Time subjects in turn, for at most `seconds` each."""
    return measure_blocks(
        lambda: {subject.contestant: subject.prepare() for subject in subjects},
        clock_for(subjects[0].device) if clock is None else ("given", clock),
        rounds=1,
        precision=PRECISION,
        seconds=seconds * len(subjects),
    )


def _peak_of(subject: Subject, tell: Tell) -> int | None:
    """Measure the peak; None if this fails, so that the finished timing is kept."""
    if subject.peak is None:
        return None
    tell(f"memory of {subject.contestant}")
    try:
        return subject.peak()
    except RuntimeError as error:
        tell(f"memory of {subject.contestant} was not measured: {words_of(error)}")
        return None
