"""The budget: registers, shared bytes and spilled bytes that each kernel may take, committed as a file.

Numbers are those of one version of Triton. Under another one registers and shared memory may differ without
anything being wrong, so only what no compiler may do is held: spills beyond a margin, and no block that fits.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.aot.rows import Row

# The checkout's own; an installed package has none.
DEFAULT = Path(__file__).parents[2] / "bench" / "aot_budget.json"
# Bytes per thread that another version of the compiler may spill beyond what is written.
OTHER_COMPILER_SPILLS = 128


@dataclass(frozen=True)
class Limits:
    """registers and spilled bytes of a thread, shared bytes of a block."""

    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Allowance:
    """Spilled bytes of a thread that cases of a name like `cases` may have on `architectures`, and why."""

    cases: str
    architectures: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class Budget:
    """limits by case and architecture."""

    triton: str
    limits: Mapping[tuple[str, int], Limits]
    spills: tuple[Allowance, ...]

    def allowed(self, case: str, architecture: int) -> int:
        """Bytes that may spill."""
        fitting = (
            each.bytes
            for each in self.spills
            if architecture in each.architectures and fnmatch.fnmatchcase(case, each.cases)
        )
        return max(fitting, default=0)


EMPTY = Budget("", {}, ())


def load(path: Path) -> Budget:
    """Of a file that `save` wrote.

    Raises:
        ValueError: the file is no budget; names it, and what is wrong.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        limits = {
            (case, int(number)): Limits(*values)
            for case, by_number in facts["limits"].items()
            for number, values in by_number.items()
        }
        spills = tuple(
            Allowance(**{**each, "architectures": tuple(each["architectures"])})
            for each in facts["spills"]
        )
        return Budget(facts["triton"], limits, spills)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a budget ({type(error).__name__}: {error})") from error


def save(path: Path, budget: Budget) -> None:
    by_case: dict[str, dict[str, list[int]]] = {}
    for (case, number), limits in budget.limits.items():
        values = [limits.registers, limits.shared, limits.spilled]
        by_case.setdefault(case, {})[str(number)] = values
    lines = [f"  {json.dumps(case)}: {json.dumps(values)}" for case, values in by_case.items()]
    spills = [f"  {json.dumps(asdict(each))}" for each in budget.spills]
    path.write_text(
        f'{{\n "triton": {json.dumps(budget.triton)},\n'
        ' "columns": ["registers", "shared", "spilled"],\n'
        ' "spills": [\n' + ",\n".join(spills) + "\n ],\n"
        ' "limits": {\n' + ",\n".join(lines) + "\n }\n}\n",
        encoding="utf-8",
    )


def updated(budget: Budget, rows: Iterable[Row], triton: str) -> Budget:
    """The budget with what was compiled in place of what it said of it; allowed spills stay as they are."""
    limits = dict(budget.limits)
    for row in rows:
        if not row.error:
            found = row.report
            limits[row.case, row.architecture] = Limits(
                found.registers, found.shared, found.spilled
            )
    return Budget(triton, limits, budget.spills)


def failures(row: Row, budget: Budget, triton: str) -> list[str]:
    """What is wrong with a row, a sentence each."""
    if row.error:
        return [f"does not compile: {row.error.splitlines()[0]}"]
    report = row.report
    found = []
    same = release(triton) == release(budget.triton)
    allowed = budget.allowed(row.case, row.architecture)
    spare = 0 if same or not budget.triton else OTHER_COMPILER_SPILLS
    if report.spilled > allowed + spare:
        found.append(f"spills {report.spilled} bytes a thread, allowed are {allowed}")
    if not row.held.blocks:
        found.append(f"does not fit an SM: {row.held.limit}")
    if row.least and not report.matrix:
        found.append("has matrix products, but no matrix instructions")
    elif sum(report.matrix.values()) < row.least:
        found.append(
            f"has {sum(report.matrix.values())} matrix instructions, {row.least} expected at least"
        )
    return found + (_over(row, budget) if same else [])


def _over(row: Row, budget: Budget) -> list[str]:
    limits = budget.limits.get((row.case, row.architecture))
    if limits is None:
        return ["is not in the budget: write it with --write-budget"]
    values: dict[str, Any] = asdict(limits)
    return [
        f"takes {getattr(row.report, name)} {word}, the budget is {values[name]}"
        for name, word in (
            ("registers", "registers"),
            ("shared", "bytes of shared memory"),
            ("spilled", "spilled bytes"),
        )
        if getattr(row.report, name) > values[name]
    ]


def release(version: str) -> str:
    """3.7 of 3.7.1."""
    return ".".join(version.split(".")[:2])
