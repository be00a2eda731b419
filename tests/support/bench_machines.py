"""Machines that are not there: calls whose seconds come from a seeded model of noise, and a clock for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from flmoe_kernels.profile.floors import Floor
from flmoe_kernels.profile.paired import Blocks, Paired, Seconds, measure_blocks

Call = Callable[[], None]


class NoisyMachine:
    """Time goes on only while a call runs.

    A call takes its own seconds, times: a drift that all calls share, noise of its own, now and then a burst of
    other work that hits a single call, and a bias that is drawn with each preparation, as where buffers lie.
    """

    def __init__(
        self,
        seed: int,
        noise: float = 0.05,
        burst: float = 0.1,
        placement: float = 0.02,
        drift: float = 0.5,
    ) -> None:
        self.random = random.Random(seed)
        self.noise, self.burst, self.placement, self.drift = noise, burst, placement, drift
        self.now = 0.0
        self.calls = 0

    def call(self, seconds: float) -> Call:
        placed = seconds * self.random.lognormvariate(0.0, self.placement)

        def run() -> None:
            self.calls += 1
            factor = self.random.lognormvariate(0.0, self.noise)
            if self.random.random() < self.burst:
                factor *= self.random.uniform(1.5, 4.0)
            # The machine gets slower while it warms up.
            factor *= 1 + self.drift * min(1.0, self.now / 5.0)
            self.now += placed * factor

        return run

    def clock(self, call: Callable[[], object]) -> float:
        start = self.now
        call()
        return self.now - start

    def measure(self, floor: Floor, ours: float, peer: float, bound: float | None = None) -> Paired:
        """A floor's comparison of two calls that take so many seconds on a quiet machine."""

        def decided(blocks: Blocks) -> bool:
            found = blocks.pair("ours", "peer")
            return bound is None or not found.low <= bound <= found.high

        blocks = measure_blocks(
            lambda: {"ours": self.call(ours), "peer": self.call(peer)},
            ("fake", self.clock),
            rounds=floor.rounds,
            precision=floor.precision,
            seconds=floor.seconds,
            decided=decided,
            now=lambda: self.now,
        )
        return blocks.pair("ours", "peer")


@dataclass(frozen=True)
class Given:
    """A measurement that is simply given."""

    ratio: float
    half: float = 0.02

    def paired(self) -> Paired:
        low, high = self.ratio * (1 - self.half), self.ratio * (1 + self.half)
        ours = Seconds(0.010, 0.0099, 0.0101, 0.0098, 0.0103)
        peer = Seconds(*(value * self.ratio for value in (0.010, 0.0099, 0.0101, 0.0098, 0.0103)))
        return Paired(self.ratio, low, high, low, high, 6, 30, "processor", ours, peer)
