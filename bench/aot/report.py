"""What was compiled as a table on a terminal, as JSON, and as Markdown."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import triton

from bench.aot.architectures import ARCHITECTURES
from bench.aot.budget import Budget
from bench.aot.model import LAUNCH_SECONDS
from bench.aot.rows import Row

if TYPE_CHECKING:
    from rich.table import Table

MARK = "<!-- begin: python -m bench.aot --markdown -->"
_MATRIX = {"mma.sync": "mma", "wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05"}
_LIMITS = {"tensor": "tensor", "exponentials": "exp", "bytes": "bytes", "launch": "launch"}


def facts(rows: Iterable[Row]) -> dict[str, Any]:
    """All that is known, as values that JSON holds."""
    found = list(rows)
    numbers = dict.fromkeys(row.architecture for row in found)
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "launch_seconds": LAUNCH_SECONDS,
        "architectures": {ARCHITECTURES[n].name: asdict(ARCHITECTURES[n]) for n in numbers},
        "rows": [row.as_dict() for row in found],
    }


def as_json(rows: Iterable[Row]) -> str:
    return json.dumps(facts(rows), indent=1) + "\n"


def table(rows: Iterable[Row]) -> Table:
    """For a terminal."""
    from rich.table import Table
    from rich.text import Text

    found = Table()
    found.add_column("kernel", no_wrap=True)
    for heading in ("sm", "registers", "spilled", "shared KiB", "blocks x warps", "held by"):
        found.add_column(heading)
    for heading in ("matrix", "GFLOP", "MB", "bound us", "by"):
        found.add_column(heading)
    for row in rows:
        style = "red" if row.failures else ""
        cells = (
            row.case,
            str(row.architecture),
            str(row.report.registers),
            str(row.report.spilled or ""),
            f"{row.report.shared / 1024:.1f}",
            _blocks(row),
            row.held.limit,
            matrix(row),
            f"{row.flop / 1e9:.2f}" if row.flop else "",
            f"{row.bytes / 1e6:.2f}",
            _micro(row),
            row.times.limit,
        )
        found.add_row(*(Text(cell, style) for cell in cells))
    return found


def markdown(rows: Sequence[Row], budget: Budget) -> str:
    """Tables of each operator, a line for a case and a cell for an architecture; then what spills, and why."""
    numbers = sorted({row.architecture for row in rows})
    by_case: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, {})[row.architecture] = row
    lines = [
        f"Compiled with Triton {triton.__version__}. A cell: registers a thread (+ spilled bytes) / KiB of shared "
        "memory a block / blocks x warps on an SM / matrix instructions / bound in us and the limit that binds.",
        "",
    ]
    for operator in dict.fromkeys(row.operator for row in rows):
        heads = [f"{ARCHITECTURES[n].name} ({ARCHITECTURES[n].device})" for n in numbers]
        lines += [f"### {operator}", "", f"| case | GFLOP | Mexp | MB | {' | '.join(heads)} |"]
        lines.append("|---|--:|--:|--:|" + "---|" * len(numbers))
        for found in by_case.values():
            first = next(iter(found.values()))
            if first.operator == operator:
                cells = [_cell(found[n]) if n in found else "" for n in numbers]
                lines.append(f"| {_line(first)} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["### Spills that are allowed", "", "| cases | on | bytes a thread | reason |"]
    lines.append("|---|---|--:|---|")
    for each in budget.spills:
        on = ", ".join(f"sm_{n}" for n in each.architectures)
        lines.append(f"| `{each.cases}` | {on} | {each.bytes} | {each.reason} |")
    return "\n".join(lines) + "\n"


def matrix(row: Row) -> str:
    """Matrix instructions by short name and number in the code."""
    return ", ".join(f"{_MATRIX[name]} {n}" for name, n in sorted(row.report.matrix.items()))


def _line(row: Row) -> str:
    name = row.case.removeprefix(f"{row.operator}/")
    flop = f"{row.flop / 1e9:.2f}" if row.flop else ""
    exponentials = f"{row.exponentials / 1e6:.1f}" if row.exponentials else ""
    return f"{name} | {flop} | {exponentials} | {row.bytes / 1e6:.2f}"


def _cell(row: Row) -> str:
    if row.error:
        return "does not compile"
    spilled = f"+{row.report.spilled}" if row.report.spilled else ""
    parts = [f"{row.report.registers}{spilled}", f"{row.report.shared / 1024:.1f}", _blocks(row)]
    parts += [matrix(row) or "-", f"{_micro(row)} {_LIMITS[row.times.limit]}"]
    return " / ".join(parts)


def _blocks(row: Row) -> str:
    return f"{row.held.blocks} x {row.warps}"


def _micro(row: Row) -> str:
    return f"{row.times.seconds * 1e6:.1f}"
