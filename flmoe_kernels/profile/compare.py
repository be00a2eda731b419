"""Two results of bench side by side: before and after a change, two commits, two machines.

What counts is the ratio to the peer that ran beside it, which a slower machine or moment leaves as it was; or,
by choice, the time alone. A change is known to an interval: each run of a side gives a median and its interval,
runs of one side differ among themselves besides, and both count. It is a significant regression where even the
upper end of the interval is below `fail_below`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .allocator import DEFAULT
from .results import Row, Run

if TYPE_CHECKING:
    from rich.table import Table

BY = ("ratio", "time")
_Z = 1.96  # standard deviations to either side for 95%
_Key = tuple[str, str, str]  # case, contestant, against


@dataclass(frozen=True)
class Side:
    """One contestant in all runs of one result: seconds, and the ratio to its peer where it has one.

    low and high are the ends of a 95% interval.
    """

    seconds: float
    low: float
    high: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Change:
    """One comparison before and after.

    Attributes:
        ours, peer: contestants; peer is "" where a case was timed alone.
        speed: after over before: 2.0 is twice as fast, relative to the peer where `by` is "ratio".
        low, high: its 95% interval.
        regression: even `high` is below what was asked for.
    """

    case: str
    ours: str
    peer: str
    before: Side
    after: Side
    by: str
    speed: float
    low: float
    high: float
    regression: bool

    @property
    def verdict(self) -> str:
        if self.regression:
            return "SLOWER"
        if self.low > 1:
            return "faster"
        return "slower, no failure" if self.high < 1 else "same"


@dataclass(frozen=True)
class Comparison:
    """All changes; only_before and only_after name what one side alone has."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    before: dict[str, Any]
    after: dict[str, Any]
    runs: tuple[int, int]
    by: str
    fail_below: float

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.regression]

    def summary(self) -> str:
        """Where the two come from and what was found, in words."""
        lines = [
            f"before: {describe(self.before)}, {_runs(self.runs[0])}",
            f"after:  {describe(self.after)}, {_runs(self.runs[1])}",
        ]
        for words, names in (("before", self.only_before), ("after", self.only_after)):
            lines += [f"only {words}: {', '.join(names)}"] if names else []
        found = len(self.regressions)
        limit = f"surely below {self.fail_below:g} of the speed before, by {self.by}"
        lines.append(f"{found} of {len(self.changes)} {limit}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        for change, entry in zip(self.changes, content["changes"], strict=True):
            entry["verdict"] = change.verdict
        return content


def compare(
    before: Sequence[Run], after: Sequence[Run], *, by: str = "ratio", fail_below: float = 0.9
) -> Comparison:
    """Compare the runs of two results.

    Args:
        by: "ratio" (of rows that have no peer: the time) or "time".
        fail_below: of the speed before.

    Raises:
        ValueError: nothing is in both, or fail_below is not above 0.
    """
    if not fail_below > 0:
        raise ValueError(f"fail_below: expected a number above 0, got {fail_below}")
    old, new = _by_key(before), _by_key(after)
    both = [key for key in old if key in new and _counts(key, old)]
    if not both:
        raise ValueError("the two results have no case and contestants in common")
    return Comparison(
        changes=[_change(key, old, new, by, fail_below) for key in both],
        only_before=[_words(key) for key in old if key not in new and _counts(key, old)],
        only_after=[_words(key) for key in new if key not in old and _counts(key, new)],
        before=before[-1].environment,
        after=after[-1].environment,
        runs=(len(before), len(after)),
        by=by,
        fail_below=fail_below,
    )


def _by_key(runs: Sequence[Run]) -> dict[_Key, list[Row]]:
    found: dict[_Key, list[Row]] = {}
    for run in runs:
        for row in run.rows:
            found.setdefault((row.case, row.contestant, row.against), []).append(row)
    return found


def _counts(key: _Key, rows: dict[_Key, list[Row]]) -> bool:
    """A comparison with a peer; or a contestant alone, if none was timed beside it."""
    case, contestant, against = key
    return bool(against) or not any(k[0] == case and k[2] == contestant for k in rows)


def _words(key: _Key) -> str:
    case, contestant, against = key
    return f"{case} ({against} vs {contestant})" if against else f"{case} ({contestant})"


def _change(
    key: _Key, old: dict[_Key, list[Row]], new: dict[_Key, list[Row]], by: str, fail_below: float
) -> Change:
    case, contestant, against = key
    ours, peer = (against, contestant) if against else (contestant, "")
    before, after = _side(old, case, ours, peer), _side(new, case, ours, peer)
    if by == "ratio" and before.ratio is not None and after.ratio is not None:
        speed, low, high = _quotient(_ratio_of(after), _ratio_of(before))
    else:
        by = "time"
        speed, low, high = _quotient(
            (before.seconds, before.low, before.high), (after.seconds, after.low, after.high)
        )
    return Change(case, ours, peer, before, after, by, speed, low, high, high < fail_below)


def _ratio_of(side: Side) -> tuple[float, float, float]:
    assert side.ratio is not None
    assert side.ratio_low is not None
    assert side.ratio_high is not None
    return side.ratio, side.ratio_low, side.ratio_high


def _side(rows: dict[_Key, list[Row]], case: str, ours: str, peer: str) -> Side:
    seconds = _pooled([(row.p50, row.low, row.high) for row in rows[case, ours, ""]])
    ratios = [
        (row.ratio, row.ratio_low, row.ratio_high)
        for row in rows.get((case, peer, ours), [])
        if row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None
    ]
    return Side(*seconds, *(_pooled(ratios) if ratios else ()))


def _pooled(runs: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """One value with its interval from those of repeated runs.

    On a logarithmic scale: the mean of the runs; its variance is that within runs, from their intervals, and that
    among them.
    """
    logs = [math.log(value) for value, _, _ in runs]
    within = [(math.log(high / low) / (2 * _Z)) ** 2 for _, low, high in runs]
    variance = sum(within) / len(runs) ** 2
    if len(runs) > 1:
        variance += statistics.variance(logs) / len(runs)
    center, half = statistics.fmean(logs), _Z * math.sqrt(variance)
    return math.exp(center), math.exp(center - half), math.exp(center + half)


def _quotient(
    over: tuple[float, float, float], under: tuple[float, float, float]
) -> tuple[float, float, float]:
    """over / under with the interval that two independent intervals give."""
    half = math.hypot(*(math.log(high / low) / 2 for _, low, high in (over, under)))
    value = over[0] / under[0]
    return value, value * math.exp(-half), value * math.exp(half)


def describe(environment: dict[str, Any]) -> str:
    """A machine and a commit in a few words."""
    keys = {"device": "", "instruction_set": "", "torch": "torch ", "commit": "commit "}
    words = [f"{word}{environment[key]}" for key, word in keys.items() if environment.get(key)]
    # Ratios of the gate and of bench may differ by it.
    if environment.get("allocator", DEFAULT) != DEFAULT:
        words.append(f"an allocator that {environment['allocator']}")
    return ", ".join(words) or "unknown"


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


HEADINGS = ("case", "peer", "before", "after", "before vs peer", "after vs peer", "speed", "")


def cells(change: Change) -> tuple[str, ...]:
    """A change as text, a cell for each of HEADINGS: medians with the ends of their intervals."""
    return (
        change.case,
        change.peer or "-",
        _milliseconds(change.before),
        _milliseconds(change.after),
        _times(change.before),
        _times(change.after),
        f"{change.speed:.2f}x ({change.low:.2f} to {change.high:.2f})",
        change.verdict,
    )


def _milliseconds(side: Side) -> str:
    return f"{1e3 * side.seconds:.3g} ms ({1e3 * side.low:.3g} to {1e3 * side.high:.3g})"


def _times(side: Side) -> str:
    if side.ratio is None:
        return "-"
    return f"{side.ratio:.2f}x ({side.ratio_low:.2f} to {side.ratio_high:.2f})"


def table(comparison: Comparison) -> Table:
    """For a terminal."""
    from rich.table import Table

    found = Table(*HEADINGS)
    for change in comparison.changes:
        style = "red" if change.regression else None
        found.add_row(*cells(change), style=style)
    return found


def markdown(comparison: Comparison) -> str:
    """For a page, a pull request, or a job's summary."""
    lines = [_line(HEADINGS), _line("---" for _ in HEADINGS)]
    for change in comparison.changes:
        mark = "**" if change.regression else ""
        lines.append(_line(f"{mark}{cell}{mark}" if cell else "" for cell in cells(change)))
    notes = "\n".join(f"- {line}" for line in comparison.summary().splitlines())
    return "\n".join(lines) + f"\n\n{notes}\n"


def _line(texts: Any) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
