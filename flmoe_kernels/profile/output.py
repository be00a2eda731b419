"""Tables of the command `profile`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .ceilings import Ceilings
from .profiles import Profile

if TYPE_CHECKING:
    from rich.console import RenderableType


def tables(profiles: Sequence[Profile]) -> Iterator[RenderableType]:
    """Yield a table of all profiles side by side, then a table of the stages of each profile."""
    from rich.text import Text

    for what in dict.fromkeys(profile.case.name for profile in profiles):
        group = [profile for profile in profiles if profile.case.name == what]
        # Printed as text, because a title of the table would be wrapped to the table's width.
        yield Text(what, style="bold")
        facts = [profile.as_dict() for profile in group]
        columns = [list(_measures(each)) for each in facts]
        heads = [f"{p.contestant.name}\n{p.contestant.kind}, {p.contestant.version}" for p in group]
        rows = [
            (cells[0][0], *(value for _, value in cells)) for cells in zip(*columns, strict=True)
        ]
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        yield _table(("", *heads), rows)
        for each in facts:
            yield Text(f"stages of a profiled call of {each['contestant']}", style="bold")
            yield _table(STAGE_HEADS, list(stage_rows(each)), right=1)
        for profile in group:
            yield from (Text(f"{profile.contestant.name}: {note}") for note in profile.notes)


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
    yield "single calls, p20-p80", f"{_time(spread['p20'])} - {_time(spread['p80'])}"
    yield (
        "time / first",
        "-" if ratio is None else "{median:.2f}x ({low:.2f} - {high:.2f})".format(**ratio),
    )
    yield "share of the limit", f"{facts['share_of_limit']:.1%} ({facts['limit']})"
    peak = facts["peak_bytes"]
    yield "peak memory", "-" if peak is None else f"{peak / 2**20:.1f} MiB"
    yield "kernel launches", _number(counts["launches"])
    yield "host waits", _number(counts["waits"])


STAGE_HEADS = ("stage", "time", "share", "calls", "achieved", "of attainable", "bound by")


def stage_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a profile's stages, then those of the whole call."""
    for stage in facts["breakdown"]["stages"]:
        yield _stage_row(stage, _number(stage["calls"] or None))
    whole, median = facts["breakdown"]["whole"], facts["spread"]["median"]
    share = facts["least"] / whole
    total = {**facts, "name": f"whole, {whole / median:.2f}x the median", "seconds": whole}
    yield _stage_row({**total, "share": 1.0, "share_of_limit": share}, "1")


def _stage_row(stage: Mapping[str, Any], calls: str) -> tuple[str, ...]:
    seconds, bound = stage["seconds"], stage["bound"]
    cells = (stage["name"], _time(seconds), f"{stage['share']:.1%}", calls)
    if not stage["bytes"]:
        return (*cells, "-", "-", bound)
    key, unit = ("bytes", "B/s") if bound == "memory" or not stage["flop"] else ("flop", "FLOP/s")
    rate = rate_text(stage[key] / seconds) + unit
    return (*cells, rate, f"{stage['share_of_limit']:.0%}", bound)


def attainable_text(ceilings: Ceilings) -> str:
    """A line that says what the rates are compared with."""
    rates = [f"{rate_text(x)}FLOP/s in {dtype}" for dtype, x in ceilings.flops.items()]
    copy = f"{rate_text(ceilings.bytes_per_second)}B/s"
    return (
        f"attainable, measured now on this machine: matrix product {', '.join(rates)}; copy {copy}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _time(seconds: float) -> str:
    # With three digits, 0.9995 ms rounds up to the next unit.
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 999.5 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} us"


def rate_text(rate: float) -> str:
    """Format a rate with three digits and the prefix of a unit: 1.23e12 is "1.23 T"."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g} {prefix}"
    return f"{rate:.3g} "
