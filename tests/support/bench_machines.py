"""Simulated machines: calls with durations from a seeded noise model, and a clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from flmoe_gate.floors import Floor
from flmoe_gate.gate import measure_pair
from flmoe_gate.timing import Call, Paired, Spread


class NoisyMachine:
    """A machine whose time passes only while a call runs.

    The duration of a call is multiplied by a drift shared by all calls, by its own noise, sometimes by a burst of
    other work during a single call, and by a bias per preparation, like that of the placement of buffers.
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

    def call(self, seconds: float) -> Call:
        placed = seconds * self.random.lognormvariate(0.0, self.placement)

        def run() -> None:
            factor = self.random.lognormvariate(0.0, self.noise)
            if self.random.random() < self.burst:
                factor *= self.random.uniform(1.5, 4.0)
            # The machine becomes slower while it warms up.
            factor *= 1 + self.drift * min(1.0, self.now / 5.0)
            self.now += placed * factor

        return run

    def clock(self, call: Callable[[], object]) -> float:
        start = self.now
        call()
        return self.now - start

    def measure(self, floor: Floor, ours: float, peer: float, bound: float | None = None) -> Paired:
        """Comparison of two calls with these durations on a quiet machine."""
        return measure_pair(
            lambda: {"ours": self.call(ours), "peer": self.call(peer)},
            "cpu",
            floor,
            bound,
            now=lambda: self.now,
            clock=("fake", self.clock),
        )


def given(ratio: float, half: float = 0.02) -> Paired:
    """A measurement with this ratio and relative half width of its interval."""
    ours = Spread(0.010, 0.0099, 0.0101, 0.97, 0.0098, 0.0103, 6, 30)
    low, high = ratio * (1 - half), ratio * (1 + half)
    spread = replace(ours, median=ratio, low=low, high=high, p20=low, p80=high)
    return Paired("processor", spread, ours, replace(ours, median=0.010 * ratio))
