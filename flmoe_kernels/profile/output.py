"""Profiles as tables for people, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flmoe_kernels.core.files import is_writable, write_whole

from .figures import LengthPoint, Point, rate_text
from .profiles import Profile
from .request import BadRequest
from .stages import EITHER
from .timing import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

SCHEMA = "flmoe_kernels.profile/1"
WHOLE = "whole"
COLUMNS = (
    *("case", "contestant", "kind", "version", "dtype", "device", "stage", "pass", "seconds"),
    *("share", "calls", "low", "high", "confidence", "p20", "p80", "flop", "bytes"),
    *("flops_per_second", "bytes_per_second", "share_of_limit", "limit", "peak_bytes"),
    *("operators", "torch_operators", "launches", "waits", "reads"),
)


@dataclass(frozen=True)
class Files:
    """Where to write what; None for nothing."""

    trace: Path | None = None
    csv: Path | None = None
    json: Path | None = None
    plot: Path | None = None

    def require_writable(self) -> None:
        """
        Raises:
            BadRequest: a folder that is not there or not writable, or a picture in an unknown format.
        """
        for name in ("trace", "csv", "json", "plot"):
            path = getattr(self, name)
            if path is not None and not is_writable(path):
                raise BadRequest(f"{name}: {path} cannot be written: no such folder, or not yours")
        if self.plot is not None:
            _require_format(self.plot)

    def write_text(self, which: str, make: Callable[[], str]) -> None:
        path = getattr(self, which)
        if path is not None:
            text = make()
            write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))

    def write_plot(self, make: Callable[[], Figure]) -> None:
        if self.plot is not None:
            figure = make()
            write_whole(self.plot, lambda part: figure.savefig(part, dpi=120))


def _require_format(path: Path) -> None:
    """
    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from flmoe_kernels.explain.figures.canvas import make_figure

    known = make_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise BadRequest(f"plot: expected a name that ends in .png, .pdf or .svg, got {path}")


def as_json(
    profiles: Sequence[Profile],
    environment: dict[str, Any],
    ceilings: dict[str, Any],
    **more: Any,
) -> str:
    """{"schema", "environment", "ceilings", "profiles": [...]} and what else is given."""
    held = {
        "schema": SCHEMA,
        "environment": environment,
        "ceilings": ceilings,
        "profiles": [profile.as_dict() for profile in profiles],
        **more,
    }
    return json.dumps(held, indent=2, allow_nan=False) + "\n"


def as_csv(profiles: Sequence[Profile]) -> str:
    """One row for each stage, and before them one named "whole" with all that is known of the call.

    Seconds of the whole are the untraced median; those of a stage are from the profiled calls, which the profiler
    makes slower. Empty where a column says nothing of a row.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for profile in profiles:
        who = {
            "case": profile.what,
            "contestant": profile.contestant,
            "kind": profile.kind,
            "version": profile.version,
            "dtype": profile.dtype,
            "device": profile.device,
        }
        writer.writerow(who | _whole(profile))
        for row in profile.breakdown.stages:
            stage = {"stage": row.name, "pass": row.phase, "seconds": row.seconds}
            writer.writerow(who | stage | {"share": row.share, "calls": row.calls})
    return buffer.getvalue()


def _whole(profile: Profile) -> dict[str, Any]:
    spread, found = profile.spread, profile.breakdown
    return {
        "stage": WHOLE,
        "pass": EITHER,
        "seconds": spread.median,
        "share": 1.0,
        "calls": 1.0,
        "low": spread.low,
        "high": spread.high,
        "confidence": spread.confidence,
        "p20": spread.p20,
        "p80": spread.p80,
        "flop": profile.flop,
        "bytes": profile.bytes,
        "flops_per_second": profile.flops_per_second,
        "bytes_per_second": profile.bytes_per_second,
        "share_of_limit": profile.share,
        "limit": profile.limit,
        "peak_bytes": profile.peak_bytes,
        "operators": found.operators,
        "torch_operators": found.torch_operators,
        "launches": found.launches,
        "waits": found.waits,
        "reads": found.reads,
    }


def lengths_csv(points: Sequence[LengthPoint]) -> str:
    buffer = io.StringIO()
    names = [field.name for field in dataclasses.fields(LengthPoint)]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(point) for point in points)
    return buffer.getvalue()


def points_of(profiles: Sequence[Profile]) -> list[Point]:
    """For the roofline."""
    return [
        Point(
            label=f"{profile.what}, {profile.contestant}",
            flop=profile.flop,
            bytes=profile.bytes,
            seconds=profile.spread.median,
            low=profile.spread.low,
            high=profile.spread.high,
            ours=profile.kind == "ours",
        )
        for profile in profiles
    ]


def tables(profiles: Sequence[Profile]) -> Iterator[RenderableType]:
    """The measures of all profiles side by side, then the stages of each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for what in dict.fromkeys(profile.what for profile in profiles):
        group = [profile for profile in profiles if profile.what == what]
        # Not the table's own title, which would be wrapped to the table's width.
        yield Text(what, style="bold")
        table = Table("", box=box.SIMPLE_HEAD)
        for profile in group:
            table.add_column(Text(f"{profile.contestant}\n{profile.kind}, {profile.version}"))
        cells = [list(_measures(profile)) for profile in group]
        for rows in zip(*cells, strict=True):
            table.add_row(rows[0][0], *(Text(value) for _, value in rows))
        yield table
        for profile in group:
            yield Text(f"stages of a profiled call of {profile.contestant}", style="bold")
            yield _stage_table(profile)


