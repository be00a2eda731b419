"""How many blocks share an SM, and the least time that a launch can take: arithmetic, not measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.aot.architectures import Architecture
from bench.aot.costs import Work
from flmoe_kernels.core.triton.launches import Report

# Assumed, not measured: what a launch costs that does nothing, from a queue that is never empty.
LAUNCH_SECONDS = 3e-6
_WARP = 32
_PARTITIONS = 4
_REGISTER_UNIT, _SHARED_UNIT, _SHARED_RESERVED = 256, 128, 1024


@dataclass(frozen=True)
class Occupancy:
    """Blocks and warps that an SM holds at a time, and what it has no more of."""

    blocks: int
    warps: int
    limit: str


@dataclass(frozen=True)
class Roofline:
    """Seconds that each limit alone would take."""

    tensor: float
    exponentials: float
    bytes: float
    launch: float

    @property
    def seconds(self) -> float:
        return max(self.tensor, self.exponentials, self.bytes, self.launch)

    @property
    def limit(self) -> str:
        """The slowest; of equal ones the first."""
        times = vars(self)
        return max(times, key=lambda name: times[name])


def occupancy(report: Report, architecture: Architecture) -> Occupancy:
    """Registers are given to whole warps, and a warp lives in one of an SM's four partitions."""
    per_warp = _up(report.registers * _WARP, _REGISTER_UNIT)
    warps = architecture.registers // _PARTITIONS // per_warp * _PARTITIONS
    held = {
        "registers": warps // report.warps,
        "shared": architecture.shared // _up(report.shared + _SHARED_RESERVED, _SHARED_UNIT),
        "warps": architecture.warps // report.warps,
        "blocks": architecture.blocks,
    }
    if report.tensor_memory:
        held["tensor memory"] = architecture.tensor_memory // report.tensor_memory
    limit = min(held, key=lambda name: held[name])
    return Occupancy(held[limit], held[limit] * report.warps, limit)


def waves(programs: int, held: Occupancy, architecture: Architecture) -> float:
    """How often the device is filled; less than 1 where SMs stay empty."""
    places = held.blocks * architecture.multiprocessors
    return programs / places if places else math.inf


def roofline(work: Work, architecture: Architecture) -> Roofline:
    rate = architecture.flops_16 if work.products == "16" else architecture.flops_tf32
    repeated = 3 if work.products == "tf32x3" else 1
    return Roofline(
        repeated * work.flop / rate,
        work.exponentials / architecture.exponentials,
        work.bytes / architecture.bandwidth,
        LAUNCH_SECONDS,
    )


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
