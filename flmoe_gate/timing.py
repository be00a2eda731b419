"""Timing of calls in turn: blocks of rounds, medians with intervals, paired ratios.

A round times every call, one right after the other, and a comparison uses the round's ratio: a slow moment of the
machine affects all calls. Rounds form blocks with new inputs, because the placement of buffers may favour one call
for as long as they exist. The median of a block is an observation. For n blocks, the interval from the k-th
smallest to the k-th largest median contains the true median with a probability given by the binomial distribution,
for any distribution of times. Blocks are added until the interval is narrow or the time is up.

Single-threaded comparisons on the CPU are timed by the processor time of this process. The wall clock would also
count the time of other processes on the same core.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]
Clock = Callable[[Call], float]  # makes the call and returns its seconds

CONFIDENCE = 0.95
BLOCK_ROUNDS = 5
LEAST_BLOCKS = 6  # fewer blocks give no interval of 95% confidence
MOST_BLOCKS = 60
SHORT = 2e-3  # calls that take fewer seconds are timed several at a time
UNDECIDED = 3.0
# If preparation takes a larger share of the time, it runs only once, for example to compile only once.
PREPARE_SHARE = 0.05


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
    """Time between two events on the current CUDA stream."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str, threads: int = 0) -> tuple[str, Clock]:
    """Return name and clock for a comparison on a device; threads: of the calls, 0 if unknown."""
    if not device.startswith("cuda"):
        return ("processor", processor_seconds) if threads == 1 else ("wall", wall_seconds)

    def clock(call: Call) -> float:
        import torch

        # Events belong to the current device, which may differ from the timed device.
        with torch.cuda.device(device):
            return device_seconds(call)

    return "device", clock


@dataclass(frozen=True)
class Spread:
    """A median over blocks with its interval: seconds of one call, or a ratio.

    Attributes:
        low, high: interval that contains the true median with probability `confidence`.
        confidence: at least CONFIDENCE from 6 blocks on; with fewer blocks that of the whole range.
        p20, p80: over all rounds; they describe single calls, not the uncertainty of the median.
    """

    median: float
    low: float
    high: float
    confidence: float
    p20: float
    p80: float
    blocks: int
    rounds: int

    @property
    def relative(self) -> float:
        """Distance of the farther end of the interval, relative to the median."""
        return max(self.high - self.median, self.median - self.low) / self.median


@dataclass(frozen=True)
class Paired:
    """Result of a comparison; ratio: seconds of the peer over seconds of ours."""

    clock: str
    ratio: Spread
    ours: Spread
    peer: Spread


