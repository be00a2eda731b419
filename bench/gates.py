"""One comparison under pytest-benchmark: checked, timed in turn, held to its floor where it has one.

The floors, their tolerance and the second attempt in a fresh process are those of
`python -m flmoe_kernels bench --gate bench/floors.toml`. A comparison without a floor is measured and recorded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flmoe_kernels.core.backend import instruction_set
from flmoe_kernels.profile import gate, suite
from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.ceilings import Ceilings, measure_ceilings
from flmoe_kernels.profile.contestants import Contestant, contestants, prepare
from flmoe_kernels.profile.costs import cost
from flmoe_kernels.profile.environment import cpu_model, environment
from flmoe_kernels.profile.floors import Floor, Here, load_floors
from flmoe_kernels.profile.paired import Paired, clock_for

FILE = Path(__file__).with_name("floors.toml")
FLOORS = load_floors(FILE, gate.known_cases())
# Of timing where no floor says how long.
SECONDS, ROUNDS, PRECISION = 2.0, 6, 0.05
# Calls that pytest-benchmark itself times, for its table.
TABLE_ROUNDS = 5


@dataclass(frozen=True)
class Comparison:
    """Ours against one peer at a case; floor: what the file asks of it, if it does."""

    case: Case
    ours: Contestant
    peer: Contestant
    floor: Floor | None = None

    def __str__(self) -> str:
        return f"{self.case.name} vs {self.peer.name}"

    @property
    def threads(self) -> int:
        return self.floor.threads if self.floor else torch.get_num_threads()


def comparisons(operator: str, full: bool) -> list[Comparison]:
    """Floors first, then what else the registry has of this operator: its quick set, or all."""
    found = {}
    for floor in FLOORS.floors:
        if floor.device == "cpu" and floor.case.split("/")[0] == operator and (full or floor.quick):
            case = gate.find_case(floor.case, "cpu")
            known = {one.name: one for one in contestants(case)}
            found[floor.key] = Comparison(case, known[floor.ours], known[floor.peer], floor)
    for entry in suite.full() if full else suite.quick():
        if entry.case.operator == operator:
            for peer in entry.peers:
                one = Comparison(entry.case, entry.ours, peer)
                found.setdefault(str(one), one)
    return list(found.values())


def hold(benchmark: Any, comparison: Comparison) -> None:
    """Measure a comparison, record everything that is known of it, and fail below its floor."""
    if comparison.floor is None:
        record(benchmark, comparison, measure(comparison))
        return
    floor = comparison.floor
    verdict = gate.judge(
        floor,
        *FLOORS.expected(floor, here()),
        gate.measure_here,
        gate.measure_elsewhere(FILE),
    )
    benchmark.extra_info["expected"] = verdict.expected
    record(benchmark, comparison, verdict.attempts[-1])
    assert verdict.passed, verdict.message()


def measure(comparison: Comparison) -> Paired:
    pair = (comparison.ours, comparison.peer)
    blocks = gate.measure_case(
        comparison.case,
        list(pair),
        threads=comparison.threads,
        rounds=ROUNDS,
        precision=PRECISION,
        seconds=SECONDS,
    )
    return blocks.pair(*(one.name for one in pair))


def record(benchmark: Any, comparison: Comparison, paired: Paired) -> None:
    """Rates, share of the roofline, ratio with its spread, device and versions, beside the benchmark's table."""
    case, work = comparison.case, cost(comparison.case)
    call = prepare(case, comparison.ours).call
    before = torch.get_num_threads()
    torch.set_num_threads(comparison.threads)
    try:
        benchmark.pedantic(call, rounds=TABLE_ROUNDS, iterations=1, warmup_rounds=1)
    finally:
        torch.set_num_threads(before)
    seconds = paired.ours.p50
    bound, binds = ceilings(comparison.threads).roofline_seconds(work, case.dtype)
    benchmark.extra_info.update(environment())
    benchmark.extra_info.update(
        case=case.name,
        peer=comparison.peer.name,
        peer_version=comparison.peer.version,
        threads=comparison.threads,
        clock=paired.clock,
        seconds=seconds,
        ratio=paired.ratio,
        ratio_interval=[paired.low, paired.high],
        ratio_of_rounds=[paired.p20, paired.p80],
        flop=work.flop,
        bytes=work.bytes,
        flop_per_second=work.flop / seconds,
        bytes_per_second=work.bytes / seconds,
        share_of_roofline=bound / seconds,
        binds=binds,
    )


def here() -> Here:
    return Here(cpu_model(), instruction_set(), "", torch.__version__)


@functools.cache
def ceilings(threads: int) -> Ceilings:
    """Of this machine with so many threads, by the clock that comparisons with so many are timed by."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_ceilings(clock=clock_for("cpu", threads)[1])
    finally:
        torch.set_num_threads(before)