def _measures(profile: Profile) -> Iterator[tuple[str, str]]:
    spread, found = profile.spread, profile.breakdown
    yield "time, median", f"{_time(spread.median)} ({_interval(spread)})"
    yield "most calls, p20-p80", f"{_time(spread.p20)} - {_time(spread.p80)}"
    ratio = profile.ratio
    yield (
        "slower than the first",
        "-" if ratio is None else f"{ratio[0]:.2f}x ({ratio[1]:.2f} - {ratio[2]:.2f})",
    )
    yield "rate", f"{rate_text(profile.flops_per_second)}FLOP/s"
    yield "  of matmul", f"{_share(profile.flops_per_second, profile.matmul)}FLOP/s"
    yield "traffic", f"{rate_text(profile.bytes_per_second)}B/s"
    yield "  of copy", f"{_share(profile.bytes_per_second, profile.copy)}B/s"
    yield "share of the limit", f"{profile.share:.1%} ({profile.limit})"
    peak = profile.peak_bytes
    yield "peak memory", "-" if peak is None else f"{peak / 2**20:.1f} MiB"
    yield "operators", f"{found.operators:g} of flmoe, {found.torch_operators:g} of torch"
    yield "kernel launches", _number(found.launches)
    yield "host waits", _number(found.waits)
    yield "values read by the host", _number(found.reads)
    for number, run in enumerate(profile.runs if len(profile.runs) > 1 else ()):
        yield f"run {number + 1}", f"{_time(run.median)} ({_interval(run)})"
    if len(profile.runs) > 1:
        yield "runs agree", "yes" if profile.agrees else "NO: something changed in between"


def _stage_table(profile: Profile) -> RenderableType:
    from rich import box
    from rich.table import Table

    found = profile.breakdown
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("stage", "pass"):
        table.add_column(name)
    for name in ("time", "share", "calls"):
        table.add_column(name, justify="right")
    for row in found.stages:
        calls = f"{row.calls:g}" if row.calls else "-"
        table.add_row(row.name, row.phase, _time(row.seconds), f"{row.share:.1%}", calls)
    slower = found.whole / profile.spread.median
    table.add_section()
    table.add_row(f"whole, {slower:.2f}x the median", "", _time(found.whole), "100.0%", "1")
    return table


def length_table(points: Sequence[LengthPoint]) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("tokens", box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(point.contestant for point in points))
    for name in names:
        table.add_column(Text(name))
    found = {(point.length, point.contestant): point for point in points}
    for length in sorted({point.length for point in points}):
        cells = [Text(_length_cell(found.get((length, name)))) for name in names]
        table.add_row(str(length), *cells)
    return table


def _length_cell(point: LengthPoint | None) -> str:
    if point is None:
        return "-"
    if point.seconds is None:
        return point.why_not
    peak = "" if point.peak_bytes is None else f", {point.peak_bytes / 2**20:.1f} MiB"
    return _time(point.seconds) + peak


def _interval(spread: Spread) -> str:
    return f"{_time(spread.low)} - {_time(spread.high)} at {spread.confidence:.0%}"


def _share(value: float, limit: float) -> str:
    return f"{value / limit:.1%} of {rate_text(limit)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _time(seconds: float) -> str:
    # Three digits round 0.9995 ms up to the next unit.
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 999.5 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} us"
