"""Measurements of the command `profile`: time, rates, share of the limit, stages, memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flmoe_gate.timing import LEAST_BLOCKS, Clock, Spread, clock_for, measure_blocks
from flmoe_kernels.core.dtypes import dtype_name

from .cases import Case
from .ceilings import MATMUL, MEMORY, Ceilings
from .memory import peak_bytes
from .registry import Contestant, prepare, words_of
from .stages import WARMUP, Breakdown, Stage, traced
from .work import Cost, cost

# Timing ends early once the interval of the median is this narrow.
PRECISION = 0.01
# Time limit of timing: LEAST_LIMIT seconds, or LIMIT_FACTOR * `seconds` if that is more.
LEAST_LIMIT, LIMIT_FACTOR = 120.0, 24.0
TRACED_CALLS = 3
# Names for the limit that gives the minimum time of a stage; HOST: a stage without counted work.
BOUNDS, HOST = {MATMUL: "compute", MEMORY: "memory"}, "host"
HOST_BOUND = 0.2  # a call with a larger share of such stages is bound by the host
SLOW = 1.0  # calls that take longer are traced once
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Profile:
    """Measurements of a contestant.

    Attributes:
        ceilings: include the case's dtype.
        peak_bytes: None if not measured.
        ratio: time relative to the first contestant; None for the first.
        notes: what was not measured or less often, and why.
    """

    case: Case
    contestant: Contestant
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
        for a call that takes ten times as long. bound: compute, memory, exponentials or host; the stages have the
        same entries.
        """
        case, work, seconds = self.case, cost(self.case), self.spread.median
        least, limit = self.ceilings.roofline_seconds(work, case.dtype)
        stages = [self._rated(stage) for stage in self.breakdown.stages]
        waiting = sum(stage["share"] for stage in stages if stage["bound"] == HOST)
        return {
            "what": case.name,
            "contestant": self.contestant.name,
            "kind": self.contestant.kind,
            "version": self.contestant.version,
            "dtype": dtype_name(case.dtype),
            "device": case.device,
            "spread": dataclasses.asdict(self.spread),
            "ratio": None if self.ratio is None else dataclasses.asdict(self.ratio),
            "flop": work.flop,
            "bytes": work.bytes,
            "flops_per_second": work.flop / seconds,
            "bytes_per_second": work.bytes / seconds,
            "matmul": self.ceilings.flops[dtype_name(case.dtype)],
            "copy": self.ceilings.bytes_per_second,
            "least": least,
            "limit": limit,
            "share_of_limit": least / seconds,
            "bound": HOST if waiting > HOST_BOUND else BOUNDS.get(limit, limit),
            "peak_bytes": self.peak_bytes,
            "breakdown": dataclasses.asdict(self.breakdown) | {"stages": stages},
            "notes": list(self.notes),
        }

    def _rated(self, stage: Stage) -> dict[str, Any]:
        work = Cost(stage.flop, stage.bytes, stage.exponentials)
        least, limit = self.ceilings.roofline_seconds(work, self.case.dtype)
        return {
            **dataclasses.asdict(stage),
            "share_of_limit": least / stage.seconds,
            "bound": BOUNDS.get(limit, limit) if work != Cost() else HOST,
        }


def profile_case(
    case: Case,
    contestants: Sequence[Contestant],
    ceilings: Ceilings,
    seconds: float,
    *,
    memory: bool = True,
    trace: Path | None = None,
    clock: Clock | None = None,
    now: Callable[[], float] = time.monotonic,
    tell: Tell = lambda message: None,
) -> list[Profile]:
    """Profile contestants of a case in turn; the others are compared with the first.

    Args:
        ceilings: measured, include the case's dtype.
        seconds: of timing per contestant; slow calls take longer.
        memory: whether peaks are measured.
        trace: file for the Chrome trace of the first contestant.
        clock, now: replacements for the device's clock and the real time.
        tell: reports the next step.
    """
    names = [contestant.name for contestant in contestants]
    tell(f"{case.name}: timing {', '.join(names)}")
    blocks = measure_blocks(
        lambda: {contestant.name: prepare(case, contestant).call for contestant in contestants},
        clock_for(case.device) if clock is None else ("given", clock),
        rounds=1,
        precision=PRECISION,
        seconds=seconds * len(contestants),
        limit=max(LEAST_LIMIT, LIMIT_FACTOR * seconds),
        now=now,
    )
    profiles = []
    for contestant in contestants:
        first = contestant is contestants[0]
        spread = blocks.of(contestant.name)
        notes = []
        if spread.blocks < LEAST_BLOCKS:
            calls = "a single call" if spread.rounds == 1 else f"{spread.rounds} calls"
            notes.append(f"time: from {calls}, because they are slow")
        tell(f"{case.name}: tracing {contestant.name}")
        slow = spread.median > SLOW
        breakdown = traced(
            prepare(case, contestant).call,
            case.device,
            calls=1 if slow else TRACED_CALLS,
            warmup=1 if slow else WARMUP,
            trace=trace if first else None,
        )
        peak = None
        if memory:
            tell(f"{case.name}: memory of {contestant.name}")
            try:
                peak = peak_bytes(case, contestant)
            except RuntimeError as error:  # the finished timing is kept
                notes.append(f"memory: not measured: {words_of(error)}")
        ratio = None if first else blocks.pair(names[0], contestant.name).ratio
        profiles.append(
            Profile(case, contestant, spread, ceilings, breakdown, peak, ratio, tuple(notes))
        )
    return profiles