@dataclass(frozen=True)
class Blocks:
    """Seconds of every round: a dictionary for each block, by the names of the calls."""

    clock: str
    seconds: list[dict[str, list[float]]] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return sum(len(next(iter(block.values()))) for block in self.seconds)

    def of(self, name: str) -> Spread:
        """Return the seconds of a call."""
        return spread_of([block[name] for block in self.seconds])

    def pair(self, ours: str, peer: str) -> Paired:
        """Compare two calls."""
        return Paired(self.clock, self._ratio(ours, peer), self.of(ours), self.of(peer))

    def width(self) -> float:
        """Widest relative interval of the ratios to the first call, or of its seconds if it is the only call."""
        ours, *peers = self.seconds[0]
        spreads = [self._ratio(ours, peer) for peer in peers] or [self.of(ours)]
        return max(spread.relative for spread in spreads)

    def _ratio(self, ours: str, peer: str) -> Spread:
        return spread_of(
            [
                [p / o for o, p in zip(block[ours], block[peer], strict=True)]
                for block in self.seconds
            ]
        )


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the narrowest symmetric order-statistic interval of the median with at least CONFIDENCE.

    Args:
        values: independent observations, at least one. With too few the whole range is returned.

    Returns:
        low, high, confidence: 1 - 2 P(Binomial(n, 1/2) < k) for the k-th smallest and the k-th largest.
    """
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        raise ValueError("values: expected at least one, got none")
    # Probability of one tail. Move inwards while the interval keeps the requested confidence.
    tail, k = 0.5**count, 1
    while k < (count + 1) // 2:
        wider = tail + math.comb(count, k) * 0.5**count
        if 1 - 2 * wider < CONFIDENCE:
            break
        tail, k = wider, k + 1
    return ordered[k - 1], ordered[count - k], max(0.0, 1 - 2 * tail)


def spread_of(blocks: Sequence[Sequence[float]]) -> Spread:
    """Summarize blocks of rounds; every block has the same weight, for any number of rounds."""
    medians = [statistics.median(block) for block in blocks]
    low, high, confidence = median_interval(medians)
    rounds = [value for block in blocks for value in block]
    fifths = statistics.quantiles(rounds, n=5, method="inclusive") if len(rounds) > 1 else rounds
    return Spread(
        median=statistics.median(medians),
        low=low,
        high=high,
        confidence=confidence,
        p20=fifths[0],
        p80=fifths[-1],
        blocks=len(blocks),
        rounds=len(rounds),
    )


def measure_blocks(
    prepare: Callable[[], Mapping[str, Call]],
    clock: tuple[str, Clock],
    *,
    rounds: int,
    precision: float,
    seconds: float,
    limit: float = math.inf,
    decided: Callable[[Blocks], bool] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Blocks:
    """Time calls in turn until every ratio to the first call is known to `precision`, or `seconds` are over.

    Args:
        prepare: makes the calls, by name, with new inputs.
        clock: name and clock, see `clock_for`.
        rounds: minimum number within the time limit; LEAST_BLOCKS blocks of one round are always measured,
            apart from `limit`.
        limit: seconds after the first calls. If LEAST_BLOCKS blocks would take longer, fewer blocks are
            measured, at least one, all of a single round on the same inputs.
        decided: whether the result is conclusive. While it is not, the time limit is UNDECIDED times `seconds`.
        now: the clock for `seconds`.
    """
    name, timed = clock
    start = now()
    calls = prepare()
    for call in calls.values():
        timed(call)  # loads, compiles, allocates
    ready = now()
    second = {key: timed(call) for key, call in calls.items()}
    settled = now()
    repeats = {key: _repeats(spent) for key, spent in second.items()}
    # Includes waiting times that `timed` may not count.
    one_round = max(settled - ready, 1e-9)
    if 2 * LEAST_BLOCKS * one_round > limit:  # a block has an untimed round, too
        return _few_rounds(calls, second, clock, limit - one_round, now)
    # The extra time of the first calls, compared with the second calls, belongs to the preparation.
    fresh = (ready - start) - one_round <= PREPARE_SHARE * seconds
    # As many rounds as fit into the time, minus the untimed round; at least one for slow calls.
    fitting = int(seconds / LEAST_BLOCKS / one_round) - 1
    per_block = max(1, min(fitting, max(BLOCK_ROUNDS, -(-rounds // MOST_BLOCKS))))
    blocks = Blocks(name)
    start = now()
    while True:
        blocks.seconds.append(_block(calls, repeats, timed, per_block))
        count = len(blocks.seconds)
        if count >= LEAST_BLOCKS:
            spent = now() - start
            answered = decided is None or decided(blocks)
            if count >= MOST_BLOCKS or spent >= (1 if answered else UNDECIDED) * seconds:
                return blocks
            if blocks.rounds >= rounds and blocks.width() <= precision:
                return blocks
        if fresh:
            calls = prepare()


def _few_rounds(
    calls: Mapping[str, Call],
    first: dict[str, float],
    clock: tuple[str, Clock],
    limit: float,
    now: Callable[[], float],
) -> Blocks:
    """Add rounds of slow calls to the `first`, as blocks of their own, while they fit into `limit` seconds."""
    name, timed = clock
    blocks = Blocks(name, [{key: [spent] for key, spent in first.items()}])
    start = now()
    while len(blocks.seconds) < LEAST_BLOCKS:
        spent = now() - start
        if spent + max(spent / max(len(blocks.seconds) - 1, 1), sum(first.values())) > limit:
            break
        blocks.seconds.append({key: [timed(call)] for key, call in calls.items()})
    return blocks


def _repeats(seconds: float) -> int:
    return max(1, min(1000, round(SHORT / max(seconds, 1e-9))))


def _block(
    calls: Mapping[str, Call], repeats: Mapping[str, int], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Time a block of rounds; every round starts with a different call."""

    def timed(name: str) -> float:
        call, count = calls[name], repeats[name]

        def repeated() -> None:
            for _ in range(count):
                call()

        return clock(repeated) / count

    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with no_collection():
        for call in calls.values():
            call()
        for number in range(rounds):
            first = number % len(names)
            for name in (*names[first:], *names[:first]):
                seconds[name].append(timed(name))
    return seconds


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage before the block, and not during its calls."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
