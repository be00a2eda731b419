"""Contestants against one another on a machine that others use too: paired ratios, in blocks, by a chosen clock.

A round times every call, one right after the other, and what counts is the round's ratio: a slow moment of the
machine meets all of them. Rounds form blocks with inputs made afresh, because where buffers happen to lie
favours one side for as long as they lie there; the median ratio of a block is one observation, and the medians
of blocks give the result and its interval (`spread.median_interval`). Blocks are added until the interval is
narrow or time is up.

The clock of a single-threaded comparison on the CPU is the processor time of this process. A process that wants
the same core takes turns with this one; the wall clock would count its turns too, and unevenly between
contestants that sleep, spin or run for different lengths of time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .shapes import is_cuda
from .spread import PREPARE_SHARE, Call, median_interval, no_collection

Clock = Callable[[Call], float]  # makes the call and tells how many seconds it took

BLOCK_ROUNDS = 5
LEAST_BLOCKS = 6  # fewer have no interval of 95% confidence
MOST_BLOCKS = 60
SHORT = 2e-3  # calls that take fewer seconds are timed several at a time
UNDECIDED = 3.0


def processor_seconds(call: Call) -> float:
    """Processor time of all threads of this process."""
    start = time.process_time()
    call()
    return time.process_time() - start


def wall_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def device_seconds(call: Call) -> float:
    """Between two events on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str, threads: int) -> tuple[str, Clock]:
    """The clock by which a comparison is timed, and its name."""
    if is_cuda(device):
        return "device", device_seconds
    if threads == 1:
        return "processor", processor_seconds
    return "wall", wall_seconds


@dataclass(frozen=True)
class Seconds:
    """Seconds of one call: median over blocks with its interval, and where most rounds lie."""

    p50: float
    low: float
    high: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Paired:
    """What a comparison gave. ratio: seconds of the peer over seconds of ours, with its interval."""

    ratio: float
    low: float
    high: float
    p20: float
    p80: float
    blocks: int
    rounds: int
    clock: str
    ours: Seconds
    peer: Seconds


@dataclass(frozen=True)
class Blocks:
    """Seconds of every round: of each block, by the names of the calls."""

    clock: str
    seconds: list[dict[str, list[float]]] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return sum(len(next(iter(block.values()))) for block in self.seconds)

    def of(self, name: str) -> Seconds:
        return _summary([block[name] for block in self.seconds])

    def pair(self, ours: str, peer: str) -> Paired:
        ratio = self._ratio(ours, peer)
        return Paired(
            ratio=ratio.p50,
            low=ratio.low,
            high=ratio.high,
            p20=ratio.p20,
            p80=ratio.p80,
            blocks=len(self.seconds),
            rounds=self.rounds,
            clock=self.clock,
            ours=self.of(ours),
            peer=self.of(peer),
        )

    def width(self) -> float:
        """The widest interval of a ratio to the first call, or, where there is no other, of its seconds.

        As a share of the median, up to its farther end.
        """
        ours, *peers = self.seconds[0]
        found = [self._ratio(ours, peer) for peer in peers] or [self.of(ours)]
        return max(max(x.high - x.p50, x.p50 - x.low) / x.p50 for x in found)

    def _ratio(self, ours: str, peer: str) -> Seconds:
        return _summary(
            [
                [p / o for o, p in zip(block[ours], block[peer], strict=True)]
                for block in self.seconds
            ]
        )


def _summary(blocks: list[list[float]]) -> Seconds:
    medians = [statistics.median(block) for block in blocks]
    low, high, _ = median_interval(medians)
    rounds = [value for block in blocks for value in block]
    fifths = statistics.quantiles(rounds, n=5, method="inclusive") if len(rounds) > 1 else rounds
    return Seconds(statistics.median(medians), low, high, fifths[0], fifths[-1])


def measure_blocks(
    prepare: Callable[[], Mapping[str, Call]],
    clock: tuple[str, Clock],
    *,
    rounds: int,
    precision: float,
    seconds: float,
    decided: Callable[[Blocks], bool] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Blocks:
    """Time calls in turn until every ratio to the first is known to `precision`, or `seconds` are over.

    Args:
        prepare: makes the calls, by name, with inputs of their own.
        clock: its name and itself, see `clock_for`.
        rounds: at least so many, unless time is over; but LEAST_BLOCKS of one round in any case.
        decided: whether what was found answers the question. As long as it does not, time is over only after
            UNDECIDED times `seconds`.
        now: what `seconds` are counted by.
    """
    name, timed = clock
    start = now()
    calls = prepare()
    for call in calls.values():
        timed(call)  # loads, compiles, allocates
    ready = now()
    repeats = {key: _repeats(timed(call)) for key, call in calls.items()}
    settled = now()
    # With the waiting that `timed` may leave out.
    one_round = max(settled - ready, 1e-9)
    # How much longer the first calls took than the second ones belongs to the preparation.
    fresh = (ready - start) - one_round <= PREPARE_SHARE * seconds
    # As many as fit into the time, less the untimed one; where calls are slow, one round must do.
    fitting = int(seconds / LEAST_BLOCKS / one_round) - 1
    per_block = max(1, min(fitting, max(BLOCK_ROUNDS, -(-rounds // MOST_BLOCKS))))
    found = Blocks(name)
    start = now()
    while True:
        found.seconds.append(_block(calls, repeats, timed, per_block))
        count = len(found.seconds)
        if count >= LEAST_BLOCKS:
            spent = now() - start
            answered = decided is None or decided(found)
            if count >= MOST_BLOCKS or spent >= (1 if answered else UNDECIDED) * seconds:
                return found
            if found.rounds >= rounds and found.width() <= precision:
                return found
        if fresh:
            calls = prepare()


def _repeats(seconds: float) -> int:
    return max(1, min(1000, round(SHORT / max(seconds, 1e-9))))


def _block(
    calls: Mapping[str, Call], repeats: Mapping[str, int], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Rounds that start with another call each time."""

    def timed(name: str) -> float:
        call, count = calls[name], repeats[name]

        def several() -> None:
            for _ in range(count):
                call()

        return clock(several) / count

    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for call in calls.values():
            call()
        for number in range(rounds):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                found[name].append(timed(name))
    return found
