"""What `bench` without a file of floors times: entries of the registry, and the table of what they took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import suite
from .cases import BOTH, OPERATORS
from .ceilings import Ceilings
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


MARK = "<!-- begin: python -m flmoe_kernels bench --named --markdown -->"
QUICK, NAMED, FULL = "quick", "named", "full"
_SETS = {QUICK: suite.quick, NAMED: suite.named, FULL: suite.full}


def choose(case: str | None, op: str | None, which: str, device: str) -> list[suite.Entry]:
    """One case by its name, or those of a set (QUICK, NAMED, FULL), of one operator or all.

    Raises:
        Unmeasured: there is no case of this name on this device.
        ValueError: there is no operator of this name.
        BackendUnavailable: none of this package's kernels can run one of them here.
    """
    if case is not None:
        return [suite.entry_of(find_case(case, device))]
    if op is not None and op not in OPERATORS:
        raise ValueError(f"operator: expected one of {', '.join(OPERATORS)}, got {op!r}")
    entries = _SETS[which](device)
    return [entry for entry in entries if op in (None, entry.case.operator)]


def measure(
    entry: suite.Entry,
    seconds: float,
    threads: int,
    memory: bool = False,
    ceilings: Ceilings | None = None,
) -> Found:
    """Time this package's kernels and the peers of a case in turn; with `memory` also measure peaks.

    Raises:
        WrongAnswer: this package's kernels compute something else; nothing is timed then.
    """
    rows, details = suite.measure_entry(entry, seconds, threads, memory, ceilings)
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


def markdown(details: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The same for a page, a line for each case, with peak memory and the share of the roofline where known."""
    where = environment["device"]
    if where == environment["cpu"]:
        where = f"{environment['threads']} threads of {where}, {environment['instruction_set']}"
    dtypes = {detail["case"].split("/")[3]: None for detail in details}
    lines = [
        f"{where}, {' and '.join(dtypes)}, torch {environment['torch']}, commit {environment['commit']}.",
        "",
        "| operator, shape | | this package | of the bound | peak | peers: ratio (interval of the median), peak |",
        "|---|---|--:|--:|--:|---|",
    ]
    for detail in details:
        ours, *peers = detail["contestants"]
        operator, shape, phase, dtype, *variant = detail["case"].split("/")
        share = ours["share_of_roofline"]
        against = "; ".join(
            f"{peer['name']} **{peer['ratio']:.2f}x** ({peer['ratio_low']:.2f} to "
            f"{peer['ratio_high']:.2f}){_peak(peer, ', ')}"
            for peer in peers
        )
        cells = [
            ", ".join([operator, shape, *variant, *([dtype] if len(dtypes) > 1 else [])]),
            "training step" if phase == BOTH else phase,
            f"{_digits(1e3 * ours['p50'])} ms",
            "" if share is None else f"{share:.0%}",
            _peak(ours),
            against,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _digits(value: float) -> str:
    """Three of them or more, never an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _peak(contestant: Mapping[str, Any], before: str = "") -> str:
    found = contestant["peak_bytes"]
    return "" if found is None else f"{before}{found / 2**20:.0f} MiB"
