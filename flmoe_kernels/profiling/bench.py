"""What `bench` without a file of floors times: entries of the registry, and the table of what they took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import suite
from .cases import OPERATORS
from .gate import find_case
from .results import Row

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Found:
    """Rows of one case; details: everything else that is known of it, as suite tells it."""

    rows: list[Row]
    details: dict[str, Any]

    @property
    def left_out(self) -> list[str]:
        """Contestants that were not timed, each with the reason."""
        return [f"{one['name']}: {one['why_not']}" for one in self.details["left_out"]]


def choose(case: str | None, op: str | None, full: bool, device: str) -> list[suite.Entry]:
    """One case by its name, or an operator's, or all of the quick set; with `full`, of the registry.

    Raises:
        Unmeasured: there is no case of this name on this device.
        ValueError: there is no operator of this name.
        BackendUnavailable: none of this package's kernels can run one of them here.
    """
    if case is not None:
        return [suite.entry_of(find_case(case, device))]
    if op is not None and op not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {op!r}")
    entries = suite.full(device) if full else suite.quick(device)
    return [entry for entry in entries if op in (None, entry.case.operator)]


def measure(entry: suite.Entry, seconds: float, threads: int) -> Found:
    """Time this package's kernels and the peers of a case in turn.

    Raises:
        WrongAnswer: this package's kernels compute something else; nothing is timed then.
    """
    rows, details = suite.measure_entry(entry, seconds, threads, memory=False, ceilings=None)
    return Found([Row(**row) for row in rows], details)


def table(rows: Iterable[Row]) -> Table:
    """Milliseconds of every contestant, and how many times as long as this package's kernels it took."""
    from rich.table import Table

    found = Table("case", "contestant", "ms", "20% to 80% of rounds", "of ours", "median in")
    for row in rows:
        found.add_row(
            "" if row.against else row.case,
            row.contestant,
            f"{1e3 * row.p50:.3f}",
            f"{1e3 * row.p20:.3f} to {1e3 * row.p80:.3f}",
            "" if row.ratio is None else f"{row.ratio:.2f}x",
            "" if row.ratio is None else f"{row.ratio_low:.2f} to {row.ratio_high:.2f}",
        )
    return found
