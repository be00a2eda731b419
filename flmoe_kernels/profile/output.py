"""Output of the command `profile`: tables, JSON and figures, written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flmoe_kernels.core.files import unwritable_reason, write_whole

from .ceilings import Ceilings
from .profiles import Profile
from .registry import OURS
from .request import BadRequest
from .stages import Breakdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

SCHEMA = "flmoe_kernels.profile/3"
MARKERS = "osD^v<>pPX*h"
STYLES = ("solid", "dashed", "dashdot", "dotted")
_MARGIN = 4.0  # factor by which the axes extend beyond the points


@dataclass(frozen=True)
class Files:
    """Output paths; None for files that are not written."""

    trace: Path | None = None
    json: Path | None = None
    plot: Path | None = None

    def require_writable(self) -> None:
        """Check the paths.

        Raises:
            BadRequest: a file cannot be written, or the format of the plot is unknown.
            ModuleNotFoundError: a plot is requested and matplotlib is not installed.
        """
        for name in ("trace", "json", "plot"):
            path = getattr(self, name)
            if path is not None and (reason := unwritable_reason(path)):
                raise BadRequest(f"{name}: {path}: {reason}")
        if self.plot is not None:
            from flmoe_kernels.core.figures import make_figure

            known = make_figure(1, 1).canvas.get_supported_filetypes()
            if self._plot_format() not in known:
                raise BadRequest(
                    f"plot: expected a file name with .png, .pdf or .svg, got {self.plot}"
                )

    def write_json(self, make: Callable[[], str]) -> None:
        if self.json is not None:
            write_whole(self.json, make())

    def write_plot(self, make: Callable[[], Figure]) -> None:
        if self.plot is not None:
            save = partial(make().savefig, format=self._plot_format(), dpi=120)
            write_whole(self.plot, save)

    def _plot_format(self) -> str:
        return "" if self.plot is None else self.plot.suffix.removeprefix(".").lower()


def as_json(environment: Mapping[str, Any], profiles: Sequence[Profile] = (), **more: Any) -> str:
    """Format {"schema", "environment", "profiles": [...]} and further entries as JSON."""
    held = {
        "schema": SCHEMA,
        "environment": environment,
        "profiles": [profile.as_dict() for profile in profiles],
        **more,
    }
    return json.dumps(held, indent=2, allow_nan=False) + "\n"


def tables(profiles: Sequence[Profile]) -> Iterator[RenderableType]:
    """Yield a table of all profiles side by side, then a table of the stages of each profile."""
    from rich.text import Text

    for what in dict.fromkeys(profile.subject.what for profile in profiles):
        group = [profile for profile in profiles if profile.subject.what == what]
        # Printed as text, because a title of the table would be wrapped to the table's width.
        yield Text(what, style="bold")
        columns = [list(_measures(profile.as_dict())) for profile in group]
        heads = [f"{p.subject.contestant}\n{p.subject.kind}, {p.subject.version}" for p in group]
        rows = [
            (cells[0][0], *(value for _, value in cells)) for cells in zip(*columns, strict=True)
        ]
        yield _table(("", *heads), rows)
        for profile in group:
            name = profile.subject.contestant
            yield Text(f"stages of a profiled call of {name}", style="bold")
            yield _stage_table(profile.breakdown, profile.spread.median)
        for profile in group:
            yield from (Text(f"{profile.subject.contestant}: {note}") for note in profile.notes)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: int = 99) -> Any:
    """Make a table; right: the first column that is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if place >= right else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _measures(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    spread, ratio, counts = facts["spread"], facts["ratio"], facts["breakdown"]
    low, high = _time(spread["low"]), _time(spread["high"])
    interval = f"{low} - {high} at {spread['confidence']:.0%}"
    if spread["rounds"] == 1:
        interval = "a single call"
    yield "time, median", f"{_time(spread['median'])} ({interval})"
    yield "most calls, p20-p80", f"{_time(spread['p20'])} - {_time(spread['p80'])}"
    yield (
        "slower than the first",
        "-" if ratio is None else "{median:.2f}x ({low:.2f} - {high:.2f})".format(**ratio),
    )
    for name, key, ceiling, unit in (
        ("rate", "flops_per_second", "matmul", "FLOP/s"),
        ("traffic", "bytes_per_second", "copy", "B/s"),
    ):
        value, limit = facts[key], facts[ceiling]
        yield name, f"{rate_text(value)}{unit}"
        yield f"  of {ceiling}", f"{value / limit:.1%} of {rate_text(limit)}{unit}"
    yield "share of the limit", f"{facts['share_of_limit']:.1%} ({facts['limit']})"
    peak = facts["peak_bytes"]
    yield "peak memory", "-" if peak is None else f"{peak / 2**20:.1f} MiB"
    yield "kernel launches", _number(counts["launches"])
    yield "host waits", _number(counts["waits"])


def _stage_table(breakdown: Breakdown, median: float) -> RenderableType:
    rows = [
        (row.name, _time(row.seconds), f"{row.share:.1%}", _number(row.calls or None))
        for row in breakdown.stages
    ]
    slower = breakdown.whole / median
    rows.append((f"whole, {slower:.2f}x the median", _time(breakdown.whole), "100.0%", "1"))
    return _table(("stage", "time", "share", "calls"), rows, right=1)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _time(seconds: float) -> str:
    # With three digits, 0.9995 ms rounds up to the next unit.
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 999.5 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} us"


