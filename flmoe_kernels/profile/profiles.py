"""Measurements of the command `profile`: time, rates, share of the limit, stages, memory.

A subject is a call that can be prepared repeatedly: a contestant of a case, or a user's own layer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cases import dtype_name
from .ceilings import Ceilings
from .costs import Cost
from .registry import words_of
from .stages import WARMUP, Breakdown, traced
from .timing import LEAST_BLOCKS, Call, Clock, Spread, clock_for, measure_blocks

# Timing ends early once the interval of the median is this narrow.
PRECISION = 0.01
# Seconds after which slow calls are timed less often, and the same in units of `seconds`.
LEAST_LIMIT, LIMIT_FACTOR = 120.0, 24.0
TRACED_CALLS = 3
SLOW = 1.0  # calls that take longer are traced once
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
        peak_bytes: None if not measured.
        ratio: time relative to the first subject; None for the first.
        notes: what was not measured or less often, and why.
    """

    subject: Subject
    spread: Spread
    ceilings: Ceilings
    breakdown: Breakdown
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
            "breakdown": dataclasses.asdict(self.breakdown),
            "notes": list(self.notes),
        }


def profile_subjects(
    subjects: Sequence[Subject],
    ceilings: Ceilings,
    seconds: float,
    *,
    trace: Path | None = None,
    clock: Clock | None = None,
    now: Callable[[], float] = time.monotonic,
    tell: Tell = lambda message: None,
) -> list[Profile]:
    """Profile subjects that do the same thing, in turn; the others are compared with the first.

    Args:
        ceilings: measured, include the subjects' dtype.
        seconds: of timing per subject; slow calls take longer.
        trace: file for the Chrome trace of the first subject.
        clock, now: replacements for the device's clock and the real time.
        tell: reports the next step.
    """
    names = [subject.contestant for subject in subjects]
    if len(set(names)) < len(names):
        raise ValueError(f"subjects: expected different contestants, got {names}")
    tell(f"{subjects[0].what}: timing {', '.join(names)}")
    blocks = measure_blocks(
        lambda: {subject.contestant: subject.prepare() for subject in subjects},
        clock_for(subjects[0].device) if clock is None else ("given", clock),
        rounds=1,
        precision=PRECISION,
        seconds=seconds * len(subjects),
        limit=max(LEAST_LIMIT, LIMIT_FACTOR * seconds),
        now=now,
    )
    profiles = []
    for subject in subjects:
        name, first = subject.contestant, subject is subjects[0]
        spread = blocks.of(name)
        notes = []
        if spread.blocks < LEAST_BLOCKS:
            calls = "a single call" if spread.rounds == 1 else f"{spread.rounds} calls"
            notes.append(f"time: from {calls}, because they are slow")
        tell(f"{subject.what}: tracing {name}")
        slow = spread.median > SLOW
        breakdown = traced(
            subject.prepare(),
            subject.device,
            calls=1 if slow else TRACED_CALLS,
            warmup=1 if slow else WARMUP,
            trace=trace if first else None,
        )
        peak = _peak_of(subject, notes, tell)
        ratio = None if first else blocks.pair(names[0], name).ratio
        profiles.append(Profile(subject, spread, ceilings, breakdown, peak, ratio, tuple(notes)))
    return profiles


def _peak_of(subject: Subject, notes: list[str], tell: Tell) -> int | None:
    """Measure the peak; None if this fails, so that the finished timing is kept."""
    if subject.peak is None:
        return None
    tell(f"{subject.what}: memory of {subject.contestant}")
    try:
        return subject.peak()
    except RuntimeError as error:
        notes.append(f"memory: not measured: {words_of(error)}")
        return None
