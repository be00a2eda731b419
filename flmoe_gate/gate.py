"""Regression check of ratios to peers against the file of floors.

A comparison fails if the whole interval of its median ratio is below expected * (1 - tolerance). A failure caused
by one process usually disappears in a new one (`pytest --last-failed`); a regression fails again. torch is not
imported: it is used if the suite has loaded it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from .floors import Floor, Floors, FloorsError, key_of, load_floors, update_file
from .machine import here, keep_freed_memory, torch_threads
from .machine import threads as default_threads
from .timing import Blocks, Call, Paired, clock_for, measure_blocks

# Calls that pytest-benchmark times for its own table.
TABLE_ROUNDS = 5


@dataclass(frozen=True)
class Verdict:
    """Outcome for one floor.

    Attributes:
        expected: the ratio; source: a machine's table, or "any machine".
    """

    floor: Floor
    expected: float
    source: str
    paired: Paired

    @property
    def bound(self) -> float:
        """Ratio that the upper end of the interval must reach to pass."""
        return self.floor.bound(self.expected)

    @property
    def passed(self) -> bool:
        """Whether at least the upper end of the interval reaches the bound."""
        return self.paired.ratio.high >= self.bound

    def message(self) -> str:
        return (
            f"{'ok' if self.passed else 'SLOWER'}: {self.floor.case}: expected {self.expected:.2f}x "
            f"{self.floor.peer} ({self.source}), at least {self.bound:.2f}x with a tolerance of "
            f"{self.floor.tolerance:.0%}; measured {_spread(self.paired)}"
        )


def _spread(paired: Paired) -> str:
    ratio = paired.ratio
    return (
        f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f} for the median of "
        f"{ratio.rounds} rounds, {ratio.p20:.2f} to {ratio.p80:.2f} in single ones)"
    )


def measure_pair(
    prepare: Callable[[], dict[str, Call]],
    device: str,
    floor: Floor,
    bound: float | None = None,
    *,
    now: Callable[[], float] = time.monotonic,
    clock: tuple[str, Callable[[Call], float]] | None = None,
) -> Paired:
    """Time the calls "ours" and "peer" in turn, with the floor's threads, rounds and precision.

    Args:
        prepare: makes the two calls.
        bound: the measurement takes longer while the interval of the ratio contains it.
        now, clock: replacements for the real clocks.
    """

    def decided(blocks: Blocks) -> bool:
        ratio = blocks.pair("ours", "peer").ratio
        return bound is None or not ratio.low <= bound <= ratio.high

    with torch_threads(floor.threads):
        return measure_blocks(
            prepare,
            clock or clock_for(device, floor.threads),
            rounds=floor.rounds,
            precision=floor.precision,
            seconds=floor.seconds,
            decided=decided,
            now=now,
        ).pair("ours", "peer")


class Gate:
    """State of a pytest session: floors, verdicts and updates."""

    def __init__(self, config: pytest.Config) -> None:
        keep_freed_memory()
        self.config = config
        path = config.getoption("--gate")
        self.path = Path(path) if path else None
        self.floors = load_floors(self.path) if self.path else Floors(())
        self.update = bool(config.getoption("--gate-update"))
        if self.update and self.path and not os.access(self.path.resolve().parent, os.W_OK):
            raise FloorsError(f"{self.path}: cannot be written: the folder is not writable")
        self.lines: list[str] = []
        self.updates: dict[str, dict[str, float]] = {}
        self.measured: set[str] = set()
        self.unknown: set[str] = set()

    def expected(self, floor: Floor, device: str) -> tuple[float, str]:
        machine = here(device)
        if self.floors.machine(machine) is None:
            torch = machine.torch and f"torch {machine.torch}"
            words = (machine.device or machine.cpu, machine.isa, torch)
            self.unknown.add(", ".join(filter(None, words)))
        return self.floors.expected(floor, machine)

    def finish(self, terminal: Any) -> None:
        """Write an update; print the measured ratios and the floors that were not checked."""
        missing = [floor.key for floor in self.floors.floors if floor.key not in self.measured]
        if not self.lines and not missing:
            return
        terminal.section("benchmarks against peers")
        for line in self.lines:
            terminal.write_line(line)
        for words in sorted(self.unknown):
            terminal.write_line(
                f"{self.path}: no [machine] table describes this machine ({words}): "
                "the low floors for any machine apply"
            )
        for device, ratio in self.updates.items():
            assert self.path is not None
            name = update_file(self.path, here(device), ratio)
            terminal.write_line(f"{self.path}: wrote this machine's ratios to [machine.{name}]")
        if missing:
            shown = "::warning::" if os.environ.get("GITHUB_ACTIONS") else ""
            terminal.write_line(
                f"{shown}{self.path}: not measured in this run: {', '.join(missing)}"
            )


class Against:
    """Fixture `benchmark_against`: times a callable and its peer in turn."""

    def __init__(self, gate: Gate, request: pytest.FixtureRequest, benchmark: Any) -> None:
        self.gate = gate
        self.request = request
        self.benchmark = benchmark

    def __call__(
        self,
        ours: Callable[[], Any],
        peer: Callable[[], Any],
        *,
        name: str | None = None,
        peer_name: str = "peer",
        fresh: bool = False,
        device: str = "cpu",
        seconds: float = 2.0,
        precision: float = 0.05,
        threads: int | None = None,
        facts: Callable[[Paired], Mapping[str, Any]] | None = None,
    ) -> Paired:
        """Time both, record the ratio, and fail below the floor of `name` and `peer_name`, if --gate has one.

        Args:
            ours, peer: callables without arguments; with `fresh`, they make the inputs and return the callable
                to time, and are called for every block of rounds.
            name: of the case; default: the test's name.
            device: "cpu", "cuda" or "cuda:N", for the clock; a GPU is timed by torch's events.
            seconds, precision, threads: used without a floor, see `floors.Floor`; default of threads: torch's.
            facts: returns additional facts about a measurement for the result file.

        Returns:
            The measurement; its `ratio` is seconds of the peer over seconds of ours.
        """
        gate, name = self.gate, name or self.request.node.name
        kind = device.split(":")[0]
        key = key_of(name, peer_name, kind)
        floor = gate.floors.find(key)
        plan = floor or Floor(
            *(name, peer_name, 0.0, kind),
            precision=precision,
            rounds=6,
            seconds=seconds,
            threads=threads or default_threads(),
        )

        def prepare() -> dict[str, Call]:
            return {"ours": ours(), "peer": peer()} if fresh else {"ours": ours, "peer": peer}

        def measure(bound: float | None) -> Paired:
            return measure_pair(prepare, device, plan, bound)

        verdict = None
        if floor is None or gate.update:
            paired = measure(None)
            if floor is not None:
                gate.updates.setdefault(device, {})[key] = paired.ratio.median
        else:
            expected, source = gate.expected(floor, device)
            paired = measure(floor.bound(expected))
            verdict = Verdict(floor, expected, source, paired)
        gate.measured.add(key)
        self._record(prepare()["ours"], plan, paired, verdict, facts)
        unchecked = "no floor, not checked: " if gate.path and floor is None else ""
        gate.lines.append(verdict.message() if verdict else f"{unchecked}{key}: {_spread(paired)}")
        if verdict is not None and not verdict.passed:
            pytest.fail(verdict.message(), pytrace=False)
        return paired

    def skip(self, name: str, peer_name: str, device: str, reason: str) -> NoReturn:
        """Skip a comparison that cannot be measured here; fail if --gate has a floor for it."""
        key = key_of(name, peer_name, device.split(":")[0])
        if self.gate.floors.find(key) is not None:
            pytest.fail(f"{key} has a floor but cannot be measured: {reason}", pytrace=False)
        pytest.skip(reason)

    def _record(
        self,
        call: Call,
        plan: Floor,
        paired: Paired,
        verdict: Verdict | None,
        facts: Callable[[Paired], Mapping[str, Any]] | None,
    ) -> None:
        def waited() -> None:
            call()
            if plan.device == "cuda":
                sys.modules["torch"].cuda.synchronize()

        with torch_threads(plan.threads):
            self.benchmark.pedantic(waited, rounds=TABLE_ROUNDS, iterations=1, warmup_rounds=1)
        self.benchmark.extra_info.update(
            case=plan.case,
            peer=plan.peer,
            device=plan.device,
            threads=plan.threads,
            clock=paired.clock,
            ratio=asdict(paired.ratio),
            seconds=asdict(paired.ours),
            peer_seconds=asdict(paired.peer),
        )
        if verdict is not None:
            self.benchmark.extra_info.update(expected=verdict.expected, passed=verdict.passed)
        if facts is not None:
            self.benchmark.extra_info.update(facts(paired))