def roofline_figure(profiles: Sequence[Profile], ceilings: Ceilings, *, title: str = "") -> Figure:
    """Plot FLOP/s over FLOP per byte, both logarithmic; the distance below the line is the possible speed-up.

    Markers of this package are filled, those of peers are open. Every contestant has its own marker, and every
    dtype's ceiling its own line style. Bars are the interval of the median, mostly smaller than the marker.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from flmoe_kernels.core.figures import make_figure, plain

    figure = make_figure(8.5, 5.5)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    copy = ceilings.bytes_per_second
    costs = [profile.subject.cost for profile in profiles]
    places = [cost.flop / cost.bytes for cost in costs]
    places += [top / copy for top in ceilings.flops.values()]
    x = np.geomspace(min(places) / _MARGIN, max(places) * _MARGIN, 200)
    for number, (dtype, top) in enumerate(ceilings.flops.items()):
        axes.plot(
            x,
            np.minimum(top, x * copy),
            color="black",
            ls=STYLES[number % len(STYLES)],
            label=f"{dtype}: matmul {rate_text(top)}FLOP/s, copy {rate_text(copy)}B/s",
        )
    for number, profile in enumerate(profiles):
        label = plain(f"{profile.subject.what}, {profile.subject.contestant}")
        _draw(axes, profile, MARKERS[number % len(MARKERS)], label)
    axes.set_xlabel("FLOP per byte of inputs and outputs")
    axes.set_ylabel("FLOP/s")
    axes.grid(True, which="major", color="0.85", lw=0.6)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0.0, -0.12), frameon=False)
    if title:
        axes.set_title(plain(title), fontsize="medium")
    return figure


def _draw(axes: Axes, profile: Profile, marker: str, label: str) -> None:
    cost, spread = profile.subject.cost, profile.spread
    low, rate, high = (cost.flop / each for each in (spread.high, spread.median, spread.low))
    axes.errorbar(
        [cost.flop / cost.bytes],
        [rate],
        yerr=[[rate - low], [high - rate]],
        color="black",
        marker=marker,
        markersize=8,
        mfc="black" if profile.subject.kind == OURS else "white",
        ls="none",
        capsize=3,
        label=f"{label}: {rate_text(rate)}FLOP/s",
        zorder=3,
    )


def rate_text(rate: float) -> str:
    """Format a rate with three digits and the prefix of a unit: 1.23e12 is "1.23 T"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g} {prefix}"
    return f"{rate:.3g} "
