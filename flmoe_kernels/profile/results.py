"""The file that `bench --json` writes and `bench compare` reads: runs, each with its environment and rows.

    {"schema": "flmoe_kernels.bench/1",
     "runs": [{"environment": {...}, "rows": [{"case": ..., "contestant": ..., ...}, ...]}, ...]}

Several runs in one file are repetitions of one thing (`--append`): base and head in turn, for example.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flmoe_kernels.core.files import write_whole

from .paired import Blocks, Paired, Seconds

SCHEMA = "flmoe_kernels.bench/1"


class ResultError(ValueError):
    """A file is no result of bench; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Row:
    """What one contestant took at one case.

    Attributes:
        p50, low, high: seconds: the median and the interval in which it lies with 95% confidence.
        p20, p80: seconds, of single rounds.
        clock: "processor", "wall" or "device".
        against: the contestant that took turns with it, or "".
        ratio, ratio_low, ratio_high: seconds of this one over those of `against`, with its interval.
    """

    case: str
    contestant: str
    p50: float
    low: float
    high: float
    p20: float
    p80: float
    rounds: int
    threads: int
    clock: str
    against: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Run:
    """One run.

    gate: what became of floors, where they were asked about. details, ceilings: as `suite` has them.
    targets: what `suite` says of each, where it made the run.
    """

    environment: dict[str, Any]
    rows: list[Row]
    gate: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, Any] | None = None
    targets: list[dict[str, Any]] = field(default_factory=list)


def row_of(case: str, name: str, threads: int, blocks: Blocks) -> Row:
    """One contestant's seconds."""
    return Row(
        case=case,
        contestant=name,
        **dataclasses.asdict(blocks.of(name)),
        rounds=blocks.rounds,
        threads=threads,
        clock=blocks.clock,
    )


def rows_of(case: str, ours: str, peer: str, threads: int, paired: Paired) -> list[Row]:
    """The two rows of a comparison; the peer's carries the ratio."""

    def row(name: str, seconds: Seconds, **ratio: Any) -> Row:
        return Row(
            case=case,
            contestant=name,
            **dataclasses.asdict(seconds),
            rounds=paired.rounds,
            threads=threads,
            clock=paired.clock,
            **ratio,
        )

    bounds = {"ratio": paired.ratio, "ratio_low": paired.low, "ratio_high": paired.high}
    return [row(ours, paired.ours), row(peer, paired.peer, against=ours, **bounds)]


def save_run(path: Path, run: Run, append: bool = False) -> None:
    """Write a file of one run, or add the run to those that it has."""
    runs = load_runs(path) if append and path.exists() else []
    content = {"schema": SCHEMA, "runs": [dataclasses.asdict(r) for r in [*runs, run]]}
    save_json(path, content)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole, in a folder that need not be there yet.

    Raises:
        ValueError: NaN or infinity among the values, which JSON cannot hold.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, text, make_folder=True)


def load_runs(path: Path) -> list[Run]:
    """The runs of a file.

    Raises:
        ResultError: no such file, no JSON, another schema, or rows that lack something.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ResultError(f"{path}: schema: expected {SCHEMA!r}, got {found!r}")
    try:
        runs = [
            Run(
                run["environment"],
                [Row(**row) for row in run["rows"]],
                run.get("gate", []),
                run.get("details", []),
                run.get("ceilings"),
                run.get("targets", []),
            )
            for run in content["runs"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path}: a run or row of it is incomplete: {error}") from error
    if not runs:
        raise ResultError(f"{path}: runs: expected one at least")
    return runs
