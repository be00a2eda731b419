"""How well a median is known: blocks of rounds, and the interval that order statistics of blocks give.

Rounds that follow one another are not independent: a machine is slow for a while, an allocation lies well or
badly. A block is a run of rounds on inputs made afresh; its median is one observation, and medians of blocks are
as good as independent. For n of them the interval from the k-th smallest to the k-th largest holds the true median
with a probability that the binomial distribution tells, whatever the distribution of times.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
BLOCKS = 11
MOST_ROUNDS = 101
# What takes a larger share of the time to measure is prepared once: compilation is not repeated for each block.
PREPARE_SHARE = 0.05

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Seconds of one call.

    Attributes:
        median: of the blocks' medians.
        low, high: the interval that holds the true median with probability `confidence`.
        confidence: at least CONFIDENCE from 6 blocks on; of fewer blocks what their whole range has.
        p20, p80: of all rounds: where most calls lie, which is no statement about the median.
        blocks, rounds: how many blocks, and rounds in all of them.
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
        """The farther end of the interval from the median, as a share of the median."""
        if not self.median:
            return 0.0
        return max(self.high - self.median, self.median - self.low) / self.median

    def agrees(self, other: Spread) -> bool:
        """Whether the two intervals meet, as those of two runs of the same thing do in over 99% of cases."""
        return self.low <= other.high and other.low <= self.high


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """The narrowest symmetric order-statistic interval of the median, and the confidence that it has.

    Args:
        values: independent observations, one at least.
        confidence: wanted. Where too few values are there, the whole range is returned with what it has.

    Returns:
        low, high, confidence: 1 - 2 P(Binomial(n, 1/2) < k) for the k-th smallest and the k-th largest.
    """
    ordered = sorted(values)
    count = len(ordered)
    if not count:
        raise ValueError("values: expected one at least, got none")
    # One tail's probability, summed up while the next step inwards still leaves enough in between.
    tail, k = 0.5**count, 1
    while k < (count + 1) // 2:
        wider = tail + math.comb(count, k) * 0.5**count
        if 1 - 2 * wider < confidence:
            break
        tail, k = wider, k + 1
    return ordered[k - 1], ordered[count - k], max(0.0, 1 - 2 * tail)


def spread_of(blocks: Sequence[Sequence[float]]) -> Spread:
    """Of the seconds of blocks of rounds."""
    medians = [statistics.median(block) for block in blocks]
    low, high, confidence = median_interval(medians)
    rounds = [seconds for block in blocks for seconds in block]
    fifths = (
        statistics.quantiles(rounds, n=5, method="inclusive") if len(rounds) > 1 else 4 * rounds
    )
    return Spread(
        median=statistics.median(medians),
        low=low,
        high=high,
        confidence=confidence,
        p20=fifths[0],
        p80=fifths[3],
        blocks=len(blocks),
        rounds=len(rounds),
    )


def timed_blocks(
    prepare: Mapping[str, Callable[[], Call]],
    clock: Callable[[Call], float],
    *,
    seconds: float,
    blocks: int = BLOCKS,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[list[float]]]:
    """Seconds of every round of every block, by the calls' names; they take turns, another one first each time.

    Args:
        prepare: each makes one call with inputs of its own, anew for every block if that is quick.
        clock: makes one call and tells how long it took.
        seconds: of measuring in all; a block has one round at least, however slow the calls are.
        now: what preparing is timed by.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in prepare}
    calls: dict[str, Call] = {}
    names = list(prepare)
    fresh = dict.fromkeys(names, True)
    rounds = 0
    for _ in range(blocks):
        for name, make in prepare.items():
            if fresh[name]:
                start = now()
                calls[name] = make()
                clock(calls[name])  # loads, compiles, allocates
                fresh[name] = now() - start <= PREPARE_SHARE * seconds
        warm = sum(clock(call) for call in calls.values())
        if not rounds:
            rounds = max(1, min(MOST_ROUNDS, int(seconds / blocks / max(warm, 1e-9))))
        block: dict[str, list[float]] = {name: [] for name in names}
        with no_collection():
            for turn in range(rounds):
                first = turn % len(names)
                for name in (*names[first:], *names[:first]):
                    block[name].append(clock(calls[name]))
        for name, values in block.items():
            found[name].append(values)
    return found


@contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, not in whichever call happens to come next."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def ratio_of(
    over: Sequence[Sequence[float]], under: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """The median over blocks of the ratio of the blocks' medians, and its interval, low and high."""
    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(over, under, strict=True)]
    low, high, _ = median_interval(ratios)
    return statistics.median(ratios), low, high
