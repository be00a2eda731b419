"""A row for each case and architecture: what was compiled, and what arithmetic makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.aot.architectures import Architecture
from bench.aot.cases import Case
from bench.aot.compile import Job
from bench.aot.model import Occupancy, Roofline, occupancy, roofline, waves
from flmoe_kernels.core.triton.launches import Report


@dataclass(frozen=True)
class Row:
    """One launch on one architecture. Times are seconds that arithmetic gives as least, not measurements.

    tiles, table: the class of the kernel's launch table, and the shared bytes stated there. waves: how often the
    launch's blocks fill the device. error: what the compiler said; the compiled facts are then 0.
    """

    case: str
    operator: str
    kernel: str
    shape: str
    dtype: str
    variant: str
    architecture: int
    tiles: str
    table: int | None
    programs: int
    warps: int
    stages: int
    least: int
    report: Report
    held: Occupancy
    waves: float
    flop: float
    exponentials: float
    bytes: float
    times: Roofline
    error: str = ""
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the bound and its limit beside what they are made of."""
        times = {"seconds": self.times.seconds, "limit": self.times.limit}
        found = asdict(self)
        found["times"] |= times
        return found


def rows_of(jobs: Sequence[Job], reports: Mapping[tuple[str, int], Report | str]) -> list[Row]:
    return [_row(case, arch, reports[case.name, arch.number]) for case, arch in jobs]


def _row(case: Case, architecture: Architecture, found: Report | str) -> Row:
    built = case.built(architecture)
    launch, work = built.launch, built.work
    error, report = "", found
    if isinstance(report, str):
        error, report = report, Report(0, 0, 0, {}, launch.warps, 0)
        held = Occupancy(0, 0, "not compiled")
    else:
        held = occupancy(report, architecture)
    return Row(
        case.name,
        case.operator,
        case.kernel,
        case.shape,
        case.dtype,
        case.variant,
        architecture.number,
        built.tiles,
        built.table,
        launch.programs,
        report.warps,
        launch.stages,
        built.least,
        report,
        held,
        waves(launch.programs, held, architecture) if held.blocks else 0.0,
        work.flop,
        work.exponentials,
        work.bytes,
        roofline(work, architecture),
        error,
    )
